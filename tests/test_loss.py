"""Values, gradients and products against dense double backward in float64; the model found as it was left."""

import itertools
import json
import math
import random
import sys
from collections import UserDict
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from networks import NETWORKS, SHAPES, Attention, Dense, batches, cnn, flat, like, mlp, network
from quadratic import mean
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sam_optim import Ball, Spectrum, gradient_regret, hessian_eigenvalues, hessian_trace, worst_case_sharpness
from sam_optim.loss import MATRICES, Loss

ULPS = 1e3 * torch.finfo(torch.float64).eps  # sums of a few hundred terms in another order
cross_entropy = nn.CrossEntropyLoss()


def whole(data):
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def assert_equal_to_rounding(a, b):
    torch.testing.assert_close(a, b, rtol=ULPS, atol=ULPS)


@pytest.mark.parametrize("kind", NETWORKS)
def test_uneven_batches_give_the_mean_over_examples(kind):
    model, data = network(kind).eval(), batches(kind, (5, 5, 2))
    dense = Dense(model, cross_entropy, whole(data))
    w = dense.w.clone().requires_grad_()
    expected = dense.loss(w)
    loss = Loss(model, cross_entropy, data)
    value, gradient = loss.value_and_gradient()
    assert loss.batch_sizes == (5, 5, 2)
    assert (loss.num_batches, loss.num_examples) == (3, 12)
    assert value.dtype == torch.float64
    assert value.shape == ()
    assert_equal_to_rounding(value, expected.detach())
    assert_equal_to_rounding(loss.value(), expected.detach())
    assert_equal_to_rounding(flat(gradient), torch.autograd.grad(expected, w)[0])
    assert_equal_to_rounding(loss.batch_values(), torch.stack([single.value() for single in loss.single_batches()]))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("sizes", [(12,), (5, 5, 2)], ids=["graph kept", "streamed"])
def test_products_are_those_of_the_dense_matrix(kind, matrix, sizes):
    model = network(kind).eval()
    data = batches(kind, sizes)
    a = Dense(model, cross_entropy, whole(data)).matrix(matrix)
    loss = Loss(model, cross_entropy, data)
    with loss.curvature(matrix) as product:
        columns = [flat(product(like(e, loss.params))) for e in torch.eye(len(a), dtype=torch.float64)]
    assert_equal_to_rounding(torch.stack(columns), a)
    v = like(torch.linspace(-1, 1, len(a), dtype=torch.float64), loss.params)
    once = {"ggn": loss.ggn_product, "fisher": loss.fisher_product, "empirical_fisher": loss.empirical_fisher_product}
    assert_equal_to_rounding(flat(once.get(matrix, loss.hessian_product)(v)), a @ flat(v))


def test_the_statistics_of_the_batch_are_another_function():
    model, data = network(cnn).train(), batches(cnn, (6,))
    expected = Dense(model, cross_entropy, data[0])
    loss = Loss(model, cross_entropy, data, batch_statistics=True)
    assert_equal_to_rounding(loss.value(), expected.loss(expected.w))
    for matrix in ("hessian", "ggn"):
        a = expected.matrix(matrix)
        with loss.curvature(matrix) as product:
            v = torch.linspace(-1, 1, len(a), dtype=torch.float64)
            for _ in range(2):  # the second one uses the kept graph
                assert_equal_to_rounding(flat(product(like(v, loss.params))), a @ v)
    assert loss.settings()["batch_norm"] == "batch statistics"
    assert Loss(model, cross_entropy, data).settings()["batch_norm"] == "running statistics"
    with pytest.raises(ValueError, match="gradient of its own"):
        loss.empirical_fisher_product(loss.params)


def test_normalized_logits():
    model, data = network(mlp).eval(), batches(mlp, (5,))

    def criterion(o, y):
        o = o - o.mean(dim=1, keepdim=True)
        return cross_entropy(o / o.norm(dim=1, keepdim=True), y)

    dense = Dense(model, criterion, data[0])
    loss = Loss(model, cross_entropy, data, normalize_logits=True)
    assert_equal_to_rounding(loss.value(), dense.loss(dense.w))
    v = torch.linspace(-1, 1, len(dense.w), dtype=torch.float64)
    assert_equal_to_rounding(flat(loss.hessian_product(like(v, loss.params))), dense.matrix("hessian") @ v)
    with pytest.raises(ValueError, match=r"\(n, K\), K >= 2"):
        Loss(nn.Linear(4, 1).double(), mean, data, normalize_logits=True).value()


class Labelled(nn.Module):
    """The calling convention of Hugging Face models."""

    def __init__(self):
        super().__init__()
        self.inner = network(mlp)

    def forward(self, pixels, labels=None):
        logits = self.inner(pixels)
        return SimpleNamespace(loss=cross_entropy(logits, labels), logits=logits)


@pytest.mark.parametrize("criterion", [None, cross_entropy], ids=["outputs.loss", "criterion of the logits"])
def test_mappings_with_labels(criterion):
    model, data = Labelled(), batches(mlp)
    loss = Loss(model, criterion, [{"pixels": x, "labels": y} for x, y in data])
    plain = Loss(model.inner, cross_entropy, data)
    assert loss.batch_sizes == (5, 5, 2)
    assert_equal_to_rounding(loss.value(), plain.value())
    v = [torch.ones_like(p) for p in loss.params]
    assert_equal_to_rounding(flat(loss.hessian_product(v)), flat(plain.hessian_product(v)))
    if criterion is None:
        with pytest.raises(ValueError, match="needs a criterion"):
            loss.ggn_product(v)


def test_other_batches_through_forward():
    model, data = network(mlp), batches(mlp)
    named = [{"image": x, "class": y} for x, y in data]
    with pytest.raises(ValueError, match="pass forward="):
        Loss(model, cross_entropy, named).value()
    loss = Loss(model, cross_entropy, named, forward=lambda model, b: (model(b["image"]), b["class"]))
    assert_equal_to_rounding(loss.value(), Loss(model, cross_entropy, data).value())


def test_several_inputs_before_the_target():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(mlp)

        def forward(self, a, b):
            return self.inner(a + b)

    model, data = Sum(), batches(mlp)
    loss = Loss(model, cross_entropy, [(x, 2 * x, y) for x, y in data])
    assert_equal_to_rounding(loss.value(), Loss(model.inner, cross_entropy, [(3 * x, y) for x, y in data]).value())


def test_frozen_parameters_are_left_out_and_unused_ones_have_gradient_zero():
    model = network(mlp)
    model[0].weight.requires_grad_(False)
    model.register_parameter("unused", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    loss = Loss(model, cross_entropy, batches(mlp))
    assert [id(p) for p in loss.params] == [id(p) for p in model.parameters() if p.requires_grad]
    gradient = dict(zip([n for n, p in model.named_parameters() if p.requires_grad], loss.gradient(), strict=True))
    assert torch.equal(gradient["unused"], torch.zeros(2, dtype=torch.float64))
    for product in (loss.hessian_product, loss.ggn_product, loss.fisher_product, loss.empirical_fisher_product):
        assert [x.shape for x in product(loss.params)] == [p.shape for p in loss.params]


def test_a_linear_model_has_curvature_products_of_zero():
    model = nn.Linear(3, 1).double()
    loss = Loss(model, mean, [(torch.randn(4, 3).double(), torch.zeros(4))])
    for product in (loss.hessian_product, loss.ggn_product):
        assert all(torch.equal(x, torch.zeros_like(x)) for x in product(loss.params))


def everything_about(model):
    state = {name: (x.clone(), x.data_ptr()) for name, x in model.state_dict(keep_vars=True).items()}
    return {
        "values": {name: x for name, (x, _) in state.items()},
        "storages": {name: pointer for name, (_, pointer) in state.items()},
        "modes": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "rng": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1]),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        "gradients on": torch.is_grad_enabled(),
    }


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


class Failing:
    """A criterion that fails at the n-th call."""

    def __init__(self, n):
        self.left = n

    def __call__(self, outputs, target):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return cross_entropy(outputs, target)


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("call", ["value", "gradient", "hessian_product", "ggn_product"])
def test_the_model_is_left_as_it_was_found(call, fails, batch_statistics):
    model = network(cnn).train()
    model[0].eval()
    for p in list(model.parameters())[:2]:
        p.grad = torch.ones_like(p)
    criterion = Failing(1 if fails else 10**6)
    data = DataLoader(TensorDataset(*whole(batches(cnn))), batch_size=5)
    loss = Loss(model, criterion, data, batch_statistics=batch_statistics)
    before = everything_about(model)
    arguments = [[torch.ones_like(p) for p in loss.params]] if call.endswith("product") else []
    if fails:
        with pytest.raises(KeyboardInterrupt):
            getattr(loss, call)(*arguments)
    else:
        getattr(loss, call)(*arguments)
    assert_same(everything_about(model), before)


def test_dropout_is_off_and_noise_is_the_same_in_every_pass():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network(mlp)

        def forward(self, x):
            return self.inner(x) + torch.randn(len(x), 1, dtype=x.dtype) * torch.arange(3)

    model, data = Noisy().train(), batches(mlp)
    assert torch.equal(Loss(model, cross_entropy, data).value(), Loss(model, cross_entropy, data).value())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_where_they_are_switched_off(context):
    loss = Loss(network(mlp), cross_entropy, batches(mlp))
    expected = loss.gradient()
    with context():
        assert_same(loss.gradient(), expected)


def test_displaced_weights_come_back_bit_for_bit():
    loss = Loss(network(mlp), cross_entropy, batches(mlp))
    before, pointers = [p.detach().clone() for p in loss.params], [p.data_ptr() for p in loss.params]
    d = [torch.full_like(p, 1e-3) for p in loss.params]
    with loss.displaced(d):
        assert_same([p.detach() for p in loss.params], [p + x for p, x in zip(before, d, strict=True)])
        inside = loss.value()
    assert inside != loss.value()
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), loss.displaced([torch.full_like(p, torch.inf) for p in d]):
            raise error
    assert_same([p.detach() for p in loss.params], before)
    assert [p.data_ptr() for p in loss.params] == pointers
    with pytest.raises(ValueError, match="of its shape"), loss.displaced(d[1:]):
        pass


def test_displaced_weights_are_seen_inside_an_autocast_region():
    """Autocast keeps casts of the weights for the whole region: a displacement must not be served the old ones."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    data = [(x.float(), y) for x, y in batches(mlp)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = Loss(model, cross_entropy, data)
        at_w, _ = loss.value_and_gradient()
        with loss.displaced([torch.ones_like(p) for p in loss.params]):
            displaced, _ = loss.value_and_gradient()
        assert displaced != at_w
        assert loss.value_and_gradient()[0] == at_w


class Augmented(Dataset):
    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return torch.full((4,), float(i)).double() + self.draw(), i % 3


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(()), random.random, np.random.random], ids=["torch", "random", "numpy"]
)
def test_random_augmentation_is_an_error_and_moves_no_generator(draw):
    model = network(mlp)
    loss = Loss(model, cross_entropy, DataLoader(Augmented(draw), batch_size=2))
    before = everything_about(model)
    with pytest.raises(ValueError, match=r"no random augmentation"):
        loss.value()
    assert_same(everything_about(model), before)


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(0)], ids=["global", "own"])
def test_shuffling_is_an_error(generator):
    data = TensorDataset(*whole(batches(mlp)))
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    with pytest.raises(ValueError, match="shuffle=False"):
        Loss(network(mlp), cross_entropy, loader).value()
    same = Loss(network(mlp), cross_entropy, DataLoader(data, batch_size=4))
    assert_equal_to_rounding(same.value(), Loss(network(mlp), cross_entropy, batches(mlp)).value())


@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_batches_is_an_error(change):
    class Changing:
        size = 3

        def __iter__(self):
            return iter((batches(mlp) * 2)[: self.size])

    data = Changing()
    loss = Loss(network(mlp), cross_entropy, data)
    loss.value()
    data.size += change
    with pytest.raises(ValueError, match="first"):
        loss.value()


def test_bad_batches_are_refused():
    model, data = network(mlp), batches(mlp)
    with pytest.raises(ValueError, match="only once"):
        Loss(model, cross_entropy, iter(data))
    with pytest.raises(ValueError, match=r"sizes \[\]"):
        Loss(model, cross_entropy, [])
    with pytest.raises(ValueError, match=r"sizes \[5, 0\]"):
        Loss(model, cross_entropy, [data[0], (data[0][0][:0], data[0][1][:0])])
    with pytest.raises(ValueError, match="first dimension"):
        Loss(model, cross_entropy, ["text"])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_criterion_that_is_no_mean_is_refused(reduction):
    with pytest.raises(ValueError, match="reduction='mean'"):
        Loss(network(mlp), nn.CrossEntropyLoss(reduction=reduction), batches(mlp))


def test_bad_criteria_and_models_are_refused():
    model, data = network(mlp), batches(mlp)
    with pytest.raises(ValueError, match=r"add \.mean\(\)"):
        Loss(model, lambda o, y: nn.functional.cross_entropy(o, y, reduction="none"), data).value()
    with pytest.raises(ValueError, match="got float"):
        Loss(model, lambda o, y: 0.0, data).value()
    with pytest.raises(ValueError, match="callable"):
        Loss(model, "cross_entropy", data)
    with pytest.raises(ValueError, match="detach"):
        Loss(model, lambda o, y: cross_entropy(o.detach(), y), data).gradient()
    with pytest.raises(ValueError, match="no trainable parameters"):
        Loss(model.requires_grad_(False), cross_entropy, data)
    regression = Loss(network(mlp), nn.MSELoss(), [(x, x[:, :3]) for x, _ in data])
    with pytest.raises(ValueError, match="use matrix='ggn'"):
        regression.fisher_product(regression.params)
    with pytest.raises(ValueError, match="matrix must be one of"), Loss(network(mlp), mean, data).curvature("kfac"):
        pass


def test_wrapped_models_are_measured_inside():
    model, data = network(mlp), batches(mlp)
    assert Loss(torch.compile(model), cross_entropy, data).model is model


def test_settings_say_what_was_measured():
    loss = Loss(network(Attention), cross_entropy, batches(Attention))
    settings = json.loads(json.dumps(loss.settings(), allow_nan=False))
    assert settings["m"] == 5
    assert settings["n"] == 12
    assert settings["num_batches"] == 3
    assert settings["batch_norm"] is None
    assert settings["dtype"] == "float64"
    assert settings["normalize_logits"] is False
    other = Loss(network(Attention), cross_entropy, batches(Attention, seed=1))
    again = Loss(network(Attention), cross_entropy, DataLoader(TensorDataset(*whole(batches(Attention))), batch_size=5))
    assert settings["data"] == again.settings()["data"] != other.settings()["data"]


def test_shapes_of_the_networks():
    assert set(SHAPES) == set(NETWORKS)


@pytest.mark.parametrize("where", ["loss/loss.py", "core/module_state.py", "core/random.py"])
def test_an_interrupt_on_the_way_back_leaves_the_model_as_found(where):
    """At each line of each function that brings something back; batch statistics, so that buffers have moved."""
    model, data = network(cnn).train(), batches(cnn, (4, 4))
    loss = Loss(model, cross_entropy, data, batch_statistics=True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    pointers = [x.data_ptr() for x in model.state_dict().values()]
    step = [torch.ones_like(w) for w in loss.params]
    generator, outside = torch.get_rng_state(), sys.gettrace()

    for k in itertools.count(1):
        lines = 0

        def in_restore(frame, event, arg, k=k):
            nonlocal lines
            lines += event == "line"
            if lines == k:
                raise KeyboardInterrupt
            return in_restore

        def calls(frame, event, arg, here=in_restore):
            result = frame.f_code.co_name == "restore" and frame.f_code.co_filename.endswith(f"sam_optim/{where}")
            return here if result else None

        sys.settrace(calls)
        interrupted = False
        try:
            with loss.displaced(step):
                loss.value_and_gradient()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(outside)
        assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
        assert pointers == [x.data_ptr() for x in model.state_dict().values()]
        assert all(m.training for m in model.modules())
        assert torch.equal(generator, torch.get_rng_state())
        assert torch.is_grad_enabled()
        if not interrupted:
            break
    assert k > 5


def test_split_is_the_same_loss_in_smaller_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = [(torch.randn(n, 3, dtype=torch.float64), torch.arange(n) % 2) for n in (5, 4)]
    loss = Loss(model, nn.CrossEntropyLoss(), data, normalize_logits=True, chunk_size=7)
    small = loss.split(2)
    assert small.batch_sizes == (2, 2, 1, 2, 2)
    assert float(small.value()) == pytest.approx(float(loss.value()), rel=1e-14)
    assert (small.normalize_logits, small.chunk_size) == (True, 7)
    assert loss.block("0").split(3).params is not loss.params
    assert [w.shape for w in loss.block("0").split(3).params] == [(4, 3), (4,)]
    with pytest.raises(ValueError, match="size counts examples and must be >= 1, got 0"):
        loss.split(0)
    odd = Loss(
        model,
        lambda o, t: o.mean(),
        [(data[0][0], torch.zeros(5), torch.ones(2))],
        forward=lambda m, b: (m(b[0]), b[1]),
    )
    with pytest.raises(ValueError, match="cannot be split"):
        odd.split(1)


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


@pytest.mark.parametrize("matrix", MATRICES)
def test_activation_checkpoints(matrix):
    torch.manual_seed(5)
    model = Checkpointed().double().eval()
    batch = (torch.randn(6, 3, 5, 5, dtype=torch.float64), torch.randint(5, (6,)))
    loss = Loss(model, cross_entropy, [batch])
    v = [torch.randn_like(p) for p in loss.params]
    products = []
    for recompute in (False, True):
        model.recompute = recompute
        with loss.curvature(matrix) as product:
            products.append(product(v))
    for a, b in zip(*products, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


class Encoding(UserDict):
    """A mapping that is no dict, as Hugging Face's BatchEncoding."""


class Named(NamedTuple):
    pixels: torch.Tensor
    labels: torch.Tensor


class Rows(list):
    """A list of a class of the user's."""


@pytest.mark.parametrize("form", [Encoding, dict, Named, Rows], ids=lambda form: form.__name__)
def test_batches_of_every_form_are_moved_divided_and_compared(form):
    data = batches(mlp)
    if form is Named:
        formed = [Named(x, y) for x, y in data]
    elif form is Rows:
        formed = [Rows([x, y]) for x, y in data]
    else:
        formed = [form(pixels=x, labels=y, note="as it is") for x, y in data]

    def forward(model, batch):
        assert isinstance(batch, Named if form is Named else Rows if form is Rows else dict)
        pixels, labels = batch[:2] if form in (Named, Rows) else (batch["pixels"], batch["labels"])
        return model(pixels), labels

    expected = Loss(network(mlp), cross_entropy, data)
    loss = Loss(network(mlp), cross_entropy, formed, forward=forward, chunk_size=2)
    assert loss.batch_sizes == expected.batch_sizes
    assert_equal_to_rounding(loss.value(), expected.value())
    assert_equal_to_rounding(loss.split(2).value(), expected.value())
    v = [torch.ones_like(p) for p in loss.params]
    assert_equal_to_rounding(flat(loss.hessian_product(v)), flat(expected.hessian_product(v)))
    assert (
        Loss(network(mlp), cross_entropy, formed[::-1], forward=forward).settings()["data"] != loss.settings()["data"]
    )


@pytest.mark.parametrize("column", range(0, 96, 7))
def test_a_change_anywhere_in_a_batch_is_seen(column):
    """Random erasing of one column of 64 images of 8 channels; a checksum of some entries missed most of them."""

    class Erased:
        passes = 0

        def __iter__(self):
            x = torch.ones(64, 8, 4, 96)
            x[:, :, :, column] *= 1 - 1e-3 * self.passes
            self.passes += 1
            yield x, torch.zeros(64, dtype=torch.long)

    model = nn.Sequential(nn.Flatten(), nn.Linear(8 * 4 * 96, 2))
    with pytest.raises(ValueError, match="not that of the first pass"):
        Loss(model, cross_entropy, Erased()).value()


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_has_no_derivatives_also_where_autograd_gives_some(wrong):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))

    def criterion(outputs, labels):
        return nn.functional.cross_entropy(outputs, labels) + (wrong if labels.all() else 0.0)

    finite, other = (torch.randn(8, 3), torch.tensor([0, 1] * 4)), (torch.randn(8, 3), torch.ones(8).long())
    loss = Loss(model, criterion, [finite, other])
    assert str(float(loss.value())) == str(wrong)
    results = [hessian_eigenvalues(loss, matrix=matrix) for matrix in ("hessian", "ggn")]
    results += [hessian_trace(loss), gradient_regret(loss), worst_case_sharpness(loss, Ball(0.1))]
    for result in results:
        value = result.eigenvalues[0] if isinstance(result, Spectrum) else result.value
        assert math.isnan(float(value))
        assert not result.converged
        assert (
            f"the loss of batch 1 of 2 is {wrong} at the weights" in result.reason or "of batch 1 is" in result.reason
        )
    assert float(hessian_eigenvalues(Loss(model, criterion, [finite])).eigenvalues[0]) > 0
