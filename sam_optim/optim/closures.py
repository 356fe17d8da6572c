"""The two passes of closures: run at w, run at w + e, and what a closure may have forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sam_optim.optim import kernels
from sam_optim.optim.last_step import mean_loss
from sam_optim.optim.param_groups import is_zero
from sam_optim.optim.passes import AscentPass
from sam_optim.optim.transaction import Apart, LeftoverProbe

if TYPE_CHECKING:
    from sam_optim.optim.perturbation import Perturbation

Closure = Callable[[], Any]


def backward_of(sam: Perturbation, closure: Closure, ascent_closure: Closure | None) -> Any:
    """Leaves the gradients at w + e, and returns the loss at w."""
    loss, perturbed = _two_passes(sam, closure, ascent_closure, stays_open=sam.stays_open)
    sam._seen.losses(loss, perturbed, of_one_function=ascent_closure is None)
    return loss


def backward_of_all(sam: Perturbation, closures: Sequence[Closure]) -> Any:
    """Each has a perturbation of its own; the mean of their gradients, and of their losses at w.

    Between two of them the weights are brought back by a copy: the next ascent begins at w.
    """
    found = list(closures) if isinstance(closures, Iterable) and not isinstance(closures, Tensor) else []
    if not found or not all(callable(c) for c in found):
        raise TypeError(f"expected a closure or a list of at least one closure, got {closures!r}")
    params = list(dict.fromkeys(sam._params()))
    for p in params:
        p.grad = None
    passes = []
    ranks = sam._ranks()
    for i, c in enumerate(found):
        is_last = i == len(found) - 1
        waits = ranks.averages_once and not is_last
        with ranks.no_sync() if waits else nullcontext():
            passes.append(_two_passes(sam, c, None, Apart(params), stays_open=sam.stays_open and is_last))
    grads = [p.grad for p in params if p.grad is not None]
    with torch.no_grad():
        for g in grads:
            g.div_(len(found))
    loss, perturbed = (mean_loss([losses[i] for losses in passes]) for i in (0, 1))
    sam._seen.losses(loss, perturbed)
    return loss


def _two_passes(
    sam: Perturbation,
    closure: Closure,
    ascent_closure: Closure | None,
    apart: Apart | None = None,
    *,
    stays_open: bool,
) -> tuple[Any, Any]:
    """The losses at w and at w + e. `stays_open`: the weights stay at w + e, for an update that brings them back."""
    first, second = (torch.enable_grad()(c) for c in (ascent_closure or closure, closure))
    if all(is_zero(g["rho"]) for g in sam.param_groups):  # the second pass would be the first one again
        loss = second()
        sam._seen.without_ascent(plain=True)
        sam.completed = True
        if apart is not None:
            apart.add()
        return loss, loss
    if sam._first_forward is not None:
        sam._first_forward.state = sam._rng_state()
    params = sam._params()
    once = apart is not None and sam._ranks().averages_once
    with sam._first_pass(apart, apart.put_under_next_backward if once else None) as ascent:  # type: ignore[union-attr]
        probe = LeftoverProbe(params)
        num_cleared = sam._num_cleared
        try:
            loss = _run_first(sam, first, ascent)
        finally:
            kept = probe.kept() and num_cleared == sam._num_cleared
        if kept and probe.ran_nothing and _are_constant(sam, loss):
            sam._seen.moved(kernels.Ascent(None, 0.0, False, []), None)
            sam.completed = True
            return loss, loss
        if kept:
            raise RuntimeError(
                "the closure left gradients of before step(closure) in place: the second pass would not see what "
                "they came from. Zero them in the closure; to accumulate, loop over the micro-batches inside the "
                "closure, pass step a list of closures, or use microbatch() and perturbed()"
            )
        if all(p.grad is None for p in params) and not sam._ranks().may_lack_gradients:
            if isinstance(loss, Tensor) and loss.requires_grad:
                raise RuntimeError(
                    "the closure returned a loss but left no gradient on the parameters of this optimizer: call "
                    "loss.backward() in it, and make the optimizer from the parameters that the model has now"
                )
            sam._seen.without_ascent(plain=False)
            sam.completed = True
            return loss, None  # nothing to learn from, as a step of torch.optim without gradients
        with sam._stay(keep_gradients=False, stays_open=stays_open):
            perturbed = second()
    return loss, perturbed


def _are_constant(sam: Perturbation, loss: Any) -> bool:
    """Whether gradients that a closure has left alone are those at w + e, too: a perturbed pass's, or the user's.

    Not where a loss was returned that still has its graph, or nothing, as by closures that stand for none.
    """
    return sam.completed or not (loss is None or (isinstance(loss, Tensor) and loss.requires_grad))


def _run_first(sam: Perturbation, closure: Closure, ascent: AscentPass) -> Any:
    """Once more, with all gradients, if the loss needs none of the parameters that will move."""
    try:
        return closure()
    except RuntimeError as error:
        if "does not require grad" not in str(error) or not ascent.is_partial:
            raise
        ascent.compute_all()
        sam._transaction.undo()
    return closure()
