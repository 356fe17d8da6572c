"""timm's optimizer factory, scheduler, scaler and weight averages, against SAM written out by hand."""

import argparse
import copy
import importlib
import pickle

import pytest
import torch
from by_hand import LOSS, Overflows, batches, largest_difference, network, seed_step, train

from sam_optim import ASAM, SAM, Ball, asam_param_groups
from sam_optim.integrations.timm import NAMES, register

MATRIX = [(accumulate, clip) for accumulate in (1, 2) for clip in (None, 0.2)]
SCALE = 2.0**16
SETTINGS = {"lr": 0.05, "weight_decay": 0.01}


@pytest.fixture(scope="module", autouse=True)
def _imported():
    global timm
    timm = pytest.importorskip("timm")
    for part in ("optim", "scheduler", "utils"):
        importlib.import_module(f"timm.{part}")
    register()


def base_of(name):
    return "adamw" if name.endswith("adamw") else "sgd"


def vit():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.models.VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_classes=3, drop_path_rate=0.2
        )


def images():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 1, 8, 8, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(6)
    ]


def run(model, optimizer, data, *, after=lambda: None):
    for i, (x, y) in enumerate(data):
        seed_step(i)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = LOSS(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        after()


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("name", NAMES)
def test_groups_and_schedules_are_those_of_the_base(name, layer_decay):
    """Weight decay and the scale of the learning rate of every parameter, before and during a schedule."""

    def settings(kind, **kwargs):
        model = vit()
        optimizer = timm.optim.create_optimizer_v2(model, kind, **SETTINGS, layer_decay=layer_decay, **kwargs)
        scheduler, _ = timm.scheduler.create_scheduler_v2(
            optimizer, "cosine", num_epochs=5, warmup_epochs=2, warmup_lr=0.01
        )
        names = {id(p): n for n, p in model.named_parameters()}
        result = []
        for epoch in range(5):
            scheduler.step(epoch)
            for group in optimizer.param_groups:
                kept = (group["lr"], group["weight_decay"], group.get("lr_scale"))
                result += [(epoch, names[id(p)], *kept) for p in group["params"]]
        return sorted(result), optimizer

    plain, base = settings(base_of(name))
    ours, optimizer = settings(name, rho=0.1)
    assert ours == plain
    assert isinstance(optimizer, SAM)
    assert type(optimizer.base_optimizer) is type(base)
    assert {ball.rho for ball in optimizer.balls} == {0.1}
    assert optimizer.defaults.items() >= base.defaults.items()


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("sam", "asam"))])
def test_training_gives_the_bits_of_sam_by_hand(name, layer_decay):
    model, truth = vit(), vit()
    optimizer = timm.optim.create_optimizer_v2(
        model, name, **SETTINGS, layer_decay=layer_decay, rho=0.1, module=model, eta=0.02
    )
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, "cosine", num_epochs=6, updates_per_epoch=1)
    updates = iter(range(1, 100))
    run(model, optimizer, images(), after=lambda: scheduler.step_update(next(updates)))
    base = timm.optim.create_optimizer_v2(truth, base_of(name), **SETTINGS, layer_decay=layer_decay)
    scheduler, _ = timm.scheduler.create_scheduler_v2(base, "cosine", num_epochs=6, updates_per_epoch=1)
    groups = []
    for group in base.param_groups:
        groups.append((group["params"], 0.02 if isinstance(optimizer, ASAM) else None))
    updates = iter(range(1, 100))
    train(truth, base, images(), rho=0.1, groups=groups, after=lambda: scheduler.step_update(next(updates)))
    assert largest_difference(model, truth) == 0.0


def test_the_groups_of_the_asam_paper_go_through_timms_own_argument():
    model = vit()
    optimizer = timm.optim.create_optimizer_v2(model, "asamsgd", lr=0.1, rho=0.3, param_group_fn=asam_param_groups)
    assert optimizer.balls == [Ball(0.3, adaptive=True), Ball(0.3)]
    assert [len(g["params"]) for g in optimizer.param_groups] == [len(g["params"]) for g in asam_param_groups(vit())]


def test_other_ways_to_hand_over_parameters():
    model = network()
    for params in (model.parameters(), model.named_parameters()):
        balls = timm.optim.create_optimizer_v2(params, "asamsgd", lr=0.1).balls
        assert balls == [Ball(0.5, adaptive=True)]
    groups = [{"params": list(model.parameters()), "adaptive": "filter", "rho": 1.0}]
    assert timm.optim.create_optimizer_v2(groups, "asamsgd", lr=0.1).balls == [Ball(1.0, adaptive="filter")]
    with pytest.raises(TypeError, match="params argument"):
        timm.optim.create_optimizer_v2(model[0].weight, "asamsgd", lr=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        timm.optim.create_optimizer_v2([], "asamsgd", lr=0.1)


def test_arguments_of_the_command_line():
    """As timm's train.py hands them over; what a base does not know is dropped as for the base."""
    args = argparse.Namespace(opt="samsgd", lr=0.1, weight_decay=5e-4, momentum=0.8, opt_eps=1e-8, opt_betas=None)
    args.opt_args = {"rho": 0.2, "norm": float("inf")}
    optimizer = timm.optim.create_optimizer(args, network())
    assert optimizer.ball == Ball(0.2, norm=float("inf"))
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.8, True)
    args = argparse.Namespace(
        opt="samadamw", lr=0.1, weight_decay=0.1, momentum=0.9, opt_eps=1e-6, opt_betas=(0.9, 0.99)
    )
    args.opt_args = {}
    optimizer = timm.optim.create_optimizer(args, network())
    assert (optimizer.defaults["eps"], optimizer.defaults["betas"]) == (1e-6, (0.9, 0.99))


def test_registering_twice_changes_nothing(caplog):
    before = {name: timm.optim.get_optimizer_info(name) for name in NAMES}
    register()
    assert {name: timm.optim.get_optimizer_info(name) for name in NAMES} == before
    assert not caplog.records  # timm warns of a name that is overwritten
    assert set(NAMES) <= set(timm.optim.list_optimizers())
    for name, info in before.items():
        assert issubclass(info.opt_class, torch.optim.Optimizer)
        assert base_of(name) in info.description


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles(name):
    model = network()
    optimizer = timm.optim.create_optimizer_v2(model, name, **SETTINGS, rho=0.1)
    run(model, optimizer, batches(2))
    for other, twin in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        assert type(twin) is type(optimizer)
        continued = copy.deepcopy((model, optimizer))
        run(other, twin, batches(4)[2:])
        run(*continued, batches(4)[2:])
        assert largest_difference(other, continued[0]) == 0.0


def test_inside_lookahead():
    model, truth = network(), network()
    optimizer = timm.optim.create_optimizer_v2(model, "lookahead_samsgd", **SETTINGS, rho=0.1)
    run(model, optimizer, batches())
    base = timm.optim.create_optimizer_v2(truth, "lookahead_sgd", **SETTINGS)
    train(truth, base, batches(), rho=0.1, groups=[(g["params"], None) for g in base.param_groups])
    for p, q in zip(model.parameters(), truth.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("accumulate", "clip"), MATRIX)
@pytest.mark.parametrize("calls", [(), (4,), (5,)], ids=["finite", "overflow at w", "overflow at w + e"])
def test_the_training_loop_of_timm(calls, accumulate, clip):
    """NativeScaler scales, runs the backward, clips, steps and updates in one call: it is given the second pass."""
    model, truth, loss_of = network(), network(), Overflows(*calls)
    optimizer = timm.optim.create_optimizer_v2(model, "samsgd", **SETTINGS, rho=0.1, module=model)
    loss_scaler, average = timm.utils.NativeScaler(device="cpu"), timm.utils.ModelEmaV3(model, decay=0.9)
    scheduler, _ = timm.scheduler.create_scheduler_v2(optimizer, "cosine", num_epochs=2, updates_per_epoch=4)
    for i, (x, y) in enumerate(batches()):
        if i % accumulate == 0:
            seed_step(i // accumulate)
        update = (i + 1) % accumulate == 0
        if accumulate == 1:
            loss_scaler(loss_of(model, x, y), optimizer, need_update=False)
            optimizer.first_step(zero_grad=True)
            loss_scaler(loss_of(model, x, y), optimizer, clip_grad=clip, parameters=model.parameters())
        else:
            with optimizer.microbatch():
                loss_scaler(loss_of(model, x, y) / accumulate, optimizer, need_update=False)
                with optimizer.perturbed():
                    loss_scaler(loss_of(model, x, y) / accumulate, optimizer, need_update=False)
            if update:  # what NativeScaler does after its backward
                scaler = loss_scaler._scaler
                if clip is not None:
                    scaler.unscale_(optimizer)
                    timm.utils.dispatch_clip_grad(model.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
        if update:
            optimizer.zero_grad()
            average.update(model)
            scheduler.step_update((i + 1) // accumulate)
    assert loss_scaler._scaler.get_scale() == SCALE / 2 ** len(calls)

    base = timm.optim.create_optimizer_v2(truth, "sgd", **SETTINGS)
    scheduler, _ = timm.scheduler.create_scheduler_v2(base, "cosine", num_epochs=2, updates_per_epoch=4)
    expected, updates = timm.utils.ModelEmaV3(truth, decay=0.9), iter(range(1, 100))

    def after():
        expected.update(truth)
        scheduler.step_update(next(updates))

    kwargs = {"accumulate": accumulate, "clip": clip, "scale": SCALE, "loss_of": Overflows(*calls)}
    groups = [(g["params"], None) for g in base.param_groups]
    train(truth, base, batches(), rho=0.1, groups=groups, after=after, **kwargs)
    assert largest_difference(model, truth) == 0.0
    assert largest_difference(average, expected) == 0.0


def test_a_training_script_that_knows_of_no_second_pass_is_an_error():
    model, (x, y) = network(), batches(1)[0]
    optimizer = timm.optim.create_optimizer_v2(model, "samsgd", **SETTINGS)
    start = [p.detach().clone() for p in model.parameters()]
    loss_scaler = timm.utils.NativeScaler(device="cpu")
    with pytest.raises(RuntimeError, match="would train the base optimizer alone"):
        loss_scaler(LOSS(model(x), y), optimizer, clip_grad=1.0, parameters=model.parameters())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))
