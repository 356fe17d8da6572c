"""One stay at w + e: what moves on the way in, and all that comes back on the way out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim import kernels, rng
from sam_optim.batchnorm import Buffers
from sam_optim.guards import CleanStateDict, FirstForward

_perturbed_now: set[int] = set()  # ids of parameters; the pass that moved them holds them, so that no id is reused


class PerturbedPass:
    """w -> w + e by `begin`, and back by `end`, which may be called again after an interrupt, also of `begin`.

    Args:
        params: all parameters, moved or not: no other perturbation may move them meanwhile.
        buckets: those that move.
        module, buffers: the model whose buffers the pass must not change, and storage for them.
        first_forward: what remembers the random state of the first pass, where the second has to draw the same.
    """

    def __init__(
        self,
        params: list[Tensor],
        buckets: list[kernels.Bucket],
        module: nn.Module | None,
        buffers: Buffers,
        first_forward: FirstForward | None,
    ):
        if not _perturbed_now.isdisjoint(map(id, params)):
            raise RuntimeError(
                "another perturbation holds some of these parameters, and only one at a time can move them: finish its "
                "pass, or give it up with its exit(failed=True)"
            )
        self._params = params
        self._buckets = buckets
        self._module = module
        self._buffers = buffers
        self._first_forward = first_forward
        self._hooks: list[Any] = []
        self._rng: rng.GlobalState | None = None
        self._buffers_saved = False
        self._ended = True

    def begin(
        self, rng_state: Callable[[], rng.GlobalState], *, zero_grad: bool
    ) -> tuple[kernels.Ascent | None, kernels.Scalar | None]:
        """Moves the weights and clears the gradients. Returns the ascent and the share of it that rounding left."""
        self._ended = False
        _perturbed_now.update(map(id, self._params))
        ascent = realized = None
        if self._buckets:
            ascent = kernels.ascend_(self._buckets)
            torch.clear_autocast_cache()  # or the second forward reuses low-precision copies of w: SAM without SAM
            if ascent.moved is not False:
                realized = kernels.realized(self._buckets, ascent.factors)
            for b in self._buckets:
                b.g, b.t = [], None  # the second pass needs their memory
        if self._module is not None:
            self._buffers.save(self._module)
            self._buffers_saved = True
            for handle in CleanStateDict(self.clean).register(self._module):
                self._hooks.append(handle)
        if zero_grad:
            for p in self._params:
                p.grad = None
        if self._first_forward is not None:
            self._rng = rng_state()
            self._first_forward.replay()
        return ascent, realized

    def end(self) -> None:
        """Every part is done, whatever another one raises."""
        with ExitStack() as parts:
            parts.callback(_perturbed_now.difference_update, [id(p) for p in self._params])
            if self._first_forward is not None:
                parts.callback(self._first_forward.forget)
            if self._rng is not None:
                parts.callback(self._rng.restore)
            if self._buffers_saved:
                parts.callback(self._buffers.restore)
            for hook in self._hooks:
                parts.callback(hook.remove)
            parts.callback(torch.clear_autocast_cache)
            with torch.no_grad():
                kernels.restore_(self._buckets)
        self._ended = True

    def __del__(self) -> None:
        """An optimizer that is dropped between its two passes does not leave its weights at w + e."""
        if not getattr(self, "_ended", True):
            self.end()

    def clean(self, tensor: Tensor) -> Tensor | None:
        """The clean value of a parameter or buffer; None of what is none of the model's."""
        for b in self._buckets:
            for param, saved, shared in zip(b.params, b.saved, b.shared, strict=False):
                if param is tensor:
                    clean = torch.view_as_complex(saved) if param.is_complex() else saved
                    return clean.detach().clone() if shared else clean.detach()
        return self._buffers.clean_copy(tensor) if self._buffers_saved else None
