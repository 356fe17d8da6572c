"""SharpnessMonitor on two ranks: the numbers of one process, no rank waits for another, training does not notice."""

import math

import pytest
import torch
from ranks import spawn
from torch import nn

from sam_optim import SAM, Loss, SharpnessMonitor

cross_entropy = nn.CrossEntropyLoss()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(4)]


def train(model, optimizer, data, monitor, num=6):
    for i in range(num):
        x, y = data[i % len(data)]

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        if monitor:
            monitor.step(optimizer)


def shown(monitor):
    names = ("step", "lambda_max", "critical_sharpness", "worst_case", "reason")
    return [[row[name] for name in names if name in row] for row in monitor.history]


def on_ddp(rank, watched, budget, folder):
    net = network()
    model = nn.parallel.DistributedDataParallel(net)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, module=model)
    loss = Loss(model, cross_entropy, batches()[rank::2])
    # the first rank takes longer for a row than the second, and both must agree on when the next one is
    measures = ["lambda_max", "critical_sharpness", "worst_case", *([slow_on_first_rank] if budget else [])]
    log = f"{folder}/rows.csv"
    monitor = SharpnessMonitor(loss, every=2, budget=budget, measures=measures, log=log) if watched else None
    train(model, optimizer, batches()[rank::2], monitor, num=40 if budget else 6)
    return [shown(monitor) if watched else [], [p.detach().clone() for p in net.state_dict().values()]]


def slow_on_first_rank(loss):
    import time

    time.sleep(0.02 if loss.rank == 0 else 0.0)
    return 1.0


def alone():
    """The same steps in one process, each with the batches of both ranks: m-sharpness."""
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, module=model)
    monitor = SharpnessMonitor(Loss(model, cross_entropy, batches()), every=2, budget=None)
    for i in range(6):
        pair = [batches()[2 * (i % 2)], batches()[2 * (i % 2) + 1]]

        def closure_of(x, y):
            def closure():
                optimizer.zero_grad()
                loss = cross_entropy(model(x), y)
                loss.backward()
                return loss

            return closure

        optimizer.step([closure_of(*batch) for batch in pair])
        monitor.step(optimizer)
    return shown(monitor)


def test_ddp(tmp_path):
    plain = spawn(on_ddp, False, None, str(tmp_path))
    watched = spawn(on_ddp, True, None, str(tmp_path))
    for (_, a), (_, b) in zip(plain, watched, strict=True):
        assert all(map(torch.equal, a, b))
    (rows, _), (others, _) = watched
    assert rows == others
    assert [row[0] for row in rows] == [2, 4, 6]
    assert all(math.isfinite(x) and x > 0 for row in rows for x in (row[1], row[3]))
    assert all(row[2] or "does not rise" in row[4] for row in rows)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 4
    for row, expected in zip(rows, alone(), strict=True):
        assert row[:4] == [pytest.approx(x, rel=0.02) for x in expected[:4]]


def test_ranks_agree_on_the_next_row(tmp_path):
    (rows, _), (others, _) = spawn(on_ddp, True, 0.2, str(tmp_path))
    assert [row[0] for row in rows] == [row[0] for row in others]
    assert 1 <= len(rows) < 20


def on_fsdp(rank, watched):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()  # of float32, gloo sums in torch 2.8
    mesh = init_device_mesh("cpu", (2,))
    for module in (net[0], net[2], net):
        fully_shard(module, mesh=mesh)
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, module=net)
    measures = ["critical_sharpness"]
    data = [(x.double(), y) for x, y in batches()[rank::2]]
    loss = Loss(net, cross_entropy, data)
    monitor = SharpnessMonitor(loss, every=2, budget=None, measures=measures) if watched else None
    train(net, optimizer, data, monitor)
    weights = [p.full_tensor().detach().clone() for p in net.parameters()]
    refusal = ""
    try:
        loss.value_and_gradient()
    except ValueError as error:
        refusal = str(error)
    return [shown(monitor) if watched else [], weights, float(loss.value()), refusal]


def test_fsdp2_has_critical_sharpness():
    plain, watched = spawn(on_fsdp, False), spawn(on_fsdp, True)
    for a, b in zip(plain, watched, strict=True):
        assert all(map(torch.equal, a[1], b[1]))
    (rows, weights, value, refusal), other = watched
    assert rows == other[0]
    assert [row[0] for row in rows] == [2, 4, 6]
    assert "FSDP2" in refusal
    # the same training in one process: both halves of each batch of the ranks together
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    data = [(x.double(), y) for x, y in batches()]
    joint = [tuple(map(torch.cat, zip(a, b, strict=True))) for a, b in zip(data[0::2], data[1::2], strict=True)]
    optimizer = SAM(net.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, module=net)
    loss = Loss(net, cross_entropy, data)
    monitor = SharpnessMonitor(loss, every=2, budget=None, measures=["critical_sharpness"])
    train(net, optimizer, joint, monitor)
    for w, p in zip(weights, net.parameters(), strict=True):
        torch.testing.assert_close(w, p.detach(), rtol=1e-5, atol=1e-6)
    assert value == pytest.approx(float(loss.value()), rel=1e-5)
    for row, expected in zip(rows, shown(monitor), strict=True):
        assert row[1] == pytest.approx(expected[1], rel=0.04)  # each to 2 %
