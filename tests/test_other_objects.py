"""Graphs, adapters, detection, sparse embeddings and complex weights against dense float64 derivatives.

Each loss is written a second time, as a function of flat weights without `Loss`, and torch's double backward gives its
Hessian. PyG and PEFT themselves are measured where they are installed; stand-ins of a few lines everywhere.
"""

import pytest
import torch
import torch.nn.functional as F
from networks import flat, like
from torch import nn
from torch.func import functional_call

from sam_optim import Ball, average_sharpness, hessian_eigenvalues, hessian_trace, worst_case_sharpness
from sam_optim.loss import Loss

FEATURES, CLASSES = 3, 4


def of_weights(model, loss_of):
    """loss_of(what is called as the model) as a function of the flat trainable weights, and these."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def f(w):
        weights = dict(zip(named, like(w, list(named.values())), strict=True))
        return loss_of(lambda *args, **kwargs: functional_call(model, weights, args, kwargs))

    return f, flat(list(named.values()))


def check(loss, loss_of, *, model=None, rtol=1e-8):
    """All that is read off the loss and its derivatives, against the same loss written out; model: another one of the
    same function and weights, where its own has no double backward. rtol: of products."""
    f, w = of_weights(model or loss.model, loss_of)
    g, h = torch.autograd.functional.jacobian(f, w), torch.autograd.functional.hessian(f, w)
    value, gradient = loss.value_and_gradient()
    torch.testing.assert_close(value, f(w).detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat(gradient), g, rtol=1e-10, atol=1e-13)
    columns = [flat(loss.hessian_product(like(e, loss.params))) for e in torch.eye(len(w), dtype=w.dtype)]
    torch.testing.assert_close(torch.stack(columns, 1), h, rtol=rtol, atol=rtol * float(h.abs().max()))
    largest = torch.linalg.eigvalsh(h)[-1:]
    torch.testing.assert_close(hessian_eigenvalues(loss).eigenvalues, largest, rtol=1e-4, atol=0)
    trace = float(h.trace())
    assert hessian_trace(loss, num_probes=len(w)).value == pytest.approx(trace, rel=10 * rtol)
    sigma = 1e-3  # second order: what is left is of fourth
    average = average_sharpness(loss, Ball(sigma), num_samples=200)
    assert abs(average.value - sigma**2 * trace / 2) < 4 * average.stderr + 1e-3 * sigma**2 * abs(trace)
    whole, rho = loss.merged(), 1e-4
    worst = worst_case_sharpness(whole, Ball(rho), num_steps=10, num_restarts=2).value
    assert worst == pytest.approx(rho * float(g.norm()), rel=2 * rho * float(largest) / float(g.norm()))
    assert torch.equal(flat(loss.params), w)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n, *, seed=0):
    return torch.randint(CLASSES, (n,), generator=torch.Generator().manual_seed(seed))


class Graph:
    """What PyG's Data and Batch look like from outside: tensors as attributes, `to`, and of a batch `num_graphs`."""

    def __init__(self, **tensors):
        vars(self).update(tensors)

    def to(self, device):
        return Graph(**{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in vars(self).items()})


class GraphNetwork(nn.Module):
    """Two layers of mean aggregation; nodes of `batch` are averaged over each graph."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 5).double(), nn.Linear(5, CLASSES).double()

    def forward(self, data):
        source, target = data.edge_index
        degree = torch.bincount(target, minlength=len(data.x)).clamp(min=1)[:, None]
        h = self.first(data.x)
        h = torch.tanh(h + torch.zeros_like(h).index_add(0, target, h[source]) / degree)
        out = self.second(h)
        if getattr(data, "batch", None) is None:
            return out
        counts = torch.bincount(data.batch, minlength=data.num_graphs)[:, None]
        return out.new_zeros(data.num_graphs, CLASSES).index_add(0, data.batch, out) / counts


def graph(nodes, *, seed, **more):
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(nodes, (2, 3 * nodes), generator=generator)
    return {"x": draw(nodes, FEATURES, seed=seed), "edge_index": edges, "y": labels(nodes, seed=seed), **more}


def stand_in(graphs):
    """PyG's collation: nodes one after the other, edges shifted, `batch` the graph of each node."""
    start, edges = 0, []
    for g in graphs:
        edges.append(g["edge_index"] + start)
        start += len(g["x"])
    index = torch.cat([torch.full((len(g["x"]),), i) for i, g in enumerate(graphs)])
    y = torch.stack([g["y"][0] for g in graphs])
    x = torch.cat([g["x"] for g in graphs])
    return Graph(x=x, edge_index=torch.cat(edges, 1), y=y, batch=index, num_graphs=len(graphs))


def pyg(graphs):
    data = pytest.importorskip("torch_geometric.data")
    return data.Batch.from_data_list([data.Data(**g | {"y": g["y"][:1]}) for g in graphs])


@pytest.mark.parametrize("collate", [stand_in, pyg])
def test_batches_of_graphs_weigh_their_graphs(collate):
    """Of different numbers of nodes, which must not count."""
    torch.manual_seed(0)
    sizes = [(4, 7, 3), (5, 5), (9,)]
    groups = [[graph(n, seed=10 * i + k) for k, n in enumerate(nodes)] for i, nodes in enumerate(sizes)]
    data = [collate(group) for group in groups]
    loss = Loss(GraphNetwork(), nn.CrossEntropyLoss(), data)
    assert loss.batch_sizes == (3, 2, 1)

    def alone(model):
        """Graph by graph, without a batch."""
        outputs = [(model(Graph(**g)).mean(0), g["y"][0]) for group in groups for g in group]
        return torch.stack([F.cross_entropy(o[None], y[None]) for o, y in outputs]).mean()

    check(loss, alone)


@pytest.mark.parametrize("package", [None, "torch_geometric.data"])
def test_nodes_that_are_masked_do_not_count(package):
    """Two graphs as two batches, some of their nodes labelled: the mean is over these."""
    torch.manual_seed(0)
    make = Graph if package is None else pytest.importorskip(package).Data
    parts = [graph(n, seed=n, train_mask=torch.arange(n) % every == 0) for n, every in ((8, 2), (12, 6))]

    def forward(model, data):
        return model(data)[data.train_mask], data.y[data.train_mask]

    loss = Loss(GraphNetwork(), nn.CrossEntropyLoss(), [make(**g) for g in parts], forward=forward)
    assert loss.batch_weights == (4, 2)

    def over_nodes(model):
        outputs = torch.cat([model(Graph(**g))[g["train_mask"]] for g in parts])
        return F.cross_entropy(outputs, torch.cat([g["y"][g["train_mask"]] for g in parts]))

    check(loss, over_nodes)


class Adapted(nn.Module):
    """A frozen layer and LoRA's B A beside it (arXiv:2106.09685)."""

    def __init__(self, inner, rank):
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.A = nn.Parameter(draw(rank, inner.in_features, seed=1))
        self.B = nn.Parameter(0.3 * draw(inner.out_features, rank, seed=2))

    def forward(self, x):
        return self.inner(x) + x @ self.A.T @ self.B.T


def by_hand(model):
    for i in (0, 2):
        model[i] = Adapted(model[i], rank=2)
    return model


def peft(model):
    package = pytest.importorskip("peft")
    config = package.LoraConfig(r=2, lora_alpha=2, lora_dropout=0.3, target_modules=["0", "2"], init_lora_weights=False)
    return package.get_peft_model(model, config).double()


@pytest.mark.parametrize("adapt", [by_hand, peft])
def test_of_adapters_alone(adapt):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    model = adapt(base)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    x, y = draw(12, FEATURES), labels(12)
    loss = Loss(model, nn.CrossEntropyLoss(), list(zip(x.split(5), y.split(5), strict=True)))
    assert sum(p.numel() for p in loss.params) == 2 * (FEATURES + 5) + 2 * (5 + CLASSES)
    model.eval()
    check(loss, lambda m: F.cross_entropy(m(x), y))
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())


class Detector(nn.Module):
    """As torchvision's: lists of images of different sizes, dicts of targets; losses where it trains, else boxes."""

    def __init__(self):
        super().__init__()
        self.body, self.box, self.score = nn.Linear(FEATURES, 5), nn.Linear(5, 4), nn.Linear(5, 2)
        self.double()

    def forward(self, images, targets=None):
        h = torch.tanh(self.body(torch.stack([image.mean(dim=(1, 2)) for image in images])))
        boxes, scores = self.box(h), self.score(h)
        if not self.training:
            return [{"boxes": b[None], "scores": s.softmax(0)} for b, s in zip(boxes, scores, strict=True)]
        assert targets is not None
        wanted = torch.stack([t["boxes"].mean(0) for t in targets])
        classes = torch.stack([t["labels"][0] for t in targets])
        return {"loss_box": (boxes - wanted).square().mean(), "loss_class": F.cross_entropy(scores, classes)}


def test_detection_by_the_forward_that_the_error_names():
    torch.manual_seed(0)
    images = [draw(3, 4 + i, 5, seed=i) for i in range(7)]
    targets = [{"boxes": draw(1 + i % 3, 4, seed=i), "labels": torch.tensor([i % 2])} for i in range(7)]
    data = [(images[:3], targets[:3]), (images[3:], targets[3:])]
    model = Detector().eval()
    with pytest.raises(ValueError, match=r"pass forward=lambda model, batch: .*criterion=lambda losses, _") as raised:
        Loss(model, None, data).value()
    forward, criterion = str(raised.value).split("forward=")[1].split(" and criterion=")
    loss = Loss(model, eval(criterion), data, forward=eval(forward))
    assert loss.batch_sizes == (3, 4)

    def trained(m):
        model.train()
        total = sum(m(images, targets).values())
        model.eval()
        return total

    check(loss, trained)
    assert not any(m.training for m in model.modules())


class OneHot(nn.Module):
    """An embedding, or the mean of one over tokens, as the matrix product that it is."""

    def __init__(self, weight, *, mean):
        super().__init__()
        self.weight, self.mean = weight, mean

    def forward(self, tokens):
        rows = F.one_hot(tokens, len(self.weight)).to(self.weight.dtype) @ self.weight
        return rows.mean(1) if self.mean else rows


@pytest.mark.parametrize("is_bag", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_embeddings(sparse, is_bag):
    """Those with sparse gradients, and bags, have no double backward: their products are by differences."""
    torch.manual_seed(0)
    tokens, y = torch.randint(9, (12, 4)), labels(12)
    kind, width = (nn.EmbeddingBag, 3) if is_bag else (nn.Embedding, 12)
    embedding, rest = kind(9, 3, sparse=sparse), (nn.Flatten(), nn.Tanh(), nn.Linear(width, CLASSES))
    model = nn.Sequential(embedding, *rest).double()
    loss = Loss(model, nn.CrossEntropyLoss(), list(zip(tokens.split(5), y.split(5), strict=True)))
    reference = nn.Sequential(OneHot(embedding.weight, mean=is_bag), *rest)
    has_double_backward = not sparse and not is_bag
    check(loss, lambda m: F.cross_entropy(m(tokens), y), model=reference, rtol=1e-8 if has_double_backward else 1e-6)
    whole = Loss(reference, nn.CrossEntropyLoss(), [(tokens, y)])
    v = [torch.ones_like(p) for p in loss.params]
    for product in ("ggn_product", "fisher_product", "empirical_fisher_product"):
        actual, expected = (flat(getattr(x, product)(v)) for x in (loss, whole))
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


class Complex(nn.Module):
    """|W x|^2 as logits; W is complex, or the pair of its parts, which the error names."""

    def __init__(self, *, as_pair):
        super().__init__()
        w = torch.complex(draw(CLASSES, FEATURES, seed=1), draw(CLASSES, FEATURES, seed=2))
        self.as_pair, self.w = as_pair, nn.Parameter(torch.view_as_real(w) if as_pair else w)

    def forward(self, x):
        w = torch.view_as_complex(self.w) if self.as_pair else self.w
        return (x.to(w.dtype) @ w.T).abs().square()


class Parts(nn.Module):
    """|W x|^2 with the real arithmetic written out."""

    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, x):
        return (x @ self.w[..., 0].T).square() + (x @ self.w[..., 1].T).square()


def test_complex_weights_are_refused_and_the_remedy_works():
    torch.manual_seed(0)
    x, y = draw(12, FEATURES), labels(12)
    with pytest.raises(ValueError, match=r"'w' is complex.*view_as_real"):
        Loss(Complex(as_pair=False), nn.CrossEntropyLoss(), [(x, y)])
    model = Complex(as_pair=True)
    loss = Loss(model, nn.CrossEntropyLoss(), [(x, y)])
    check(loss, lambda m: F.cross_entropy(m(x), y), model=Parts(model.w))
