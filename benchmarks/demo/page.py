"""The demo's page: what was found, how, and how to do the same with another model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.demo import figures as draw
from benchmarks.demo.findings import (
    SHARPNESS,
    Results,
    flatter_went_with,
    interpolation_note,
    mean,
    run_table,
    training_note,
    values,
    verdict,
)
from benchmarks.demo.plan import CLEAN, DATA, METHODS, NOISY, TEST, Plan
from benchmarks.paired import difference
from sam_optim.core.text import signed, spread
from sam_optim.report.page import (
    Child,
    Markup,
    bullets,
    code_block,
    definitions,
    element,
    folded,
    html_page,
    html_table,
    paragraph,
    section,
)

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
    return html_page(
        "SAM, ASAM and SGD on noisy digits",
        _header(plan, results),
        _accuracy(results, final),
        section("Training", paragraph(training_note(final)), draw.training_curves(final), identifier="training"),
        _sharpness(plan, results, final),
        _flat_and_better(results, final),
        _landscapes(final),
        _caveats(plan, results),
        _settings(plan, results),
        _your_model(),
        data=dict(results) | {"runs": list(final.values())},
    )


def _header(plan: Plan, results: Mapping[str, Any]) -> Markup:
    gain, rest = results["differences"][0], _against_best_control(results)
    tau = _tau(results, "sam_ball", NOISY)
    warning = "A quick run, to see that everything works: the numbers mean nothing. " if results["quick"] else ""
    lead = (
        f"{warning}A small convolutional network, {100 * plan.label_noise:.0f} % of its training labels replaced at "
        f"random, clean test labels. {len(METHODS)} ways to train it from the same {plan.num_seeds} initialisations; "
        "settings chosen on a validation split, which shares no image with the test data."
    )
    items: list[tuple[Child, Child]] = [
        (f"points of test accuracy: SAM minus SGD; {_support(gain)}", signed(gain["mean"], 1)),
        (f"points: {rest['name']}; {_support(rest)}", signed(rest["mean"], 1)),
        (
            f"Kendall's τ of sharpness in SAM's ball on the noisy training labels with test error, {tau['n']} runs; "
            f"95 % interval {_interval(tau)}",
            signed(tau["tau"]),
        ),
    ]
    return element(
        "header",
        paragraph("sam_optim demo", kind="overline"),
        element("h1", results["headline"]),
        paragraph(lead, kind="lead"),
        definitions(items, kind="facts"),
    )


def _accuracy(results: Mapping[str, Any], final: Results) -> Markup:
    rows = [
        [d["name"], signed(d["mean"], 1), _interval(d, 1), f"{d['wins']} of {d['n']}"] for d in results["differences"]
    ]
    caption = "Differences by seed, in points of test accuracy, with the 95 % t-interval of their mean."
    sgd_learned, sam_learned = (mean(values(final, m, "memorised", scale=100)) for m in ("sgd", "sam"))
    accuracy = results["accuracy"]
    ways = (("sgd", "best"), ("sgd_decay", "last"), ("sgd_decay", "best"), ("sam", "last"), ("sam", "best"))
    early, decay, both, sam, stopped = (
        signed(difference(accuracy[method][when], accuracy["sgd"]["last"]).mean, 1) for method, when in ways
    )
    return section(
        "Accuracy on clean test labels",
        paragraph(
            f"SGD ends up saying {sgd_learned:.0f} % of the wrong labels it was shown, SAM {sam_learned:.0f} %. "
            f"Against SGD's last epoch, stopping SGD early is worth {early} points, tuned weight decay {decay}, both "
            f"together {both}; SAM {sam}, stopped early {stopped}. Compare SAM with these controls, not "
            "with plain SGD: the table of differences does."
        ),
        draw.accuracy_table(final),
        draw.accuracy_dots(final),
        html_table(["", "difference", "95 % interval", "seeds where positive"], rows, caption),
        identifier="accuracy",
    )


def _sharpness(plan: Plan, results: Mapping[str, Any], final: Results) -> Markup:
    return section(
        "Sharpness, and on which data",
        paragraph(
            "Every network, SGD's too, is measured in the neighbourhoods that SAM and ASAM searched: the highest rise "
            f"of the loss within SAM's ball (rho = {results['chosen']['sam']:g}) and within ASAM's (rho = "
            f"{results['chosen']['asam']:g}, scaled by each weight), for batches of {plan.batch_size}. Beside them the "
            "Hessian and the gradient regret, and the loss, without which none of these numbers can be read."
        ),
        paragraph(interpolation_note(final), kind="aside"),
        *(draw.sharpness_table(final, data) for data in DATA),
        draw.sharpness_dots(final, NOISY),
        folded("The same on clean labels and on test data", *(draw.sharpness_dots(final, d) for d in (CLEAN, TEST))),
        identifier="sharpness",
    )


def _flat_and_better(results: Mapping[str, Any], final: Results) -> Markup:
    sharpness = [c for c in results["correlations"] if c["measure"] in SHARPNESS]
    groups = {data: [c for c in sharpness if c["data"] == data] for data in DATA}
    tau = _tau(results, "sam_ball", NOISY)
    return section(
        "Did flatter go with better?",
        paragraph(element("strong", verdict(sharpness))),
        paragraph(
            f"Over all {tau['n']} runs, counting a direction only where the 95 % interval of Kendall's τ leaves out 0:"
        ),
        bullets([f"On {name}: {flatter_went_with(group)}." for name, group in groups.items()]),
        paragraph(
            f"The loss on the noisy training labels alone has {draw.tau_text(_tau(results, 'loss', NOISY))}, on the "
            f"test data {draw.tau_text(_tau(results, 'loss', TEST))}. A sharpness measured on test data has seen the "
            "test labels: it explains, it does not predict. And five methods are no random sample of networks: SAM and "
            "ASAM lower these numbers by construction, so part of any such correlation is the choice of methods."
        ),
        draw.key(),
        draw.correlation_scatters(run_table(final), results["correlations"], "sam_ball"),
        draw.correlation_scatters(run_table(final), results["correlations"], "lambda_max"),
        draw.correlation_intervals(results["correlations"]),
        identifier="correlation",
    )


def _landscapes(final: Results) -> Markup:
    test = draw.planes(final, TEST)
    return section(
        "The loss around the weights",
        paragraph(
            "Pictures of one or two directions out of tens of thousands. They show the shape near each result, not a "
            "reason for it; the intervals above are the evidence."
        ),
        draw.slices(final),
        draw.planes(final, NOISY),
        folded("The same planes on test data", test) if test else None,
        identifier="landscapes",
    )


def _caveats(plan: Plan, results: Mapping[str, Any]) -> Markup:
    budget = len(next(iter(plan.grids.values()))) * plan.num_tuning_seeds
    return section(
        "What this does not show",
        bullets(
            [
                f"One small network on one small data set (1,797 images of 8 × 8 pixels), {plan.num_seeds} seeds, one "
                "kind of label noise. The ranking may be another one elsewhere.",
                f"Weight decay, SAM's rho and ASAM's rho were each chosen from {budget} trainings, by validation "
                "accuracy at the last epoch, on seeds that are not reported. The validation labels are clean, which "
                "real noisy data do not offer; learning rate, momentum and epochs are the same for all, not tuned.",
                "SAM and ASAM take two passes for each step. SGD with twice the epochs has the same number of passes.",
                f"Sharpness is measured on {plan.num_measured} fixed examples of each data set. The ± are standard "
                "deviations over seeds; the measures' own standard errors are in the data inside this page's source.",
                "The interval of τ resamples runs as if they were independent; runs of one method are alike, so it is "
                "too narrow.",
                "Published studies find that sharpness often does not correlate with generalization, and sometimes the "
                "other way round (arXiv:2302.07011). One demo confirms or refutes nothing.",
            ]
        ),
        identifier="caveats",
    )


def _settings(plan: Plan, results: Mapping[str, Any]) -> Markup:
    rows = []
    for name, accuracies in results["tuning"].items():
        for value, accuracy in accuracies.items():
            mark = "chosen" if float(value) == results["chosen"][name] else ""
            cells = [METHODS[name].name, METHODS[name].tuned, f"{float(value):g}"]
            rows.append([*cells, spread([100 * v for v in accuracy], decimals=1), mark])
    best = [i for i, row in enumerate(rows) if row[-1]]
    settings = {
        "network": "3 convolutions (32, 64, 64 channels), ReLU, no normalisation, no dropout",
        "data": "scikit-learn digits: 898 training images, "
        f"{100 * plan.validation_fraction:.0f} % of them held out for validation, and 899 test images",
        "training": f"{plan.epochs} epochs, batches of {plan.batch_size}, learning rate {plan.lr:g}, "
        f"momentum {plan.momentum:g}",
        "label noise": f"{100 * plan.label_noise:.0f} % of the training labels drawn anew, uniformly from all ten",
        "sharpness": f"Auto-PGD, {plan.num_steps} steps from the weights, mean over batches of {plan.batch_size}",
        "trace": f"Hutchinson, {plan.num_probes} probes",
        "landscapes": f"{plan.points_1d} and {plan.points_2d} × {plan.points_2d} points; filter-normalised, no biases",
        "computing": f"{results['cpu_s']:.0f} CPU seconds for all runs, one thread each",
    }
    caption = "Validation accuracy at the last epoch in %, over the tuning seeds."
    return section(
        "Settings and versions",
        html_table(["method", "setting", "value", "validation", ""], rows, caption, best=best),
        definitions(list((settings | results["provenance"]).items()), kind="pairs"),
        identifier="settings",
    )


def _your_model() -> Markup:
    return section(
        "The same with your model",
        paragraph("Change one line of the training, then measure what it did:"),
        code_block(YOUR_MODEL),
        paragraph(
            "This page is the output of ",
            element("code", "make demo"),
            "; the numbers behind it are in ",
            element("code", "results.json"),
            " beside it.",
        ),
        identifier="your-model",
    )


def _interval(row: Mapping[str, Any], decimals: int = 2) -> str:
    return f"{signed(row['low'], decimals)} to {signed(row['high'], decimals)}"


def _support(row: Mapping[str, Any]) -> str:
    return f"95 % interval {_interval(row, 1)}, positive in {row['wins']} of {row['n']} seeds"


def _against_best_control(results: Mapping[str, Any]) -> Mapping[str, Any]:
    control = list(results["best_control"])
    return next(d for d in results["differences"] if d["ours"] == "sam" and [d["theirs"], d["when"]] == control)


def _tau(results: Mapping[str, Any], measure: str, data: str) -> Mapping[str, Any]:
    return next(c for c in results["correlations"] if c["measure"] == measure and c["data"] == data)
