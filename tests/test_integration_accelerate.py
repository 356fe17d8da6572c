"""Accelerate: no module of ours, the contexts around prepared objects, against SAM written out by hand."""

import itertools
import socket

import pytest
import torch
from by_hand import LOSS, Overflows, add_sam_gradient, batches, largest_difference, network, seed_step, sgd, train

from sam_optim import ASAM, SAM, Perturbation, asam_param_groups

MATRIX = [(accumulate, clip) for accumulate in (1, 2) for clip in (None, 0.2)]
DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 2.0**16


@pytest.fixture
def accelerator():
    """Makes one for the CPU; its state is one for the whole process, and is forgotten before."""
    pytest.importorskip("accelerate")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def forget():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def make(precision="no", **kwargs):
        forget()
        made = Accelerator(cpu=True, mixed_precision=precision, **kwargs)
        if precision == "fp16":  # Accelerate leaves it out on a CPU, and then does with these what it does on a GPU
            made.native_amp, made.scaler = True, torch.amp.GradScaler("cpu")
        return made

    return make


def prepared(accelerator, model, optimizer):
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    return accelerator.prepare(model, optimizer, loader)


def loop(accelerator, model, sam, optimizer, loader, *, clip, loss_of=lambda m, x, y: LOSS(m(x), y)):
    """The loop of Accelerate's documentation, with two backwards. Returns whether each step was skipped."""
    skipped = []
    for i, (x, y) in enumerate(loader):
        if i % accelerator.gradient_accumulation_steps == 0:
            seed_step(i // accelerator.gradient_accumulation_steps)
        with accelerator.accumulate(model):
            with sam.microbatch():
                accelerator.backward(loss_of(model, x, y))
                with sam.perturbed():
                    accelerator.backward(loss_of(model, x, y))
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients:
                skipped.append(optimizer.step_was_skipped)
    return skipped


def by_hand(precision, *, accumulate, clip, **kwargs):
    model = network()
    scale = SCALE if precision == "fp16" else 1.0
    kwargs |= {"accumulate": accumulate, "clip": clip, "scale": scale, "autocast": DTYPES[precision]}
    train(model, sgd(model), batches(), rho=0.1, **kwargs)
    return model


@pytest.mark.parametrize(("accumulate", "clip"), MATRIX)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", ["Perturbation", "SAM"])
def test_the_contexts_around_prepared_objects(kind, precision, accumulate, clip, accelerator):
    accelerator, model = accelerator(precision, gradient_accumulation_steps=accumulate), network()
    optimizer = sgd(model) if kind == "Perturbation" else SAM.wrap(sgd(model), rho=0.1, module=model)
    model, optimizer, loader = prepared(accelerator, model, optimizer)
    sam = Perturbation(model, rho=0.1) if kind == "Perturbation" else optimizer.optimizer
    assert not any(loop(accelerator, model, sam, optimizer, loader, clip=clip))
    assert largest_difference(model, by_hand(precision, accumulate=accumulate, clip=clip)) == 0.0


@pytest.mark.parametrize(("accumulate", "clip"), MATRIX)
@pytest.mark.parametrize("call", [4, 5], ids=["at w", "at w + e"])
@pytest.mark.parametrize("kind", ["Perturbation", "SAM"])
def test_an_overflow_in_fp16_skips_the_step(kind, call, accumulate, clip, accelerator):
    accelerator, model = accelerator("fp16", gradient_accumulation_steps=accumulate), network()
    optimizer = sgd(model) if kind == "Perturbation" else SAM.wrap(sgd(model), rho=0.1, module=model)
    model, optimizer, loader = prepared(accelerator, model, optimizer)
    sam = Perturbation(model, rho=0.1) if kind == "Perturbation" else optimizer.optimizer
    skipped = loop(accelerator, model, sam, optimizer, loader, clip=clip, loss_of=Overflows(call))
    assert skipped == [k == 2 // accumulate for k in range(8 // accumulate)]
    assert accelerator.scaler.get_scale() == SCALE / 2
    truth = by_hand("fp16", accumulate=accumulate, clip=clip, loss_of=Overflows(call))
    assert largest_difference(model, truth) == 0.0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_closure_for_the_prepared_optimizer(precision, accelerator):
    accelerator, model = accelerator(precision), network()
    model, optimizer, loader = prepared(accelerator, model, SAM.wrap(sgd(model), rho=0.1, module=model))
    for i, (x, y) in enumerate(loader):
        seed_step(i)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
    assert largest_difference(model, by_hand(precision, accumulate=1, clip=None)) == 0.0


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps=2.*optimizer.optimizer.microbatch\(\)"),
        ({"precision": "fp16"}, "gradients that are still scaled"),
    ],
    ids=["accumulating", "fp16"],
)
def test_closures_that_accelerate_would_not_run_or_not_unscale_are_refused(kwargs, what, accelerator):
    accelerator, model = accelerator(**kwargs), network()
    start = [p.detach().clone() for p in model.parameters()]
    model, optimizer, loader = prepared(accelerator, model, SAM(model.parameters(), rho=0.1, lr=0.1))

    def epoch():
        for x, y in loader:
            with accelerator.accumulate(model):

                def closure(x=x, y=y):
                    optimizer.zero_grad()
                    loss = LOSS(model(x), y)
                    accelerator.backward(loss)
                    return loss

                if kwargs.get("precision") == "fp16":
                    closure()  # the scaler looks at gradients before it calls step
                optimizer.step(closure)

    with pytest.raises(RuntimeError, match=what):
        epoch()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))


def test_preparing_keeps_groups_and_schedules_together(accelerator):
    """`prepare` loads the optimizer's own state_dict into it, which replaces its groups."""
    accelerator, model, truth = accelerator(), network(), network()
    groups = asam_param_groups(model)
    optimizer = ASAM(groups, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, weight_decay=0.01, module=model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    loader = torch.utils.data.DataLoader(batches(), batch_size=None)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for i, (x, y) in enumerate(loader):
        seed_step(i)
        accelerator.backward(LOSS(model(x), y))
        with optimizer.optimizer.perturbed():
            accelerator.backward(LOSS(model(x), y))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    plain = sgd(truth)
    weights, others = ([p for p in truth.parameters() if (p.ndim > 1) == large] for large in (True, False))
    after = torch.optim.lr_scheduler.StepLR(plain, 2, gamma=0.5).step
    train(truth, plain, batches(), rho=0.1, groups=[(weights, 0.01), (others, None)], after=after)
    assert largest_difference(model, truth) == 0.0
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] == 0.1 / 2**4


def without_randomness():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3))


def on_one_rank(rank, port, results):
    import os

    from accelerate import Accelerator

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    data = [(x[4 * rank :][:4], y[4 * rank :][:4]) for x, y in batches()]
    for shared, (accumulate, clip) in itertools.product((None, True), MATRIX):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
        model = without_randomness()
        model, optimizer = accelerator.prepare(model, sgd(model))
        assert type(model) is torch.nn.parallel.DistributedDataParallel
        loop(accelerator, model, Perturbation(model, rho=0.1, sync_ascent=shared), optimizer, data, clip=clip)
        results[rank, shared, accumulate, clip] = [p.detach() for p in model.parameters()]
    accelerator.end_training()


@pytest.mark.slow
def test_two_ranks():
    """Each rank has its own perturbation, or all have one; gradients are averaged in the last micro-batch of a step."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(on_one_rank, (port, results), nprocs=2)
        results = dict(results)
    for shared, (accumulate, clip) in itertools.product((None, True), MATRIX):
        model = without_randomness()
        optimizer = sgd(model)
        parts = [slice(None)] if shared else [slice(4), slice(4, None)]
        share = accumulate * len(parts)
        for i, (x, y) in enumerate(batches()):
            for part in parts:

                def loss_at(m, x=x[part], y=y[part], share=share):
                    return LOSS(m(x), y) / share

                add_sam_gradient(model, loss_at, rho=0.1)
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        first, second = (results[rank, shared, accumulate, clip] for rank in (0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for w, p in zip(first, model.parameters(), strict=True):
            torch.testing.assert_close(w, p.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["sam", "around"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_monitor_attached_to_the_prepared_optimizer_sees_every_step(accelerator, kind, accumulate):
    from sam_optim import Loss, SharpnessMonitor

    weights = []
    for watched in (False, True):
        prepared_by = accelerator(gradient_accumulation_steps=accumulate)
        model = network()
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1) if kind == "sam" else sgd(model)
        model, optimizer, loader = prepared(prepared_by, model, optimizer)
        sam = optimizer.optimizer.perturbation if kind == "sam" else Perturbation(model, rho=0.1)
        monitor = SharpnessMonitor(Loss(model, LOSS, batches()[:2]), every=1, budget=None)
        if watched:
            monitor.attach(optimizer, **({} if kind == "sam" else {"perturbation": sam}))
        loop(prepared_by, model, sam, optimizer, loader, clip=None)
        weights.append([p.detach().clone() for p in model.parameters()])
        assert len(monitor.history) == (len(batches()) // accumulate if watched else 0)
        assert all(row["worst_case"] > 0 for row in monitor.history)
    assert all(map(torch.equal, *weights))
