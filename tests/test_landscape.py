"""Lines and planes of the loss against closed forms on quadratics and against the peer's numbers for the golden MLP."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sam_optim.landscape import (
    eigenvector_direction,
    filter_normalized,
    gradient_direction,
    interpolate,
    random_direction,
    slice_1d,
    slice_2d,
    trajectory_directions,
)
from sam_optim.loss import Loss
from sam_optim.measures import hessian_eigenvalues

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden values are not part of the repository")


class Quadratic(nn.Module):
    """Outputs 1/2 <w, A w>, w = (u, v) in a 2 x 2 weight: every slice is a parabola that can be written down."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.6, 0.8], [3.0, 4.0]], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
        self.register_buffer("a", torch.tensor([[2.0, 1.0], [0.5, 4.0]], dtype=torch.float64))

    def forward(self, x):
        return (self.a * self.w**2).sum() / 2 + self.bias.sum() + 0 * x


def quadratic():
    model = Quadratic()
    return model, Loss(model, lambda o, y: o.mean(), [(torch.zeros(3, dtype=torch.float64), torch.zeros(3))])


def mlp(weights="mlp_weights", dtype=torch.float64):
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(64, 24))
    model.add_module("tanh", nn.Tanh())
    model.add_module("fc2", nn.Linear(24, 10))
    arrays = np.load(GOLDEN / f"{weights}.npz")
    model.load_state_dict({k: torch.tensor(arrays[k]) for k in arrays})
    return model.to(dtype)


def golden_loss(model, split="train"):
    data = np.load(GOLDEN / "data.npz")
    dtype = next(model.parameters()).dtype
    x, y = torch.tensor(data[f"x_{split}"], dtype=dtype) / 16, torch.tensor(data[f"y_{split}"], dtype=torch.int64)
    return Loss(model, nn.CrossEntropyLoss(), [(x[i : i + 200], y[i : i + 200]) for i in (0, 200, 400)])


def golden_direction(loss, key):
    flat = torch.tensor(np.load(GOLDEN / "mlp_directions.npz")[key], dtype=torch.float64)
    parts = flat.split([w.numel() for w in loss.params])
    return [d.view_as(w) for d, w in zip(parts, loss.params, strict=True)]


def golden():
    return json.loads((GOLDEN / "mlp.json").read_text())["landscape"]


def test_a_line_through_a_quadratic_is_its_parabola():
    model, loss = quadratic()
    d = [torch.tensor([[1.0, -2.0], [0.5, 0.0]], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64)]
    axis = [-2.0, -0.3, 0.0, 1.5]
    result = slice_1d(loss, d, coordinates=axis)
    w, bias = model.w.detach(), model.bias.detach()
    expected = [float((model.a * (w + a * d[0]) ** 2).sum() / 2 + bias + a * d[1]) for a in axis]
    assert result.losses.tolist() == pytest.approx(expected, rel=1e-14)
    assert result.coordinates[0].tolist() == axis
    assert result.directions["kind"] == "given"
    assert result.directions["norms"] == [pytest.approx(math.sqrt(1 + 4 + 0.25 + 0.0625))]


def test_a_plane_has_the_first_direction_on_its_first_axis():
    _, loss = quadratic()
    d = [torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    e = [torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)]
    result = slice_2d(loss, (d, e), coordinates=([-1.0, 0.0, 1.0], [0.0, 2.0]))
    assert result.losses.shape == (3, 2)
    base = float(loss.value())
    for i, a in enumerate((-1.0, 0.0, 1.0)):
        for j, b in enumerate((0.0, 2.0)):
            rise = 2.0 * (a * 0.6 + a * a / 2) + 1.0 * (b * 0.8 + b * b / 2)
            assert float(result.losses[i, j]) == pytest.approx(base + rise, rel=1e-14)
    assert result.directions["cosine"] == 0


def test_random_directions_have_the_norm_of_every_filter_and_leave_biases():
    _, loss = quadratic()
    weight, bias = random_direction(loss, seed=3)
    torch.testing.assert_close(weight.norm(dim=1), torch.tensor([1.0, 5.0], dtype=torch.float64))
    assert not bias.any()
    assert torch.equal(random_direction(loss, seed=3)[0], weight)
    assert not torch.equal(random_direction(loss, seed=4)[0], weight)
    assert torch.equal(random_direction(loss, seed=3, biases=True)[1], loss.params[1])


def test_normalization_layers_do_not_move_whatever_their_shape():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.LayerNorm((4, 4)), nn.Flatten())
    loss = Loss(model, nn.CrossEntropyLoss(), [(torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 2, 3]))])
    moved = [bool(d.any()) for d in random_direction(loss)]
    assert moved == [True, False, False, False, False, False]


def test_a_filter_of_zeros_does_not_move_and_gives_no_nan():
    _, loss = quadratic()
    with torch.no_grad():
        loss.params[0][0] = 0
    assert not random_direction(loss)[0][0].any()
    still = filter_normalized(loss, [torch.zeros(2, 2, dtype=torch.float64), torch.zeros(1)])
    assert all(bool(d.isfinite().all()) for d in still)


def test_the_default_grid_contains_the_weights_and_they_come_back():
    _, loss = quadratic()
    before = [w.clone() for w in loss.params]
    pointers = [w.data_ptr() for w in loss.params]
    line, plane = slice_1d(loss), slice_2d(loss, coordinates=([-1, 0, 1], [-1, 0, 1]))
    assert line.coordinates[0][10] == 0
    assert line.losses[10] == loss.value()
    assert plane.losses[1, 1] == loss.value()
    assert all(torch.equal(w, b) for w, b in zip(loss.params, before, strict=True))
    assert [w.data_ptr() for w in loss.params] == pointers


def test_losses_that_overflow_are_null_in_the_result():
    _, loss = quadratic()
    result = slice_1d(loss, coordinates=[0.0, 1e200]).to_dict()
    assert result["losses"][1] is None
    json.dumps(result, allow_nan=False)


def test_interpolation_ends_at_the_other_model_with_its_buffers():
    torch.manual_seed(0)
    make = lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))  # noqa: E731
    here, there = make(), make()
    for model in (here, there):
        for _ in range(3):
            model(torch.randn(20, 5) * 3 + 1)
    batches = [(torch.randn(20, 5), torch.randint(0, 3, (20,)))]
    loss, other = (Loss(m, nn.CrossEntropyLoss(), batches) for m in (here, there))
    before = {k: v.clone() for k, v in here.state_dict().items()}
    for given in (there, there.state_dict()):
        result = interpolate(loss, given, coordinates=[0.0, 0.5, 1.0])
        assert float(result.losses[0]) == float(loss.value())
        assert float(result.losses[2]) == pytest.approx(float(other.value()), rel=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in here.state_dict().items())
    weights_only = interpolate(loss, list(there.parameters()), coordinates=[0.0, 1.0])
    assert float(weights_only.losses[1]) != pytest.approx(float(other.value()), rel=1e-3)


def test_the_barrier_is_the_height_above_the_chord():
    model, loss = quadratic()
    other = [w.detach().clone() for w in loss.params]
    other[0][0, 0] += 2.0  # L along the segment: 0.36 + ... + (0.6 + 2a)^2, convex, so nothing is above the chord
    assert interpolate(loss, other).directions["barrier"] == pytest.approx(0, abs=1e-14)
    with torch.no_grad():
        model.a.neg_()  # concave now: the chord's middle lies 1/8 * 2 * 2 * 2^2 / 2 = 1 below
    assert interpolate(loss, other).directions["barrier"] == pytest.approx(1.0)


def test_what_does_not_fit_is_refused_with_the_remedy():
    _, loss = quadratic()
    with pytest.raises(ValueError, match="one tensor for each parameter"):
        slice_1d(loss, [torch.zeros(2, 2)])
    with pytest.raises(ValueError, match="first that differs is number 1"):
        slice_1d(loss, [torch.zeros(2, 2), torch.zeros(2)])
    for wrong in ([], [math.nan], [[0.0]]):
        with pytest.raises(ValueError, match="list of finite numbers"):
            slice_1d(loss, coordinates=wrong)
    with pytest.raises(ValueError, match=r"state_dict"):
        interpolate(loss, {"w": torch.zeros(2, 2)})


def small_loss(num_batches=3):
    """Two layers with BatchNorm between them, in float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).double()
    x = torch.randn(4 * num_batches + 1, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (len(x),), generator=generator)
    batches = list(zip(x.split([4] * (num_batches - 1) + [5]), y.split([4] * (num_batches - 1) + [5]), strict=True))
    return Loss(model, nn.CrossEntropyLoss(), batches)


def test_along_an_eigenvector_the_loss_has_its_curvature():
    loss = small_loss()
    spectrum = hessian_eigenvalues(loss, num=2, tol=1e-9)
    for k in (0, 1):
        d = eigenvector_direction(loss, spectrum, k)
        assert math.sqrt(sum(float(x.square().sum()) for x in d)) == pytest.approx(1, rel=1e-12)
        low, middle, high = slice_1d(loss, d, coordinates=[-1e-4, 0.0, 1e-4]).losses.tolist()
        assert (low - 2 * middle + high) / 1e-8 == pytest.approx(float(spectrum.eigenvalues[k]), rel=1e-4)
    scaled = eigenvector_direction(loss, spectrum, 1, normalize="filter")
    torch.testing.assert_close(scaled[0].norm(dim=1), loss.params[0].norm(dim=1))
    assert not scaled[1].any()


def test_along_the_gradient_the_loss_rises_by_its_norm():
    loss = small_loss()
    norm = math.sqrt(sum(float(g.square().sum()) for g in loss.gradient()))
    low, high = slice_1d(loss, gradient_direction(loss), coordinates=[-1e-6, 1e-6]).losses.tolist()
    assert (high - low) / 2e-6 == pytest.approx(norm, rel=1e-6)
    scaled = gradient_direction(loss, normalize="filter", biases=True)
    torch.testing.assert_close(scaled[0].norm(dim=1), loss.params[0].norm(dim=1))
    assert torch.equal(scaled[1], loss.params[1])


def run(loss, n=9):
    """State dicts on a curve that ends at the weights of the loss, nearly in a plane."""
    generator = torch.Generator().manual_seed(1)
    a, b, c = ([torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in loss.params] for _ in range(3))
    names = [name for name, _ in loss.model.named_parameters()]
    result = []
    for t in torch.linspace(1, 0, n).tolist():
        moved = [w.detach() + t * x + 0.3 * t * t * y + 0.01 * math.sin(20 * t) * z
                 for w, x, y, z in zip(loss.params, a, b, c, strict=True)]  # fmt: skip
        result.append(loss.model.state_dict() | dict(zip(names, moved, strict=True)))
    return result


def test_the_plane_of_a_run_is_that_of_its_singular_vectors():
    loss = small_loss()
    checkpoints = run(loss)
    result = trajectory_directions(loss, checkpoints)
    names = [name for name, _ in loss.model.named_parameters()]
    rows = np.stack([np.concatenate([c[name].flatten().numpy() for name in names]) for c in checkpoints])
    _, s, v = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    assert result.explained.tolist() == pytest.approx((s**2 / (s**2).sum())[:2].tolist(), rel=1e-10)
    flat = np.stack([np.concatenate([x.flatten().numpy() for x in d]) for d in result.directions])
    assert np.abs(flat @ v[:2].T) == pytest.approx(np.eye(2), abs=1e-9)
    origin = np.concatenate([w.detach().flatten().numpy() for w in loss.params])
    assert result.coordinates.numpy() == pytest.approx((rows - origin) @ flat.T, abs=1e-12)
    assert result.coordinates[-1].tolist() == pytest.approx([0, 0], abs=1e-12)
    apart = np.linalg.norm(rows - origin - result.coordinates.numpy() @ flat, axis=1)
    assert result.distances.tolist() == pytest.approx(apart.tolist(), abs=1e-7)
    json.dumps(result.to_dict(), allow_nan=False)


def test_a_filter_normalized_plane_of_a_run_is_found_by_least_squares():
    loss = small_loss()
    checkpoints = run(loss)
    result = trajectory_directions(loss, checkpoints, normalize="filter")
    torch.testing.assert_close(result.directions[1][0].norm(dim=1), loss.params[0].norm(dim=1))
    flat = torch.stack([torch.cat([x.flatten() for x in d]) for d in result.directions])
    origin = torch.cat([w.detach().flatten() for w in loss.params])
    names = [name for name, _ in loss.model.named_parameters()]
    point = torch.cat([checkpoints[2][name].flatten() for name in names]) - origin
    expected = torch.linalg.lstsq(flat.T, point[:, None]).solution[:, 0]
    torch.testing.assert_close(result.coordinates[2], expected)
    plane = slice_2d(loss, result.directions, coordinates=([0.0], [0.0, 1.0]))
    assert plane.losses[0, 0] == pytest.approx(float(loss.value()), rel=1e-14)


def test_a_band_has_each_of_its_directions():
    loss = small_loss()
    axis = [-0.5, 0.0, 1.0]
    band = slice_1d(loss, coordinates=axis, num_directions=3, seed=4)
    single = torch.stack([slice_1d(loss, coordinates=axis, seed=4 + k).losses for k in range(3)])
    assert torch.equal(band.directions["losses"], single)
    assert torch.equal(band.losses, single.mean(dim=0))
    assert len(band.directions["norms"]) == 3
    assert json.loads(json.dumps(band.to_dict()))["directions"]["num_directions"] == 3


def test_batches_are_read_once_for_many_points():
    reads = []

    class Counted(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            reads.append(i)
            return torch.full((5,), float(i), dtype=torch.float64), i % 3

    model = small_loss().model
    loss = Loss(model, nn.CrossEntropyLoss(), torch.utils.data.DataLoader(Counted(), batch_size=4))
    loss.value()  # the first use weighs the batches
    reads.clear()
    seen = []
    slice_2d(loss, coordinates=([0.0, 1.0], [0.0, 0.5, 1.0]), progress=lambda done, total: seen.append((done, total)))
    assert len(reads) == 8
    assert seen[-1] == (6, 6)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_an_interrupted_landscape_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("sam_optim.landscape.grid.CHUNK", 4)
    loss = small_loss()
    before = [w.detach().clone() for w in loss.params]
    path, axis = tmp_path / "deep" / "grid.json", [0.1 * k for k in range(10)]
    expected = slice_1d(loss, coordinates=axis).losses

    def stop(done, total):
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slice_1d(loss, coordinates=axis, resume=path, progress=stop)
    assert all(torch.equal(w, b) for w, b in zip(loss.params, before, strict=True))
    seen = []
    again = slice_1d(loss, coordinates=axis, resume=path, progress=lambda done, total: seen.append(done))
    assert torch.equal(again.losses, expected)
    assert min(seen) >= 4
    slice_1d(loss, coordinates=axis, resume=path, progress=lambda *_: pytest.fail("all is there"))
    with pytest.raises(ValueError, match="delete it, or resume elsewhere"):
        slice_1d(loss, coordinates=axis, resume=path, seed=1)
    with torch.no_grad():
        loss.params[0].add_(1)
    with pytest.raises(ValueError, match="delete it, or resume elsewhere"):
        slice_1d(loss, coordinates=axis, resume=path)


def test_directions_that_are_none_are_refused():
    loss = small_loss()
    spectrum = hessian_eigenvalues(loss)
    with pytest.raises(ValueError, match=r"none with index 1: measure it with hessian_eigenvalues\(loss, num=2\)"):
        eigenvector_direction(loss, spectrum, 1)
    with pytest.raises(ValueError, match="must be None or 'filter'"):
        gradient_direction(loss, normalize="layer")
    with torch.no_grad():
        for w in loss.params:
            w.zero_()
    flat = Loss(nn.Linear(1, 1), lambda o, y: 0 * o.sum(), [(torch.ones(2, 1), torch.ones(2))])
    with pytest.raises(ValueError, match=r"the gradient has length 0.0 and gives no direction"):
        gradient_direction(flat)
    with pytest.raises(ValueError, match="num must be from 1"):
        trajectory_directions(loss, run(loss)[:2], num=2)
    with pytest.raises(ValueError, match="span fewer than 2 directions"):
        trajectory_directions(loss, [loss.model] * 4)
    with pytest.raises(ValueError, match="num_directions must be >= 1"):
        slice_1d(loss, [torch.zeros_like(w) for w in loss.params], num_directions=2)


@needs_golden
def test_golden_directions_are_those_of_the_peer_code():
    """Each vector width has its own logarithm and cosine behind `torch.randn`, which differ by ulps of the factors."""
    loss, ulps = golden_loss(mlp(dtype=torch.float32)), 4 * torch.finfo(torch.float32).eps
    for ignore, biases in (("biasbn", False), ("none", True)):
        for seed in (0, 1):
            expected = golden_direction(loss, f"direction_ignore={ignore}_seed{seed}")
            for d, e in zip(random_direction(loss, seed=seed, biases=biases), expected, strict=True):
                torch.testing.assert_close(d.double(), e, rtol=0, atol=ulps * float(e.abs().max()))


@needs_golden
@pytest.mark.parametrize("ignore", ["biasbn", "none"])
def test_golden_losses_on_the_line_and_the_plane(ignore):
    model, expected = mlp(), golden()[f"ignore={ignore}"]
    train, test = golden_loss(model), golden_loss(model, "test")
    d, e = (golden_direction(train, f"direction_ignore={ignore}_seed{seed}") for seed in (0, 1))
    line = slice_1d(train, d, coordinates=expected["grid"])
    assert line.losses.tolist() == pytest.approx(expected["loss_1d_dir0"], rel=1e-10)
    assert slice_1d(test, d, coordinates=expected["grid"]).losses.tolist() == pytest.approx(
        expected["test_loss_1d_dir0"], rel=1e-10
    )
    plane = slice_2d(train, (d, e), coordinates=(expected["grid2d"], expected["grid2d"]))
    assert plane.losses.flatten().tolist() == pytest.approx(np.ravel(expected["loss_2d"]).tolist(), rel=1e-10)
    assert plane.directions["norms"] == pytest.approx(expected["direction_norms"], rel=1e-7)
    assert plane.directions["cosine"] == pytest.approx(expected["cos"], rel=1e-6)


@needs_golden
def test_golden_interpolation_to_the_second_model():
    expected = golden()["linear_interpolation_mlp_to_mlp_b"]
    result = interpolate(golden_loss(mlp()), mlp("mlp_b_weights"), coordinates=expected["alpha"])
    assert result.losses.tolist() == pytest.approx(expected["train_loss"], rel=1e-10)
    assert result.directions["barrier"] == pytest.approx(expected["barrier"], rel=1e-10)
