"""The whole two-pass step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sam_optim.optim.base_update import takes_found_inf
from sam_optim.optim.sam import SAM

_READS_NO_LR = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)  # where lr is a tensor


class GraphedStep:
    """optimizer.step(closure) as one CUDA graph: forward, backward, ascent, both again, restore, update.

        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9, fused=True, module=model)
        step = GraphedStep(optimizer, lambda x, y: criterion(model(x), y))
        for x, y in loader:
            loss = step(x, y)
            scheduler.step()

    The first calls run as they are, the next one captures, and from then on a call copies its inputs into those of the
    graph and replays it: no Python, no launches one by one. That is worth most where a model is small and the processor
    cannot keep up with the device. Every call is one step of training, captured or not.

    `lr` and `rho` of each group become 0-d tensors on the device; what a scheduler or you put into the group is copied
    into them. (A base other than SGD, Adam and AdamW keeps its lr a number.) Any other hyperparameter that changes, and
    a state that is loaded, cost a step that runs as it is, and another capture. Step hooks run when a step is captured,
    not when it is replayed; so does everything else in Python. Inputs keep their shapes.

    Args:
        optimizer: over parameters on one CUDA device; over SGD with fused=True, over Adam and AdamW with
            capturable=True.
        loss: from the inputs of a call to the loss, a 0-d tensor; forward only.
        warmup: calls before the capture, at least 1: they create the optimizer's state and let libraries choose. One
            more follows where the last of them has changed what a graph would have inside.

    Raises:
        ValueError: parameters that are not on CUDA, a base or an option that a graph cannot hold, warmup < 1.
    """

    def __init__(self, optimizer: SAM, loss: Callable[..., Tensor], *, warmup: int = 3):
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1, the step that creates the optimizer's state, got {warmup}")
        self._device = _device_of(optimizer)
        _check(optimizer)
        self.optimizer = optimizer
        self._loss = loss
        self._left = warmup
        self._stream = torch.cuda.Stream(self._device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured: Any = None
        self._ran: Any = None
        self._scalars: dict[tuple[int, str], Tensor] = {}
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Any = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """One step. The loss at w, which the next call overwrites: `float(loss)` or `loss.clone()` keeps it."""
        self._to_device()
        signature = self._signature()
        if self._graph is None or self._captured != signature:
            # A capture may neither load code nor allocate pinned memory, so a step of exactly this kind must have run
            # before it.
            if self._left > 0 or self._ran != signature:
                self._left = max(0, self._left - 1)
                self._ran = signature
                return self._eagerly(inputs)
            self._capture(inputs)
        self._fill(inputs)
        self._graph.replay()  # type: ignore[union-attr]
        return self._result

    def _to_device(self) -> None:
        """What the groups hold now, in the tensors that the graph reads."""
        for k, group in enumerate(self.optimizer.param_groups):
            keys = ("lr", "rho") if isinstance(self.optimizer.base_optimizer, _READS_NO_LR) else ("rho",)
            for key in keys:
                value, scalar = group.get(key), self._scalars.get((k, key))
                if value is None or value is scalar:
                    continue
                if scalar is None:
                    if key == "rho" and not isinstance(value, Tensor) and value == 0:
                        continue  # a number: a group that does not move, and stays out of the norm
                    scalar = self._scalars[k, key] = torch.empty((), dtype=torch.float32, device=self._device)
                scalar.copy_(value) if isinstance(value, Tensor) else scalar.fill_(value)
                group[key] = scalar

    def _signature(self) -> Any:
        """What is fixed inside a graph: if it changes, another capture is needed."""
        groups = [
            {k: id(v) if isinstance(v, Tensor) else v for k, v in g.items() if k != "params"}
            | {"params": [id(p) for p in g["params"]]}
            for g in self.optimizer.param_groups
        ]
        return groups, id(self.optimizer.state), len(self.optimizer.state)

    def _eagerly(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Runs the step on a separate stream, as the capture will."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._step(inputs)
        current.wait_stream(self._stream)
        return loss

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._graph, self._result = None, None  # their memory
        self._inputs = tuple(x.detach().clone() for x in inputs)
        self.optimizer.zero_grad()  # gradients belong to the graph's own memory
        graph = torch.cuda.CUDAGraph()
        # threads of a data loader that pin memory may continue
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._result = self._step(self._inputs)
        self._graph, self._captured = graph, self._signature()

    def _fill(self, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) != len(self._inputs):
            raise ValueError(f"the graph was captured with {len(self._inputs)} inputs, got {len(inputs)}")
        for static, x in zip(self._inputs, inputs, strict=True):
            if (static.shape, static.dtype) != (x.shape, x.dtype):
                raise ValueError(
                    f"the graph was captured for inputs of {tuple(static.shape)} {static.dtype}, got {tuple(x.shape)} "
                    f"{x.dtype}: drop the last batch, or take that step with optimizer.step(closure)"
                )
            static.copy_(x, non_blocking=True)

    def _step(self, inputs: tuple[Tensor, ...]) -> Tensor:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self._loss(*inputs)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        return self.optimizer.step(closure)


def _device_of(optimizer: SAM) -> torch.device:
    devices = {p.device for group in optimizer.param_groups for p in group["params"]}
    if len(devices) != 1 or (device := next(iter(devices))).type != "cuda":
        raise ValueError(
            f"a CUDA graph holds one CUDA device, and the parameters are on {sorted(map(str, devices))}: move the "
            "model there, or call optimizer.step(closure)"
        )
    return device


def _check(optimizer: SAM) -> None:
    """Raises for options with which a step is decided in Python or on the host, which a graph cannot repeat."""
    base = optimizer.base_optimizer
    for group in optimizer.param_groups:
        if "capturable" in group and not group["capturable"]:
            raise ValueError(f"{type(base).__name__} counts its steps on the CPU: pass capturable=True")
        if isinstance(base, torch.optim.SGD) and not group.get("fused"):
            raise ValueError("SGD copies an lr from the device to the host unless fused=True: pass fused=True")
    if optimizer.param_groups[0].get("sam_step") is not None:
        raise ValueError(
            f"{type(optimizer).__name__} with a schedule has one pass in some steps and two in others, and a graph "
            "always repeats the same passes: call optimizer.step(closure)"
        )
    if optimizer.perturbation.replay_rng:
        raise ValueError("replay_rng=True resets generators from Python, which a graph cannot capture")
    if optimizer.perturbation.rounding != "nearest":
        raise ValueError(
            f"rounding={optimizer.perturbation.rounding!r} runs partly on the CPU, which a graph cannot capture"
        )
    if optimizer.nonfinite == "raise" or (optimizer.nonfinite == "skip" and not takes_found_inf(base)):
        raise ValueError(
            f"nonfinite={optimizer.nonfinite!r} reads gradients back, which a graph cannot: use None over a base "
            "with fused=True, which skips the step on the device"
        )
