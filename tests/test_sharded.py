"""FSDP2, hybrid, tensor parallel, FSDP1 and ZeRO on two processes (four for meshes): against one process."""

import functools
import io
import warnings

import pytest
import ranks
import torch
import torch.distributed.checkpoint as dcp
from test_ddp import LOSS, batch, by_closure, flat, gradient, loss_on, moved, network
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel as DDP

from sam_optim import SAM, Perturbation

STEPS = 4
GEOMETRIES = {
    "SAM": {"rho": 0.2},
    "ASAM": {"rho": 0.2, "adaptive": True, "eta": 0.1},
    "filter": {"rho": 0.2, "adaptive": "filter", "eta": 0.1},
    "layer": {"rho": 0.2, "adaptive": "layer", "eta": 0.1},
    "inf": {"rho": 0.02, "norm": float("inf")},
    "inf, adaptive": {"rho": 0.02, "norm": float("inf"), "adaptive": True},
    "for-loop": {"rho": 0.2, "foreach": False},
}
BASE = functools.partial(torch.optim.AdamW, lr=0.01)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def full(model):
    return torch.cat([whole(p).detach().reshape(-1) for p in model.parameters()])


def both(i):
    """The batches of both ranks as one."""
    pairs = [batch(i, rank) for rank in range(ranks.WORLD)]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def train(model, optimizer, inputs, steps=range(STEPS)):
    for i in steps:
        x, y = inputs(i)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return optimizer


def single(options, base=BASE):
    model = network()
    optimizer = train(model, SAM(model.parameters(), base, **options), both)
    return flat(model).tolist(), *lengths(optimizer.last_step)


def lengths(step):
    return [float(x) for x in (step.dual_norm, step.grad_norm, step.radius, step.perturbation_norm)]


def assert_close(found, truth):
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), torch.tensor(truth, dtype=torch.float64), rtol=1e-9, atol=1e-11
    )


def sharded(model):
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def fsdp2(rank):
    result = {}
    for name, options in GEOMETRIES.items():
        model = sharded(network())
        optimizer = SAM(model.parameters(), BASE, module=model, **options)
        train(model, optimizer, lambda i: batch(i, rank))
        step = optimizer.last_step
        result[name] = full(model).tolist(), *lengths(step)
        assert all(isinstance(s["exp_avg"], DTensor) for s in optimizer.state.values())
    model = sharded(network())  # contexts, and a plain optimizer
    sam, plain = Perturbation(model, rho=0.2), BASE(model.parameters())
    for i in range(STEPS):
        x, y = batch(i, rank)
        LOSS(model(x), y).backward()
        pointers = [p.to_local().data_ptr() for p in model.parameters()]
        with sam.perturbed():
            LOSS(model(x), y).backward()
            clean = model.state_dict()
        assert [p.to_local().data_ptr() for p in model.parameters()] == pointers
        for name, p in model.named_parameters():  # state_dict() in the second pass was that of the clean weights
            assert torch.equal(whole(clean[name]), whole(p))
        plain.step()
        plain.zero_grad()
    result["contexts"] = full(model).tolist()
    return result


def test_fsdp2_is_one_process():
    first, second = ranks.spawn(fsdp2)
    assert first == second
    for name, options in GEOMETRIES.items():
        weights, *truth = single(options)
        assert_close(first[name][0], weights)
        assert_close(first[name][1:], truth)
    assert_close(first["contexts"], single(GEOMETRIES["SAM"])[0])


def parallel(model, mesh):
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def tensor_parallel(rank):
    """The first layer by columns, the second by rows, the last one whole on each rank: mixed, and plain."""
    result = {}
    mesh = init_device_mesh("cpu", (ranks.WORLD,))
    for name, options in GEOMETRIES.items():
        model = parallel(network(), mesh)
        optimizer = SAM(model.parameters(), functools.partial(BASE, foreach=False), module=model, **options)
        train(model, optimizer, both)
        result[name] = full(model).tolist(), *lengths(optimizer.last_step)
    return result


def test_tensor_parallel_is_one_process():
    first, second = ranks.spawn(tensor_parallel)
    assert first == second
    for name, options in GEOMETRIES.items():
        weights, *truth = single(options, functools.partial(BASE, foreach=False))
        assert_close(first[name][0], weights)
        assert_close(first[name][1:], truth)


def meshes(rank):
    """Hybrid sharding on 2 x 2, and FSDP2 of a tensor-parallel model."""
    result = {}
    hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = network()
    for layer in (model[0], model[2], model[4], model):
        fully_shard(layer, mesh=hybrid)
    optimizer = SAM(model.parameters(), BASE, module=model, rho=0.2)
    train(model, optimizer, lambda i: tuple(z.chunk(4)[rank] for z in both(i)))
    result["hybrid"] = full(model).tolist()
    assert optimizer.perturbation.together

    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for name in ("SAM", "ASAM", "filter", "layer"):
        model = parallel(network(), grid["tensor"])
        for layer in (model[0], model[2], model[4], model):
            fully_shard(layer, mesh=grid["data"])
        optimizer = SAM(model.parameters(), functools.partial(BASE, foreach=False), module=model, **GEOMETRIES[name])
        train(model, optimizer, lambda i: tuple(z.chunk(2)[rank // 2] for z in both(i)))
        result["grid", name] = full(model).tolist()
    return result


def test_meshes_of_two_dimensions_are_one_process():
    result = ranks.spawn(meshes, world=4)
    assert all(f == result[0] for f in result)
    assert_close(result[0]["hybrid"], single(GEOMETRIES["SAM"])[0])
    for name in ("SAM", "ASAM", "filter", "layer"):
        assert_close(result[0]["grid", name], single(GEOMETRIES[name])[0])


def fsdp1(rank):
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    result = {}
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD):
        for original in (True, False):
            for name in ("SAM", "ASAM", "inf"):
                model = FullyShardedDataParallel(
                    network(), sharding_strategy=strategy, use_orig_params=original, device_id=torch.device("cpu")
                )
                optimizer = SAM(model.parameters(), BASE, module=model, **GEOMETRIES[name])
                train(model, optimizer, lambda i: batch(i, rank))
                with FullyShardedDataParallel.summon_full_params(model):
                    weights = flat(model).tolist()
                result[str(strategy), original, name] = weights, float(optimizer.last_step.dual_norm)
    try:
        SAM(model.parameters(), BASE, rho=0.2)
        result["refused"] = None
    except RuntimeError as error:
        result["refused"] = str(error)
    return result


def test_fsdp1_has_the_radius_of_the_whole_model():
    first, second = ranks.spawn(fsdp1)
    assert first == second
    assert "pass module=" in first.pop("refused")
    for (_, _, name), (weights, norm) in first.items():
        truth = single(GEOMETRIES[name])
        assert_close(weights[: len(truth[0])], truth[0])
        assert_close(norm, truth[1])


def checkpoints(rank, folder):
    """Two ranks save; what they go on to is what one rank that loads it must go on to."""
    model = sharded(network())
    optimizer = SAM(model.parameters(), BASE, module=model, rho=0.2)
    train(model, optimizer, lambda i: batch(i, rank))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    train(model, optimizer, lambda i: batch(i, rank), range(STEPS, 2 * STEPS))
    on = full(model).tolist()

    fresh = sharded(network())
    resumed = SAM(fresh.parameters(), BASE, module=fresh, rho=0.05)
    weights, state = get_state_dict(fresh, resumed)
    result = {"model": weights, "optimizer": state}
    dcp.load(result, checkpoint_id=folder)
    set_state_dict(fresh, resumed, model_state_dict=result["model"], optim_state_dict=result["optimizer"])
    assert resumed.param_groups[0]["rho"] == 0.2
    train(fresh, resumed, lambda i: batch(i, rank), range(STEPS, 2 * STEPS))
    assert full(fresh).tolist() == on
    return on


def test_a_checkpoint_of_two_ranks_goes_on_on_one(tmp_path):
    first, second = ranks.spawn(checkpoints, str(tmp_path))
    assert first == second
    model = network()
    optimizer = SAM(model.parameters(), BASE, module=model, rho=0.05)
    weights, state = get_state_dict(model, optimizer)
    result = {"model": weights, "optimizer": state}
    with pytest.warns(UserWarning, match="assuming the intent is to load in a single process"):
        dcp.load(result, checkpoint_id=str(tmp_path), no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=result["model"], optim_state_dict=result["optimizer"])
    train(model, optimizer, both, range(STEPS, 2 * STEPS))
    assert_close(flat(model).tolist(), first)


def zero(rank, options):
    ddp = DDP(network())
    base = functools.partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW, lr=0.01, **options)
    optimizer = SAM(ddp.parameters(), base, module=ddp, rho=0.2)
    for i in range(STEPS):
        by_closure(ddp, optimizer, i, rank)
    owned = sum("exp_avg" in s for s in optimizer.base_optimizer.optim.state.values())
    skipped = by_poisoned_closure(ddp, optimizer, rank)
    optimizer.consolidate_state_dict(to=0)
    buffer = io.BytesIO()
    if rank == 0:
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
    return flat(ddp).tolist(), owned, skipped, rank != 0 or len(torch.load(buffer, weights_only=True)["state"])


def by_poisoned_closure(ddp, optimizer, rank):
    """A gradient of inf on rank 1 only, after the exchange: ZeRO's ranks wait for each other's part of the update."""
    before, calls = flat(ddp), []
    warnings.filterwarnings("ignore", "a gradient at w")

    def closure():
        calls.append(None)
        optimizer.zero_grad()
        loss = loss_on(0, rank)(ddp)
        loss.backward()
        if rank == 1 and len(calls) == 2:
            next(iter(ddp.parameters())).grad.fill_(float("inf"))
        return loss

    optimizer.step(closure)
    return torch.equal(flat(ddp), before) and optimizer.num_skipped == 1


@pytest.mark.parametrize("views", [False, True])
def test_zero_redundancy_optimizer_as_base(views):
    first, second = ranks.spawn(zero, {"parameters_as_bucket_view": views})
    model = network()
    optimizer = BASE(model.parameters())
    for i in range(STEPS):
        losses = [loss_on(i, 0), loss_on(i, 1)]
        parts = [gradient(moved(model, gradient(model, loss), 0.2, None), loss) for loss in losses]
        for p, *g in zip(model.parameters(), *parts, strict=True):
            p.grad = sum(g) / 2
        optimizer.step()
    assert_close(first[0], flat(model).tolist())
    assert first[0] == second[0]
    assert first[1] + second[1] == len(list(model.parameters()))  # state is held once
    assert first[2]
    assert second[2]
    assert first[3] == len(list(model.parameters()))


def refusals(rank):
    result = {}

    def refused(name, function):
        try:
            function()
            result[name] = None
        except (ValueError, RuntimeError) as error:
            result[name] = str(error)

    model = sharded(network())
    x, y = batch(0, rank)
    refused("per-rank ascent", lambda: Perturbation(model, sync_ascent=False))
    optimizer = SAM(model.parameters(), BASE, module=model, rho=0.2)
    model.set_requires_gradient_sync(False)
    LOSS(model(x), y).backward()
    refused("no exchange", optimizer.first_step)
    model.set_requires_gradient_sync(True)
    optimizer.zero_grad()

    model.set_reshard_after_backward(False)
    LOSS(model(x), y).backward()
    refused("stale weights", optimizer.first_step)
    return result


def test_what_sharded_models_cannot_do_is_an_error_that_says_so():
    for result in ranks.spawn(refusals):
        assert "can only move together" in result["per-rank ascent"]
        assert "set_requires_gradient_sync(True)" in result["no exchange"]
        assert "set_reshard_after_backward" in result["stale weights"]


def faults(rank):
    """NaN in one rank's loss, in either pass."""
    result = {}
    warnings.filterwarnings("ignore", "a gradient at w")
    for where in (1, 2):
        model = sharded(network())
        optimizer = train(model, SAM(model.parameters(), BASE, module=model, rho=0.2), lambda i: batch(i, rank))
        before, calls = full(model), []
        steps = [whole(s["step"]).item() for s in optimizer.state.values()]

        def closure(model=model, optimizer=optimizer, calls=calls, where=where):
            calls.append(None)
            optimizer.zero_grad()
            x, y = batch(9, rank)
            loss = LOSS(model(x), y) * (float("nan") if rank == 1 and len(calls) == where else 1.0)
            loss.backward()
            return loss

        optimizer.step(closure)
        stood = torch.equal(full(model), before)
        same_state = steps == [whole(s["step"]).item() for s in optimizer.state.values()]
        train(model, optimizer, lambda i: batch(i, rank))
        result[where] = full(model).tolist(), len(calls), stood, same_state, int(optimizer.num_skipped)
        assert full(model).isfinite().all()
    return result


def test_a_gradient_that_is_not_finite_on_one_shard_is_everybodys():
    first, second = ranks.spawn(faults)
    assert first == second
    for where in (1, 2):
        assert first[where][1:] == (2, True, True, 1)


def low_precision(rank):
    model = sharded(network(torch.bfloat16))
    optimizer = SAM(model.parameters(), BASE, module=model, rho=0.2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(
            model, optimizer, lambda i: tuple(z.bfloat16() if z.is_floating_point() else z for z in batch(i, rank)), [0]
        )
    return float(optimizer.last_step.realized)


def test_what_rounding_leaves_is_measured_over_all_shards():
    first, second = ranks.spawn(low_precision)
    assert first == second
    assert 0.3 < first < 1.2
