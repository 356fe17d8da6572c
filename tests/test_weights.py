"""What batches and examples weigh: the loss over batches is that of one batch, whatever its mean is over."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from networks import Dense, batches, flat, like, mlp, network
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sam_optim.core.geometry import Ball
from sam_optim.loss import Loss
from sam_optim.measures import gradient_noise_scale, hessian_eigenvalues, hessian_trace, worst_case_sharpness

ULPS = 1e4 * torch.finfo(torch.float64).eps
SIZES = (9, 4, 7)
CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
CRITERIA = {
    "ignored labels": nn.CrossEntropyLoss(ignore_index=0),
    "class weights": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS),
    "both, smoothed": nn.CrossEntropyLoss(weight=CLASS_WEIGHTS, ignore_index=1, label_smoothing=0.1),
    "partial": functools.partial(F.cross_entropy, ignore_index=2),
    "a function": lambda o, y: F.cross_entropy(o, y, weight=CLASS_WEIGHTS, ignore_index=0),
    "an ignoring function": lambda o, y: F.cross_entropy(o, y, ignore_index=1),
}
RULES = {"ignored labels": "counted labels", "partial": "counted labels"}
RULES |= {"class weights": "weights of classes", "both, smoothed": "weights of classes"}


def joined(data):
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", CRITERIA)
def test_several_batches_are_one_batch(name, chunk_size):
    model, data, criterion = network(mlp).eval(), batches(mlp, SIZES), CRITERIA[name]
    dense = Dense(model, criterion, joined(data))
    w = dense.w.clone().requires_grad_()
    expected = dense.loss(w)
    loss = Loss(model, criterion, data, chunk_size=chunk_size)
    value, gradient = loss.value_and_gradient()
    torch.testing.assert_close(value, expected.detach(), rtol=ULPS, atol=ULPS)
    torch.testing.assert_close(loss.value(), expected.detach(), rtol=ULPS, atol=ULPS)
    torch.testing.assert_close(flat(gradient), torch.autograd.grad(expected, w)[0], rtol=ULPS, atol=ULPS)
    v = torch.linspace(-1, 1, len(dense.w), dtype=torch.float64)
    for matrix in ("hessian", "ggn"):
        with loss.curvature(matrix) as product:
            torch.testing.assert_close(
                flat(product(like(v, loss.params))), dense.matrix(matrix) @ v, rtol=1e-9, atol=1e-9
            )
    assert loss.settings()["weights"] == RULES.get(name, "criterion")
    assert loss.batch_sizes == SIZES


@pytest.mark.parametrize("name", CRITERIA)
def test_fisher_matrices_have_the_weights_of_the_criterion(name):
    model, data, criterion = network(mlp).eval(), batches(mlp, SIZES), CRITERIA[name]
    loss = Loss(model, criterion, data, chunk_size=3)
    v = like(torch.linspace(-1, 1, 51, dtype=torch.float64), loss.params)
    if "smoothed" not in name:  # with it the Hessian of the criterion is that of another model of the labels
        torch.testing.assert_close(flat(loss.fisher_product(v)), flat(loss.ggn_product(v)), rtol=1e-9, atol=1e-9)
    x, y = joined(data)
    total = torch.zeros(51, 51, dtype=torch.float64)
    weight_of = {
        "ignored labels": [0, 1, 1],
        "class weights": [1, 2, 5],
        "both, smoothed": [1, 0, 5],
        "partial": [1, 1, 0],
    }
    weight_of |= {"a function": [0, 2, 5], "an ignoring function": [1, 0, 1]}
    weights = torch.tensor(weight_of[name], dtype=torch.float64)[y]
    for i in range(len(x)):
        if weights[i]:
            dense = Dense(model, criterion, (x[i : i + 1], y[i : i + 1]))
            w = dense.w.clone().requires_grad_()
            g = torch.autograd.grad(dense.loss(w), w)[0]
            total += weights[i] * torch.outer(g, g) / weights.sum()
    torch.testing.assert_close(flat(loss.empirical_fisher_product(v)), total @ flat(v), rtol=1e-9, atol=1e-9)


def test_examples_alone_and_a_batch_without_labels():
    data = batches(mlp, SIZES)
    loss = Loss(network(mlp), CRITERIA["ignored labels"], data)
    alone = loss.split(1)
    assert alone.num_batches == sum(int((y != 0).sum()) for _, y in data)
    torch.testing.assert_close(alone.value(), loss.value(), rtol=ULPS, atol=ULPS)
    data[1] = (data[1][0], torch.zeros_like(data[1][1]))
    for several, number in ((data, 1), (data[1:2], 0)):
        with pytest.raises(ValueError, match=f"batch {number} has the weight 0"):
            Loss(network(mlp), CRITERIA["ignored labels"], several).value()


def test_the_noise_scale_is_over_counted_labels():
    model, data = network(mlp).eval(), batches(mlp, SIZES)
    x, y = joined(data)
    kept = y != 0
    expected = gradient_noise_scale(Loss(model, nn.CrossEntropyLoss(), [(x[kept], y[kept])])).value
    loss = Loss(model, CRITERIA["ignored labels"], data)
    assert gradient_noise_scale(loss.split(1)).value == pytest.approx(expected, rel=1e-9)
    assert gradient_noise_scale(Loss(model, CRITERIA["ignored labels"], [(x, y)])).value == pytest.approx(expected)


def test_weights_that_are_given():
    data = batches(mlp, SIZES)
    values = torch.stack([Loss(network(mlp), nn.CrossEntropyLoss(), [b]).value() for b in data])
    for given in ([1.0, 3.0, 2.0], lambda batch: {9: 1.0, 4: 3.0, 7: 2.0}[len(batch[1])]):
        loss = Loss(network(mlp), nn.CrossEntropyLoss(), data, batch_weights=given)
        expected = (values * torch.tensor([1.0, 3.0, 2.0]).double()).sum() / 6
        torch.testing.assert_close(loss.value(), expected, rtol=ULPS, atol=ULPS)
        assert loss.settings()["weights"] == "given"
        assert loss.over_batches(lambda single: float(single.value())) == pytest.approx(values.tolist())
    with pytest.raises(ValueError, match="one number for each batch, got 2 for 3"):
        Loss(network(mlp), nn.CrossEntropyLoss(), data, batch_weights=[1.0, 2.0]).value()


def test_elements_of_sequences_of_different_lengths():
    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()
    data = [(torch.randn(n, t, 2).double(), torch.randn(n, t, 1).double()) for n, t in ((3, 5), (4, 2), (2, 7))]
    loss = Loss(model, nn.MSELoss(), data)
    errors = torch.cat([(model(x) - y).square().flatten() for x, y in data]).detach()
    torch.testing.assert_close(loss.value(), errors.mean(), rtol=ULPS, atol=ULPS)


class Tokens(nn.Module):
    """A language model in the form of Hugging Face's: labels of the same or of the next token, -100 is padding."""

    def __init__(self, shift):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7)).double()
        self.shift = shift

    def forward(self, input_ids, labels=None):
        logits = self.body(input_ids)
        shifted = logits[:, : logits.shape[1] - self.shift], labels[:, self.shift :]
        loss = F.cross_entropy(shifted[0].flatten(0, 1), shifted[1].flatten(), ignore_index=-100)
        return SimpleNamespace(loss=loss, logits=logits)


@pytest.mark.parametrize("shift", [0, 1])
def test_padded_language_batches_weigh_their_tokens(shift):
    model, data, losses = Tokens(shift), [], []
    for n, t in ((2, 6), (3, 9), (4, 3)):
        ids = torch.randint(7, (n, t))
        labels = ids.masked_fill(torch.rand(n, t) < 0.4, -100)
        data.append({"input_ids": ids, "labels": labels})
        logits, wanted = model.body(ids)[:, : t - shift], labels[:, shift:]
        losses.append(
            F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")[wanted.flatten() != -100]
        )
    loss = Loss(model, None, data)
    torch.testing.assert_close(loss.value(), torch.cat(losses).mean().detach(), rtol=ULPS, atol=ULPS)
    w = torch.cat([p.flatten() for p in model.parameters()])
    grads = torch.autograd.grad(torch.cat(losses).mean(), list(model.parameters()), create_graph=True)
    g = torch.cat([x.flatten() for x in grads])
    rows = [torch.autograd.grad(x, list(model.parameters()), retain_graph=True, materialize_grads=True) for x in g]
    dense = torch.stack([torch.cat([x.flatten() for x in row]) for row in rows])
    top = float(hessian_eigenvalues(loss, tol=1e-8).eigenvalues)
    assert top == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-7)
    assert loss.settings()["weights"] == "counted labels"
    assert len(w) == loss.settings()["num_parameters"]


SOFT = {
    "probabilities": (nn.CrossEntropyLoss(), lambda n, t: torch.rand(n, 3, t).double().softmax(1)),
    "elements": (nn.MSELoss(), lambda n, t: torch.randn(n, 3, t).double()),
    "function": (lambda o, y: F.mse_loss(o, y), lambda n, t: torch.randn(n, t).double()),
}


@pytest.mark.parametrize("name", SOFT)
def test_sequences_of_other_lengths_whose_targets_are_no_labels(name):
    """The mean over all positions of all batches."""
    torch.manual_seed(0)
    criterion, draw = SOFT[name]
    layers = [nn.Conv1d(2, 1, 1), nn.Flatten()] if name == "function" else [nn.Conv1d(2, 3, 1)]
    model = nn.Sequential(*layers, nn.Tanh()).double()
    data = [(torch.randn(n, 2, t).double(), draw(n, t)) for n, t in ((2, 3), (4, 5), (3, 3))]
    values = [criterion(model(x), y).item() for x, y in data]
    positions = [x.shape[0] * x.shape[2] for x, _ in data]
    expected = sum(k * v for k, v in zip(positions, values, strict=True)) / sum(positions)
    assert float(Loss(model, criterion, data).value()) == pytest.approx(expected, rel=1e-9)
    if name == "elements":  # a function of targets with another last dimension is not looked through
        with pytest.raises(ValueError, match="batch_weights="):
            Loss(model, lambda o, y: F.mse_loss(o, y), data).value()


def test_ignored_labels_beside_other_targets():
    """Two means in one loss, over labels that count and over examples: no weight of a batch is right for both."""
    model = nn.ModuleList([network(mlp).eval(), nn.Linear(4, 1).double()])
    x, y, z = torch.randn(6, 4).double(), torch.tensor([0, 1, 2, 0, 1, -100]), torch.randn(6).double()
    data = [(x[:4], y[:4], z[:4]), (x[4:], y[4:], z[4:])]
    how = {"forward": lambda m, b: ((m[0](b[0]), m[1](b[0])[:, 0]), b[1:])}

    def two(outputs, targets):
        return F.cross_entropy(outputs[0], targets[0]) + F.mse_loss(outputs[1], targets[1])

    with pytest.raises(ValueError, match="batch_weights="):
        Loss(model, two, data, **how).value()
    values = [two(*how["forward"](model, b)).item() for b in data]
    assert float(Loss(model, two, data, batch_weights=[3.0, 1.0], **how).value()) == pytest.approx(
        (3 * values[0] + values[1]) / 4
    )


def next_token(o, t):
    return F.cross_entropy(o[:, :-1].flatten(0, 1), t[:, 1:].flatten(), ignore_index=-100)


def weighted_token(o, t):
    return F.cross_entropy(o.flatten(0, 1), t.flatten(), ignore_index=-100, weight=torch.arange(1.0, 8.0).double())


@pytest.mark.parametrize("criterion", [next_token, weighted_token])
def test_functions_of_padded_batches_of_other_lengths(criterion):
    model, data, losses, weights = Tokens(0).body, [], [], []
    shift = criterion is next_token
    for n, t in ((2, 6), (3, 9), (4, 3), (1, 6)):
        ids = torch.randint(7, (n, t))
        labels = ids.masked_fill(torch.rand(n, t) < 0.4, -100)
        labels[:, :2] = ids[:, :2]
        data.append((ids, labels))
        counted = labels[:, shift:][labels[:, shift:] != -100]
        weights.append(float(len(counted) if shift else (counted + 1).sum()))
        losses.append(criterion(model(ids), labels).item())
    loss = Loss(model, criterion, data)
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert float(loss.value()) == pytest.approx(expected, rel=1e-9)
    assert loss.settings()["weights"] == "criterion"


@pytest.mark.parametrize("name", CRITERIA)
def test_batches_of_one_example(name):
    """Weights of classes cannot be seen from one example alone."""
    model, criterion = network(mlp).eval(), CRITERIA[name]
    x, y = joined(batches(mlp, SIZES))
    alone = [(a[None], b[None]) for a, b in zip(x, y, strict=True) if criterion(model(a[None]), b[None]) > 0]
    kept = joined(alone)
    expected = criterion(model(kept[0]), kept[1]).detach()
    torch.testing.assert_close(Loss(model, criterion, alone).value(), expected, rtol=1e-9, atol=1e-9)


class Labelled(nn.Module):
    """The calling convention of Hugging Face models, with a loss of its own."""

    def __init__(self, loss):
        super().__init__()
        self.inner, self.loss = network(mlp), loss

    def forward(self, x, labels=None):
        logits = self.inner(x)
        return SimpleNamespace(loss=self.loss(logits, labels), logits=logits)


def a_sum(o, y):
    return F.cross_entropy(o, y, reduction="sum")


def half_ignored(data):
    return [(x, y.where(torch.arange(len(y)) >= (len(y) + 1) // 2, -100)) for x, y in data]


SUMS = {
    "a function": lambda data: (network(mlp), a_sum, data),
    "a part of it": lambda data: (network(mlp), lambda o, y: a_sum(o, y) / 128, data),
    "of one example": lambda data: (network(mlp), a_sum, [(x[:1], y[:1]) for x, y in data]),
    "outputs.loss": lambda data: (Labelled(a_sum), None, [{"x": x, "labels": y} for x, y in data]),
    "targets in a mapping": lambda data: (
        network(mlp), lambda o, t: a_sum(o, t["y"]), [(x, {"y": y}) for x, y in data],
    ),
    "beside ignored labels": lambda data: (network(mlp), a_sum, half_ignored(data)),
    "of the model, beside ignored labels": lambda data: (
        Labelled(a_sum), None, [{"x": x, "labels": y} for x, y in half_ignored(data)[:1]],
    ),
    "squares": lambda data: (network(mlp), lambda o, y: (o.sum(1) - y).square().sum(), data),
    "beside a mean": lambda data: (network(mlp), lambda o, y: a_sum(o, y) + 0.1 * o.square().mean(), data),
    "over the root of their number": lambda data: (network(mlp), lambda o, y: a_sum(o, y) / len(y) ** 0.5, data),
    "of the model, beside a mean": lambda data: (
        Labelled(lambda o, y: a_sum(o, y) / 100 + o.square().mean()), None, [{"x": x, "labels": y} for x, y in data],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_over_the_batch_is_refused(name):
    with pytest.raises(ValueError, match="sum over the batch"):
        Loss(*SUMS[name](batches(mlp))).value()


def contrastive(o, y):
    """arXiv:2004.11362."""
    z = F.normalize(o, dim=1) @ F.normalize(o, dim=1).T - 1e9 * torch.eye(len(o), dtype=o.dtype)
    same = (y[:, None] == y) & ~torch.eye(len(o), dtype=torch.bool)
    return -(z.log_softmax(1) * same).sum() / same.sum().clamp(min=1)


def test_losses_that_change_with_the_batch_and_are_no_sums():
    for criterion in (contrastive, lambda o, y: o.std(dim=0).sum(), lambda o, y: torch.cdist(o, o).max()):
        assert Loss(network(mlp), criterion, batches(mlp, (16, 16))).value().isfinite()


def test_a_mean_over_pairs_weighs_examples():
    pairs = Loss(network(mlp), lambda o, y: (o @ o.T).square().mean(), batches(mlp))
    assert pairs.settings()["weights"] == "examples"


def test_ignored_labels_of_a_loss_that_is_no_mean_over_the_others():
    """As of BertForPreTraining, which adds the loss of a second task."""
    model = Labelled(lambda o, y: F.cross_entropy(o, y, ignore_index=-100) + o.square().mean())
    data = [{"x": x, "labels": y.masked_fill(y == 0, -100)} for x, y in batches(mlp)]
    with pytest.raises(ValueError, match="batch_weights="):
        Loss(model, None, data).value()
    given = Loss(model, None, data, batch_weights=[1.0, 2.0, 3.0])
    values = [float(Loss(model, None, [b]).value()) for b in data]
    assert float(given.value()) == pytest.approx((values[0] + 2 * values[1] + 3 * values[2]) / 6)


def test_ignored_labels_beside_outputs_in_a_tuple():
    """What the mean is over cannot be seen from such outputs."""

    def run(given=None, several=None):
        def forward(model, batch):
            return (model(batch[0]), None), batch[1]

        def criterion(outputs, y):
            return F.cross_entropy(outputs[0], y)

        return Loss(model, criterion, several or data, forward=forward, batch_weights=given).value()

    model, data = network(mlp), half_ignored(batches(mlp, SIZES))
    with pytest.raises(ValueError, match="batch_weights="):
        run()
    counted = [float((y != -100).sum()) for _, y in data]
    x, y = joined(data)
    torch.testing.assert_close(run(counted), F.cross_entropy(model.eval()(x), y).detach(), rtol=ULPS, atol=ULPS)
    torch.testing.assert_close(run(several=[(x, y)]), run(counted), rtol=ULPS, atol=ULPS)


def test_logits_of_tokens_say_which_forward_to_write():
    model = Tokens(1)
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(7, (3, 4, 6))]
    with pytest.raises(ValueError, match=r"forward=lambda model, batch") as raised:
        Loss(model, nn.CrossEntropyLoss(), data).value()
    forward = eval(str(raised.value).split("it is forward=")[1])
    loss = Loss(model, nn.CrossEntropyLoss(), data, forward=forward)
    assert float(loss.value()) == pytest.approx(float(Loss(model, None, data).value()), rel=1e-9)
    v = [torch.ones_like(p) for p in loss.params]
    torch.testing.assert_close(flat(loss.fisher_product(v)), flat(loss.ggn_product(v)))


def test_cross_entropy_of_large_vocabularies_in_closed_form():
    """Against double backward of the criterion, for every form that torch's cross-entropy takes."""
    torch.manual_seed(0)
    model = nn.Conv1d(2, 3, 1).double()
    x = torch.randn(5, 2, 4).double()
    labels = torch.randint(3, (5, 4)).masked_fill(torch.rand(5, 4) < 0.3, -100)
    of_classes = torch.rand(5, 3, 4).double().softmax(1)
    for options in ({}, {"weight": CLASS_WEIGHTS}, {"weight": CLASS_WEIGHTS, "label_smoothing": 0.2}):
        for y in (labels, of_classes):
            built_in = Loss(model, nn.CrossEntropyLoss(**options), [(x, y)])
            general = Loss(model, lambda o, t, options=options: F.cross_entropy(o, t, **options), [(x, y)])
            v = [torch.randn_like(p) for p in built_in.params]
            torch.testing.assert_close(
                flat(built_in.ggn_product(v)), flat(general.ggn_product(v)), rtol=1e-9, atol=1e-12
            )


class Peak(TorchDispatchMode):
    """The most bytes of large storages that were alive at once, of those that operations returned."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage()).nbytes() > 2**20:
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {ref: n for ref, n in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


@pytest.mark.slow
@pytest.mark.parametrize("matrix", ["ggn", "fisher"])
def test_the_memory_of_a_large_vocabulary_is_little_more_than_the_logits(matrix):
    torch.manual_seed(0)
    vocabulary, n, length = 50_000, 8, 128
    rows = matrix == "fisher"  # a batch of tokens, (N, V); else of sequences, (n, V, length)
    x, y = torch.randint(50, (n, length)), torch.randint(vocabulary, (n, length))
    head = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, vocabulary, bias=False))
    model = head if rows else nn.Sequential(head, nn.Flatten(0, 1), nn.Unflatten(0, (-1, length)), Transposed())
    data = [(x.flatten(), y.flatten())] if rows else [(x, y)]
    logits = 4 * n * length * vocabulary
    with Peak() as memory, Loss(model, nn.CrossEntropyLoss(), data).curvature(matrix) as product:
        result = product([torch.ones_like(p) for p in model.parameters()])
    assert memory.peak < 2.2 * logits  # a forward pass takes 2: the criterion has the logarithms of softmax
    g, w = head[0](x).detach().flatten(0, 1), head[1].weight.detach()  # d = J v of the logits, by hand
    p, d = (g @ w.T).softmax(1), (g.sum(1)[:, None] + w.sum(1))
    covariance = (p * (d - (p * d).sum(1, keepdim=True))) / len(p)
    torch.testing.assert_close(result[1], covariance.T @ g, rtol=1e-3, atol=1e-7)


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


class Graphs:
    """A batch of PyG: an object with its tensors inside."""

    def __init__(self, x, y):
        self.x, self.y, self.num_graphs = x, y, len(y)

    def to(self, device):
        return Graphs(self.x.to(device), self.y.to(device))


class OfGraphs(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network(mlp)

    def forward(self, data):
        return self.inner(data.x)


def test_objects_are_batches_of_examples():
    data = batches(mlp)
    graphs = Loss(OfGraphs(), nn.CrossEntropyLoss(), [Graphs(x, y) for x, y in data])
    expected = Loss(network(mlp), nn.CrossEntropyLoss(), data)
    assert graphs.batch_sizes == (5, 5, 2)
    torch.testing.assert_close(graphs.value(), expected.value(), rtol=ULPS, atol=ULPS)
    other = Loss(OfGraphs(), nn.CrossEntropyLoss(), [Graphs(x + 1e-9, y) for x, y in data])
    assert other.settings()["data"] != graphs.settings()["data"]


def test_small_batches_are_computed_together():
    """As fast as one batch, and the same numbers; where examples act on each other they stay alone."""
    x, y = joined(batches(mlp, (3000,)))
    alone = [(a[None], b[None]) for a, b in zip(x, y, strict=True)]
    model, calls = network(mlp).eval(), []
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    loss, whole = Loss(model, nn.CrossEntropyLoss(), alone), Loss(model, nn.CrossEntropyLoss(), [(x, y)])
    v = [torch.ones_like(p) for p in loss.params]
    for few in (loss, loss.merged()):
        torch.testing.assert_close(few.value(), whole.value(), rtol=ULPS, atol=ULPS)
        torch.testing.assert_close(flat(few.gradient()), flat(whole.gradient()), rtol=1e-9, atol=1e-12)
        for matrix in ("hessian", "ggn", "fisher"):
            expected = flat(whole._product(matrix, v))
            torch.testing.assert_close(flat(few._product(matrix, v)), expected, rtol=1e-9, atol=1e-12)
    assert len(calls) < 500
    assert loss.batch_values().shape == (3000,)
    contrast = lambda o, t: (o - o.mean(0)).square().mean() + F.cross_entropy(o, t)  # noqa: E731
    model, data = network(mlp), batches(mlp, (2, 2, 2, 2))
    expected = torch.stack([contrast(model.eval()(a), b) for a, b in data]).mean().detach()
    torch.testing.assert_close(Loss(model, contrast, data).value(), expected, rtol=ULPS, atol=ULPS)


class TwoFunctions(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = network(mlp)

    def forward(self, x):
        return self.inner(x) if torch.is_grad_enabled() else 1.01 * self.inner(x)


def test_a_model_of_two_functions_is_refused():
    with pytest.raises(ValueError, match=r"without gradients and .* with them"):
        Loss(TwoFunctions(), nn.CrossEntropyLoss(), batches(mlp)).value()


class TwoForSome(TwoFunctions):
    def forward(self, x):
        y = self.inner(x)
        return y if torch.is_grad_enabled() else torch.where(x[:, :1] > 0, 1.05 * y, y)


def test_a_model_of_two_functions_is_refused_wherever_the_other_one_is():
    """In later batches alone, as where only these are padded."""
    x, y = torch.cat([x for x, _ in batches(mlp, (32,) * 10)]), torch.arange(320) % 3
    data = list(zip(x[x[:, 0].argsort()].split(32), y.split(32), strict=True))
    with pytest.raises(ValueError, match=r"without gradients and .* with them"):
        Loss(TwoForSome(), nn.CrossEntropyLoss(), data).value()
    Loss(TwoForSome(), nn.CrossEntropyLoss(), data[:4]).value()


def test_values_and_gradients_of_an_encoder_with_padding_are_of_one_function():
    """torch's fast path, which only inference takes, computes another one where the padding is not on the right."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, x, mask):
            return self.head(self.encoder(x, src_key_padding_mask=mask).mean(dim=1))

    model = Encoder().eval()
    x, mask = torch.randn(6, 5, 8), torch.zeros(6, 5, dtype=torch.bool)
    mask[::2, 0] = True
    y = torch.randint(3, (6,))
    loss = Loss(model, nn.CrossEntropyLoss(), [(x, mask, y)])
    enabled = torch.backends.mha.get_fastpath_enabled()
    value, gradient = loss.value_and_gradient()
    assert float(loss.value()) == pytest.approx(float(value), rel=1e-6)
    size = float(flat(gradient).norm())
    with loss.displaced([1e-3 * g / size for g in gradient]):
        rise = float(loss.value() - value)
    assert rise == pytest.approx(1e-3 * size, rel=0.02)
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def cross_entropy_of_logits(outputs, target):
    return nn.functional.cross_entropy(outputs, target)


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), cross_entropy_of_logits], ids=["module", "function"])
@pytest.mark.parametrize("num_batches", [1, 3])
def test_a_model_that_has_diverged_has_no_curvature_whatever_the_criterion_is(criterion, num_batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    batches = [(torch.randn(6, 4), torch.randint(0, 3, (6,))) for _ in range(num_batches)]
    for measure in (hessian_eigenvalues, hessian_trace):
        result = measure(Loss(model, criterion, batches))
        assert not result.converged
        assert "is nan at the weights" in result.reason


@pytest.mark.parametrize(
    ("criterion", "label"),
    [
        (cross_entropy_of_logits, -100),
        (lambda o, t: (o - 100).log().mean(), 0),
        (lambda o, t: (o[:, 0] - t).square().mean(), math.nan),
    ],
    ids=["no label counts", "logarithm", "target"],
)
def test_a_loss_that_is_nan_at_finite_outputs_is_an_error(criterion, label):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    batches = [(torch.randn(6, 4), torch.full((6,), label))]
    for measure in (hessian_eigenvalues, hessian_trace, functools.partial(worst_case_sharpness, ball=Ball(0.05))):
        with pytest.raises(ValueError, match=r"nan where the model's outputs are finite|-100"):
            measure(Loss(model, criterion, batches))


class Hidden:
    """An output in which no tensor can be looked for."""

    __slots__ = ("loss",)

    def __init__(self, loss):
        self.loss = loss


class Diverged(nn.Linear):
    def forward(self, x):
        return Hidden(super().forward(x).mean() * math.nan)


def test_outputs_that_hide_their_tensors_are_not_called_finite():
    assert math.isnan(Loss(Diverged(4, 1), None, [(torch.randn(6, 4), torch.zeros(6))]).value())


@pytest.mark.parametrize(
    "of_mean", [torch.exp, torch.sqrt, lambda ce: (1 - torch.exp(-ce)) ** 2 * ce], ids=["exp", "sqrt", "focal"]
)
def test_a_function_of_a_mean_is_not_a_mean_over_pieces(of_mean):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(24, 4, dtype=torch.float64), torch.randint(3, (24,))

    def criterion(outputs, labels):
        return of_mean(nn.functional.cross_entropy(outputs, labels))

    whole = hessian_eigenvalues(Loss(model, criterion, [(x, y)]))
    chunked = hessian_eigenvalues(Loss(model, criterion, [(x, y)], chunk_size=8))
    torch.testing.assert_close(chunked.eigenvalues, whole.eigenvalues, rtol=1e-9, atol=0)
    loss = Loss(model, criterion, [(x[:16], y[:16]), (x[16:], y[16:])])
    parts = [criterion(model(a).detach(), b) for a, b in ((x[:16], y[:16]), (x[16:], y[16:]))]
    assert float(loss.value()) == pytest.approx(float(2 * parts[0] + parts[1]) / 3)


class ItsOwnLoss(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2).double()

    def forward(self, x, y):
        return F.cross_entropy(self.layer(x), y)


class TestModelsThatAreTheirOwnLoss:
    data = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64), torch.tensor([0, 1] * 3)

    def loss(self, **options):
        return Loss(ItsOwnLoss(), lambda o, _: o, [self.data], forward=lambda m, b: (m(*b), None), **options)

    @pytest.mark.parametrize("chunk_size", [None, 2])
    def test_the_hessian_is_that_of_the_layer(self, chunk_size):
        x, y = self.data
        expected = Loss(ItsOwnLoss().layer, nn.CrossEntropyLoss(), [(x, y)])
        result = hessian_eigenvalues(self.loss(chunk_size=chunk_size), num=3)
        torch.testing.assert_close(result.eigenvalues, hessian_eigenvalues(expected, num=3).eigenvalues)

    @pytest.mark.parametrize("matrix", ["ggn", "fisher", "fisher_mc", "empirical_fisher"])
    def test_there_is_no_matrix_of_outputs(self, matrix):
        """Of the identity it would be 0 for every model."""
        with pytest.raises(ValueError, match=r"got outputs that are the loss itself: .* use matrix='hessian'"):
            hessian_eigenvalues(self.loss(), matrix=matrix)


def test_t5_is_weighed_by_its_labels_and_agrees_with_a_dense_hessian():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).double().eval()
    labels = [torch.tensor([[3, 4, 5, 1], [3, 1, -100, -100], [7, 8, 1, -100]]), torch.tensor([[3, 4], [3, -100]])]
    data = [{"input_ids": torch.randint(1, 40, (len(y), 5)), "labels": y} for y in labels]
    loss = Loss(model, None, data)
    assert loss.batch_weights == (9, 3)
    w = model.decoder.final_layer_norm.weight
    mean = sum(n * model(**batch).loss for n, batch in zip((9, 3), data, strict=True)) / 12
    assert float(loss.value()) == pytest.approx(float(mean.detach()), rel=1e-12)
    (g,) = torch.autograd.grad(mean, w, create_graph=True)
    dense = torch.stack([torch.autograd.grad(x, w, retain_graph=True)[0] for x in g])
    values = hessian_eigenvalues(loss.block("decoder.final_layer_norm"), num=8).eigenvalues
    torch.testing.assert_close(values, torch.linalg.eigvalsh(dense).flip(0))
