"""Curvature in pieces of batches: the same matrix, and whole batches where pieces would be another loss; blocks."""

import gc

import pytest
import torch
from networks import NETWORKS, Dense, batches, cnn, flat, like, mlp, network
from quadratic import mean
from torch import nn

from sam_optim.loss import MATRICES, Loss
from sam_optim.loss import curvature as curvature_module
from sam_optim.measures import by_layer, hessian_eigenvalues, hessian_trace

ULPS = 1e3 * torch.finfo(torch.float64).eps
cross_entropy = nn.CrossEntropyLoss()


def whole(data):
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def product_of(loss, matrix="hessian", **arguments):
    v = torch.linspace(-1, 1, sum(p.numel() for p in loss.params), dtype=torch.float64)
    with loss.curvature(matrix, **arguments) as product:
        once = flat(product(like(v, loss.params)))
        assert torch.equal(once, flat(product(like(v, loss.params))))
    return once


def pieces_of(loss, matrix="hessian"):
    with loss.curvature(matrix) as product:
        return [size for _, size, _ in product.pieces()]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("kept_bytes", [0, 10**4, 2**29], ids=["streamed", "some kept", "all kept"])
def test_pieces_give_the_same_product(kind, matrix, kept_bytes, monkeypatch):
    monkeypatch.setattr(curvature_module, "KEPT_BYTES", kept_bytes)
    model, data = network(kind), batches(kind, (10, 7))
    expected = product_of(Loss(model, cross_entropy, data), matrix)
    loss = Loss(model, cross_entropy, data, chunk_size=4)
    assert pieces_of(loss, matrix) == [4, 4, 2, 4, 3]
    torch.testing.assert_close(product_of(loss, matrix), expected, rtol=ULPS, atol=ULPS)
    assert loss.batch_sizes == (10, 7)
    assert loss.settings()["m"] == 10


def test_a_piece_is_as_large_as_memory_allows(monkeypatch):
    model, data = network(cnn).eval(), batches(cnn, (64,))
    assert pieces_of(Loss(model, cross_entropy, data)) == [64]
    loss = Loss(model, cross_entropy, [(data[0][0][:16], data[0][1][:16])])
    saved = curvature_module.SavedBytes(loss.params)
    with saved.counting(), torch.enable_grad():
        torch.autograd.grad(cross_entropy(model(data[0][0][:16]), data[0][1][:16]), loss.params, create_graph=True)
    monkeypatch.setattr(curvature_module, "GRAPH_BYTES", saved.count)
    assert 8 <= max(pieces_of(Loss(model, cross_entropy, data))) <= 18  # weighed by 8 examples, buffers included


class ChangesWhatItSaved(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.first(x).sigmoid()
        z = self.second(y)
        y.mul_(2)
        return z


def test_a_change_in_place_of_what_a_graph_saved_is_an_error():
    loss = Loss(ChangesWhatItSaved(), cross_entropy, [(torch.randn(5, 3), torch.randint(2, (5,)))])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product_of(loss)


@pytest.mark.parametrize("matrix", MATRICES)
def test_weights_that_change_while_graphs_are_kept_are_an_error(matrix):
    loss = Loss(network(mlp), cross_entropy, batches(mlp, (6,)))
    v = [torch.ones_like(w) for w in loss.params]
    with loss.curvature(matrix) as product:
        product(v)
        with torch.no_grad():
            loss.params[-2].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product(v)


def test_a_batch_stays_whole_where_the_loss_is_no_mean_over_examples():
    model, data, criterion = network(mlp), batches(mlp, (12,)), lambda o, y: (o @ o.T).square().mean()
    loss = Loss(model, criterion, data, chunk_size=4)
    assert pieces_of(loss) == [12]
    torch.testing.assert_close(product_of(loss), product_of(Loss(model, criterion, data)), rtol=0, atol=0)


CRITERIA = {
    "class weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)),
    "ignored labels": nn.CrossEntropyLoss(ignore_index=0),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_pieces_have_the_weights_of_their_labels(name):
    model, data = network(mlp), batches(mlp, (12,))
    loss = Loss(model, CRITERIA[name], data, chunk_size=4)
    assert pieces_of(loss) == [4, 4, 4]
    whole = product_of(Loss(model, CRITERIA[name], data))
    torch.testing.assert_close(product_of(loss), whole, rtol=1e-9, atol=1e-10)


def test_a_batch_stays_whole_where_examples_act_on_each_other():
    data = batches(cnn, (12,))
    assert pieces_of(Loss(network(cnn), cross_entropy, data, batch_statistics=True, chunk_size=4)) == [12]
    model = network(cnn)
    model[1] = nn.BatchNorm2d(3, track_running_stats=False).double()
    assert pieces_of(Loss(model, cross_entropy, data, chunk_size=4)) == [12]
    assert pieces_of(Loss(network(cnn), cross_entropy, data, chunk_size=4)) == [4, 4, 4]
    with pytest.raises(ValueError, match="chunk_size"):
        Loss(network(cnn), cross_entropy, data, chunk_size=0)


@pytest.mark.slow
def test_sampled_fisher_is_unbiased_and_depends_on_the_contents_of_batches_alone():
    model, data = network(mlp).eval(), batches(mlp, (6, 5))
    exact = float(Dense(model, cross_entropy, whole(data)).matrix("fisher").trace())
    loss = Loss(model, cross_entropy, data)
    seeds = [hessian_trace(loss, matrix="fisher_mc", seed=seed).value for seed in range(50)]
    values = torch.tensor(seeds, dtype=torch.float64)
    assert abs(float(values.mean()) - exact) < 4 * float(values.std()) / 50**0.5
    assert float(values.std()) > 0.01 * exact
    swapped = Loss(model, cross_entropy, data[::-1])
    torch.testing.assert_close(product_of(swapped, "fisher_mc"), product_of(loss, "fisher_mc"), rtol=ULPS, atol=ULPS)
    pieces = Loss(model, cross_entropy, data, chunk_size=2)
    torch.testing.assert_close(product_of(pieces, "fisher_mc"), product_of(loss, "fisher_mc"), rtol=ULPS, atol=ULPS)
    alone = [product_of(single, "fisher_mc") * n for single, n in zip(loss.single_batches(), (6, 5), strict=True)]
    torch.testing.assert_close(sum(alone) / 11, product_of(loss, "fisher_mc"), rtol=ULPS, atol=ULPS)
    assert not torch.equal(product_of(loss, "fisher_mc", seed=1), product_of(loss, "fisher_mc"))
    assert torch.equal(flat(loss.fisher_mc_product([torch.ones_like(p) for p in loss.params], seed=3)),
                       flat(loss.fisher_mc_product([torch.ones_like(p) for p in loss.params], seed=3)))  # fmt: skip
    many = {"seed": 1, "draws": 20_000}
    torch.testing.assert_close(product_of(pieces, "fisher_mc", **many), product_of(loss, "fisher_mc", **many))
    torch.testing.assert_close(product_of(loss, "fisher_mc", **many), product_of(loss, "fisher"), rtol=0.05, atol=0.01)
    with pytest.raises(ValueError, match="softmax"):
        Loss(model, nn.MSELoss(), [(x, x[:, :3]) for x, _ in data]).fisher_mc_product(loss.params)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("by", ["module", "tensor"])
def test_layers_are_diagonal_blocks(kind, by):
    model, data = network(kind).eval(), batches(kind)
    loss = Loss(model, cross_entropy, data)
    h = Dense(model, cross_entropy, whole(data)).matrix("hessian")
    top = by_layer(hessian_eigenvalues, loss, by=by, tol=1e-6)
    trace = by_layer(hessian_trace, loss, by=by, num_probes=1000)
    named = list(model.named_parameters())
    keys = [name if by == "tensor" else name.rpartition(".")[0] for name, _ in named]
    assert list(top) == list(trace) == list(dict.fromkeys(keys))
    index = torch.cat([torch.full((p.numel(),), list(top).index(key)) for key, (_, p) in zip(keys, named, strict=True)])
    for i, name in enumerate(top):
        block = h[index == i][:, index == i]
        largest = float(torch.linalg.eigvalsh(block)[-1])
        assert float(top[name].eigenvalues) == pytest.approx(largest, rel=1e-4, abs=1e-12)
        assert trace[name].value == pytest.approx(float(block.trace()), rel=1e-10, abs=1e-12)
        assert trace[name].settings["num_parameters"] == len(block)
    assert sum(t.value for t in trace.values()) == pytest.approx(float(h.trace()), rel=1e-10)


def test_blocks_are_chosen_by_name():
    model = network(cnn)
    loss = Loss(model, cross_entropy, batches(cnn))
    block = loss.block("0", "4.bias")
    assert block.parameter_names() == ["0.weight", "0.bias", "4.bias"]
    assert [s.params[0].shape for s in block.single_batches()] == [model[0].weight.shape] * 3
    assert block.settings()["parameters"] == ["0", "4.bias"]
    assert len(loss.params) == 6
    for wrong in (("5",), ("4.bia",), ()):
        with pytest.raises(ValueError, match=r"block|no parameter"):
            loss.block(*wrong)
    with pytest.raises(ValueError, match="by must be"):
        by_layer(hessian_trace, loss, by="layer")
    assert Loss(model, mean, batches(cnn)).settings()["parameters"] is None


def test_the_trace_of_a_relu_network_is_that_of_its_gauss_newton_matrix():
    """Each weight enters piecewise linearly, so the rest of the Hessian has a diagonal of zeros."""
    loss = Loss(network(cnn), cross_entropy, batches(cnn))
    traces = [hessian_trace(loss, matrix=matrix, num_probes=1000).value for matrix in ("hessian", "ggn")]
    assert traces[0] == pytest.approx(traces[1], rel=1e-12)


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "fisher", "empirical_fisher"])
def test_graphs_are_freed(matrix):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Tanh(), nn.Conv2d(4, 4, 2)]
    model = nn.Sequential(*layers, nn.Sigmoid(), nn.Flatten(), nn.Linear(16, 3), nn.Softmax(dim=1)).eval()
    loss = Loss(model, nn.CrossEntropyLoss(), [(torch.randn(20, 1, 8, 8), torch.randint(3, (20,)))])
    v = [torch.randn_like(p) for p in loss.params]

    def tensors():
        gc.collect()
        return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]

    with loss.curvature(matrix) as product:
        product(v)
    del product
    before = tensors()  # held, so that none that another test left behind goes in the meantime
    for _ in range(3):
        with loss.curvature(matrix) as product:
            product(v)
        del product
    assert len(tensors()) == len(before)
