"""DistributedDataParallel on two processes: against the definition, computed by one process on both batches."""

import contextlib
import copy
import os
import time
import warnings

import pytest
import ranks
import torch
import torch.distributed as dist
from limits import PATIENCE
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from sam_optim import ASAM, SAM, Perturbation

LOSS = nn.CrossEntropyLoss()
STEPS = 4


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batch(i, rank, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 * i + rank)
    return torch.randn(8, 6, generator=generator, dtype=dtype), torch.randint(3, (8,), generator=generator)


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def gradient(model, loss):
    return torch.autograd.grad(loss(model), list(model.parameters()))


def moved(model, grads, rho, eta):
    """A copy of the model at w + e, by the formula."""
    weights = list(model.parameters())
    t = [torch.ones_like(w) if eta is None else w.detach().abs() + eta for w in weights]
    length = sum((s * g).square().sum() for s, g in zip(t, grads, strict=True)).sqrt()
    there = copy.deepcopy(model)
    with torch.no_grad():
        for p, s, g in zip(there.parameters(), t, grads, strict=True):
            p += rho * s**2 * g / length
    return there


def definition(losses_of_step, *, shared, rho=0.2, eta=None):
    """w <- w - lr mean_r grad L_r(w + e_r): e_r by rank r's own gradient, or `shared`, by that of the mean."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for losses in losses_of_step:
        ascents = [gradient(model, loss) for loss in losses]
        if shared:
            ascents = [[sum(g) / len(losses) for g in zip(*ascents, strict=True)]] * len(losses)
        descents = [gradient(moved(model, g, rho, eta), loss) for g, loss in zip(ascents, losses, strict=True)]
        for p, *g in zip(model.parameters(), *descents, strict=True):
            p.grad = sum(g) / len(losses)
        optimizer.step()
    return flat(model)


def loss_on(i, rank):
    x, y = batch(i, rank)
    return lambda model: LOSS(model(x), y)


def two_losses_on(i, rank):
    """Mean over two micro-batches."""
    return lambda model: (loss_on(2 * i, rank)(model) + loss_on(2 * i + 1, rank)(model)) / 2


class Counted:
    """How often gradients were exchanged."""

    def __init__(self, ddp):
        self.buckets = 0
        ddp.register_comm_hook(None, self.reduce)

    def reduce(self, _, bucket):
        self.buckets += 1
        future = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True).get_future()
        return future.then(lambda f: f.value()[0])


def train(rank, path, options):
    ddp = DDP(network(), **options.pop("ddp", {}))
    exchanged = Counted(ddp)
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, module=ddp, lr=0.1, momentum=0.9, **{"rho": 0.2} | options)
    for i in range(STEPS):
        path(ddp, optimizer, i, rank)
    return flat(ddp).tolist(), exchanged.buckets


def by_closure(ddp, optimizer, i, rank):
    def closure():
        optimizer.zero_grad()
        loss = loss_on(i, rank)(ddp)
        loss.backward()
        return loss

    optimizer.step(closure)


def by_contexts(ddp, optimizer, i, rank):
    sync = optimizer.perturbation.sync_ascent
    with contextlib.nullcontext() if sync else ddp.no_sync():
        loss_on(i, rank)(ddp).backward()
    with optimizer.perturbed():
        loss_on(i, rank)(ddp).backward()
    optimizer.step()
    optimizer.zero_grad()


def by_names_of_davda54(ddp, optimizer, i, rank):
    sync = optimizer.perturbation.sync_ascent
    with contextlib.nullcontext() if sync else ddp.no_sync():
        loss_on(i, rank)(ddp).backward()
    optimizer.first_step(zero_grad=True)
    loss_on(i, rank)(ddp).backward()
    optimizer.second_step(zero_grad=True)


def by_microbatch(ddp, optimizer, i, rank):
    """microbatch() keeps DDP from averaging the first gradient; nothing to remember."""
    with optimizer.microbatch():
        loss_on(i, rank)(ddp).backward()
        with optimizer.perturbed():
            loss_on(i, rank)(ddp).backward()
    optimizer.step()
    optimizer.zero_grad()


def by_perturbation(ddp, optimizer, i, rank):
    """The contexts around a plain optimizer."""
    if not hasattr(ddp, "plain"):
        sam = Perturbation(ddp, rho=0.2, sync_ascent=optimizer.perturbation.sync_ascent)
        object.__setattr__(ddp, "plain", (sam, torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)))
    sam, plain = ddp.plain
    by_microbatch(ddp, _Both(sam, plain), i, rank)


class _Both:
    def __init__(self, sam, plain):
        self.microbatch, self.perturbed = sam.microbatch, sam.perturbed
        self.step, self.zero_grad = plain.step, plain.zero_grad


def accumulated(ddp, optimizer, i, rank):
    """Two micro-batches, the first without exchange, as torch documents accumulation under DDP."""
    for j in (0, 1):
        with ddp.no_sync() if j == 0 else contextlib.nullcontext(), optimizer.microbatch():
            (loss_on(2 * i + j, rank)(ddp) / 2).backward()
            with optimizer.perturbed():
                (loss_on(2 * i + j, rank)(ddp) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def accumulated_in_the_closure(ddp, optimizer, i, rank):
    def closure():
        optimizer.zero_grad()
        for j in (0, 1):
            (loss_on(2 * i + j, rank)(ddp) / 2).backward()

    optimizer.step(closure)


def by_closures(ddp, optimizer, i, rank):
    def closure_of(j):
        def closure():
            optimizer.zero_grad()
            loss_on(2 * i + j, rank)(ddp).backward()

        return closure

    optimizer.step([closure_of(0), closure_of(1)])


SINGLE = [by_closure, by_contexts, by_names_of_davda54, by_microbatch, by_perturbation]
DOUBLE = [accumulated, by_closures]


def all_paths(rank):
    """Every way of stepping; one process group for all of them."""
    result = {}
    for shared in (False, True):
        sync = {"sync_ascent": True} if shared else {}
        for path in SINGLE + DOUBLE + [accumulated_in_the_closure]:
            result[path.__name__, shared, "SAM"] = train(rank, path, dict(sync))
        for name, ddp in (("views", {"gradient_as_bucket_view": True}), ("unused", {"find_unused_parameters": True})):
            for path in (by_closure, by_microbatch, accumulated, by_closures):
                result[path.__name__, shared, name] = train(rank, path, sync | {"ddp": ddp})
        result["by_closure", shared, "ASAM"] = train(rank, by_closure, sync | {"adaptive": True, "eta": 0.1})
        result["by_closure", shared, "foreach"] = train(rank, by_closure, sync | {"foreach": True})
    return result


@pytest.fixture(scope="module")
def trained():
    return ranks.spawn(all_paths)


@pytest.mark.parametrize("shared", [False, True], ids=["each rank's own e", "sync_ascent"])
def test_every_way_of_stepping_is_the_definition(trained, shared):
    first, second = trained
    single = [[loss_on(i, 0), loss_on(i, 1)] for i in range(STEPS)]
    for (path, was_shared, variant), (weights, _) in first.items():
        if was_shared != shared:
            continue
        eta = 0.1 if variant == "ASAM" else None
        if path == "accumulated_in_the_closure":
            truth = definition([[two_losses_on(i, 0), two_losses_on(i, 1)] for i in range(STEPS)], shared=shared)
        elif path in ("accumulated", "by_closures"):  # each micro-batch has its own e
            truth = torch.tensor(_definition_of_microbatches(shared), dtype=torch.float64)
        else:
            truth = definition(single, shared=shared, eta=eta)
        torch.testing.assert_close(
            torch.tensor(weights, dtype=torch.float64), truth, rtol=0, atol=1e-12, msg=lambda m, p=path: f"{p}: {m}"
        )
        assert weights == second[path, shared, variant][0], f"{path}: ranks differ"


def _definition_of_microbatches(shared):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i in range(STEPS):
        total = None
        for j in (2 * i, 2 * i + 1):
            losses = [loss_on(j, 0), loss_on(j, 1)]
            ascents = [gradient(model, loss) for loss in losses]
            if shared:
                ascents = [[sum(g) / 2 for g in zip(*ascents, strict=True)]] * 2
            for g, loss in zip(ascents, losses, strict=True):
                part = [x / 4 for x in gradient(moved(model, g, 0.2, None), loss)]
                total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
        for p, g in zip(model.parameters(), total, strict=True):
            p.grad = g
        optimizer.step()
    return flat(model).tolist()


def test_gradients_are_exchanged_once_a_step(trained):
    """The whole point of m-sharpness under DDP: SAM's first pass costs no communication."""
    for path in [p.__name__ for p in SINGLE + DOUBLE]:
        assert trained[0][path, False, "SAM"][1] == STEPS
    for path in [p.__name__ for p in SINGLE]:
        assert trained[0][path, True, "SAM"][1] == 2 * STEPS


def many_steps(rank, steps, shared):
    ddp = DDP(network(torch.float32))
    optimizer = ASAM(ddp.parameters(), torch.optim.AdamW, module=ddp, rho=0.3, lr=1e-3, sync_ascent=shared)
    for i in range(steps):
        x, y = batch(i % 7, rank, torch.float32)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = LOSS(ddp(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return flat(ddp).tolist()


@pytest.mark.parametrize("steps", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_replicas_are_equal_bit_for_bit_after_many_steps(steps):
    for shared in (None, True):
        first, second = ranks.spawn(many_steps, steps, shared)
        assert first == second
        assert torch.tensor(first).isfinite().all()


def faults(rank):
    """NaN on one rank, in either pass, and what the ranks have afterwards."""
    result = {}
    warnings.filterwarnings("ignore", "a gradient at w")
    for shared in (None, True):
        for where in ("ascent", "descent", "p.grad of the descent", "p.grad of the ascent"):
            ddp = DDP(network())
            optimizer = SAM(ddp.parameters(), module=ddp, rho=0.2, lr=0.1, momentum=0.9, sync_ascent=shared)
            by_closure(ddp, optimizer, 0, rank)
            passes = []
            before = flat(ddp).tolist()
            momentum = [s["momentum_buffer"].clone() for s in optimizer.state.values()]

            def closure(optimizer=optimizer, ddp=ddp, passes=passes, where=where):
                passes.append(None)
                optimizer.zero_grad()
                loss = loss_on(1, rank)(ddp)
                bad = rank == 1 and len(passes) == (1 if "ascent" in where else 2)
                (loss * float("nan") if bad and "p.grad" not in where else loss).backward()
                if bad and "p.grad" in where:
                    next(iter(ddp.parameters())).grad[0, 0] = float("inf")
                return loss

            optimizer.step(closure)
            after = flat(ddp).tolist()
            kept = all(
                torch.equal(s["momentum_buffer"], m) for s, m in zip(optimizer.state.values(), momentum, strict=True)
            )
            by_closure(ddp, optimizer, 2, rank)
            result[str(shared), where] = {
                "passes": len(passes),
                "stood still": after == before and kept,
                "weights": after,
                "later": flat(ddp).tolist(),
                "skipped": int(optimizer.num_skipped),
            }
    return result


def test_a_gradient_that_is_not_finite_on_one_rank_leaves_ranks_equal():
    first, second = ranks.spawn(faults)
    for key, a in first.items():
        b = second[key]
        assert a["weights"] == b["weights"], key
        assert a["later"] == b["later"], key
        assert torch.tensor(a["later"]).isfinite().all(), key
        assert a["passes"] == b["passes"] == 2, key
        assert a["skipped"] == b["skipped"] == 1, key
        assert a["stood still"], key
        assert b["stood still"], key


def recipe_that_does_nothing(rank):
    """davda54's README: only the backward inside no_sync. DDP decides in the forward."""
    ddp = DDP(network())
    result = []
    for shared in (None, True):
        optimizer = SAM(ddp.parameters(), module=ddp, rho=0.2, lr=0.1, sync_ascent=shared)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for i in range(3):
                loss = loss_on(i, rank)(ddp)
                with ddp.no_sync():
                    loss.backward()
                optimizer.first_step(zero_grad=True)
                loss_on(i, rank)(ddp).backward()
                optimizer.second_step(zero_grad=True)
        result.append([str(w.message) for w in caught])
    return result


def test_no_sync_around_the_backward_only_is_noticed():
    for own, shared in ranks.spawn(recipe_that_does_nothing):
        assert len(own) == 1
        assert "ascent gradients of all ranks are the same" in own[0]
        assert not shared


def statistics(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    plain = DDP(copy.deepcopy(model))
    ddp = DDP(model)
    optimizer = SAM(ddp.parameters(), module=ddp, rho=0.2, lr=0.0)
    for i in range(3):
        x, y = batch(i, rank, torch.float32)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            LOSS(ddp(x), y).backward()

        optimizer.step(closure)
        LOSS(plain(x), y).backward()
    return [torch.equal(a, b) for a, b in zip(ddp.buffers(), plain.buffers(), strict=True)]


def test_batchnorm_statistics_are_those_of_the_plain_loop():
    assert ranks.spawn(statistics) == [[True] * 3] * 2


def dies(rank, folder, point):
    ddp = DDP(network())
    optimizer = SAM(ddp.parameters(), module=ddp, rho=0.2, lr=0.1, sync_ascent=True)
    by_closure(ddp, optimizer, 0, rank)
    before = flat(ddp)
    passes = []

    def closure():
        passes.append(None)
        optimizer.zero_grad()
        if rank == 1 and len(passes) == point:
            os._exit(0)
        loss = loss_on(1, rank)(ddp)
        loss.backward()
        return loss

    try:
        optimizer.step(closure)
        outcome = "went on"
    except RuntimeError:
        outcome = "raised"
    restored = torch.equal(flat(ddp), before) and not optimizer.perturbation.active
    torch.save({"outcome": outcome, "restored": restored}, f"{folder}/{rank}.pt")
    os._exit(0)


@pytest.mark.parametrize("point", [1, 2], ids=["before pass 1", "before pass 2"])
def test_when_a_rank_dies_the_others_raise_with_their_weights_restored(tmp_path, point):
    import torch.multiprocessing as mp

    file = tmp_path / "store"
    start = time.monotonic()
    mp.spawn(_start_and_die, (str(file), str(tmp_path), point), nprocs=2)
    assert torch.load(tmp_path / "0.pt", weights_only=True) == {"outcome": "raised", "restored": True}
    assert time.monotonic() - start < PATIENCE  # and not the half hour of the process group


def _start_and_die(rank, file, folder, point):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    dies(rank, folder, point)


def uneven(rank):
    """One rank has more batches than the other, inside DDP's own `join`."""
    ddp = DDP(network())
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, module=ddp, rho=0.2, lr=0.1)
    with ddp.join():
        for i in range(2 + 2 * rank):
            by_closure(ddp, optimizer, i, rank)
    return flat(ddp).tolist()


def test_uneven_inputs_inside_join():
    first, second = ranks.spawn(uneven)
    assert first == second
    assert first != flat(network()).tolist()


def static_graph(rank):
    try:
        ddp = DDP(network(), static_graph=True)
        SAM(ddp.parameters(), torch.optim.SGD, module=ddp, rho=0.2, lr=0.1)
    except ValueError as error:
        own = str(error)
    ddp = DDP(network(), static_graph=True)
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, module=ddp, sync_ascent=True, rho=0.2, lr=0.1, momentum=0.9)
    for i in range(STEPS):
        by_closure(ddp, optimizer, i, rank)
    return own, flat(ddp).tolist()


def test_a_static_graph_averages_in_both_passes_or_is_refused():
    truth = definition([[loss_on(i, 0), loss_on(i, 1)] for i in range(STEPS)], shared=True)
    for own, weights in ranks.spawn(static_graph):
        assert "pass sync_ascent=True" in own
        torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), truth, rtol=0, atol=1e-12)


class Skipping(nn.Module):
    """A layer that only the first pass uses, on one rank: stochastic depth, a mixture of experts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.extra, self.head = (nn.Linear(6, 6).double() for _ in range(3))
        self.uses_extra = True

    def forward(self, x):
        x = self.first(x).tanh()
        return self.head(x + self.extra(x) if self.uses_extra else x)


def skipping(rank):
    ddp = DDP(Skipping(), find_unused_parameters=True)
    optimizer = SAM(ddp.parameters(), torch.optim.SGD, module=ddp, rho=0.2, lr=0.1, momentum=0.9)
    for i in range(3):
        calls = []

        def closure(i=i, calls=calls):
            calls.append(None)
            optimizer.zero_grad()
            ddp.module.uses_extra = rank == 0 or len(calls) == 1
            loss = loss_on(i, rank)(ddp)
            loss.backward()
            return loss

        optimizer.step(closure)
    return flat(ddp).tolist()


def test_a_layer_that_only_the_first_pass_uses():
    model = Skipping()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i in range(3):
        total = [torch.zeros_like(p) for p in model.parameters()]
        for rank in (0, 1):
            model.uses_extra = True
            there = moved(model, gradient(model, loss_on(i, rank)), 0.2, None)
            there.uses_extra = rank == 0
            loss_on(i, rank)(there).backward()
            for t, p in zip(total, there.parameters(), strict=True):
                t += 0 if p.grad is None else p.grad / 2
        for p, t in zip(model.parameters(), total, strict=True):
            p.grad = t
        optimizer.step()
    first, second = ranks.spawn(skipping)
    assert first == second
    torch.testing.assert_close(torch.tensor(first, dtype=torch.float64), flat(model), rtol=0, atol=1e-12)


def named_before_it_was_wrapped(rank):
    """timm's train.py makes the optimizer before the wrapper."""
    model = nn.Linear(4, 2)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, module=model)
    ddp = DDP(model)
    x = torch.randn(8, 4)

    def passes():
        ddp(x).square().mean().backward()
        with optimizer.perturbed():
            ddp(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with pytest.warns(UserWarning, match=r"inside a DistributedDataParallel.*optimizer\.module = ddp"):
        passes()
    optimizer.module = ddp
    with optimizer.microbatch():
        ddp(x).square().mean().backward()
        with optimizer.perturbed():
            ddp(x).square().mean().backward()
    optimizer.step()
    return True


def test_a_module_that_is_wrapped_later_is_noticed():
    assert ranks.spawn(named_before_it_was_wrapped) == [True, True]
