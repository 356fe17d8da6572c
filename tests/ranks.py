"""Two processes that train together: `spawn(worker, ...)` runs a function of this folder's test modules on each rank."""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def _main(rank, world, file, worker, args, results, timeout):
    import datetime
    import warnings

    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.*")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=timeout)
    )
    try:
        results.put((rank, worker(rank, *args)))
    finally:
        dist.destroy_process_group()


def spawn(worker, *args, world=WORLD, timeout=120):
    """What worker(rank, *args) returned on each rank; plain Python, for it is pickled."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_main, (world, f"{folder}/store", worker, args, results, timeout), nprocs=world)
    found = dict(results.get() for _ in range(world))
    return [found[rank] for rank in range(world)]
