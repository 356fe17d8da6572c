"""Convolutions with cheap second derivatives, and normalisation folded into them: equal to torch's own."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sam_optim import Loss
from sam_optim.loss.convolutions import CheapSecondDerivatives

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 2), "padding": (2, 0)},
    {"dilation": 2, "padding": 2},
    {"groups": 2},
    {"groups": 4, "stride": 2},
    {"padding": "same"},
    {"padding": "valid", "stride": 2},
]


def double_backward(compute, inputs, seed=0):
    """Output, first derivatives along a random direction, and theirs along others: of all inputs."""
    torch.manual_seed(seed)
    y = compute(*inputs)
    g = torch.randn_like(y).requires_grad_()
    first = torch.autograd.grad(y, inputs, g, create_graph=True)
    along = [torch.randn_like(x) for x in first]
    second = torch.autograd.grad(first, [g, *inputs], along, materialize_grads=True)
    return [y, *first, *second]


def assert_equal(compute, inputs):
    expected = double_backward(compute, inputs)
    with CheapSecondDerivatives():
        found = double_backward(compute, inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def names(y):
    """Of the nodes of a graph."""
    found, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            found.add(type(node).__name__)
            waiting += [n for n, _ in node.next_functions]
    return found


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", GEOMETRIES, ids=str)
def test_of_two_dimensions(options, with_bias):
    torch.manual_seed(1)
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(8, 4 // options.get("groups", 1), 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(8, dtype=torch.float64, requires_grad=True)
    if with_bias:
        assert_equal(lambda x, w, b: F.conv2d(x, w, b, **options), [x, w, b])
    else:
        assert_equal(lambda x, w: F.conv2d(x, w, **options), [x, w])


@pytest.mark.parametrize("dims", [1, 3])
def test_of_other_dimensions(dims):
    torch.manual_seed(1)
    x = torch.randn(2, 3, *[7] * dims, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, *[3] * dims, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    convolve = {1: F.conv1d, 3: F.conv3d}[dims]
    assert_equal(lambda x, w, b: convolve(x, w, b, stride=2, padding=1), [x, w, b])


def test_only_what_needs_a_gradient_gets_one():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert_equal(lambda w: F.conv2d(x, w), [w])
    images = x.clone().requires_grad_()
    assert_equal(lambda x: F.conv2d(x, w.detach()), [images])
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert_equal(lambda b: F.conv2d(x, w.detach(), b), [b])


@pytest.mark.parametrize("convolution_bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_normalisation_by_running_statistics_is_folded_in(dims, affine, convolution_bias):
    torch.manual_seed(2)
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 4, 3, bias=convolution_bias)
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](4, affine=affine)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 2)
    model = nn.Sequential(convolution, norm).double().eval()
    x = torch.randn(2, 3, *[6] * dims, dtype=torch.float64, requires_grad=True)
    params = list(model.parameters())
    for p in params:
        p.data.add_(0.1 * torch.randn_like(p))
    assert_equal(lambda x, *_: model(x), [x, *params])
    with CheapSecondDerivatives():
        assert not any("BatchNorm" in name for name in names(model(x)))


def test_normalisation_called_as_torch_batch_norm_is_folded_in():
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    gain, shift = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mean, var = torch.randn(4, dtype=torch.float64), torch.rand(4, dtype=torch.float64) + 0.1

    def compute(x, w, gain, shift):
        return torch.batch_norm(F.conv2d(x, w), gain, shift, mean, var, False, 0.1, 1e-5, False)

    assert_equal(compute, [x, w, gain, shift])
    with CheapSecondDerivatives():
        assert not any("BatchNorm" in name for name in names(compute(x, w, gain, shift)))


def test_an_output_that_something_else_uses_too_is_that_of_the_convolution():
    torch.manual_seed(3)
    convolution, norm = nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double().eval()
    norm.running_mean.normal_()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)

    def compute(x, *_):
        y = convolution(x)
        return norm(y) * y.sigmoid()

    assert_equal(compute, [x, *convolution.parameters(), *norm.parameters()])


def test_normalisation_of_something_else_stays_as_it_is():
    torch.manual_seed(3)
    convolution, norm = nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double().eval()
    norm.running_mean.normal_()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    assert_equal(lambda x, *_: norm(convolution(x).relu()), [x, *convolution.parameters(), *norm.parameters()])
    assert_equal(lambda x, *_: norm(convolution(x)[:1]), [x, *convolution.parameters(), *norm.parameters()])


def add_without_gradient(y):
    with torch.no_grad():
        return y.add_(1)


def doubled_gradient(y):
    y.register_hook(lambda g: 2 * g)
    return y


def data_doubled(y):
    y.data.mul_(2)
    return y


BETWEEN = {
    "in-place activation": nn.ReLU(inplace=True),
    "in place, of a part": lambda y: y[:, 0].add_(1)._base,
    "in place without gradients": add_without_gradient,
    "of the data": data_doubled,
    "detached in place": lambda y: y.detach_(),
    "hook": doubled_gradient,
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_what_happens_to_an_output_before_its_normalisation_is_not_lost(between):
    torch.manual_seed(3)
    convolution, norm = nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)

    def compute(x, *_):
        y = convolution(x)
        changed = between(y)
        assert changed is y
        return norm(changed) + convolution(x.tanh())

    assert_equal(compute, [x, *convolution.parameters(), *norm.parameters()])


def test_a_weight_that_changes_before_the_normalisation_is_an_error():
    convolution, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4).eval()
    with CheapSecondDerivatives():
        y = convolution(torch.randn(2, 3, 6, 6, requires_grad=True))
        with torch.no_grad():
            convolution.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            norm(y).sum().backward()


def test_in_place_operations_on_a_normalised_output():
    torch.manual_seed(3)
    convolution, norm = nn.Conv2d(3, 3, 3, padding=1).double(), nn.BatchNorm2d(3).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)

    def compute(x, *_):
        y = norm(convolution(x)).relu_()
        z = norm(convolution(y))
        z += y
        return z.tanh()

    assert_equal(compute, [x, *convolution.parameters(), *norm.parameters()])


def test_statistics_of_the_batch_stay_so():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().train()
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    before = copy.deepcopy(model)
    with CheapSecondDerivatives():
        y = model(x)
    torch.testing.assert_close(y, before(x))
    assert any("BatchNorm" in name for name in names(y))
    torch.testing.assert_close(model[1].running_mean, before[1].running_mean)


def test_layers_of_many_weights_are_torch_s_unless_they_are_grouped():
    x, w = torch.randn(1, 16, 2, 2), torch.randn(16, 16, 3, 3, requires_grad=True)
    with CheapSecondDerivatives():
        assert "ConvolutionBackward0" in names(F.conv2d(x, w, padding=1))
        assert "_ConvolutionBackward" in names(F.conv2d(x.repeat(32, 1, 1, 1), w, padding=1))
        assert "_ConvolutionBackward" in names(F.conv2d(x, w[:, :1].detach().requires_grad_(), padding=1, groups=16))


def test_what_is_torch_s_affair_stays_there():
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    x = torch.randn(2, 3, 6, 6)
    with CheapSecondDerivatives():
        ours = names(F.conv2d(x, w))
        assert "_ConvolutionBackward" in ours
        assert "ConvolutionBackward0" in names(F.conv2d(x[0], w))  # one image
        assert "ConvolutionBackward0" in names(F.conv_transpose2d(x.new_ones(2, 4, 6, 6), w))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert F.conv2d(x, w).dtype == torch.bfloat16
        with torch.no_grad():
            assert F.conv2d(x, w).grad_fn is None
        per_example = torch.func.vmap(torch.func.grad(lambda w, x: F.conv2d(x[None], w).sum()), (None, 0))(w, x)
        assert per_example.shape == (2, 4, 3, 3, 3)
        with pytest.raises(RuntimeError, match="weight"):
            F.conv2d(x, torch.randn(4, 2, 3, 3, requires_grad=True))
        with pytest.raises(RuntimeError, match="running_mean"):
            F.batch_norm(F.conv2d(x, w), torch.zeros(1), torch.ones(1))
        with pytest.raises(RuntimeError, match="stride"):
            F.conv2d(x, w, stride=[])
        assert "ConvolutionBackward0" in names(F.conv2d(x, w, stride=np.int64(2)))
        assert F.conv2d(x.cfloat(), w.cfloat()).dtype == torch.complex64
        y = F.conv2d(x, w)
        mean, var = torch.zeros(4), torch.ones(4)
        normalised = torch.vmap(lambda b: F.batch_norm(y, mean, var, None, b))(torch.zeros(3, 4))
        torch.testing.assert_close(normalised[0], y, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's forward mode calls it
def test_forward_mode():
    w = torch.randn(4, 3, 3, 3, requires_grad=True)
    x, tangent = torch.randn(2, 2, 3, 6, 6)
    with CheapSecondDerivatives(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(F.conv2d(forward_ad.make_dual(x, tangent), w)).tangent
        torch.testing.assert_close(found, F.conv2d(tangent, w))


def test_higher_derivatives():
    torch.manual_seed(8)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def fourth():
        value = F.conv2d(x, w, b, padding=1).pow(4).sum()
        for _ in range(4):
            found = torch.autograd.grad(value, [x, w, b], create_graph=True)
            value = sum(t.sum() for t in found)
        return found

    expected = fourth()
    with CheapSecondDerivatives():
        found = fourth()
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        self.head = nn.Linear(4, 5)
        self.recompute = False

    def forward(self, x):
        x = self.first(x)
        x = checkpoint(self.second, x, use_reentrant=False) if self.recompute else self.second(x)
        return self.head(x.mean(dim=(2, 3)))


def test_a_checkpoint_that_begins_with_a_normalisation():
    convolution, norm = nn.Conv2d(3, 4, 3).double(), nn.BatchNorm2d(4).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)

    def compute(x, *_):
        return checkpoint(lambda y: norm(y).tanh(), convolution(x), use_reentrant=False)

    assert_equal(compute, [x, *convolution.parameters(), *norm.parameters()])


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher", "empirical_fisher"])
def test_activation_checkpoints(matrix):
    torch.manual_seed(5)
    model = Checkpointed().double().eval()
    batch = (torch.randn(6, 3, 5, 5, dtype=torch.float64), torch.randint(5, (6,)))
    loss = Loss(model, nn.CrossEntropyLoss(), [batch])
    v = [torch.randn_like(p) for p in loss.params]
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        with loss.curvature(matrix) as product:
            found.append(product(v))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_curvature_of_a_network_calls_no_double_backward_of_torch():
    torch.manual_seed(6)
    model = Checkpointed().eval()
    loss = Loss(model, nn.CrossEntropyLoss(), [(torch.randn(20, 3, 5, 5), torch.randint(5, (20,)))])
    v = [torch.randn_like(p) for p in loss.params]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.hessian_product(v)
    called = {event.name for event in profile.events()}
    assert "aten::convolution_backward" in called
    assert not any("double_backward" in name or "batch_norm_backward" in name for name in called)


def test_a_model_that_views_its_images_in_one_layout():
    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 3, padding=1)
            self.linear = nn.Linear(4 * 36, 3)

        def forward(self, x):
            y = self.conv(x).tanh()
            return self.linear(y.view(len(x), -1))

    torch.manual_seed(7)
    model = Views().eval()
    batch = (torch.randn(4, 2, 6, 6), torch.randint(3, (4,)))
    found = Loss(model, nn.CrossEntropyLoss(), [batch])
    v = [torch.randn_like(p) for p in found.params]
    expected = Loss(copy.deepcopy(model).double(), nn.CrossEntropyLoss(), [(batch[0].double(), batch[1])])
    for a, b in zip(found.hessian_product(v), expected.hessian_product([x.double() for x in v]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-5)
