"""Two processes that train together: `spawn(worker, ...)` runs a function of a test module on each rank."""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from limits import PATIENCE

WORLD = 2


def _main(rank, world, folder, worker, args, timeout):
    import datetime
    import warnings

    warnings.simplefilter("error")
    for message in (
        "FSDP2-wrapped module .* returned a view",
        "The `NO_SHARD` sharding strategy is deprecated",
        "Deallocating Tensor that still has live PyObject references",  # FSDP1's own in torch 2.8
        "TypedStorage is deprecated",  # torch.distributed.checkpoint's own in torch 2.8
    ):
        warnings.filterwarnings("ignore", message)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    try:
        torch.save(worker(rank, *args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    leave()


def leave():
    """Ends this process. DDP keeps the threads of its process group alive, and one that lets go of a tensor while
    Python shuts down would abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def spawn(worker, *args, world=WORLD, timeout=PATIENCE):
    """What worker(rank, *args) returned on each rank; plain Python, for it is pickled."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_main, (world, folder, worker, args, timeout), nprocs=world)
        return [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(world)]
