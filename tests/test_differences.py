"""Second derivatives that torch lacks or gets wrong: products by differences of gradients, and an error."""

from contextlib import nullcontext

import pytest
import torch
from networks import NETWORKS, Dense, batches, flat, like, mlp, network
from torch import nn
from torch.autograd.function import once_differentiable

from sam_optim.loss import MATRICES, Loss
from sam_optim.loss.differences import STEP
from sam_optim.measures import (
    hessian_diagonal,
    hessian_eigenvalues,
    hessian_frobenius_norm,
    hessian_trace,
    spectral_density,
)

cross_entropy = nn.CrossEntropyLoss()


class HardSigmoid(nn.Module):
    """torch's own has no double backward; by clamp it has one."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def forward(self, x):
        return nn.functional.hardsigmoid(x) if self.fused else (x / 6 + 0.5).clamp(0, 1)


def gated(fused, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), HardSigmoid(fused), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_model_without_double_backward_has_products_by_differences(dtype):
    (x, y) = batches(mlp, (9,))[0]
    data = [(x[:5].to(dtype), y[:5]), (x[5:].to(dtype), y[5:])]
    dense = Dense(gated(False), cross_entropy, (x, y)).matrix("hessian")
    model = gated(True, dtype)
    loss = Loss(model, cross_entropy, data)
    before = [p.detach().clone() for p in model.parameters()]
    result = hessian_eigenvalues(loss, num=2, which="magnitude", tol=1e-5)
    values = torch.linalg.eigvalsh(dense)
    expected = values[values.abs().topk(2).indices].sort(descending=True).values
    torch.testing.assert_close(result.eigenvalues, expected, rtol=1e-5, atol=1e-6)
    assert result.settings["products"] == "central differences"
    rounding = 1e3 * torch.finfo(torch.float64).eps / STEP  # a thousand ulps of a gradient, over the step
    assert 0 < result.settings["product_error"] < rounding
    assert (result.errors >= result.settings["product_error"] * result.eigenvalues.abs()).all()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert hessian_trace(loss, num_probes=1000).value == pytest.approx(float(dense.trace()), rel=1e-4)


class Near(nn.Module):
    """hardswish(w x + b) + c at x = 2, c = 100: its second derivative is 1/3 up to 3, and 0 beyond."""

    def __init__(self, gap):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 1.0 - gap], dtype=torch.float64))
        self.c = nn.Parameter(torch.tensor(100.0, dtype=torch.float64))

    def forward(self, x):
        return nn.functional.hardswish(self.w[0] * x + self.w[1]) + self.c


def near(gap, **how):
    data = [(torch.tensor([2.0], dtype=torch.float64), torch.zeros(1))]
    return Loss(Near(gap), lambda outputs, _: outputs.mean(), data, **how)


@pytest.mark.parametrize("gap", [1e-5, 1e-7, 1e-8, -1e-8])
def test_steps_do_not_reach_kinks_that_are_near(gap):
    """The step is 1e-6 long; at a gap below 0 the function is linear."""
    loss = near(gap, differences=True)
    assert loss.settings()["products"] == "central differences"
    v = [torch.tensor([2.0, 1.0], dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)]
    expected = torch.tensor([10.0, 5.0, 0.0], dtype=torch.float64) / 3 if gap > 0 else torch.zeros(3)  # 5 / 3 v
    torch.testing.assert_close(flat(loss.hessian_product(v)), expected.double(), rtol=1e-4, atol=1e-5)
    if gap > 0:
        result = hessian_eigenvalues(loss)
        assert float(result.eigenvalues[0]) == pytest.approx(5 / 3, rel=1e-4)  # |(x, 1)|^2 / 3
        assert result.converged


OF_PRODUCTS = [hessian_eigenvalues, hessian_trace, hessian_frobenius_norm, hessian_diagonal, spectral_density]


@pytest.mark.parametrize("measure", OF_PRODUCTS)
def test_where_weights_lie_on_a_kink_there_is_no_second_derivative(measure):
    result = measure(near(0.0, differences=True))
    assert not result.converged
    assert "on a kink" in result.reason
    assert result.settings["product_error"] > 0.4
    assert measure(near(1e-5, differences=True)).converged


def test_a_kink_near_the_weights_is_not_called_a_wrong_derivative():
    result = hessian_eigenvalues(near(1e-8))
    assert "products" not in result.settings
    assert float(result.eigenvalues[0]) == pytest.approx(5 / 3, rel=1e-6)


@pytest.mark.parametrize("matrix", MATRICES)
def test_every_matrix_of_a_model_without_double_backward(matrix):
    x, y = batches(mlp, (9,))[0]
    a = Dense(gated(False), cross_entropy, (x, y)).matrix(matrix)
    loss = Loss(gated(True), cross_entropy, [(x[:5], y[:5]), (x[5:], y[5:])])
    v = like(torch.linspace(-1, 1, len(a), dtype=torch.float64), loss.params)
    with loss.curvature(matrix) as product:
        for w in (v, [2 * part for part in v]):
            torch.testing.assert_close(flat(product(w)), a @ flat(w), rtol=1e-6, atol=1e-7)
    assert loss.settings()["products"] == "central differences"


@pytest.mark.parametrize("kind", NETWORKS)
def test_differences_by_name_are_the_products_of_double_backward(kind):
    model, data = network(kind), batches(kind)
    loss, exact = Loss(model, cross_entropy, data, differences=True), Loss(model, cross_entropy, data)
    v = like(torch.linspace(-1, 1, sum(p.numel() for p in loss.params), dtype=torch.float64), loss.params)
    a, b = flat(loss.hessian_product(v)), flat(exact.hessian_product(v))
    assert float((a - b).norm()) < 1e-6 * float(b.norm())
    assert loss.block("0" if kind is not NETWORKS[2] else "head").settings()["products"] == "central differences"
    assert "products" not in exact.settings()


class Square(torch.autograd.Function):
    """x^2, whose backward hides from autograd that it depends on x."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * g


class Once(Square):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Custom(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.function = nn.Linear(4, 5).double(), nn.Linear(5, 3).double(), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize("function", [Square, Once])
def test_second_derivatives_that_are_wrong_are_an_error(function):
    """torch does not refuse `once_differentiable` here: its products come out wrong."""
    data = batches(mlp)
    exact = hessian_eigenvalues(Loss(Custom(torch.square), cross_entropy, data), tol=1e-6)
    with pytest.raises(ValueError, match=r"second derivatives .* are wrong: .*differences=True"):
        hessian_eigenvalues(Loss(Custom(function.apply), cross_entropy, data))
    by_name = hessian_eigenvalues(Loss(Custom(function.apply), cross_entropy, data, differences=True), tol=1e-6)
    assert float(by_name.eigenvalues) == pytest.approx(float(exact.eigenvalues), rel=1e-6)


@pytest.mark.parametrize("criterion", [cross_entropy, lambda o, y: cross_entropy(o, y)])
def test_they_are_checked_on_examples_that_count(criterion):
    """Not on the first ones, where their labels are ignored: there all derivatives are 0."""
    x, y = (torch.cat(column) for column in zip(*batches(mlp), strict=True))
    y[:5] = -100
    with pytest.raises(ValueError, match=r"second derivatives .* are wrong"):
        hessian_eigenvalues(Loss(Custom(Once.apply), criterion, [(x, y)]))


class Late(Custom):
    """Wrong in its second derivatives for positive first inputs alone."""

    def forward(self, x):
        z = self.first(x)
        return self.second(torch.where(x[:, :1] > 0, Square.apply(z), z * z))


def test_they_are_checked_on_examples_of_all_batches():
    x, y = torch.cat([x for x, _ in batches(mlp, (32,) * 10)]), torch.arange(320) % 3
    order = x[:, 0].argsort()  # the second half of the batches has the positive ones
    data = list(zip(x[order].split(32), y.split(32), strict=True))
    with pytest.raises(ValueError, match=r"second derivatives .* are wrong"):
        hessian_eigenvalues(Loss(Late(None), cross_entropy, data))
    with pytest.raises(ValueError, match=r"second derivatives .* are wrong"):
        hessian_eigenvalues(Loss(Late(None), cross_entropy, torch.utils.data.DataLoader(Listed(data), batch_size=None)))
    hessian_eigenvalues(Loss(Late(None), cross_entropy, data[:4]))  # where they are right


def test_batches_of_which_only_some_can_be_cut_are_checked():
    """Of the first one no example may be drawn, and the others are one piece each: objects of some other kind."""
    (x, y), *_ = batches(mlp, (4,))
    large = [{"x": x.repeat(50, 1), "labels": y.repeat(50), "who": object()} for _ in range(20)]
    data = [{"x": x, "labels": y, "who": 0}, *large]

    def forward(model, batch):
        return model(batch["x"]), batch["labels"]

    hessian_eigenvalues(Loss(Custom(torch.square), cross_entropy, data, forward=forward), max_products=2)
    with pytest.raises(ValueError, match=r"second derivatives .* are wrong"):
        hessian_eigenvalues(Loss(Custom(Once.apply), cross_entropy, data, forward=forward))


def test_with_batch_statistics_no_example_is_checked_alone(monkeypatch):
    """However large its outputs are: of one example there are none."""
    monkeypatch.setattr("sam_optim.loss.loss.MANY_OUTPUT_BYTES", 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    assert hessian_eigenvalues(Loss(model, cross_entropy, batches(mlp), batch_statistics=True), tol=0.1).converged


class Listed(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def test_a_padding_token_in_the_data_has_no_true_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Tanh(), nn.Linear(6, 2)).double()
    nn.init.ones_(model[0].weight)
    for first, expected in ((1, nullcontext()), (0, pytest.raises(ValueError, match="padding_idx"))):
        with expected:
            hessian_eigenvalues(
                Loss(model, cross_entropy, [(torch.tensor([[first, 2], [3, 4]]), torch.tensor([0, 1]))])
            )


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_check_costs_less_than_a_gradient_of_ten_batches_and_refuses_nothing_right(kind, dtype):
    model = network(kind).to(dtype)
    data = [(x.to(dtype), y) for x, y in batches(kind, (64,) * 10)]
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    loss = Loss(model, cross_entropy, data)
    loss.value_and_gradient()
    assert sum(seen) == 10 * 64 + 2 * (64 + 32) + 8  # a batch and 32 examples of all, twice; 8 of these
    with loss.curvature():
        pass


class Foreign(nn.Module):
    """Cannot be computed in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        return self.inner(x.float()) * torch.ones(3, dtype=torch.float32)


def test_a_model_that_stays_in_float32_has_its_products():
    data = [(x.float(), y) for x, y in batches(mlp)]
    loss = Loss(Foreign(), cross_entropy, data)
    result = hessian_eigenvalues(loss)
    assert result.converged
    assert "products" not in result.settings


class PartlyCompiled(nn.Module):
    def __init__(self, *, compiled):
        super().__init__()
        self.inner = network(mlp)
        if compiled:
            self.inner[0] = torch.compile(self.inner[0])

    def forward(self, x):
        return self.inner(x)


@pytest.mark.filterwarnings("ignore:Using .torch.compile.module:UserWarning")  # an optimizer of another test may wait
def test_a_compiled_submodule_has_products():
    data = batches(mlp)
    found, expected = (
        hessian_eigenvalues(Loss(PartlyCompiled(compiled=c), cross_entropy, data)) for c in (True, False)
    )
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=1e-9, atol=0)


@pytest.mark.parametrize("norm", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_weight_norm_of_torch(norm):
    """Its second derivatives on the CPU are wrong; the old one cannot be copied, either."""
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)).double()
    loss = Loss(model, cross_entropy, batches(mlp))
    with pytest.raises(ValueError, match="are wrong"):
        hessian_eigenvalues(loss)
    by_differences = Loss(model, cross_entropy, batches(mlp), differences=True)
    v = torch.linspace(-1, 1, sum(p.numel() for p in loss.params), dtype=torch.float64)
    step = like(1e-5 * v, loss.params)
    slopes = []
    for sign in (1, -1):
        with loss.displaced([sign * x for x in step]):
            slopes.append(flat(loss.gradient()))
    product = flat(by_differences.hessian_product(like(v, loss.params)))
    torch.testing.assert_close(product, (slopes[0] - slopes[1]) / 2e-5, rtol=1e-5, atol=1e-7)
