"""Loops with torch alone: contexts, closures, GradScaler and schedulers, against SAM written out by hand."""

import functools

import pytest
import torch
from by_hand import LOSS, Overflows, batches, largest_difference, network, seed_step, sgd, train

from sam_optim import SAM, Perturbation

MATRIX = [(accumulate, clip) for accumulate in (1, 2) for clip in (None, 0.2)]


def reference(**kwargs):
    model = network()
    train(model, sgd(model), batches(), rho=0.1, **kwargs)
    return model


def contexts(model, kind):
    """What has microbatch() and perturbed(), and the optimizer to step."""
    if kind == "Perturbation":
        return Perturbation(model, rho=0.1), sgd(model)
    optimizer = SAM.wrap(sgd(model), rho=0.1, module=model)
    return optimizer, optimizer


@pytest.mark.parametrize(("accumulate", "clip"), MATRIX)
@pytest.mark.parametrize("kind", ["Perturbation", "SAM"])
def test_the_contexts_in_a_plain_loop(kind, accumulate, clip):
    model = network()
    sam, optimizer = contexts(model, kind)
    for i, (x, y) in enumerate(batches()):
        if i % accumulate == 0:
            seed_step(i // accumulate)
        with sam.microbatch():
            (LOSS(model(x), y) / accumulate).backward()
            with sam.perturbed():
                (LOSS(model(x), y) / accumulate).backward()
        if (i + 1) % accumulate == 0:
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(model, reference(accumulate=accumulate, clip=clip)) == 0.0
    assert largest_difference(model, reference_without_sam(accumulate, clip)) > 1e-3


@functools.cache
def reference_without_sam(accumulate, clip):
    model = network()
    train(model, sgd(model), batches(), rho=0.0, accumulate=accumulate, clip=clip)
    return model


def closure_for(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    return closure


def test_closures_in_a_plain_loop():
    model = network()
    optimizer = SAM.wrap(sgd(model), rho=0.1, module=model)
    losses = []
    for i, (x, y) in enumerate(batches()):
        seed_step(i)
        losses.append(optimizer.step(closure_for(model, optimizer, x, y)).item())
    truth = network()
    assert losses == train(truth, sgd(truth), batches(), rho=0.1)
    assert largest_difference(model, truth) == 0.0


def test_a_list_of_closures_is_accumulation():
    model = network()
    optimizer = SAM.wrap(sgd(model), rho=0.1, module=model)
    data = batches()
    for k in range(len(data) // 2):
        seed_step(k)
        optimizer.step([closure_for(model, optimizer, x, y) for x, y in data[2 * k :][:2]])
    assert largest_difference(model, reference(accumulate=2)) == 0.0


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=9),  # moves momentum, too
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [3],
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("way", ["closure", "contexts"])
def test_schedulers_move_the_learning_rate_of_the_base(name, way):
    model, truth = network(), network()
    plain = sgd(truth)
    train(truth, plain, batches(), rho=0.1, after=SCHEDULERS[name](plain).step)
    optimizer = SAM.wrap(sgd(model), rho=0.1, module=model)
    scheduler = SCHEDULERS[name](optimizer)
    for i, (x, y) in enumerate(batches()):
        seed_step(i)
        if way == "closure":
            optimizer.step(closure_for(model, optimizer, x, y))
        else:
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            with optimizer.perturbed():
                LOSS(model(x), y).backward()
            optimizer.step()
        scheduler.step()
    assert largest_difference(model, truth) == 0.0
    assert scheduler.get_last_lr() == [plain.param_groups[0]["lr"]]


def test_a_plateau_is_seen_in_the_loss_that_step_returns():
    model, truth = network(), network()
    plain = sgd(truth)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(plain, patience=0, factor=0.5)
    for i, batch in enumerate(batches()):
        torch.manual_seed(i)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("by_hand.seed_step", lambda k: None)
            (loss,) = train(truth, plain, [batch], rho=0.1)
        plateau.step(loss)
    optimizer = SAM.wrap(sgd(model), rho=0.1, module=model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for i, (x, y) in enumerate(batches()):
        torch.manual_seed(i)
        scheduler.step(optimizer.step(closure_for(model, optimizer, x, y)).item())
    assert largest_difference(model, truth) == 0.0
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"] < 0.1


# GradScaler

SCALE = 2.0**16  # torch's first one; a power of two, which changes no digit of a gradient


def scaled_loop(model, sam, optimizer, scaler, *, accumulate, clip, autocast, loss_of=lambda m, x, y: LOSS(m(x), y)):
    """The loop of the documentation of torch.amp, with two backwards."""

    def loss(x, y):
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            return loss_of(model, x, y) / accumulate

    for i, (x, y) in enumerate(batches()):
        if i % accumulate == 0:
            seed_step(i // accumulate)
        with sam.microbatch():
            scaler.scale(loss(x, y)).backward()
            with sam.perturbed():
                scaler.scale(loss(x, y)).backward()
        if (i + 1) % accumulate == 0:
            if clip is not None:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()


@pytest.mark.parametrize(("accumulate", "clip"), MATRIX)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("kind", ["Perturbation", "SAM"])
def test_the_contexts_with_a_gradient_scaler(kind, autocast, accumulate, clip):
    model = network()
    scaler = torch.amp.GradScaler("cpu")
    scaled_loop(model, *contexts(model, kind), scaler, accumulate=accumulate, clip=clip, autocast=autocast)
    dtype = torch.float16 if autocast else None
    truth = reference(accumulate=accumulate, clip=clip, scale=SCALE, autocast=dtype)
    assert largest_difference(model, truth) == 0.0
    assert scaler.get_scale() == SCALE


@pytest.mark.parametrize(("accumulate", "clip"), MATRIX)
@pytest.mark.parametrize("calls", [(4,), (5,), (4, 5), (0, 1, 14, 15)], ids=str)
@pytest.mark.parametrize("kind", ["Perturbation", "SAM"])
def test_an_overflow_skips_the_step_once_and_nothing_else(kind, calls, accumulate, clip):
    """At w, at w + e or in both: one step less, and the weights are as by hand."""
    model = network()
    scaler = torch.amp.GradScaler("cpu")
    overflows = Overflows(*calls)
    scaled_loop(
        model, *contexts(model, kind), scaler, accumulate=accumulate, clip=clip, autocast=False, loss_of=overflows
    )
    truth = reference(accumulate=accumulate, clip=clip, scale=SCALE, loss_of=Overflows(*calls))
    assert largest_difference(model, truth) == 0.0
    skipped = {call // 2 // accumulate for call in calls}
    assert scaler.get_scale() == SCALE / 2 ** len(skipped)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("calls", [(), (4,), (5,)], ids=str)
def test_the_two_steps_with_a_gradient_scaler(calls, clip):
    """No context: GradScaler calls `step` with the weights still at w + e, also where it finds an overflow."""
    model = network()
    optimizer, scaler, loss_of = (
        SAM.wrap(sgd(model), rho=0.1, module=model),
        torch.amp.GradScaler("cpu"),
        Overflows(*calls),
    )
    for i, (x, y) in enumerate(batches()):
        seed_step(i)
        scaler.scale(loss_of(model, x, y)).backward()
        optimizer.first_step(zero_grad=True)
        scaler.scale(loss_of(model, x, y)).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert largest_difference(model, reference(clip=clip, scale=SCALE, loss_of=Overflows(*calls))) == 0.0
    assert scaler.get_scale() == SCALE / 2 ** len(calls)
