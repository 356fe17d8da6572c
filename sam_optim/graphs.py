"""The whole two-pass step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sam_optim.optimizers import SAM


class GraphedStep:
    """optimizer.step(closure) as one CUDA graph: forward, backward, ascent, both again, restore, update.

        step = GraphedStep(optimizer, lambda x, y: criterion(model(x), y))
        for x, y in loader:
            loss = step(x, y)

    The first `warmup` calls run as they are, the next one captures, and from then on a call copies its inputs into
    those of the graph and replays it: no Python, no launches one by one. That is worth most where a model is small and
    the processor cannot keep up with the device. Every call is one step of training, captured or not.

    `lr` and `rho` of each group become 0-d tensors on the device, so that schedulers, which fill them in place, still
    reach the graph; change `rho` by `group["rho"].fill_(0.1)`. What the graph cannot hold is anything decided in Python
    meanwhile: GradScaler, shapes that change, a loss that is looked at. The base must be capturable: SGD is, Adam with
    `capturable=True`.

    Args:
        optimizer: over parameters on one CUDA device.
        loss: from the inputs of a call to the loss, a 0-d tensor; forward only.
        warmup: calls before the capture, at least 1: they create the optimizer's state and let libraries choose.

    Raises:
        ValueError: parameters that are not on CUDA, or warmup < 1.
    """

    def __init__(self, optimizer: SAM, loss: Callable[..., Tensor], *, warmup: int = 3):
        devices = {p.device for group in optimizer.param_groups for p in group["params"]}
        if len(devices) != 1 or (device := next(iter(devices))).type != "cuda":
            raise ValueError(
                f"a CUDA graph holds one CUDA device, and the parameters are on {sorted(map(str, devices))}: move the "
                "model there, or call optimizer.step(closure)"
            )
        if warmup < 1:
            raise ValueError(f"warmup must be at least 1, the step that creates the optimizer's state, got {warmup}")
        for group in optimizer.param_groups:
            for key in ("lr", "rho"):
                group[key] = torch.as_tensor(group[key], dtype=torch.float32, device=device).clone()
        self.optimizer = optimizer
        self._loss = loss
        self._left = warmup
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._result: Any = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        """One step. The loss at w, which the next call overwrites: `float(loss)` or `loss.clone()` keeps it."""
        if self._graph is None and self._left > 0:
            self._left -= 1
            return self._eagerly(inputs)
        if self._graph is None:
            self._capture(inputs)
        self._fill(inputs)
        self._graph.replay()  # type: ignore[union-attr]
        return self._result

    def _eagerly(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """On a stream of its own, as a capture will be."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._step(inputs)
        current.wait_stream(self._stream)
        return loss

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(x.detach().clone() for x in inputs)
        self.optimizer.zero_grad()  # gradients belong to the graph's own memory
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._result = self._step(self._inputs)
        self._graph = graph

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
