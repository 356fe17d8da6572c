"""GradScaler and autocast around two passes: what is skipped, what is scaled, and what stays bit for bit the same."""

import contextlib
import copy
import functools
import math

import pytest
import torch
from torch import nn

from sam_optim import SAM, Perturbation

LOSS = nn.CrossEntropyLoss()
RHO, INTERVAL, CLIP = 0.1, 2, 0.3
BASES = {
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "fused adamw": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
}
# which passes overflow in which iteration
PATTERNS = {
    "none": {},
    "first pass": {1: {1}, 2: {1}},
    "second pass": {1: {2}, 4: {2}},
    "both, and each": {0: {1, 2}, 2: {1}, 3: {2}, 4: {1, 2}},
}
REGIONS = {
    "float32": None,
    "bfloat16": functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "float16": functools.partial(torch.autocast, "cpu", dtype=torch.float16),
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3))


def batch(seed, n=16):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def halves(seed):
    x, y = batch(seed)
    return [(x[:8], y[:8]), (x[8:], y[8:])]


def loss_of(model, x, y, region=None):
    with region() if region else contextlib.nullcontext():
        outputs = model(x)
    return LOSS(outputs.float(), y)


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def state_of(optimizer):
    return [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]


def spoil(model, wanted):
    if wanted:
        model[0].weight.grad[3, 2] = math.inf


class ByHand:
    """SAM, its loss scale and its skipped steps, written out: no SAM, no GradScaler."""

    def __init__(self, base, *, region, scale, clip):
        self.model = network()
        self.base = base(self.model.parameters())
        self.region, self.scale, self.clip = region, scale, clip
        self.tracker = 0

    def gradient(self, x, y, scale, bad):
        self.model.zero_grad()
        (scale * loss_of(self.model, x, y, self.region)).backward()
        spoil(self.model, bad)
        return copies(p.grad for p in self.model.parameters())

    def step(self, parts, bad):
        params = list(self.model.parameters())
        # powers of 2 make no difference, except to what float16 can hold
        scale = self.scale if self.region is REGIONS["float16"] else 1.0
        total = None
        for x, y in parts:
            start = copies(params)
            g = self.gradient(x, y, scale / len(parts), 1 in bad)
            buffers = copies(self.model.buffers())
            norm = float(torch.linalg.vector_norm(torch.cat([t.flatten() for t in g])))
            with torch.no_grad():
                for p, t in zip(params, g, strict=True):
                    p.add_(t, alpha=RHO / norm if math.isfinite(norm) else math.nan)
            g = self.gradient(x, y, scale / len(parts), 2 in bad)
            with torch.no_grad():
                for t, value in zip((*params, *self.model.buffers()), (*start, *buffers), strict=True):
                    t.copy_(value)
            total = g if total is None else [a + b for a, b in zip(total, g, strict=True)]
        if all(bool(t.isfinite().all()) for t in total):
            for p, t in zip(params, total, strict=True):
                p.grad = t / scale
            if self.clip:
                nn.utils.clip_grad_norm_(params, CLIP)
            self.base.step()
            self.tracker += 1
            if self.tracker == INTERVAL:
                self.scale, self.tracker = 2 * self.scale, 0
            return True
        self.scale, self.tracker = self.scale / 2, 0
        return False


class WithScaler:
    """A way to write the loop; `model`, `sam` and `base` are its own."""

    def __init__(self, way, base, *, region, scale, clip):
        self.model, self.way, self.region, self.clip = network(), way, region, clip
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=INTERVAL)
        if way == "perturbation":
            self.base = self.optimizer = base(self.model.parameters())
            self.sam = Perturbation(self.model, rho=RHO)
        else:
            self.sam = self.optimizer = SAM(self.model.parameters(), base, rho=RHO, module=self.model)
            self.base = self.optimizer.base_optimizer

    def backward(self, x, y, bad, share=1):
        self.scaler.scale(loss_of(self.model, x, y, self.region) / share).backward()
        spoil(self.model, bad)

    def step(self, parts, bad):
        if self.way == "first_step":
            ((x, y),) = parts
            self.backward(x, y, 1 in bad)
            self.optimizer.first_step(zero_grad=True)
            self.backward(x, y, 2 in bad)
        else:
            for x, y in parts:
                with self.sam.microbatch() if self.way == "microbatch" else contextlib.nullcontext():
                    self.backward(x, y, 1 in bad, len(parts))
                    with self.sam.perturbed():
                        self.backward(x, y, 2 in bad, len(parts))
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("way", ["contexts", "first_step", "microbatch", "perturbation"])
def test_a_stock_grad_scaler_is_the_loop_by_hand_bit_for_bit(way, base, clip, region, pattern):
    """One `update()` an iteration, no `unscale_` before the ascent; an overflow in either pass is a step
    that is left out, with half the scale from then on."""
    options = {"region": REGIONS[region], "scale": 1024.0, "clip": clip}
    hand, ours = ByHand(BASES[base], **options), WithScaler(way, BASES[base], **options)
    taken = []
    for i in range(6):
        parts = halves(i) if way == "microbatch" else [batch(i)]
        before, state = copies(ours.model.parameters()), copies(state_of(ours.base))
        bad = PATTERNS[pattern].get(i, set())
        taken.append(hand.step(parts, bad))
        ours.step(parts, bad)
        if not taken[-1]:
            assert equal(ours.model.parameters(), before)
            assert equal(state_of(ours.base)[: len(state)], state)
        assert equal(ours.model.parameters(), hand.model.parameters())
        assert equal(ours.model.buffers(), hand.model.buffers())
        assert (ours.scaler.get_scale(), ours.scaler._get_growth_tracker()) == (hand.scale, hand.tracker)
    assert taken == [not PATTERNS[pattern].get(i) for i in range(6)]
    assert equal(state_of(ours.base), state_of(hand.base))


@pytest.mark.parametrize("way", ["contexts", "first_step", "microbatch", "perturbation"])
def test_a_scale_that_float16_cannot_hold_comes_down_as_by_hand(way):
    """Overflows as they happen: in both passes, until the scale is one that fits."""
    options = {"region": REGIONS["float16"], "scale": 2.0**22, "clip": False}
    hand, ours = ByHand(BASES["momentum"], **options), WithScaler(way, BASES["momentum"], **options)
    skipped = 0
    for i in range(12):
        parts = halves(i) if way == "microbatch" else [batch(i)]
        skipped += not hand.step(parts, set())
        ours.step(parts, set())
        assert equal(ours.model.parameters(), hand.model.parameters())
        assert (ours.scaler.get_scale(), ours.scaler._get_growth_tracker()) == (hand.scale, hand.tracker)
    assert 3 <= skipped < 10


@pytest.mark.parametrize("way", ["contexts", "first_step", "perturbation"])
def test_the_scale_goes_as_without_sam(way):
    """The same overflows, in either pass, in a plain loop with the same scaler."""
    pattern = {1: {1, 2}, 2: {1}, 5: {2}, 6: {2}}
    ours = WithScaler(way, BASES["momentum"], region=None, scale=1024.0, clip=False)
    model = network()
    plain = BASES["momentum"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=INTERVAL)
    for i in range(10):
        bad = pattern.get(i, set())
        ours.step([batch(i)], bad)
        plain.zero_grad()
        scaler.scale(loss_of(model, *batch(i))).backward()
        spoil(model, bad)
        scaler.step(plain)
        scaler.update()
        assert ours.scaler.state_dict() == scaler.state_dict()


@pytest.mark.parametrize("region", ["bfloat16", "float16"])
@pytest.mark.parametrize("way", ["closure", "contexts", "first_step", "list"])
def test_one_region_around_both_passes_or_one_around_each_gives_the_same_bits(way, region):
    """Autocast keeps low-precision copies of the weights for the length of a region, which are of w, not of w + e."""
    region, runs = REGIONS[region], []
    for around_both, rho in ((False, 2.0), (True, 2.0), (False, 0.0)):
        model = network()
        optimizer = SAM(model.parameters(), BASES["momentum"], rho=rho, module=model)
        for i in range(3):
            x, y = batch(i)

            def closure(x=x, y=y, model=model, optimizer=optimizer, inner=None if around_both else region):
                optimizer.zero_grad()
                loss = loss_of(model, x, y, inner)
                loss.backward()
                return loss

            with region() if around_both else contextlib.nullcontext():
                if way == "closure":
                    optimizer.step(closure)
                elif way == "list":
                    optimizer.step([closure])
                elif way == "contexts":
                    closure()
                    with optimizer.perturbed():
                        closure()
                    optimizer.step()
                else:
                    closure()
                    optimizer.first_step(zero_grad=True)
                    closure()
                    optimizer.second_step(zero_grad=True)
        runs.append(copies((*model.parameters(), *model.buffers())))
    each, both, plain = runs
    assert equal(each, both)
    assert not equal(each, plain)


@pytest.mark.parametrize("region", ["bfloat16", "float16"])
def test_an_ascent_in_lower_precision_than_the_descent(region):
    model, hand = network(), network()
    optimizer = SAM(model.parameters(), BASES["momentum"], rho=RHO, module=model)
    base = BASES["momentum"](hand.parameters())

    def closure(x, y, inner):
        optimizer.zero_grad()
        loss = loss_of(model, x, y, inner)
        loss.backward()
        return loss

    for i in range(3):
        x, y = batch(i)
        loss = loss_of(hand, x, y, REGIONS[region])
        g = torch.autograd.grad(loss, list(hand.parameters()))
        start, buffers = copies(hand.parameters()), copies(hand.buffers())
        norm = float(torch.linalg.vector_norm(torch.cat([t.flatten() for t in g])))
        with torch.no_grad():
            for p, t in zip(hand.parameters(), g, strict=True):
                p.add_(t, alpha=RHO / norm)
        base.zero_grad()
        loss_of(hand, x, y).backward()
        with torch.no_grad():
            for t, value in zip((*hand.parameters(), *hand.buffers()), (*start, *buffers), strict=True):
                t.copy_(value)
        base.step()
        first, second = (functools.partial(closure, x, y, r) for r in (REGIONS[region], None))
        assert torch.equal(optimizer.step(second, ascent_closure=first), loss)
        assert equal(model.parameters(), hand.parameters())


# what is refused, and what is left of it


def test_a_closure_given_to_the_scaler_is_refused_in_every_state_and_leaves_none():
    """The right loop, continued after the error, is the right loop."""
    for base in BASES.values():
        for how, state in (("positional", "clean"), ("keyword", "clean"), ("positional", "perturbed")):
            models = [network(), network()]
            optimizers = [SAM(m.parameters(), base, rho=RHO, module=m) for m in models]
            scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0) for _ in models]
            for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):

                def backward(model=model, scaler=scaler):
                    scaler.scale(loss_of(model, *batch(0))).backward()
                    return torch.ones(())

                def attempt(backward=backward, model=model, optimizer=optimizer, scaler=scaler, how=how, state=state):
                    weights = copies(model.parameters())
                    message = "still scaled" if how == "positional" else "Closure use is not currently supported"
                    given = ((backward,), {}) if how == "positional" else ((), {"closure": backward})
                    with pytest.raises(RuntimeError, match=message):
                        scaler.step(optimizer, *given[0], **given[1])
                    assert equal(model.parameters(), weights)
                    assert optimizer.perturbation.active == (state == "perturbed")

                backward()
                if optimizer is optimizers[0] and state == "clean":
                    attempt()
                    if how == "positional":
                        scaler.update()  # it has looked at this optimizer's gradients before it called `step`
                optimizer.first_step(zero_grad=True)
                backward()
                if optimizer is optimizers[0] and state == "perturbed":
                    attempt()
                scaler.step(optimizer)
                scaler.update()
            assert equal(models[0].parameters(), models[1].parameters())
            assert not equal(models[0].parameters(), network().parameters())


def test_a_base_that_fails_under_the_scaler_is_stepped_again_with_gradients_unscaled_once():
    """GradScaler takes its scale back from the optimizer only after a step that returns."""
    models = [network(), network()]
    for fails, model in zip((True, False), models, strict=True):
        optimizer = SAM(model.parameters(), BASES["momentum"], rho=RHO)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(loss_of(model, *batch(0))).backward()
        optimizer.first_step(zero_grad=True)
        scaler.scale(loss_of(model, *batch(0))).backward()
        if fails:
            grads = copies(p.grad for p in model.parameters())
            optimizer.param_groups[0]["lr"] = "fast"
            with pytest.raises((TypeError, RuntimeError, ValueError)):
                scaler.step(optimizer)
            optimizer.param_groups[0]["lr"] = 0.1
            assert equal(model.parameters(), network().parameters())
            optimizer.state.clear()
            for p, g in zip(model.parameters(), grads, strict=True):
                p.grad = g
        scaler.step(optimizer)
        scaler.update()
    assert equal(*(m.parameters() for m in models))


@pytest.mark.parametrize("how", ["positional", "keyword"])
def test_a_disabled_scaler_passes_closures_on(how):
    """`enabled=False` is how loops switch mixed precision off: it is then no scaler at all."""
    model, twin = network(), network()
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def closure(model, optimizer):
        optimizer.zero_grad()
        loss = scaler.scale(loss_of(model, *batch(0)))
        loss.backward()
        return loss

    optimizers = [SAM(m.parameters(), BASES["momentum"], rho=RHO) for m in (model, twin)]
    first, second = (functools.partial(closure, m, o) for m, o in zip((model, twin), optimizers, strict=True))
    loss = scaler.step(optimizers[0], first) if how == "positional" else scaler.step(optimizers[0], closure=first)
    scaler.update()
    assert torch.equal(loss, optimizers[1].step(second))
    assert equal(model.parameters(), twin.parameters())


@pytest.mark.filterwarnings("ignore:a gradient at w")
def test_two_updates_an_iteration_as_folk_recipes_have_it_do_not_reach_the_weights_with_an_overflow():
    """unscale_ and update() in each pass: counts growth twice, but must not write an infinity to the weights."""
    model = network()
    optimizer = SAM(model.parameters(), BASES["momentum"], rho=RHO)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    start = copies(model.parameters())
    for bad in ({1}, {2}, {1, 2}, set()):
        before = copies(model.parameters())
        for number, finish in ((1, optimizer.first_step), (2, optimizer.second_step)):
            scaler.scale(loss_of(model, *batch(0))).backward()
            spoil(model, number in bad)
            scaler.unscale_(optimizer)
            finish(zero_grad=True)
            scaler.update()
        assert equal(model.parameters(), before) == bool(bad)
    assert not equal(model.parameters(), start)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert optimizer.num_skipped == 3


def test_a_skipped_step_does_not_become_the_next_one_and_schedulers_are_not_warned():
    """After a skip the scaler has not called `step`: the next iteration is complete, and not half of this one."""
    model, twin = network().eval(), network().eval()
    optimizer = SAM(model.parameters(), BASES["momentum"], rho=RHO)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def passes(bad):
        scaler.scale(loss_of(model, *batch(0))).backward()
        with optimizer.perturbed():
            scaler.scale(loss_of(model, *batch(0))).backward()
            spoil(model, bad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    passes(False)
    scheduler.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    passes(True)
    assert equal(model.state_dict().values(), saved[0].values())
    scaler.scale(loss_of(model, *batch(0))).backward()
    with pytest.raises(RuntimeError, match="plain gradients"):
        scaler.step(optimizer)  # of this iteration there was only one pass
    optimizer.zero_grad()
    scaler.update()
    passes(False)
    other = SAM(twin.parameters(), BASES["momentum"], rho=RHO)
    twin.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    loss_of(twin, *batch(0)).backward()
    with other.perturbed():
        loss_of(twin, *batch(0)).backward()
    other.step()
    assert equal(model.parameters(), twin.parameters())
