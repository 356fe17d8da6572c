"""A measure of minibatch losses against that measure of the mean loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sam_optim.core.results import Estimate, Spectrum, plain
from sam_optim.loss import Loss
from sam_optim.measures.shared import Progress, Ticks, batch_mean, checked, estimate

# Linear in the loss: their mean over batches is their value for the mean loss.
LINEAR = {
    "hessian_trace",
    "hessian_diagonal",
    "average_sharpness",
    "average_in_ball",
    "fisher_rao_norm",
    "relative_flatness",
}

Measure = Callable[..., "Estimate | Spectrum | float | Tensor"]


@checked
def contrastive_sharpness(measure: Measure, loss: Loss, *, progress: Progress | None = None, **kwargs: Any) -> Estimate:
    """How sharp the losses of single batches are, compared with their mean.

        C = sum_b n_b / N M(l_b) / M(L),   L = sum_b n_b / N l_b

    A mean of flat functions that look alike and a mean of sharp ones with scattered minima can be equally flat; C tells
    them apart. It does not change with a reparametrization that multiplies M of every loss by one factor; rescaling
    between layers with T = 1 is not of that kind, it weighs their directions anew. A convex measure, such as the
    largest eigenvalue or a norm of the Hessian or the gradient, has C >= 1. Of a linear one C is 1 for all losses and
    says nothing; it is refused.

    Args:
        measure: M(loss, **kwargs) -> Estimate, Spectrum (whose first eigenvalue counts), or a number. M(L) is that of
            the whole data as one unit: `worst_case_sharpness` there has one perturbation for all batches.
        loss: L, with two batches or more; C depends on their size m.
        progress: called with (batches done, their number + 1).
        kwargs: for the measure.

    Returns:
        `value`, without units. `stderr`: that of the mean over batches relative to M(L), on these data, so L is not
        taken to vary; with the standard error that M gave for L, if any. `details`: `whole`, M(L); `batch_values`,
        M(l_b). `converged` is that of all of them; nan where M(L) is 0 or not finite.

    Raises:
        ValueError: fewer than two batches, a linear measure.
        TypeError: a measure that returns anything else.

    Source: F. Huszar, "The Generalization Mystery: Sharp vs Flat Minima" (2018).
    """
    name = _name(measure)
    _refuse_linear(name, measure)
    if loss.num_batches < 2:
        raise ValueError("contrast compares batches with their mean, and this loss has a single batch: split it")
    tick = Ticks(progress, loss.num_batches + 1)

    def result(part: Loss) -> Estimate:
        value = _estimate_of(measure(part, **kwargs), name)
        tick()
        return value

    whole = result(loss.merged())
    _refuse_linear(str(whole.settings.get("measure", "")), None)
    parts = loss.over_batches(result)
    values = [part.value for part in parts]
    mean, stderr = batch_mean(loss, values)
    value = mean / whole.value if whole.value else math.nan
    if math.isfinite(whole.stderr) and math.isfinite(value):
        stderr = math.hypot(stderr, value * whole.stderr)
    everything = [whole, *parts]
    reason = next((f"{name}: {v.reason or 'not converged'}" for v in everything if not v.converged), None)
    if not whole.value:
        reason = f"{name} of the mean loss is 0"
    return estimate(
        loss,
        value,
        stderr / abs(whole.value) if whole.value else math.nan,
        num_samples=len(parts),
        converged=all(v.converged for v in everything),
        reason=reason,
        details={"whole": whole.value, "batch_values": values},
        settings={"measure": "contrastive_sharpness", "of": name}
        | {"arguments": {k: _plain(v) for k, v in kwargs.items()}}
        | loss.settings(),
    )


def _estimate_of(result: Any, name: str) -> Estimate:
    """The one number of what a measure returned."""
    if isinstance(result, Estimate):
        return result
    if isinstance(result, Spectrum) and result.grid is None and len(result.eigenvalues):
        return Estimate(float(result.eigenvalues[0]), converged=result.converged, reason=result.reason)
    if isinstance(result, Tensor) and result.numel() == 1:
        result = float(result)
    if isinstance(result, (int, float)) and not isinstance(result, bool):
        finite = math.isfinite(result)
        return Estimate(float(result), converged=finite, reason=None if finite else "it is not finite")
    got = "a spectral density" if isinstance(result, Spectrum) else type(result).__name__
    raise TypeError(f"a measure must return an Estimate, a Spectrum with eigenvalues or a number; {name} gave {got}")


def _refuse_linear(name: str, measure: Any) -> None:
    if name in LINEAR or getattr(measure, "linear", False):
        raise ValueError(
            f"{name} is linear in the loss: its mean over batches is its value for the mean loss, so the contrast is 1 "
            "for every model; use a measure that is not linear, such as hessian_eigenvalues or worst_case_sharpness"
        )


def _name(measure: Any) -> str:
    """The name of a function, also of a functools.partial."""
    while hasattr(measure, "func"):
        measure = measure.func
    return getattr(measure, "__name__", type(measure).__name__)


def _plain(value: Any) -> Any:
    try:
        return plain(value)
    except TypeError:
        return repr(value)
