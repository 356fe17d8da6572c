"""What the demo's numbers say: differences by seed with intervals, correlations, and the sentences that follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.demo.plan import DATA, MEASURES, METHODS, NOISY, TEST, Plan
from benchmarks.machine import versions
from benchmarks.paired import Difference, difference
from sam_optim.core.results import plain, provenance
from sam_optim.core.text import number, signed, spread, text_table
from sam_optim.statistics.kendall import correlate

NAN = float("nan")
Results = Mapping[str, Mapping[str, Any]]
SHARPNESS = tuple(name for name in MEASURES if name != "loss")
CONTROL_NAMES = {
    "sgd_long": "SGD with twice the epochs",
    "sgd_decay": "SGD with tuned weight decay",
    "sgd": "plain SGD",
}
# (method, which epoch): compared like with like, so SAM stops early, too, where the control does
CONTROLS = (("sgd_long", "last"), ("sgd_decay", "last"), ("sgd", "best"), ("sgd_decay", "best"))


def summary(plan: Plan, chosen: Mapping[str, float], tuning: Results, final: Results) -> dict[str, Any]:
    """Everything that the page and the terminal say, as strict JSON."""
    accuracy = {
        m: {when: values(final, m, when, "test_accuracy", scale=100) for when in ("last", "best")} for m in METHODS
    }
    results = {
        "accuracy": accuracy,
        "headline": headline(accuracy),
        "differences": differences(accuracy),
        "best_control": best_control(accuracy),
        "correlations": correlations(final),
        "chosen": dict(chosen),
        "tuning": tuning_table(plan, tuning),
        "terminal_table": text_table(*terminal_rows(final)),
        "plan": asdict(plan),
        "provenance": provenance() | versions("scikit-learn", "scipy"),
        "cpu_s": sum(run["cpu_s"] for run in (*tuning.values(), *final.values())),
    }
    return plain(results)


def values(final: Results, method: str, *path: str, scale: float = 1.0) -> list[float]:
    """One number for each seed; nan where the run failed."""
    numbers = []
    for run in final.values():
        if run["job"]["method"] == method:
            value: Any = run
            for key in path:
                value = value.get(key) if isinstance(value, Mapping) else None
            numbers.append(NAN if value is None else scale * value)
    return numbers


def tuning_table(plan: Plan, tuning: Results) -> dict[str, dict[float, list[float]]]:
    """method -> value -> validation accuracy at the last epoch, for each tuning seed; 0 where training diverged."""
    table: dict[str, dict[float, list[float]]] = {m: {value: [] for value in grid} for m, grid in plan.grids.items()}
    for run in tuning.values():
        job = run["job"]
        table[job["method"]][job[METHODS[job["method"]].tuned]].append(run["last"]["validation_accuracy"] or 0.0)
    return table


def differences(accuracy: Mapping[str, Mapping[str, list[float]]]) -> list[dict[str, Any]]:
    """SAM and ASAM against SGD and each control, at the same kind of epoch, in points (1 %) of test accuracy."""
    rows = []
    for ours in ("sam", "asam"):
        for theirs, when in (("sgd", "last"), *CONTROLS):
            stopped = ", both stopped early" if when == "best" else ""
            name = f"{METHODS[ours].name} minus {CONTROL_NAMES[theirs]}{stopped}"
            numbers = difference(accuracy[ours][when], accuracy[theirs][when])._asdict()
            rows.append({"name": name, "ours": ours, "theirs": theirs, "when": when} | numbers)
    return rows


def best_control(accuracy: Mapping[str, Mapping[str, list[float]]]) -> tuple[str, str]:
    """(method, which epoch) of the control with the highest mean test accuracy."""
    return max(CONTROLS, key=lambda control: mean(accuracy[control[0]][control[1]], empty=-math.inf))


def headline(accuracy: Mapping[str, Mapping[str, list[float]]]) -> str:
    gain = difference(accuracy["sam"]["last"], accuracy["sgd"]["last"])
    control, when = best_control(accuracy)
    rest, name = difference(accuracy["sam"][when], accuracy[control][when]), CONTROL_NAMES[control]
    first = {
        1: f"SAM is {gain.mean:.1f} percentage points more accurate than SGD on clean test digits",
        -1: f"SAM is {-gain.mean:.1f} percentage points less accurate than SGD on clean test digits",
        0: f"No difference is seen between SAM and SGD on clean test digits{interval(gain)}",
    }[sign(gain)]
    second = {
        1: f"SAM beats the best control, {name}, by {rest.mean:.1f} points",
        -1: f"the best control, {name}, beats SAM by {-rest.mean:.1f} points",
        0: f"no difference is seen between SAM and the best control, {name}{interval(rest)}",
    }[sign(rest)]
    joint = "and" if sign(gain) == sign(rest) else "but"
    return f"{first}, {joint} {'with early stopping for both, ' if when == 'best' else ''}{second}."


def interval(difference: Difference) -> str:
    """In brackets; nothing where there is none."""
    if math.isnan(difference.low):
        return ""
    return f" (95 % interval {signed(difference.low, 1)} to {signed(difference.high, 1)} points)"


def sign(difference: Difference) -> int:
    """+1 or -1 where the interval excludes 0, else 0."""
    if difference.low > 0:
        return 1
    return -1 if difference.high < 0 else 0


def run_table(final: Results) -> list[dict[str, Any]]:
    """One row for each run: test error in percent, and every measure on every data set as "data / measure"."""
    rows = []
    for run in final.values():
        accuracy = run["last"]["test_accuracy"]
        row = {
            "method": run["job"]["method"],
            "seed": run["job"]["seed"],
            "test_error": None if accuracy is None else 100 * (1 - accuracy),
        }
        for data in DATA:
            for measure in MEASURES:
                row[f"{data} / {measure}"] = run.get("measures", {}).get(data, {}).get(measure, {}).get("value")
        rows.append(row)
    return rows


def correlations(final: Results) -> list[dict[str, Any]]:
    """tau of every measure on every data set with the test error, over all runs and by factor."""
    rows = run_table(final)
    return [
        {"data": data, "measure": measure}
        | correlate(rows, f"{data} / {measure}", "test_error", factors=["method", "seed"]).to_dict()
        for data in DATA
        for measure in MEASURES
    ]


def directions(taus: Sequence[Mapping[str, Any]]) -> tuple[int, int, int]:
    """How many of these correlations say that flatter went with better, with worse, and how many leave it open."""
    better, worse = (sum(_excludes_zero(c, side) for c in taus) for side in (1, -1))
    return better, worse, len(taus) - better - worse


def verdict(taus: Sequence[Mapping[str, Any]]) -> str:
    """The answer of all sharpness measures on all data sets, and whether it holds where only chance differs."""
    better, worse, unclear = directions(taus)
    n = len(taus)
    if n in (better, worse):
        first = "Here it did" if better else "Here flatter went with worse"
        first += f", in all {n} combinations of a sharpness measure and a data set."
    else:
        first = (
            f"It depends on the measure and on the data: of {n} combinations of the two, flatter went with better in "
            f"{better} and with worse in {worse}; in {unclear} the interval includes 0."
        )
    between, within = (_mean_tau(taus, factor) for factor in ("method", "seed"))
    return (
        f"{first} Averaged over these combinations, τ is {signed(between)} among the five methods of one seed, and "
        f"{signed(within)} among the seeds of one method, which differ by chance alone."
    )


def flatter_went_with(taus: Sequence[Mapping[str, Any]]) -> str:
    names = ("flatter went with better", "flatter went with worse", "no clear direction")
    parts = [(count, name) for count, name in zip(directions(taus), names, strict=True) if count]
    return "; ".join(f"{name} for {count} of {len(taus)} measures" for count, name in parts)


def interpolation_note(final: Results) -> str:
    """Does a low training-set curvature mislead, as it does once SGD has memorized the noise?"""
    paths = {
        "loss": ("measures", NOISY, "loss", "value"),
        "curvature": ("measures", NOISY, "lambda_max", "value"),
        "adaptive": ("measures", NOISY, "asam_ball", "value"),
        "on test data": ("measures", TEST, "lambda_max", "value"),
        "accuracy": ("last", "test_accuracy"),
    }
    short, long = ({name: values(final, m, *path) for name, path in paths.items()} for m in ("sgd", "sgd_long"))
    before, after = (100 * mean(numbers["accuracy"]) for numbers in (short, long))
    change = {name: f"from {number(mean(short[name]))} to {number(mean(long[name]))}" for name in paths}
    curvature, accuracy = (difference(long[name], short[name]) for name in ("curvature", "accuracy"))
    lower = difference(short["curvature"], long["curvature"])
    numbers = (
        f"Doubling the epochs of SGD takes the loss on the noisy training labels {change['loss']}, the largest Hessian "
        f"eigenvalue there {change['curvature']} (lower in {lower.wins} of {lower.n} seeds) and "
        f"test accuracy from {before:.1f} to {after:.1f} %. On test data the eigenvalue goes {change['on test data']}."
    )
    flatter, better = -direction(curvature), direction(accuracy)
    if flatter and flatter == better:
        return f"{numbers} Here curvature and accuracy move together as flatness would predict."
    if not flatter:
        return f"{numbers} These seeds do not show whether the longer training is flatter by that eigenvalue."
    outcome = {1: "but more accurate", 0: "with no clear difference in accuracy", -1: "but less accurate"}
    if flatter < 0:
        return f"{numbers} By that eigenvalue the longer training is sharper, {outcome[better]}."
    adaptive = direction(difference(long["adaptive"], short["adaptive"]))
    other = (
        f" In ASAM's ball, where a large weight may move far, the sharpness of the same networks goes "
        f"{change['adaptive']}: which of the two is flatter depends on the ball."
    )
    return (
        f"{numbers} By that eigenvalue the longer training is flatter on its own labels, wrong ones included, "
        f"{outcome[better]}.{other if adaptive > 0 else ''}"
    )


def direction(difference: Difference) -> int:
    """As `sign`; where all pairs differ by the same, which leaves no interval, the sign of that."""
    if difference.n > 1 and math.isnan(difference.low):
        return (difference.mean > 0) - (difference.mean < 0)
    return sign(difference)


def training_note(final: Results) -> str:
    """Where SGD's test accuracy is highest, and what the rest of its training does."""
    test, train = (
        [100 * mean(column) for column in zip(*values_by_epoch(final, "sgd_long", name), strict=True)]
        for name in ("test_accuracy", "train_accuracy")
    )
    peak = max(range(len(test)), key=lambda epoch: mean(test[epoch : epoch + 1], empty=-math.inf))
    numbers = (
        f"Averaged over seeds, SGD's test accuracy peaks at {test[peak]:.1f} % after {peak + 1} epochs and is "
        f"{test[-1]:.1f} % after {len(test)}; the share of noisy labels that it predicts goes from "
        f"{train[peak]:.0f} to {train[-1]:.0f} %."
    )
    learns_noise = test[-1] < test[peak] - 2 and train[-1] > train[peak]
    return f"{numbers} What it learns after the peak is the noise." if learns_noise else numbers


def values_by_epoch(final: Results, method: str, curve: str) -> list[list[float]]:
    """One curve for each seed; nan after a run failed."""
    runs = [run["curves"][curve] for run in final.values() if run["job"]["method"] == method]
    return [[NAN if value is None else value for value in run] for run in runs]


def terminal_rows(final: Results) -> tuple[list[str], list[list[str]]]:
    head = ["", "test %, last epoch", "test %, best epoch", "wrong labels learned %", "loss, train", "SAM ball, train"]
    rates = (("last", "test_accuracy"), ("best", "test_accuracy"), ("memorized",))
    measures = [("measures", NOISY, measure, "value") for measure in ("loss", "sam_ball")]
    rows = [
        [
            method.name,
            *(spread(values(final, key, *path, scale=100), decimals=1) for path in rates),
            *(spread(values(final, key, *path)) for path in measures),
        ]
        for key, method in METHODS.items()
    ]
    return head, rows


def mean(numbers: Sequence[float], empty: float = NAN) -> float:
    """The mean of the finite values; `empty` if there are none."""
    finite = [v for v in numbers if math.isfinite(v)]
    return math.fsum(finite) / len(finite) if finite else empty


def _excludes_zero(correlation: Mapping[str, Any], side: int) -> bool:
    ends = correlation.get("low"), correlation.get("high")
    return all(end is not None and end * side > 0 for end in ends)


def _mean_tau(taus: Sequence[Mapping[str, Any]], factor: str) -> float:
    return mean([NAN if (tau := c["by_factor"].get(factor)) is None else tau for c in taus])
