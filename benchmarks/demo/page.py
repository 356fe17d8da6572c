"""The demo's page: results, method, and how to do the same with another model. Its words are in page.html."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.demo import figures, findings
from benchmarks.demo.findings import SHARPNESS, Results
from benchmarks.demo.plan import CLEAN, DATA, METHODS, NOISY, TEST, Plan
from benchmarks.paired import difference
from sam_optim.core.text import signed, spread
from sam_optim.report.page import Markup, definitions, html_page, html_table, render

YOUR_MODEL = """\
import torch
from sam_optim import SAM, Ball, Loss
from sam_optim import gradient_regret, hessian_eigenvalues, slice_2d, worst_case_sharpness
from sam_optim.report import results_page, write_page

optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9, module=model)

def closure():
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    return loss

for x, y in loader:
    optimizer.step(closure)  # runs the closure twice: at w and at the worst point nearby

# batches: a list, or a DataLoader without shuffling or augmentation
loss = Loss(model, criterion, batches)
write_page("report.html", results_page({
    "sharpness in my optimizer's ball": worst_case_sharpness(loss, optimizer.neighborhood),
    "sharpness in ASAM's ball": worst_case_sharpness(loss, Ball(1.0, adaptive=True)),
    "largest eigenvalue": hessian_eigenvalues(loss),
    "gradient regret": gradient_regret(loss),
    "landscape": slice_2d(loss),
}))
"""


def page(plan: Plan, results: Mapping[str, Any], final: Results) -> Markup:
    def tau(measure: str, data: str) -> Mapping[str, Any]:
        return next(c for c in results["correlations"] if c["measure"] == measure and c["data"] == data)

    def gain(method: str, when: str) -> str:
        """The gain over SGD's last epoch, in points."""
        accuracy = results["accuracy"]
        return signed(difference(accuracy[method][when], accuracy["sgd"]["last"]).mean, 1)

    sharpness = [c for c in results["correlations"] if c["measure"] in SHARPNESS]
    body = render(
        Path(__file__).with_name("page.html").read_text(encoding="utf-8"),
        draw=figures,
        findings=findings,
        final=final,
        plan=plan,
        results=results,
        methods=METHODS,
        noisy=NOISY,
        clean=CLEAN,
        test=TEST,
        tau=tau,
        gain=gain,
        whole="{:.0f}".format,
        facts=_facts(results, tau("sam_ball", NOISY)),
        differences=_differences(results),
        tuning=_tuning(results),
        sharpness={data: [c for c in sharpness if c["data"] == data] for data in DATA},
        verdict=findings.verdict(sharpness),
        your_model=YOUR_MODEL,
    )
    return html_page("SAM, ASAM and SGD on noisy digits", body, data=dict(results) | {"runs": list(final.values())})


def _facts(results: Mapping[str, Any], tau: Mapping[str, Any]) -> Markup:
    def support(row: Mapping[str, Any]) -> str:
        return f"95 % interval {_interval(row, 1)}, positive in {row['wins']} of {row['n']} seeds"

    control = list(results["best_control"])
    gain = results["differences"][0]
    rest = next(d for d in results["differences"] if d["ours"] == "sam" and [d["theirs"], d["when"]] == control)
    about_tau = f"Kendall's τ of sharpness in SAM's ball on the noisy training labels with test error, {tau['n']} runs"
    return definitions(
        [
            (f"points of test accuracy: SAM minus SGD; {support(gain)}", signed(gain["mean"], 1)),
            (f"points: {rest['name']}; {support(rest)}", signed(rest["mean"], 1)),
            (f"{about_tau}; 95 % interval {_interval(tau)}", signed(tau["tau"])),
        ],
        kind="facts",
    )


def _differences(results: Mapping[str, Any]) -> Markup:
    head = ["", "difference", "95 % interval", "seeds where positive"]
    rows = [
        [d["name"], signed(d["mean"], 1), _interval(d, 1), f"{d['wins']} of {d['n']}"] for d in results["differences"]
    ]
    return html_table(
        head, rows, "Differences by seed, in points of test accuracy, with the 95 % t-interval of their mean."
    )


def _tuning(results: Mapping[str, Any]) -> Markup:
    rows = []
    for name, accuracies in results["tuning"].items():
        for value, accuracy in accuracies.items():
            mark = "chosen" if float(value) == results["chosen"][name] else ""
            cells = [METHODS[name].name, METHODS[name].tuned, f"{float(value):g}"]
            rows.append([*cells, spread([100 * v for v in accuracy], decimals=1), mark])
    best = [i for i, row in enumerate(rows) if row[-1]]
    caption = "Validation accuracy at the last epoch in %, over the tuning seeds."
    return html_table(["method", "setting", "value", "validation", ""], rows, caption, best=best)


def _interval(row: Mapping[str, Any], decimals: int = 2) -> str:
    return f"{signed(row['low'], decimals)} to {signed(row['high'], decimals)}"
