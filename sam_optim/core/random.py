"""The only place that draws numbers, and the only one that touches the global generators."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.contexts import undone


class Stream:
    """A seeded stream of draws on the CPU, moved to where they are needed: the same bits on every device, whatever ran
    before. Global generators are neither read nor advanced."""

    def __init__(self, seed: int):
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
        self._generator = torch.Generator().manual_seed(seed)

    def normal_like(self, w: Tensor) -> Tensor:
        """z ~ N(0, 1) for each entry, of the shape, dtype and device of w."""
        return torch.randn(w.shape, generator=self._generator, dtype=_draw_dtype(w)).to(w)

    def rademacher_like(self, w: Tensor) -> Tensor:
        """+1 or -1 with equal probability."""
        return torch.randint(0, 2, w.shape, generator=self._generator, dtype=torch.int8).mul_(2).sub_(1).to(w)

    def uniform_like(self, w: Tensor) -> Tensor:
        """U(0, 1) for each entry."""
        return torch.rand(w.shape, generator=self._generator, dtype=_draw_dtype(w)).to(w)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self._generator)

    def integers(self, high: int, size: tuple[int, ...]) -> Tensor:
        """Uniform on 0 .. high - 1, int64."""
        return torch.randint(high, size, generator=self._generator)


def _draw_dtype(w: Tensor) -> torch.dtype:
    return torch.float64 if w.dtype == torch.float64 else torch.float32


class GlobalState:
    """A snapshot of the global generators: torch's (and those of the CUDA devices asked for), Python's, numpy's."""

    def __init__(self, cuda_devices: Iterable[torch.device] = ()):
        self._cpu = torch.get_rng_state()
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in cuda_devices]
        self._python = random.getstate()
        self._numpy: Any = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)


@contextmanager
def preserved(cuda_devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Restores the global generators at the end."""
    with undone(GlobalState(cuda_devices).restore):
        yield


class Aside:
    """Generators for code that draws from the global ones: inside `with` these are seeded, and continue where the last
    `with` left them; outside it the global ones are as they were."""

    def __init__(self, seed: int, cuda_devices: Iterable[torch.device] = ()):
        self._seed = seed
        self._devices = tuple(cuda_devices)
        self._seeded: GlobalState | None = None

    def __enter__(self) -> None:
        self._before = GlobalState(self._devices)
        if self._seeded is not None:
            self._seeded.restore()
        else:
            _seed_global(self._seed, self._devices)

    def __exit__(self, *exc: object) -> None:
        self._seeded = GlobalState(self._devices)
        self._before.restore()


def _seed_global(seed: int, cuda_devices: Iterable[torch.device]) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds every CUDA device, also those not restored
    for device in cuda_devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
