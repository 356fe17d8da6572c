"""Accumulation over micro-batches on two ranks, where DistributedDataParallel averages only in the last one."""

import contextlib
import socket

import pytest
import torch
from by_hand import LOSS, batches
from ranks import leave
from torch import nn

from sam_optim import Perturbation

WAYS = [(0.0, False), (0.0, True), (0.1, False), (0.1, True)]  # rho, gradient_as_bucket_view


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(rank, port, results):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for rho, views in WAYS:
        model = network()
        ddp = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=views)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sam = Perturbation(ddp, rho=rho)
        for i, (x, y) in enumerate(batches()):
            x, y = x[4 * rank :][:4], y[4 * rank :][:4]
            with ddp.no_sync() if i % 2 == 0 else contextlib.nullcontext(), sam.microbatch():
                (LOSS(ddp(x), y) / 2).backward()
                with sam.perturbed():
                    (LOSS(ddp(x), y) / 2).backward()
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()
        results[rank, rho, views] = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    leave()


@pytest.fixture(scope="module")
def results():
    with torch.multiprocessing.Manager() as manager:
        result = manager.dict()
        torch.multiprocessing.spawn(run, (free_port(), result), nprocs=2)
        yield dict(result)


@pytest.mark.parametrize(("rho", "views"), WAYS)
def test_ranks_stay_equal_and_average_the_gradients_of_all_their_micro_batches(rho, views, results):
    assert torch.equal(results[0, rho, views], results[1, rho, views])
    alone = network()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for i, (x, y) in enumerate(batches()):
        (LOSS(alone(x), y) / 2).backward()
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    apart = (torch.cat([p.detach().flatten() for p in alone.parameters()]) - results[0, rho, views]).abs().max()
    if rho == 0:
        assert apart < 1e-6  # nothing moves: the plain optimizer on the examples of both, summed in another order
    else:
        assert apart > 1e-3
