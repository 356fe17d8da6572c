"""The contract of torch.optim, driven through torch's own database of optimizer inputs.

SAM and ASAM over SGD and AdamW, for-loop, foreach and fused, each compared with torch's own optimizer around a
perturbation that is computed here by hand.
"""

import copy
import functools
import gc
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from sam_optim import ASAM, SAM

pytest.importorskip("expecttest", reason="torch.testing's database of optimizers imports it")
database = pytest.importorskip("torch.testing._internal.common_optimizers")


class _OverSGD:
    base = torch.optim.SGD

    def __init__(self, params, lr=1e-3, **kwargs):
        super().__init__(params, self.base, lr=lr, **kwargs)


class _OverAdamW(_OverSGD):
    base = torch.optim.AdamW


class SAMSGD(_OverSGD, SAM):
    """As a user may define it, and as torch's suite takes optimizers: a class of params and keywords."""


class SAMAdamW(_OverAdamW, SAM):
    pass


class ASAMSGD(_OverSGD, ASAM):
    pass


class ASAMAdamW(_OverAdamW, ASAM):
    pass


def info_of(cls):
    """What torch's database says of the base, for a step that takes a closure."""
    base = next(i for i in database.optim_db if i.optim_cls is cls.base)
    return database.OptimizerInfo(
        cls,
        optim_inputs_func=base.optim_inputs_func,
        optim_error_inputs_func=base.optim_error_inputs_func,
        scheduler_inputs=base.scheduler_inputs,
        supported_impls=tuple(i for i in base.supported_impls if i != "differentiable"),
        not_og_supported_flags=base.not_og_supported_flags,
        supports_fused_on=base.supports_fused_on,
        step_requires_closure=True,
    )


INFOS = {cls.__name__: info_of(cls) for cls in (SAMSGD, SAMAdamW, ASAMSGD, ASAMAdamW)}
# torch's fused kernels for the CPU are wrong for parameters with gaps: torch 2.15, without SAM as with it
SKIP = {True: ("differentiable",), False: ("differentiable", "fused")}
every = pytest.mark.parametrize("info", INFOS.values(), ids=INFOS)


def keywords(info, *, skip=("differentiable",)):
    """Each of the base's inputs, for-loop, foreach and fused."""
    inputs = database._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, info, skip=skip)
    return [copy.deepcopy(i.kwargs) for i in inputs]


def bias_and_weight(seed=0, *, dtype=torch.float32, contiguous=True):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(10, 5, 2, generator=generator).to(dtype)[..., 0]
    bias = torch.randn(10, 2, generator=generator).to(dtype)[..., 0]
    x = torch.randn(5, generator=generator).to(dtype)
    if contiguous:
        weight, bias = weight.contiguous(), bias.contiguous()
    return Parameter(weight), Parameter(bias), x


def closure_of(optimizer, weight, bias, x):
    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).square().sum()
        loss.backward()
        return loss

    return closure


def copies(params):
    return [Parameter(p.detach().clone()) for p in params]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same(a, b):
    """Of nested state: equal to the bit, with the same keys."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def step_by_hand(cls, base, params, gradients, *, rho=None, maximize=False):
    """w <- base(w, g(w + rho T^2 g(w) / ||T g(w)||)): the formula, one flat float64 norm."""
    asam = issubclass(cls, ASAM)
    rho = (0.5 if asam else 0.05) if rho is None else rho
    start = [p.detach().clone() for p in params]
    g = gradients(params)
    t = [(w.abs() + 0.01 if asam else torch.ones_like(w)) for w in start]
    norm = sum((s * d).double().square().sum() for s, d in zip(t, g, strict=True)).sqrt()
    with torch.no_grad():
        for p, s, d in zip(params, t, g, strict=True):
            p.add_((-rho if maximize else rho) * s * s * d / norm)
    for p, d, w in zip(params, gradients(params), start, strict=True):
        p.grad = d
        p.data.copy_(w)
    base.step()


# what is refused, and how


@every
def test_wrong_arguments_raise_and_warn_as_they_do_for_the_base(info):
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        assert case.error_on is database.OptimizerErrorEnum.CONSTRUCTION_ERROR
        context = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
        for cls in (info.optim_cls.base, info.optim_cls):
            with context(case.error_type, match=case.error_regex):
                cls(given.params, **given.kwargs)


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_a_parameter_listed_twice_warns_as_in_torch_and_moves_once(rho):
    """torch updates it twice a step, and so does SAM; but it is perturbed once, and its gradient counts once."""
    start, optimizers = torch.tensor([3.0, 4.0]), []
    for make in (torch.optim.SGD, functools.partial(SAM, rho=rho)):
        p = Parameter(start.clone())
        with pytest.warns(UserWarning, match="duplicate parameters"):
            optimizers.append((make([p, p], lr=0.1), p))
    (plain, expected), (optimizer, p) = optimizers

    def closure():
        optimizer.zero_grad()
        seen.append(p.detach().clone())
        loss = p.square().sum() / 2
        loss.backward()
        return loss

    for way in (optimizer.step, lambda c: optimizer.step([c])):
        seen = []
        w = expected.detach().clone()
        expected.grad = w + rho * w / w.norm()
        plain.step()
        way(closure)
        torch.testing.assert_close(seen[-1], w + rho * w / w.norm())
        torch.testing.assert_close(p.detach(), expected.detach())
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer.add_param_group({"params": [q := Parameter(torch.ones(1)), q]})
    optimizer.step(closure)


# the update


@every
@pytest.mark.parametrize("contiguous", [True, False])
def test_every_input_and_implementation_steps_by_the_formula(info, contiguous):
    for kwargs in keywords(info, skip=SKIP[contiguous]):
        weight, bias, x = bias_and_weight(dtype=torch.float64, contiguous=contiguous)
        params = copies([weight, bias])
        optimizer = info.optim_cls([weight, bias], **kwargs)
        base = info.optim_cls.base(params, **({"lr": 1e-3} | copy.deepcopy(kwargs)))

        def gradients(params, x=x):
            return torch.autograd.grad((params[0].mv(x) + params[1]).square().sum(), params)

        for _ in range(4):
            optimizer.step(closure_of(optimizer, weight, bias, x))
            step_by_hand(info.optim_cls, base, params, gradients, maximize=kwargs.get("maximize", False))
            # fused SGD takes a tensor lr in float32
            for p, q in zip((weight, bias), params, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        for p, q in zip((weight, bias), params, strict=True):
            torch.testing.assert_close(dict(optimizer.state[p]), dict(base.state[q]), rtol=1e-11, atol=1e-13)


@every
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("scheduled", [True, False])
def test_the_loss_goes_in_the_right_direction(info, contiguous, scheduled):
    for schedulers in info.scheduler_inputs if scheduled else [[]]:
        for kwargs in keywords(info, skip=SKIP[contiguous]):
            weight, bias, x = bias_and_weight(contiguous=contiguous)
            groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01}]
            optimizer = info.optim_cls(groups if scheduled and "lr" not in kwargs else [weight, bias], **kwargs)
            chain = [s(optimizer) for s in schedulers]
            closure = closure_of(optimizer, weight, bias, x)
            first = closure().item()
            for _ in range(10):
                loss = optimizer.step(closure)
                for s in chain:
                    plateau = isinstance(s, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    s.step(loss.item()) if plateau else s.step()
            last = closure().item()
            assert last > first if kwargs.get("maximize") else last < first


@every
@pytest.mark.parametrize("lr", [1.0, 1e-3])
def test_a_learning_rate_in_a_tensor_is_that_number(info, lr):
    for kwargs in keywords(info):
        runs = []
        for value in (lr, torch.tensor(lr)):
            weight, bias, x = bias_and_weight()
            try:
                optimizer = info.optim_cls([weight, bias], **kwargs | {"lr": value})
            except ValueError as error:
                assert "lr as a Tensor is not supported" in str(error)  # noqa: PT017
                continue
            for _ in range(5):
                optimizer.step(closure_of(optimizer, weight, bias, x))
            runs.append([weight, bias])
        torch.testing.assert_close(runs[0], runs[-1])


@pytest.mark.parametrize("cls", [SAMSGD, ASAMSGD], ids=lambda c: c.__name__)
@pytest.mark.parametrize("foreach", [None, False, True])
def test_sparse_gradients_are_dense_ones_with_zeros(cls, foreach):
    """One coordinate of Rosenbrock's function at a time, uncoalesced; with foreach beside a dense parameter."""
    runs = []
    for sparse in (True, False):
        w, dense = Parameter(torch.tensor([1.1, 1.3], dtype=torch.float64)), Parameter(torch.ones(3).double())
        optimizer = cls([w, dense], lr=5e-4, rho=0.02, foreach=foreach)

        def closure(i, w=w, dense=dense, optimizer=optimizer, sparse=sparse):
            optimizer.zero_grad()
            x, y = w
            loss = (1 - x) ** 2 + 100 * (y - x**2) ** 2 + dense.square().sum()
            loss.backward()
            g = w.grad[i % 2]
            rows, values = torch.tensor([[i % 2, i % 2]]), torch.stack([g / 4, g - g / 4])
            w.grad = torch.sparse_coo_tensor(rows, values, (2,), check_invariants=True)
            if not sparse:
                w.grad = w.grad.to_dense()
            return loss

        for i in range(60):
            optimizer.step(functools.partial(closure, i))
        runs.append([w.detach(), dense.detach()])
    torch.testing.assert_close(*runs, rtol=1e-12, atol=0)


def complex_forms(start):
    """The same numbers as complex parameters, as pairs, and in halves; and how each makes them complex again."""
    pairs = [(torch.view_as_real(p) if p.is_complex() else p).clone().requires_grad_() for p in start]
    halves = [q.clone().requires_grad_() for p in start for q in ((p.real, p.imag) if p.is_complex() else (p,))]
    whole = [p.clone().requires_grad_() for p in start]

    def of_pairs():
        return [torch.view_as_complex(q) if p.is_complex() else q for p, q in zip(start, pairs, strict=True)]

    def of_halves():
        it = iter(halves)
        return [torch.complex(next(it), next(it)) if p.is_complex() else next(it) for p in start]

    return [(whole, lambda: whole), (pairs, of_pairs), (halves, of_halves)]


@every
def test_complex_parameters_are_pairs_of_real_ones(info):
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(*s, generator=generator, dtype=torch.complex64) for s in ((10, 5), (10,))]
    start.append(torch.randn(4, generator=generator))
    for kwargs in keywords(info, skip=("differentiable", "fused")):
        steps = []
        for params, values in complex_forms(start):
            optimizer = info.optim_cls(params, **copy.deepcopy(kwargs))
            seen = []

            def closure(optimizer=optimizer, values=values, seen=seen):
                optimizer.zero_grad()
                z = values()
                seen.extend(v.detach().clone() for v in z)
                loss = sum((v.abs() ** 2 * (1 + i)).sum() for i, v in enumerate(z)) + (z[0] ** 3).real.sum()
                loss.backward()
                return loss

            for _ in range(3):
                optimizer.step(closure)
            steps.append(seen + [v.detach() for v in values()])  # also w + e, where the closure was
        for other in steps[1:]:
            torch.testing.assert_close(other, steps[0], rtol=1e-4, atol=1e-5)


def small_model(dtype):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid()).to(dtype)
    lone = torch.empty((), dtype=dtype).fill_(0.5).requires_grad_()  # 0-d, and never with a gradient of the model's
    return model, lone, torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], dtype=dtype)


def seven_steps(model, optimizer, x, way):
    """In one step no gradients at all, in two a layer is frozen. Stops after each."""
    for i in range(7):
        model[2].requires_grad_(i not in (3, 4))

        def closure(i=i):
            optimizer.zero_grad()
            if i == 2:
                return torch.zeros(())
            loss = model(x).sum()
            loss.backward()
            return loss

        if way == "closure":
            optimizer.step(closure)
        else:
            if i != 2:
                closure()
                with optimizer.perturbed():
                    closure()
            optimizer.step()
            optimizer.zero_grad()
        yield


@every
@pytest.mark.parametrize("way", ["closure", "contexts"])
@pytest.mark.parametrize(
    ("flag", "dtype"),
    [("foreach", torch.float64), ("fused", torch.float64), ("fused", torch.float32), ("fused", torch.bfloat16)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:only .* of the perturbation survives")
def test_implementations_agree_in_weights_and_state(info, flag, dtype, way):
    """Step by step: each begins where the for-loop is, or rounding would grow."""
    for given in info.optim_inputs_func(device="cpu", dtype=dtype):
        runs = []
        for value in (False, True):
            model, lone, x = small_model(dtype)
            optimizer = info.optim_cls([*model.parameters(), lone], **copy.deepcopy(given.kwargs) | {flag: value})
            runs.append(([*model.parameters(), lone], optimizer, seven_steps(model, optimizer, x, way)))
        (params, optimizer, steps), (others, other, other_steps) = runs
        for _ in zip(steps, other_steps, strict=True):
            for p, q in zip(params, others, strict=True):
                torch.testing.assert_close(p, q)
                torch.testing.assert_close(dict(optimizer.state[p]), dict(other.state[q]))
                q.data.copy_(p)
                for key, value in optimizer.state[p].items():
                    if torch.is_tensor(value):
                        other.state[q][key].copy_(value)


@every
@pytest.mark.parametrize("default", [torch.float64, torch.float16])
def test_the_default_dtype_does_not_matter(info, default):
    runs = []
    for dtype in (torch.float32, default):
        model, lone, x = small_model(torch.float64)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            optimizer = info.optim_cls([*model.parameters(), lone], foreach=True)
            assert len(list(seven_steps(model, optimizer, x, "closure"))) == 7
        finally:
            torch.set_default_dtype(before)
        runs.append(list(model.parameters()))
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-14)


@every
@pytest.mark.parametrize("flag", ["foreach", "fused"])
def test_one_group_of_many_dtypes_has_one_norm(info, flag):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    start = [torch.rand(2, 3, generator=generator).to(d) for d in dtypes * 2]
    grads = [torch.rand(2, 3, generator=generator).to(d) for d in dtypes * 2]
    asam = issubclass(info.optim_cls, ASAM)
    rho = 0.5
    t = [w.double().abs() + 0.01 if asam else torch.ones(2, 3).double() for w in start]
    norm = sum((s * g.double()).square().sum() for s, g in zip(t, grads, strict=True)).sqrt()
    params, seen = [Parameter(p.clone()) for p in start], []
    optimizer = info.optim_cls([*params, torch.arange(3)], rho=rho, **{flag: True})

    def closure():
        seen.append([p.detach().clone() for p in params])
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        return 1.0

    optimizer.step(closure)
    for w, e, s, g in zip(start, seen[1], t, grads, strict=True):
        expected = w.double() + rho * s * s * g.double() / norm
        torch.testing.assert_close(e.double(), expected, rtol=torch.finfo(w.dtype).eps, atol=1e-7)
    assert optimizer.last_step.dual_norm.item() == pytest.approx(norm.item(), rel=1e-6)


@every
def test_parameters_without_data_leave_the_others_alone(info):
    """On the meta device: fused raises torch's own error; else what has data steps as if it were alone."""
    with torch.device("meta"):
        model = nn.Linear(2, 3)
    fused = info.optim_cls(model.parameters(), fused=True)

    def on_meta():
        for p in model.parameters():
            p.grad = torch.rand_like(p)
        return 1.0

    on_meta()
    for step in (fused.step, functools.partial(fused.step, on_meta)):
        with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating point Tensors"):
            step()
    runs = []
    for extra in ([], list(model.parameters())):
        weight, bias, x = bias_and_weight()
        optimizer = info.optim_cls([weight, *extra, bias], foreach=False)

        def closure(optimizer=optimizer, given=(weight, bias, x)):
            loss = closure_of(optimizer, *given)()
            on_meta()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        runs.append([weight, bias])
    assert equal(*runs)


@every
def test_groups_have_their_own_decay_and_rate(info):
    """Each group as an optimizer of its own that shares the perturbation; one with lr 1e-28 does not move at all."""
    for kwargs in keywords(info):
        kwargs.setdefault("lr", 1e-3)
        weight, bias, x = bias_and_weight()
        still = Parameter(torch.tensor([1.0, -2.0]))
        without_decay = copy.deepcopy(kwargs) | {"weight_decay": 0.0}
        groups = [{"params": [weight], **kwargs}, {"params": [bias], **without_decay}, {"params": [still]}]
        twins = copies([weight, bias, still])
        optimizer = info.optim_cls(groups, lr=1e-28)
        flags = {k: kwargs[k] for k in ("maximize",) if k in kwargs}

        def gradients(params, x=x):
            loss = (params[0].mv(x) + params[1]).square().sum() + 3 * params[2].square().sum()
            return torch.autograd.grad(loss, params)

        class Bases:
            bases = (
                info.optim_cls.base([twins[0]], **copy.deepcopy(kwargs)),
                info.optim_cls.base([twins[1]], **copy.deepcopy(without_decay)),
                info.optim_cls.base([twins[2]], lr=1e-28),
            )

            def step(self):
                for base in self.bases:
                    base.step()

        def closure(optimizer=optimizer, params=(weight, bias, still), gradients=gradients):
            for p, g in zip(params, gradients(params), strict=True):
                p.grad = g
            return 1.0

        for _ in range(3):
            optimizer.step(closure)
            if flags:  # then the third group ascends where the others descend, and by hand would need two signs
                continue
            step_by_hand(info.optim_cls, Bases(), twins, gradients)
            torch.testing.assert_close([weight, bias, still], twins, rtol=1e-5, atol=1e-6)
        assert torch.equal(still.detach(), torch.tensor([1.0, -2.0]))


@every
def test_nothing_moves_without_gradients_or_with_zero_ones(info):
    for kwargs in keywords(info):
        params = [torch.randn(2, 3) for _ in range(2)]
        before = [p.clone() for p in params]
        optimizer = info.optim_cls(params, **kwargs)
        assert optimizer.step(lambda: torch.tensor([1.0])) == 1
        optimizer.step()
        assert equal(params, before)
        if kwargs.get("weight_decay", 0) or info.optim_cls.base is torch.optim.AdamW:
            continue  # these decay
        p = torch.randn(5, 1, requires_grad=True)
        before = p.detach().clone()
        p.grad = torch.zeros_like(p)
        info.optim_cls([p], **kwargs).step(lambda: torch.tensor([1.0]))
        assert torch.equal(p, before)


@every
@pytest.mark.parametrize("scaled", [False, True])
def test_fused_does_not_step_if_infinities_were_found(info, scaled):
    """By GradScaler, which tells the optimizer so; the base counts no step either."""
    for given in info.optim_inputs_func(device="cpu"):
        params = [Parameter(torch.ones(1)) for _ in range(5)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = info.optim_cls(params, fused=True, **given.kwargs)
        optimizer.grad_scale = torch.ones(1) if scaled else None
        for value in (1.0, 0.0):
            optimizer.found_inf = torch.tensor(value)
            if not value:
                with pytest.raises(RuntimeError, match="plain gradients"):
                    optimizer.step()
                continue
            optimizer.step()
            assert all(p.item() == 1 for p in params)
            assert all(state.get("step", 0) == 0 for state in optimizer.state.values())


# closures that leave gradients alone


def test_closures_that_stand_for_none_are_no_closures():
    """Lightning gives such a one in manual optimization: it may finish a perturbed pass, no more."""
    w = Parameter(torch.tensor([1.0, 2.0]))
    optimizer = SAM([w], lr=0.1, rho=0.5)
    w.square().sum().backward()
    loss = w.square().sum()
    for closure in (lambda: None, lambda: loss, lambda: loss.item(), lambda: 1):
        with pytest.raises(RuntimeError, match="left gradients"):
            optimizer.step(closure)
    assert torch.equal(w.detach(), torch.tensor([1.0, 2.0]))
    with optimizer.perturbed():
        w.square().sum().backward()
    optimizer.step(lambda: None)
    start = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(w.detach(), start - 0.2 * (start + 0.5 * start / start.norm()))


def test_a_closure_may_replace_gradients_that_it_has_not_zeroed():
    """torch's own suite does so: `backward` adds to what was there, and then the closure assigns another tensor."""
    w = Parameter(torch.tensor([1.0]))
    optimizer = SAM([w], lr=0.1, rho=0.0)
    for rho in (0.0, 0.5):
        optimizer.param_groups[0]["rho"] = rho
        w.data.fill_(1.0)

        def closure():
            loss = w.square().sum()
            loss.backward()
            w.grad = 2 * w.detach()
            return loss

        for _ in range(2):
            before = w.item()
            optimizer.step(closure)
            assert w.item() == pytest.approx(before - 0.2 * (before + rho))


@every
def test_gradients_are_read_only(info):
    for kwargs in keywords(info):
        p, given = Parameter(torch.randn(10, 5)), []
        optimizer = info.optim_cls([p], **kwargs)

        def closure(p=p, given=given):
            p.grad = torch.rand_like(p)
            given.append((p.grad, p.grad.clone()))
            return 1.0

        for _ in range(3):
            optimizer.step(closure)
        assert all(torch.equal(g, copy_of_it) for g, copy_of_it in given)


# state


@every
@pytest.mark.parametrize("named", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_a_state_dict_is_all_that_there_is_to_say(info, named):
    def form(params, is_named):
        return [(f"name{i}", p) for i, p in enumerate(params)] if is_named else params

    def without_names(state_dict):
        groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state_dict["param_groups"]]
        return {"state": state_dict["state"], "param_groups": groups}

    for kwargs in keywords(info):
        weight, bias, x = bias_and_weight()
        optimizer = info.optim_cls(form([weight, bias], named[0]), **kwargs)
        closure = closure_of(optimizer, weight, bias, x)
        for _ in range(4):
            optimizer.step(closure)
        twins = copies([weight, bias])
        other = info.optim_cls(form(twins, named[1]), **copy.deepcopy(kwargs))
        stored = io.BytesIO()
        torch.save(optimizer.state_dict(), stored)
        stored.seek(0)
        loaded = torch.load(stored, weights_only=True)
        assert same(loaded, optimizer.state_dict())
        other.load_state_dict(loaded)
        if any(named):
            assert other.state_dict()["param_groups"][0]["param_names"] == ["name0", "name1"]
        for _ in range(4):
            optimizer.step(closure)
            other.step(closure_of(other, *twins, x))
            assert equal([weight, bias], twins)
        assert same(without_names(optimizer.state_dict()), without_names(other.state_dict()))
        other.param_groups.extend(other.param_groups)
        assert (
            without_names(other.state_dict())["param_groups"][-1]
            == without_names(optimizer.state_dict())["param_groups"][-1]
        )


@every
def test_what_older_versions_saved_can_be_loaded(info):
    """Without flags that came later, without SAM's own keys, and with step counts that are no tensors."""
    for kwargs in keywords(info):
        weight, bias, x = bias_and_weight()
        optimizer = info.optim_cls([weight, bias], **kwargs)
        closure = closure_of(optimizer, weight, bias, x)
        for _ in range(3):
            optimizer.step(closure)
        old = copy.deepcopy(optimizer.state_dict())
        for group in old["param_groups"]:
            for key in (*info.not_og_supported_flags, "rho", "adaptive", "eta", "norm"):
                group.pop(key, None)
        for state in old["state"].values():
            if "step" in state:
                state["step"] = state["step"].item()
        twins = copies([weight, bias])
        fresh = info.optim_cls(twins, **copy.deepcopy(kwargs))
        fresh.load_state_dict(old)
        assert fresh.balls == optimizer.balls
        if not kwargs.get("maximize"):  # it is among what is lost
            optimizer.step(closure)
            fresh.step(closure_of(fresh, *twins, x))
            torch.testing.assert_close([weight, bias], twins, rtol=1e-5, atol=1e-6)
        optimizer.load_state_dict(old)
        optimizer.step(closure)


@every
def test_hooks_of_state_dicts_run_in_torchs_order(info):
    calls = []

    def save(optimizer):
        calls.append("pre")
        optimizer.state["note"] = 1

    def mark(optimizer, state_dict):
        calls.append("post")
        assert state_dict["state"].pop("note") == 1
        return state_dict | {"hooked": True}

    def load(lr, name):
        def hook(optimizer, state_dict):
            calls.append(name)
            changed = copy.deepcopy(state_dict)
            changed["param_groups"][0]["lr"] = lr
            return changed

        return hook

    for kwargs in keywords(info):
        optimizer = info.optim_cls([torch.rand(2, 3, requires_grad=True)], **kwargs)
        calls.clear()
        optimizer.register_state_dict_pre_hook(save)
        optimizer.register_state_dict_post_hook(mark)
        saved = optimizer.state_dict()
        assert saved["hooked"]
        optimizer.register_load_state_dict_pre_hook(load(0.002, "second"))
        optimizer.register_load_state_dict_pre_hook(load(0.003, "first"), prepend=True)
        optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o.param_groups[0]["lr"]))
        optimizer.load_state_dict(saved)
        assert calls == ["pre", "post", "first", "second", 0.002]


@every
def test_hooks_of_steps_run_in_torchs_order_and_once(info):
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    params, calls = [torch.ones(2)], []
    for kwargs in keywords(info):
        optimizer = info.optim_cls(params, **kwargs)
        handles = [
            register_optimizer_step_pre_hook(lambda o, *_: calls.append((o, "global pre"))),
            register_optimizer_step_post_hook(lambda o, *_: calls.append((o, "global post"))),
            optimizer.register_step_pre_hook(lambda o, *_: calls.append((o, "pre"))),
            optimizer.register_step_post_hook(lambda o, *_: calls.append((o, "post"))),
        ]
        try:
            for closure in (lambda: 1, None):
                calls.clear()
                optimizer.step(closure)
                assert [name for _, name in calls] == ["global pre", "pre", "post", "global post"]
                assert all(o is optimizer for o, _ in calls)
        finally:
            for handle in handles:
                handle.remove()
        calls.clear()
        optimizer.step(lambda: 1)
        assert calls == []


@every
def test_copies_are_whole(info):
    for kwargs in keywords(info):
        weight, bias, x = bias_and_weight()
        optimizer = info.optim_cls([weight, bias], **kwargs)
        closure = closure_of(optimizer, weight, bias, x)
        optimizer.step(closure)
        public = {k for k in optimizer.__dict__ if not k.startswith("_")}
        others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
        optimizer.step(closure)
        for other in others:
            assert {k for k in other.__dict__ if not k.startswith("_")} == public
            assert repr(other) == repr(optimizer)
            params = other.param_groups[0]["params"]
            other.step(closure_of(other, *params, x))
            assert equal(params, [weight, bias])


@every
def test_no_reference_keeps_an_optimizer_alive(info):
    gc.collect()
    p = Parameter(torch.ones(10))
    optimizer = info.optim_cls([p], lr=0.5)
    optimizer.step(closure_of(optimizer, Parameter(torch.ones(1, 1)), p, torch.ones(1)))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    del scheduler
    gc.collect()
    assert gc.get_referrers(optimizer) == []
    del optimizer
    assert gc.collect() == 0
