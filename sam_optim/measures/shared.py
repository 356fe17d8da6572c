"""Shared by all measures: vectors of the size of the model, the matrix T M T, settings and provenance of results."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import count
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from sam_optim.core.geometry import Ball, ProductBall
from sam_optim.core.random import Stream
from sam_optim.core.results import Estimate, mean_over_batches, plain, provenance, student_quantile
from sam_optim.core.scalars import real, shown, whole
from sam_optim.loss import SAMPLED, Loss
from sam_optim.loss.differences import TOLERANCE

Product = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]
M = TypeVar("M", bound=Callable[..., Any])

DRAWS = 16  # labels for each example of "fisher_mc", where one matrix is needed
CHUNK = 1 << 20  # entries that are in float64 at once
FEW_SAMPLES = 4  # below it a standard error is itself uncertain by half


def checked(measure: M) -> M:
    """Makes the arguments of a measure plain, as its annotations say: numbers may be NumPy's or one-element tensors.

    Raises:
        ValueError: a number that is none, or not finite. TypeError: no Loss, no ball. With the value, before any work.
    """
    signature = inspect.signature(measure)

    @wraps(measure)
    def with_plain_arguments(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return measure(*args, **kwargs)  # which names the measure
        for name, value in bound.arguments.items():
            kinds = str(signature.parameters[name].annotation).split(" | ")
            if not (value is None and "None" in kinds):
                bound.arguments[name] = _plain(name, value, kinds)
        return measure(*bound.args, **bound.kwargs)

    return cast(M, with_plain_arguments)


def _plain(name: str, value: Any, kinds: Sequence[str]) -> Any:
    if "int" in kinds:
        whole_number = whole(name, value)
        if name == "seed":
            Stream(whole_number)  # refuses what is no seed, also where nothing is drawn
        return whole_number
    if "float" in kinds:
        number = real(name, value)
        if name == "tol" and not 0 < number < 1:
            raise ValueError(f"tol is relative and must be > 0 and < 1, got {number}")
        return number
    if set(kinds) <= {"bool", "None"} and not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    if set(kinds) <= {"str", "None"} and not isinstance(value, str):
        raise ValueError(f"{name} must be a word, got {shown(value)}")
    if kinds == ["Loss"] and not isinstance(value, Loss):
        got = type(value).__name__
        raise TypeError(f"a measure is of a Loss: pass Loss(model, criterion, batches), got {got}")
    of_ball = "Ball" in kinds and not isinstance(value, (Ball, ProductBall))
    if of_ball and not ("Sequence[Ball]" in kinds and isinstance(value, Sequence) and not isinstance(value, str)):
        raise TypeError(f"{name} must be a Ball: pass Ball(rho) or optimizer.ball, got {type(value).__name__}")
    return value


def check_vector(name: str, v: Any, params: Sequence[Tensor]) -> None:
    """Raises ValueError for what is no sequence of tensors in the shapes of the parameters."""
    expected: list[Any] = [tuple(w.shape) for w in params]
    got: Any = type(v).__name__
    if isinstance(v, Sequence) and not isinstance(v, str):
        got = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in v]
    if got != expected:
        raise ValueError(f"{name} needs one tensor for each parameter, of its shape (see `params`), got {got}")


@contextmanager
def redrawn(loss: Loss, matrix: str, seed: int) -> Iterator[Callable[[Sequence[Tensor]], list[Tensor]]]:
    """v -> M v; of "fisher_mc" with other labels in each product, so that the spread of products holds theirs."""
    if matrix not in SAMPLED:
        with loss.curvature(matrix) as product:
            yield product
        return
    numbers = count()
    yield lambda v: loss.fisher_mc_product(v, seed=other_seed(seed, next(numbers)))


def other_seed(seed: int, k: int) -> int:
    """The k-th of independent seeds."""
    return zlib.crc32(f"{seed} {k}".encode())


@contextmanager
def flat_product(
    loss: Loss,
    ball: Ball | ProductBall | None,
    matrix: str,
    *,
    seed: int = 0,
    damping: float = 0.0,
    redraw: bool = False,
    draws: int = 1,
) -> Iterator[Product]:
    """v -> (T M T + damping) v for vectors of P entries. redraw: as in `redrawn`; draws: as in `Loss.curvature`."""
    scales = None if ball is None else ball.scales(loss.params)
    drawn = {"draws": draws} if matrix == "fisher_mc" else {}
    with redrawn(loss, matrix, seed) if redraw else loss.curvature(matrix, seed=seed, **drawn) as product:
        yield lambda v: flat(scaled(product(scaled(unflat(v, loss.params), scales)), scales)) + damping * v


def scaled(v: Sequence[Tensor], scales: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """T v, for the parts of v."""
    return v if scales is None else [t * x for t, x in zip(scales, v, strict=True)]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all entries, in float32 or better."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return torch.cat([x.detach().flatten().to(dtype) for x in tensors])


def unflat(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of v in the shapes of `like`: views, in the dtype of v."""
    parts = v.split([w.numel() for w in like])
    return [x.view(w.shape) for x, w in zip(parts, like, strict=True)]


def dot(a: Tensor, b: Tensor) -> float:
    """<a, b>, accumulated in float64: a long float32 sum is off by up to 1e-3."""
    if a.dtype == torch.float64:
        return float(torch.dot(a, b))
    parts = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    return math.fsum(float(torch.dot(x.double(), y.double())) for x, y in parts)


def norm(a: Tensor) -> float:
    """||a||_2, accumulated in float64."""
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))


def mean_and_stderr(x: Sequence[float]) -> tuple[float, float]:
    """The mean of independent draws and its standard error, nan for a single draw."""
    mean = math.fsum(x) / len(x)
    if len(x) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((a - mean) ** 2 for a in x) / (len(x) - 1) / len(x))


def batch_weights(loss: Loss) -> Tensor:
    """p_b = W_b / sum W, (B,) float64."""
    weights = torch.tensor(loss.batch_weights, dtype=torch.float64)
    return weights / weights.sum()


def batch_mean(loss: Loss, values: Sequence[float]) -> tuple[float, float]:
    """sum_b p_b x_b over batches, and its standard error; nan for one batch."""
    weights: Sequence[Any] = loss.batch_weights
    return mean_over_batches(values, weights)


def settings(measure: str, loss: Loss, **options: Any) -> dict[str, Any]:
    """The name, what the caller chose, and what the loss says of itself: enough to compute the number again."""
    return {"measure": measure} | {name: plain(value) for name, value in options.items()} | loss.settings()


def why_not_finite(loss: Loss, what: str = "a derivative of it") -> str:
    """Why a measure is not: the first batch whose loss is not finite at the weights, or `what` is not."""
    values = loss.batch_values().tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            return f"the loss{f' of batch {i} of {len(values)}' if len(values) > 1 else ''} is {value} at the weights"
    return f"the loss is {float(loss.value()):.4g} at the weights, and {what} is not finite"


def doubt_about_products(record: Mapping[str, Any]) -> str | None:
    """Why a result with these settings is not to be believed, if its products were central differences."""
    wrong = record.get("product_error")
    if wrong is None or wrong <= TOLERANCE:
        return None
    return f"products by central differences are off by up to {wrong:.1e} of their size, as where w is on a kink"


def estimate(
    loss: Loss,
    value: float,
    stderr: float,
    *,
    settings: dict[str, Any],
    reason: str | None = None,
    half_width: float | None = None,
    **fields: Any,
) -> Estimate:
    """An Estimate: nan, with a reason, if the value is not finite; says when its standard error is itself a guess.

    half_width: of the interval; None: stderr times Student's t for num_samples - 1 degrees of freedom."""
    if not math.isfinite(value):
        value, stderr = math.nan, math.nan
        reason = reason or why_not_finite(loss)
    elif 0 < stderr < math.inf and (n := fields.get("num_samples", 1)) < FEW_SAMPLES:
        reason = reason or f"few samples: the standard error is over {n}"
    if half_width is None:
        half_width = student_half_width(stderr, fields.get("num_samples", 1))
    fields["interval"] = (value - half_width, value + half_width) if math.isfinite(half_width + stderr) else None
    fields["converged"] = fields.get("converged", True) and math.isfinite(value)
    return Estimate(value, stderr, settings=settings, provenance=provenance(), reason=reason, **fields)


def student_half_width(stderr: float, num: int) -> float:
    """Half the width of the 95 % interval; nan where the standard error is nan, 0 where it is 0."""
    return stderr * student_quantile(num - 1) if stderr and num > 1 else stderr


class Ticks:
    """Counts steps, and tells `progress` after each."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        self.to(self._done + 1)

    def to(self, done: int) -> None:
        """`done` steps are behind, of which some were not needed."""
        if done > self._done and self._progress is not None:
            self._progress(done, self._total)
        self._done = max(done, self._done)
