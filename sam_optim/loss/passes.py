"""Passes of a model over a batch, in a fixed mode and in a precision that small displacements survive."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core import module_state
from sam_optim.core import random as rng
from sam_optim.loss import criterion as criteria
from sam_optim.loss.batches import channels_last, target_of, tree_map
from sam_optim.loss.criterion import Criterion, Forward

HALF = (torch.bfloat16, torch.float16)


class Passes:
    """l(batch; w) of a model and a criterion, in eval mode, with the same draws in each pass.

    Arguments as those of `Loss`.

    Attributes:
        model: the module inside DDP or torch.compile. params: its trainable parameters.
        wide: what narrower weights, buffers and batches are widened to inside a pass; None: they are taken as they are.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Criterion | None,
        forward: Forward | None,
        *,
        normalize_logits: bool,
        batch_statistics: bool,
        device: torch.device | str | None,
    ):
        criteria.check(criterion, normalize_logits)
        self.model = _unwrapped(model)
        self.criterion = criterion
        self.normalize_logits, self.batch_statistics = normalize_logits, batch_statistics
        self.params: list[Tensor] = [p for p in self.model.parameters() if p.requires_grad]
        if not self.params:
            raise ValueError("the model has no trainable parameters (requires_grad=True): nothing to measure")
        named = self.model.named_parameters()
        if of_complex := next((name for name, p in named if p.requires_grad and p.is_complex()), None):
            raise ValueError(
                f"measures need real weights, and {of_complex!r} is complex: make torch.view_as_real of it the "
                "parameter, and take torch.view_as_complex of that in forward"
            )
        halves = any(p.dtype in HALF and not is_spread(p) for p in self.params)
        self.wide = torch.float32 if halves and not may_be_in_ddp() else None
        self._forward = forward or criteria.default_forward
        self._device = None if device is None else torch.device(device)
        self._images_last = _convolves_on_cpu(self.model)

    @property
    def device(self) -> torch.device:
        """The device of the batches: that of the parameters, also after a framework has moved them."""
        return self.params[0].device if self._device is None else self._device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the loss is computed."""
        return self.wide or self.params[0].dtype

    def with_criterion(self, criterion: Criterion) -> Passes:
        criteria.check(criterion, self.normalize_logits)
        return self._copy(criterion=criterion)

    def in_float64(self) -> Passes:
        return self._copy(wide=torch.float64, _images_last=False)

    def _copy(self, **changes: Any) -> Passes:
        other = copy.copy(self)
        other.__dict__.update(changes)
        return other

    @contextmanager
    def evaluating(self, *, grad: bool) -> Iterator[None]:
        """Inside it are the passes. The model, generators and flags come back as they were."""
        cuda = [self.device] if self.device.type == "cuda" else []
        measured = module_state.measured(self.model, batch_statistics=self.batch_statistics)
        # a model that draws in eval mode draws the same in every pass
        preserved, aside = rng.preserved(cuda), rng.Aside(0, cuda)
        before, fast_path = torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled()
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # nn.TransformerEncoder's, of another function for padding
            with self.widened(), preserved, measured, aside, torch.inference_mode(False), torch.set_grad_enabled(grad):
                yield
        finally:
            for module in self.model.modules():
                if hasattr(module, "_get_fsdp_state"):  # FSDP2 would use the gathered weights again, also after a move
                    module.reshard()  # type: ignore[operator]
            torch.backends.mha.set_fastpath_enabled(fast_path)
            torch.set_grad_enabled(before)  # again, for an interrupt on the way out

    @contextmanager
    def widened(self) -> Iterator[None]:
        """Weights and buffers in the precision of the passes. What autocast has cast before is cast anew: torch 2.8
        gives the casts of a pass without gradients to one that needs them."""
        torch.clear_autocast_cache()
        with ExitStack() as stack:
            for module in (self.model, self.criterion):
                if isinstance(module, nn.Module):
                    stack.enter_context(module_state.widened(module, self.wide))
            yield

    def loss(self, batch: Any, *, needs_gradient: bool = True) -> Tensor:
        """l(batch), 0-d."""
        return self.of_outputs(*self.outputs(batch), needs_gradient=needs_gradient)

    def of_outputs(self, outputs: Any, target: Any, *, needs_gradient: bool = True) -> Tensor:
        return criteria.value(self.criterion, outputs, target, needs_gradient=needs_gradient)

    def outputs(self, batch: Any) -> tuple[Any, Any]:
        """(outputs, target); images have their channels last, which a CPU convolves faster."""
        if (wide := self.wide) is not None:
            batch = tree_map(lambda x: x.to(wide) if _is_narrower(x, wide) else x, batch)
        if self._images_last:
            try:
                return self._for_criterion(*self._forward(self.model, channels_last(batch)))
            except RuntimeError:  # of a view() that needs the other layout; any other error comes again
                self._images_last = False
        return self._for_criterion(*self._forward(self.model, batch))

    def target(self, batch: Any) -> Any:
        return target_of(batch) if self._forward is criteria.default_forward else self.outputs(batch)[1]

    def _for_criterion(self, outputs: Any, target: Any) -> tuple[Any, Any]:
        if self.criterion is not None:
            outputs = getattr(outputs, "logits", outputs)
        return (criteria.normalized(outputs) if self.normalize_logits else outputs), target

    def eager(self) -> AbstractContextManager[Any]:
        """Inside it compiled submodules, which have no double backward, run as they were before."""
        if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in self.model.modules()):
            return torch.compiler.set_stance("force_eager")
        return nullcontext()


def may_be_in_ddp() -> bool:
    """Data of another dtype would take a parameter's accumulator of gradients from it, and with it the hooks by which
    DDP averages: training would go on with the gradients of each rank alone. So nothing is widened in place then."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_spread(w: Tensor) -> bool:
    """A DTensor: FSDP2, tensor parallelism."""
    return hasattr(w, "full_tensor")


def _is_narrower(x: Any, dtype: torch.dtype) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.itemsize < dtype.itemsize


def _convolves_on_cpu(model: nn.Module) -> bool:
    """Convolutions in float32 on the CPU: where images with their channels last are faster, and equal to rounding."""
    return any(
        isinstance(m, nn.Conv2d) and m.weight.dtype == torch.float32 and m.weight.device.type == "cpu"
        for m in model.modules()
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DDP, whose reducer waits for a backward that never comes, and inside torch.compile, which has
    no double backward."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model
