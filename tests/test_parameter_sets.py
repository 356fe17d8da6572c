"""Random sets of parameters of every shape, dtype, layout and gradient, in random groups: each body is the formula."""

import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import Parameter

from sam_optim import ASAM, SAM, Perturbation

SHAPES = [(), (0,), (1,), (3,), (17,), (2, 3), (4, 0, 2), (5, 1, 2), (2, 3, 4, 4), (5000,), (70, 70)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
LAYOUTS = ["contiguous", "transposed", "gaps", "channels_last", "offset"]
GRADIENTS = ["dense", "dense", "none", "zero", "transposed", "sparse"]

one_parameter = st.tuples(
    st.sampled_from(SHAPES), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS), st.sampled_from(GRADIENTS)
)
one_group = st.fixed_dictionaries(
    {
        "rho": st.sampled_from([0.0, 0.05, 0.5]),
        "adaptive": st.sampled_from([False, True, "filter", "layer"]),
        "eta": st.sampled_from([0.0, 0.01]),
        "maximize": st.booleans(),
    }
)
parameter_sets = st.lists(st.tuples(one_group, st.lists(one_parameter, min_size=1, max_size=4)), min_size=1, max_size=3)


def laid_out(values, layout):
    """The same numbers with other strides, or inside other storage."""
    if layout == "transposed" and values.ndim >= 2:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        return torch.stack([values, torch.zeros_like(values)], dim=-1)[..., 0]
    if layout == "channels_last" and values.ndim == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "offset":
        return torch.cat([torch.zeros(3, dtype=values.dtype), values.flatten()])[3:].view(values.shape)
    return values.contiguous()


def make(spec, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for group, members in spec:
        params = []
        for shape, dtype, layout, gradient in members:
            wide = torch.complex128 if dtype.is_complex else torch.float64
            p = Parameter(laid_out(torch.randn(shape, generator=generator, dtype=wide).to(dtype), layout))
            g = torch.randn(shape, generator=generator, dtype=wide).to(dtype)
            if gradient == "zero":
                g.zero_()
            elif gradient == "transposed":
                g = laid_out(g, "transposed")
            elif gradient == "sparse" and len(shape) == 2 and not dtype.is_complex and dtype.itemsize > 2:
                g = (g * (torch.arange(shape[0]) % 2)[:, None]).to_sparse(1)  # whole rows, as of an embedding
            p.grad = None if gradient == "none" else g
            params.append(p)
        groups.append(group | {"params": params})
    return groups


def t_of(w, group):
    """T in float64, written out; of complex numbers for the real and the imaginary part."""
    eta = group["eta"]
    if not group["adaptive"]:
        return torch.ones_like(w)
    if group["adaptive"] == "layer":
        return torch.full_like(w, w.norm() + eta)
    return w.abs() + eta


def expected(groups, norm):
    """{parameter: where it is while perturbed}, as pairs of real numbers in float64; the length of T g."""
    moves, total = [], 0.0
    for group in groups:
        for p in group["params"]:
            if group["rho"] == 0 or p.grad is None:
                continue
            g = p.grad.to_dense() if p.grad.is_sparse else p.grad
            w, g = ((torch.view_as_real(x) if x.is_complex() else x).detach().double() for x in (p, g))
            t = t_of(w, group)
            if group["adaptive"] == "filter" and p.ndim >= 2:
                rows = w.reshape(w.shape[0], math.prod(w.shape[1:])).norm(dim=1) + group["eta"]
                t = rows.reshape(-1, *[1] * (w.ndim - 1)).expand_as(w)
            elif group["adaptive"] == "filter" and p.is_complex():  # a filter of one complex number
                t = (w.norm(dim=-1, keepdim=True) + group["eta"]).expand_as(w)
            total += (t * g).square().sum() if norm == 2 else (t * g).abs().sum()
            moves.append((p, w, t, g, -group["rho"] if group["maximize"] else group["rho"]))
    length = math.sqrt(total) if norm == 2 else float(total)
    if not 0 < length < math.inf:
        return {}, length
    if norm == 2:
        return {p: w + rho * t * t * g / length for p, w, t, g, rho in moves}, length
    return {p: w + rho * t * g.sign() for p, w, t, g, rho in moves}, length


def check(spec, norm, seed):
    groups = make(spec, seed)
    params = [p for group in groups for p in group["params"]]
    grads = [p.grad for p in params]
    clean = [p.detach().clone() for p in params]
    places = [(p.data_ptr(), p.stride()) for p in params]
    truth, length = expected(groups, norm)
    for foreach in (None, False, True):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        sam = Perturbation([dict(g) for g in groups], norm=norm, foreach=foreach)
        if all(g is None for g in grads) and any(group["rho"] for group in groups):
            with pytest.raises(RuntimeError, match="no parameter has a gradient"):
                sam.enter()
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "only .* of the perturbation survives")
            with sam.perturbed():
                for p, w, place in zip(params, clean, places, strict=True):
                    now = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
                    if p not in truth:
                        assert torch.equal(p, w)
                        continue
                    eps = torch.finfo(now.dtype).eps
                    size = float(truth[p].abs().max()) if p.numel() else 0.0
                    atol = max(2 * eps, 32 * torch.finfo(torch.float32).eps) * size
                    torch.testing.assert_close(now.double(), truth[p], rtol=2 * eps, atol=atol)
                    assert p.stride() == place[1]
        assert all(torch.equal(p, w) for p, w in zip(params, clean, strict=True))
        assert [(p.data_ptr(), p.stride()) for p in params] == places
        if sam.last_step.dual_norm is not None:
            assert sam.last_step.dual_norm.item() == pytest.approx(length, rel=1e-5)
    for g, p in zip(grads, params, strict=True):
        p.grad = g


common = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None)


@settings(common, max_examples=60)
@given(parameter_sets, st.sampled_from([2, math.inf]), st.integers(0, 2**20))
def test_sixty_random_sets(spec, norm, seed):
    check(spec, norm, seed)


@pytest.mark.slow
@settings(common, max_examples=500)
@given(parameter_sets, st.sampled_from([2, math.inf]), st.integers(0, 2**20))
def test_five_hundred_random_sets(spec, norm, seed):
    check(spec, norm, seed)


# what does not fit into a random set


@pytest.mark.parametrize("foreach", [None, False, True])
def test_an_expanded_parameter_cannot_be_written_to_and_is_left_alone(foreach):
    """Several entries on one place in memory: torch's own optimizers raise, too."""
    p, other = Parameter(torch.ones(3).expand(4, 3)), Parameter(torch.ones(2))
    optimizer = SAM([other, p], lr=0.1, rho=0.5, foreach=foreach)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum() + other.square().sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="single memory location"):
        torch.optim.SGD([p], lr=0.1).step(closure)
    with pytest.raises(RuntimeError, match="single memory location"):
        optimizer.step(closure)
    assert torch.equal(p, torch.ones(4, 3))
    assert torch.equal(other, torch.ones(2))
    assert not optimizer.perturbation.active


@pytest.mark.parametrize("cls", [SAM, ASAM])
def test_tied_weights_move_once_and_stay_tied(cls):
    """Input and output embedding of a language model: one parameter, two uses, one perturbation."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    optimizer = cls(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, module=model)
    tokens = torch.arange(7)
    w, places = embedding.weight.detach().clone().double(), embedding.weight.data_ptr()
    seen = []

    def gradient(w):
        w = w.clone().requires_grad_()
        loss = nn.functional.cross_entropy(w[tokens] @ w.T, tokens)
        return torch.autograd.grad(loss, w)[0]

    def closure():
        optimizer.zero_grad()
        seen.append(head.weight.detach().double())
        loss = nn.functional.cross_entropy(model(tokens), tokens)
        loss.backward()
        return loss

    for _ in range(3):
        g = gradient(w)
        t = w.abs() + 0.01 if cls is ASAM else torch.ones_like(w)
        moved = w + 0.3 * t * t * g / (t * g).norm()
        w = w - 0.1 * gradient(moved)
        optimizer.step(closure)
        torch.testing.assert_close(seen[-1], moved, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(embedding.weight.detach().double(), w, rtol=1e-5, atol=1e-6)
        assert head.weight is embedding.weight
        assert embedding.weight.data_ptr() == places


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("foreach", [None, True])
def test_sparse_gradients_of_an_embedding_are_the_dense_ones(adaptive, foreach):
    """Through SGD, which takes both; only the rows of the batch move, and none becomes dense."""
    bags = torch.tensor([[1, 2, 4], [4, 4, 1]])
    runs = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.EmbeddingBag(9, 4, sparse=sparse), nn.Linear(4, 2))
        optimizer = SAM(model.parameters(), lr=0.1, rho=0.2, adaptive=adaptive, foreach=foreach)
        untouched = model[0].weight.detach()[[0, 3, 5, 6, 7, 8]].clone()

        def closure(model=model, optimizer=optimizer, untouched=untouched, sparse=sparse):
            optimizer.zero_grad()
            assert torch.equal(model[0].weight[[0, 3, 5, 6, 7, 8]], untouched)
            loss = model(bags).square().sum()
            loss.backward()
            assert model[0].weight.grad.is_sparse == sparse
            return loss

        for _ in range(4):
            optimizer.step(closure)
        runs.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


def test_parameters_freeze_thaw_and_arrive_later():
    """A parameter counts in the norm when it has a gradient, from then on, and never otherwise."""
    a, b, late = (Parameter(torch.tensor([x, x])) for x in (1.0, 2.0, 3.0))
    optimizer = SAM([a, b], torch.optim.SGD, lr=0.1, rho=0.5)
    stages = [
        ((a, b), lambda: None),
        ((a,), lambda: b.requires_grad_(False)),
        ((a, b), lambda: b.requires_grad_(True)),
        ((a, b, late), lambda: optimizer.add_param_group({"params": [late], "lr": 0.2})),
    ]
    for moving, change in stages:
        optimizer.zero_grad()
        change()
        start = {p: p.detach().clone() for p in (a, b, late)}
        norm = torch.cat([2 * start[p] for p in moving]).norm()

        def closure(moving=moving):
            optimizer.zero_grad()
            loss = sum(p.square().sum() for p in moving)
            loss.backward()
            return loss

        optimizer.step(closure)
        for p in (a, b, late):
            w = start[p]
            moved = w - (0.2 if p is late else 0.1) * 2 * (w + 0.5 * 2 * w / norm) if any(p is q for q in moving) else w
            torch.testing.assert_close(p.detach(), moved)


def test_every_parameter_keeps_its_storage_through_a_thousand_steps():
    """Also one that lives in a flat buffer with others, which sees each move."""
    flat = torch.randn(12, generator=torch.Generator().manual_seed(0))
    inside = [Parameter(flat[:5]), Parameter(flat[5:].view(7, 1))]
    alone = Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    params = [*inside, alone]
    optimizer = ASAM(params, torch.optim.SGD, lr=1e-3, momentum=0.9, rho=0.1)
    places = [p.data_ptr() for p in params]

    def closure():
        optimizer.zero_grad()
        assert torch.equal(torch.cat([p.detach().flatten() for p in inside]), flat)
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    for _ in range(1000):
        optimizer.step(closure)
    assert [p.data_ptr() for p in params] == places
    assert torch.equal(torch.cat([p.detach().flatten() for p in inside]), flat)


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e4, 1e25])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_the_size_of_gradients_does_not_matter(scale, foreach):
    """Squares below 1e-45 and above 1e38 are no float32; e depends on the direction alone."""
    p = Parameter(torch.tensor([1.0, 2.0, 3.0]))
    p.grad = torch.tensor([3.0, 0.0, 4.0]) * scale
    with Perturbation([p], rho=0.5, foreach=foreach).perturbed():
        torch.testing.assert_close(p.detach(), torch.tensor([1.3, 2.0, 3.4]))
