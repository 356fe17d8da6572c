"""Which measures move under changes of the weights that leave the function as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from sam_optim.core import random as rng
from sam_optim.core.results import Spectrum, _Result, provenance
from sam_optim.core.text import MISSING, printable, text_table
from sam_optim.loss import Criterion, Loss
from sam_optim.loss.batches import moved
from sam_optim.symmetries.inputs import Inputs, difference, inputs_for, outputs_of
from sam_optim.symmetries.transforms import NoSymmetry, permute, rescale, rescale_normalized

Measure = Callable[[Any], Any]
Transform = Callable[[nn.Module], nn.Module]
Progress = Callable[[int, int], None]

ALPHA = 4.0  # factors from 1/4 to 4: a few epochs of training can change the scale of a layer so much


@dataclass(frozen=True)
class AuditRow(_Result):
    """One measure before and after one change.

    ratio: after / before. noise: the standard error of `after - before` over the draws of the measure, on these data;
    0 where it draws nothing. moved: whether it changed by more than the tolerance and three times the noise; None where
    one of the two is not a number (`reason` says why).
    """

    measure: str
    transform: str
    before: float
    after: float
    ratio: float
    noise: float
    moved: bool | None
    reason: str | None = None


@dataclass(frozen=True)
class Audit(_Result):
    """What changed, and what did not.

    rows: for each measure and each change. differences: of the outputs under each change, relative to the largest
    output. skipped: changes that do not apply to this model, and why.
    """

    rows: tuple[AuditRow, ...]
    differences: Mapping[str, float]
    skipped: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def moved(self) -> dict[str, bool | None]:
        """For each measure: True if any change moved it, None if that cannot be decided."""
        moved: dict[str, bool | None] = {}
        for row in self.rows:
            before = moved.get(row.measure, False)
            moved[row.measure] = True if before or row.moved else (None if None in (before, row.moved) else False)
        return moved

    def __str__(self) -> str:
        """A table: a row for each measure, a column for each change with the ratio, starred where it moved."""
        cells = {(row.measure, row.transform): row for row in self.rows}
        lines = []
        for measure in self.moved:
            changes = [cells[measure, name] for name in self.differences]
            lines.append([measure, f"{changes[0].before:.4g}", *map(_ratio, changes)])
        lines.append(["outputs", "", *(f"{d:.0e}" for d in self.differences.values())])
        notes = ["* moved, though the function did not: by more than the tolerance and the noise of the measure"]
        notes += [f"{row.measure}, {row.transform}: {row.reason}" for row in self.rows if row.reason]
        notes += [f"{name} left out: {why}" for name, why in self.skipped.items()]
        return "\n".join([text_table(["measure", "value", *self.differences], lines), *map(printable, notes)])


def audit(
    model: nn.Module,
    measures: Mapping[str, Measure],
    transforms: Mapping[str, Transform] | None = None,
    *,
    criterion: Criterion | None = None,
    batches: Iterable[Any] | None = None,
    make_loss: Callable[[nn.Module], Loss] | None = None,
    inputs: Inputs = None,
    tolerance: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> Audit:
    """Which measures move, and by how much, when the weights of this model change and its function does not.

        S(w') / S(w),   f_w' = f_w

    A measure that moves can be made as large or small as one likes without any change of what the model predicts: it
    says nothing about generalization unless the scale of the weights is fixed by something else.

    Args:
        model: at the weights w; it is not changed.
        measures: name -> a function of the model that returns an `Estimate`, a `Spectrum` (its first eigenvalue counts)
            or a number. With `batches` or `make_loss` it is a function of the `Loss` instead: the measures of this
            package as they are. `sam_optim.standard_measures()` has the usual ones.
        transforms: name -> a function of the model that returns a changed copy. None for `rescale` and
            `rescale_normalized` with random factors between 1/4 and 4, and `permute`; those that do not apply to this
            model are left out, and `skipped` says so.
        criterion, batches: as in `Loss`.
        make_loss: model -> Loss, where `Loss(model, criterion, batches)` is not enough.
        inputs: on which outputs are compared and the model is traced, as in `rescale`; None for those of the first
            batch, or examples made up.
        tolerance: a measure has moved if it changed by more than this share of its value, and by three standard errors
            of its draws.
        seed: of the default transforms.
        progress: called with (measurements done, total).

    Returns:
        An `Audit`: `rows`, `differences` of the outputs, `moved`; `str()` is a table.

    Raises:
        ValueError: no measures, or no transform that applies to this model.
        RuntimeError: a default transform changed the outputs.

    Source: Dinh et al. (2017), arXiv:1703.04933: sharp minima can generalize; the list of measures is yours.
    """
    if not measures:
        raise ValueError("measures is empty: pass name -> function, or sam_optim.standard_measures() with batches=")
    if batches is not None and make_loss is not None:
        raise ValueError("pass batches= or make_loss=, not both")
    if batches is not None:
        make_loss = partial(Loss, criterion=criterion, batches=batches)
        inputs = _inputs_of(batches, next(model.parameters()).device) if inputs is None else inputs
    arguments = inputs_for(model, inputs)
    changed, skipped = _changed(model, transforms, arguments, seed)
    outputs = outputs_of(model, arguments)
    differences = {name: difference(outputs, outputs_of(other, arguments)) for name, other in changed.items()}
    total = len(measures) * (1 + len(changed))
    values: dict[tuple[str, str | None], _Value] = {}
    for transform, candidate in [(None, model), *changed.items()]:
        subject = candidate if make_loss is None else make_loss(candidate)
        for name, measure in measures.items():
            values[name, transform] = _measured(measure, subject)
            if progress is not None:
                progress(len(values), total)
    rows = [_row(m, t, values[m, None], values[m, t], tolerance) for m in measures for t in changed]
    settings = {"tolerance": tolerance, "seed": seed, "alpha": ALPHA if transforms is None else None}
    return Audit(tuple(rows), differences, skipped, settings, provenance())


def _changed(
    model: nn.Module, transforms: Mapping[str, Transform] | None, inputs: Any, seed: int
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    if transforms is not None:
        if not transforms:
            raise ValueError("transforms is empty: pass name -> function of the model, or None for the usual ones")
        return {name: transform(model) for name, transform in transforms.items()}, {}
    usual: dict[str, Transform] = {
        "rescale": lambda m: rescale(m, ALPHA, seed=seed, inputs=inputs),
        "rescale_normalized": lambda m: rescale_normalized(m, ALPHA, seed=seed, inputs=inputs),
        "permute": lambda m: permute(m, seed, inputs=inputs),
    }
    changed, skipped = {}, {}
    for name, transform in usual.items():
        try:
            changed[name] = transform(model)
        except NoSymmetry as error:
            skipped[name] = str(error)
    if not changed:
        raise NoSymmetry(f"no change of the weights keeps this model's function: {'; '.join(skipped.values())}")
    return changed, skipped


class _Value(NamedTuple):
    number: float
    noise: float  # standard error over draws on the same data
    reason: str | None


def _measured(measure: Measure, subject: Any) -> _Value:
    try:
        result = measure(subject)
    except ValueError as error:  # a measure that this loss does not have, such as the regret of one batch
        return _Value(math.nan, 0.0, str(error))
    if isinstance(result, Spectrum):
        return _Value(float(result.eigenvalues[0]), 0.0, result.reason)
    details, settings = getattr(result, "details", {}), getattr(result, "settings", {})
    noise = details.get("stderr_draws", result.stderr if "num_probes" in settings else 0.0)
    return _Value(float(result), noise if math.isfinite(noise) else 0.0, getattr(result, "reason", None))


def _row(measure: str, transform: str, before: _Value, after: _Value, tolerance: float) -> AuditRow:
    a, b = before.number, after.number
    noise = math.hypot(before.noise, after.noise)
    is_finite = math.isfinite(a) and math.isfinite(b)
    moved = abs(b - a) > max(tolerance * max(abs(a), abs(b)), 3 * noise) if is_finite else None
    ratio = b / a if is_finite and a else math.nan
    return AuditRow(measure, transform, a, b, ratio, noise, moved, after.reason or before.reason)


def _ratio(row: AuditRow) -> str:
    return MISSING if row.moved is None else f"x {row.ratio:.4g} " + ("*" if row.moved else " ")


def _inputs_of(batches: Iterable[Any], device: torch.device) -> Inputs:
    """The inputs of the first batch."""
    with rng.preserved():  # a DataLoader draws a seed from the global generator
        batch = moved(next(iter(batches)), device)
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}
    return tuple(batch[:-1])
