"""What a table of models says: every measure against every target, and the sentences that follow from the intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.paired import LEVEL
from sam_optim.statistics.kendall import correlate
from sam_optim.statistics.partial import conditional, holm

NAMES = {
    "test_error": "test error",
    "gap": "generalization gap",
    "ood_error": "error on corrupted images",
    "train_loss": "training loss",
    "test_loss": "test loss",
    "loss_gap": "gap of the losses",
    "train_error": "training error",
    "validation_error": "held-out error",
    "train_accuracy": "training accuracy",
    "validation_accuracy": "held-out accuracy",
    "test_accuracy": "test accuracy",
    "ood_accuracy": "accuracy on corrupted images",
    "lr": "learning rate",
    "sam_rho": "radius of SAM",
}
UNITS = {c: "%" for c in NAMES if c.endswith(("_error", "_accuracy"))}
UNITS |= {"gap": "points", "train_loss": "nats", "test_loss": "nats", "loss_gap": "nats"}

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Models, one row each, and which of their columns are what.

    given: the factor that is held fixed, or several ("lr,augmentation"); None where there is none to hold.
    about: for the page: settings, versions. failed: models that have no numbers, with the reason.
    """

    title: str
    rows: Sequence[Row]
    measures: Sequence[str]
    targets: Sequence[str]
    factors: Sequence[str] = ()
    given: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    failed: Sequence[Row] = ()

    @property
    def held(self) -> list[str]:
        """The factors of `given`; the first gives models their colours."""
        return self.given.split(",") if self.given else []

    @property
    def cluster(self) -> list[str] | None:
        """The factors but the seed: models that agree in them are not independent evidence. None without seeds."""
        setting = [f for f in self.factors if f != "seed"]
        return setting if setting and len(setting) < len(self.factors) else None


def analyse(table: Table, *, num_resamples: int = 2000, seed: int = 0, level: float = LEVEL) -> dict[str, Any]:
    """Every comparison with its tests corrected for their number, and the conclusions, as plain values.

    Models that differ in their seed alone are one cluster: intervals draw, and tests exchange, whole clusters.
    Holm's correction runs over all tests of the page: one for each measure and target over all models, and one more
    with `given` held fixed. The chance of even one false finding on the page is then at most 1 - level.
    """
    options = {"level": level, "num_resamples": num_resamples, "seed": seed, "cluster": table.cluster}
    comparisons = []
    for target in table.targets:
        for measure in table.measures:
            overall = correlate(table.rows, measure, target, factors=table.factors, **options)
            row: dict[str, Any] = {"measure": measure, "target": target} | _picked(overall)
            if table.given:
                fixed = conditional(table.rows, measure, target, table.held, **options).to_dict()
                row["fixed"] = {k: v for k, v in fixed.items() if k not in ("type", "settings", "provenance")}
                row["groups"] = by_group(table, measure, target, table.held[0], options)
            comparisons.append(row)
    follows = [followed(table, measure, options) for measure in table.measures] if table.given else []
    _correct(comparisons)
    for row in comparisons:
        row["verdict"] = verdict(row, table.given, level)
    return {
        "comparisons": comparisons,
        "num_models": len(table.rows),
        "num_tests": sum(1 for row in comparisons for p in _p_values(row) if p is not None),
        "correction": "Holm (1979)",
        "given": table.given,
        "cluster": table.cluster,
        "follows": follows,
        "level": level,
        "num_resamples": num_resamples,
        "seed": seed,
        "headline": headline(comparisons, table, level),
        "conclusions": [conclusion(comparisons, table, target, level, follows) for target in table.targets],
    }


def by_group(table: Table, measure: str, target: str, factor: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """tau at each value of a factor, and whether they differ: Q = sum (tau_k - mean)^2 / se_k^2, chi-squared with one
    degree of freedom less than groups where they do not (Cochran, 1954); se from the width of the intervals."""
    from scipy.stats import chi2, norm

    taus = {}
    for value in sorted({row[factor] for row in table.rows if row.get(factor) is not None}, key=str):
        rows = [row for row in table.rows if row.get(factor) == value]
        tau = correlate(rows, measure, target, **options).to_dict()
        taus[str(value)] = {key: tau[key] for key in ("tau", "low", "high", "n")}
    groups = [t for t in taus.values() if t["low"] is not None and t["high"] > t["low"]]
    width = 2 * norm.ppf(0.5 + options["level"] / 2)
    weights = [(width / (t["high"] - t["low"])) ** 2 for t in groups]
    mean = sum(w * t["tau"] for w, t in zip(weights, groups, strict=True)) / sum(weights) if groups else math.nan
    q = sum(w * (t["tau"] - mean) ** 2 for w, t in zip(weights, groups, strict=True))
    p = float(chi2.sf(q, len(groups) - 1)) if len(groups) > 1 else None
    return {"factor": factor, "taus": taus, "heterogeneity_p": p}


def followed(table: Table, measure: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """tau of a measure with the factor that is held fixed; None where that is no number."""
    about = {"measure": measure, "tau": None, "low": None, "high": None}
    factor = table.held[0]
    values = [row.get(factor) for row in table.rows]
    if not all(isinstance(v, (int, float)) for v in values if v is not None):
        return about
    return about | {k: v for k, v in _picked(correlate(table.rows, measure, factor, **options)).items() if k in about}


def _picked(overall: Any) -> dict[str, Any]:
    keys = ("tau", "low", "high", "p", "n", "num_dropped", "by_factor", "granulated", "reason")
    return {k: v for k, v in overall.to_dict().items() if k in keys}


def _p_values(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return row.get("p"), row.get("fixed", {}).get("within_p")


def _correct(comparisons: Sequence[dict[str, Any]]) -> None:
    """Adds p_adjusted, over all tests of all comparisons together."""
    flat = [math.nan if p is None else p for row in comparisons for p in _p_values(row)]
    adjusted = [None if math.isnan(p) else p for p in holm(flat)]
    for i, row in enumerate(comparisons):
        row["p_adjusted"] = adjusted[2 * i]
        if "fixed" in row:
            row["fixed"]["within_p_adjusted"] = adjusted[2 * i + 1]


def direction(low: float | None, high: float | None, p: float | None, level: float) -> int:
    """+1 or -1 where the interval excludes 0 and the corrected test agrees, else 0."""
    if low is None or high is None or p is None or not p < 1 - level:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def directions(row: Mapping[str, Any], level: float) -> tuple[int, int | None]:
    """Over all models, and with the factor held fixed (None where that could not be computed)."""
    overall = direction(row.get("low"), row.get("high"), row.get("p_adjusted"), level)
    fixed = row.get("fixed")
    if not fixed or fixed.get("within") is None:
        return overall, None
    return overall, direction(fixed["within_low"], fixed["within_high"], fixed["within_p_adjusted"], level)


def verdict(row: Mapping[str, Any], given: str | None, level: float = LEVEL) -> str:
    """One comparison in words."""
    if row.get("tau") is None:
        return f"not computed: {row.get('reason')}"
    words = {1: "positive", -1: "negative"}
    overall, fixed = directions(row, level)
    at = f"at a fixed {name(given)}" if given else ""
    if overall and fixed is None:
        return words[overall]
    if overall and fixed == overall:
        return f"{words[overall]}, also {at}"
    if overall and fixed == 0:
        return f"{words[overall]}, but no evidence {at}"
    if overall:
        return f"{words[overall]}, but {words[fixed or 0]} {at}"
    if fixed:
        return f"no evidence of a trend over all models, but {words[fixed]} {at}"
    return "no evidence of a trend after correction" if _almost(row) else "no evidence of a trend"


def _almost(row: Mapping[str, Any]) -> bool:
    """Whether an interval excludes 0, and only the number of tests speaks against it."""
    fixed = row.get("fixed") or {}
    ends = [(row.get("low"), row.get("high")), (fixed.get("within_low"), fixed.get("within_high"))]
    return any(a is not None and b is not None and a * b > 0 for a, b in ends)


def headline(comparisons: Sequence[Mapping[str, Any]], table: Table, level: float = LEVEL) -> str:
    """What the first target's comparisons come to, in one or two sentences."""
    target = table.targets[0]
    rows = [row for row in comparisons if row["target"] == target and row["tau"] is not None]
    if not rows:
        return f"No measure could be compared with {name(target)}."
    rising, falling, unclear = _counts([directions(row, level)[0] for row in rows])
    n, goal = len(rows), name(target)
    if n == 1:
        first = {
            1: f"{capitalized(rows[0]['measure'])} rises with {goal}",
            -1: f"{capitalized(rows[0]['measure'])} falls as {goal} rises",
        }
        text = first.get(rising - falling, f"No evidence that {rows[0]['measure']} goes with {goal}")
    elif unclear == n:
        text = f"No evidence that any of {n} measures goes with {goal}"
    elif rising == n or falling == n:
        text = (
            f"{'Both' if n == 2 else f'All {n}'} measures {f'rise with {goal}' if rising else f'fall as {goal} rises'}"
        )
    else:
        text = f"Of {n} measures {_parts(rising, falling, unclear, goal)}"
    fixed = [d for row in rows if (d := directions(row, level)[1]) is not None]
    if not fixed:
        return f"{text}, over {table_size(rows)} models."
    return f"{text}; {_at_fixed(fixed, name(table.given))}."


def _at_fixed(fixed: Sequence[int], given: str) -> str:
    rising, falling, unclear = _counts(fixed)
    if unclear == len(fixed):
        return f"at a fixed {given} there is no evidence that {'it' if len(fixed) == 1 else 'any'} does"
    if len(fixed) == 1:
        return f"at a fixed {given} it {'rises' if rising else 'falls'}"
    if rising == len(fixed) or falling == len(fixed):
        return f"at a fixed {given} {'both' if len(fixed) == 2 else 'all'} {'rise' if rising else 'fall'}"
    return f"at a fixed {given} {_parts(rising, falling, unclear, 'it')}"


def _parts(rising: int, falling: int, unclear: int, goal: str) -> str:
    parts = []
    for count, word in ((rising, "rise"), (falling, "fall")):
        if count:
            parts.append(f"{count} {word + 's' if count == 1 else word}{'' if parts else f' with {goal}'}")
    if unclear:
        parts.append(f"{unclear} {'shows' if unclear == 1 else 'show'} no clear trend")
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]


def conclusion(
    comparisons: Sequence[Mapping[str, Any]],
    table: Table,
    target: str,
    level: float = LEVEL,
    follows: Sequence[Mapping[str, Any]] = (),
) -> str:
    """One target in words: which measures, in which direction, and whether the factor held fixed explains more."""
    rows = [row for row in comparisons if row["target"] == target]
    computed = [row for row in rows if row["tau"] is not None]
    if not computed:
        return f"{capitalized(name(target))}: not computed ({rows[0].get('reason') if rows else 'no measures'})."
    groups: dict[str, list[str]] = {}
    for row in computed:
        groups.setdefault(verdict(row, table.given, level), []).append(str(row["measure"]))
    text = "; ".join(f"{said} for {listed(measures)}" for said, measures in groups.items())
    taus = {row["measure"]: abs(row["tau"]) for row in computed}
    closer = [
        str(row["measure"])
        for row in follows
        if row["low"] is not None and row["low"] * row["high"] > 0 and abs(row["tau"]) > taus.get(row["measure"], 1.0)
    ]
    if closer:
        who = "every measure" if len(closer) == len(computed) else listed(closer)
        verb = "follow" if len(closer) > 1 and len(closer) < len(computed) else "follows"
        text += f". {capitalized(who)} {verb} the {name(table.held[0])} more closely than {name(target)}"
    return f"{capitalized(name(target))}: {text}."


def table_size(rows: Sequence[Mapping[str, Any]]) -> str:
    sizes = sorted({row["n"] for row in rows})
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def name(column: str | None) -> str:
    """The name of a column in words; also of several columns, "lr,augmentation"."""
    return listed([NAMES.get(part, part) for part in str(column).split(",")])


def labelled(column: str) -> str:
    """The name with its unit, for an axis."""
    return f"{name(column)}, {UNITS[column]}" if column in UNITS else name(column)


def _counts(signs: Sequence[int]) -> tuple[int, int, int]:
    return sum(s > 0 for s in signs), sum(s < 0 for s in signs), sum(s == 0 for s in signs)


def listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]
