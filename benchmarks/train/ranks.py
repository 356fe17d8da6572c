"""One process for each device, as torchrun starts them: who this one is, sums over all, stopping together, sharding."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.command import Interrupted, Signals
from sam_optim.core.errors import InputError

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """`size` processes, of which this is number `rank`, and number `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def sum_(self, values: Tensor) -> Tensor:
        """Sums in place over all ranks; every rank must call it."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean_buffers_(self, model: nn.Module) -> None:
        """BatchNorm statistics are those of each rank's own batches: the model that is evaluated and saved has their
        mean."""
        if self.size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    self.sum_(buffer).div_(self.size)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


ALONE = World()


def named(device: str) -> str:
    """The device that "auto" means: CUDA where torch sees it, else the CPU. Other names are as they are."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


@contextmanager
def joined(device: str) -> Iterator[World]:
    """The world of torchrun's variables, or of a process group that exists; otherwise one process alone.

    Yields inside a process group where there are several; it is left at the end.
    """
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", dist.get_rank())))
        return
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    cuda = named(device).startswith("cuda")
    if cuda:
        count = torch.cuda.device_count()
        if not count:
            raise InputError(f"--device {device} cannot be used here: there is no CUDA device; try --device cpu")
        torch.cuda.set_device(world.local_rank % count)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield world
    finally:
        dist.destroy_process_group()
        # DDP keeps the threads of its process group alive, and one that lets go of a tensor while Python shuts down
        # aborts the process: it gets the time to do it now
        time.sleep(0.1)


class Agreed:
    """Signals of any rank, raised on all of them after the same update: one that stopped alone would leave the others
    waiting for it.

    The flags of one update are exchanged on the CPU while the next one is computed, so that nothing waits for them.
    """

    def __init__(self, signals: Signals, world: World):
        self.signals = signals
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.pending: tuple[Any, Tensor] | None = None

    def check(self) -> None:
        """Raises `Interrupted`; with several ranks all must call it."""
        if self.group is None:
            self.signals.check()
            return
        self.settle()
        flag = torch.tensor([self.signals.received or 0])
        self.pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag)

    def check_here(self) -> None:
        """Where ranks are not synchronized: only a single process may stop here."""
        if self.group is None:
            self.signals.check()

    def settle(self) -> None:
        """Waits for the flags that are under way, and raises `Interrupted` for them."""
        if self.pending is not None:
            (work, flag), self.pending = self.pending, None
            work.wait()
            if received := int(flag):
                raise Interrupted(received)


def shard_(model: nn.Module, device: torch.device) -> None:
    """FSDP2: a group for each element of the outermost Sequentials and ModuleLists (blocks, stages), and the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in _parts(model):
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for part in model.modules() if device.type == "cpu" else ():
        if hasattr(part, "set_force_sum_reduction_for_comms"):  # torch 2.8: gloo would sum where an average is meant
            part.set_force_sum_reduction_for_comms(True)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            if any(True for _ in child.parameters()):
                yield child
        else:
            yield from _parts(child)


def full_state(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(model, optimizer); of a sharded model as whole tensors on the CPU of rank 0. Every rank must call it."""
    if not _sharded(model):
        return model.state_dict(), None if optimizer is None else optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if optimizer is None:
        return get_model_state_dict(model, options=options), None
    return get_state_dict(model, optimizer, options=options)


def load_full_state(
    model: nn.Module,
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_state: dict[str, Any] | None = None,
) -> None:
    """The reverse of `full_state`."""
    if not _sharded(model):
        model.load_state_dict(state)
        if optimizer is not None:
            optimizer.load_state_dict(optimizer_state)  # type: ignore[arg-type]
        return
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_state_dict

    options = StateDictOptions(full_state_dict=True)
    if optimizer is None:
        set_model_state_dict(model, state, options=options)
    else:
        set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=optimizer_state, options=options)


def _sharded(model: nn.Module) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in model.parameters())
