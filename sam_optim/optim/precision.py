"""The second pass in float32, for models with bf16 or fp16 weights, whose rounding would swallow most of e."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sam_optim.optim.kernels.bucket import LOW_PRECISION, addresses, are_apart

_SHARDED = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")

Forward = Callable[..., Any]


class Float32Pass:
    """From `enter` to `leave` every bf16 and fp16 parameter and buffer of the module holds a copy in float32.

    The tensor objects stay the same; `leave` returns their own data, which nothing has written to. Gradients of
    the pass are rounded to the dtype of their parameters. `module(...)` converts low-precision arguments to float32,
    and runs with autocast off, which would round the copies again.

    It costs the memory of two float32 copies of the module, which later steps reuse, and a pass with the time,
    activations and gradients of float32. Limits:

    - the outputs are float32: cast low-precision targets where you compute the loss;
    - parts of the module that are called on their own get neither float32 arguments nor protection from autocast, and
      a backward inside an autocast region (which torch advises against) rounds in its products;
    - code that exists only in low precision (the flash-attn package, a cast to bf16 in a forward) cannot run;
    - `GradScaler.unscale_` refuses fp16 gradients, with any rounding: scale the loss by a constant instead.

    Raises:
        ValueError: no module; one that shares its parameters with others (DDP, FSDP, DTensor) or among themselves.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        if len(modules) != 1:
            raise ValueError(
                f"rounding='float32' computes the second pass of one model in float32, got {len(modules)}: pass "
                "module=model"
            )
        module = modules[0]
        for m in module.modules():
            if wrappers := {c.__name__ for c in type(m).__mro__}.intersection(_SHARDED):
                raise ValueError(f"rounding='float32' is for models on one device, got a {wrappers.pop()}: {_INSTEAD}")
        _check_plain([*_distinct(module.parameters()).values()])
        self._module = module
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._data: dict[int, tuple[Tensor, Tensor]] = {}
        self._own_forward: dict[str, Any] = {}
        self._forward: Forward | None = None
        self._made_of: tuple[Forward, set[str]] | None = None

    def enter(self, moving: Iterable[Tensor]) -> None:
        """`moving`: the parameters that are about to move, which must be the module's."""
        params, buffers = (_distinct(tensors) for tensors in (self._module.parameters(), self._module.buffers()))
        if strangers := [p for p in moving if id(p) not in params]:
            raise ValueError(
                f"rounding='float32' computes with the parameters of module, and one of shape "
                f"{tuple(strangers[0].shape)} is not among them: pass the model that holds all that the optimizer moves"
            )
        _check_plain([*params.values()])
        stale, self._copies = self._copies, {}
        for key, tensor in (params | buffers).items():
            owner, copy = stale.get(key, (None, tensor))
            if owner is not tensor or copy.shape != tensor.shape or copy.device != tensor.device:
                copy = torch.empty_like(tensor, dtype=torch.float32)
            self._copies[key] = (tensor, copy.copy_(tensor))
        for key, (tensor, copy) in self._copies.items():
            self._data[key] = (tensor, tensor.data)  # before the change: what is recorded can be brought back
            tensor.data = copy
        torch.autograd.graph.increment_version(
            list(params.values())
        )  # as an in-place change: a backward through graphs of pass 1 must fail
        self._replace_forward({p.device.type for p in params.values()})

    def leave(self) -> None:
        """May be called again after an interrupt."""
        if self._forward is not None and vars(self._module).get("forward") is self._forward:
            if self._own_forward:
                vars(self._module).update(self._own_forward)
            else:
                del vars(self._module)["forward"]
        for tensor, data in self._data.values():
            tensor.data = data
            if isinstance(tensor, nn.Parameter):
                torch.autograd.graph.increment_version(tensor)
                dtype = getattr(tensor, "grad_dtype", None) or data.dtype
                if tensor.grad is not None and tensor.grad.dtype != dtype:
                    tensor.grad = tensor.grad.to(dtype)
        self._data = {}

    def clean(self, tensor: Tensor) -> Tensor | None:
        """The clean value, in its own dtype and storage, of what is a float32 copy now."""
        recorded = self._data.get(id(tensor))
        return None if recorded is None else recorded[1].detach()

    def _replace_forward(self, devices: set[str]) -> None:
        """Sets an attribute of the instance: forward hooks would not be called after a KeyboardInterrupt."""
        self._own_forward = {k: v for k, v in vars(self._module).items() if k == "forward"}
        if self._made_of != (self._module.forward, devices):  # a new function would be compiled again
            self._made_of = self._module.forward, devices
            self._forward = _in_float32(*self._made_of)
        vars(self._module)["forward"] = self._forward


_INSTEAD = "keep the weights in float32 and compute under autocast, or use rounding='stochastic'"


def _distinct(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    return {id(t): t for t in tensors if t.dtype in LOW_PRECISION}


def _check_plain(params: Sequence[Tensor]) -> None:
    """Raises ValueError unless the parameters are plain and share no memory."""
    for p in params:
        if type(p) is not nn.Parameter:
            raise ValueError(f"rounding='float32' is for plain parameters, got a {type(p).__name__}: {_INSTEAD}")
    if not are_apart(params, addresses(params)):
        raise ValueError(
            "two parameters share memory, and rounding='float32' would give each a copy of its own: make them one "
            f"Parameter, or {_INSTEAD}"
        )


def _in_float32(forward: Forward, devices: set[str]) -> Forward:
    for device in sorted(devices):
        forward = _without_autocast(forward, device)

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None:
            raise RuntimeError(
                f"rounding='float32' is for models on one device, and this one is inside a DistributedDataParallel, "
                f"which would not see its gradients: {_INSTEAD}"
            )
        args, kwargs = tree_map_only(Tensor, _wide, (args, kwargs))
        return forward(*args, **kwargs)

    return run


def _without_autocast(forward: Forward, device: str) -> Forward:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return forward(*args, **kwargs)

    return run


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in LOW_PRECISION else x
