"""Pictures show the numbers that they are given: read back from matplotlib's own objects, and from files."""

import builtins
import math

import pytest
import torch

from sam_optim.core.results import Landscape, Spectrum
from sam_optim.report import contour_picture, save_picture, slices_picture, spectrum_picture, surface_picture

pytest.importorskip("matplotlib")


def axis(n):
    return torch.linspace(-1, 1, n, dtype=torch.float64)


def plane(*, high=1e3, hole=False):
    a, b = axis(7)[:, None], axis(9)[None, :]
    losses = 0.1 * torch.exp(math.log(high) * (a**2 + b**2) / 2)
    if hole:
        losses[0, 0] = math.inf
        losses[0, 1] = math.nan
    return Landscape((axis(7), axis(9)), losses, {"kind": "random", "norms": [3.0, 3.0]})


def line(values, **directions):
    return Landscape((axis(len(values)),), torch.tensor(values, dtype=torch.float64), {"norms": [1.0]} | directions)


def test_a_plane_has_its_first_direction_upwards_and_a_cross_at_the_weights():
    figure = contour_picture(plane(), title="here", loss_label="loss, nats")
    axes, bar = figure.axes
    assert axes.get_title(loc="left") == "here"
    assert axes.get_ylabel().startswith("first")
    assert axes.get_xlabel().startswith("second")
    assert bar.get_ylabel() == "loss, nats"
    (cross,) = axes.get_lines()
    assert (list(cross.get_xdata()), list(cross.get_ydata())) == ([0], [0])
    labels = [text.get_text() for text in bar.get_yticklabels()]
    assert labels[:5] == ["0.1", "0.3", "1", "3", "10"]
    assert len(axes.collections[0].levels) == 24


def test_a_run_is_drawn_in_the_plane_of_its_directions():
    positions = torch.tensor([[0.5, -0.25], [0.0, 0.0]])
    axes = contour_picture(plane(), trace=positions).axes[0]
    run = axes.get_lines()[1]
    assert run.get_xdata().tolist() == [-0.25, 0.0]
    assert run.get_ydata().tolist() == [0.5, 0.0]


@pytest.mark.parametrize(("high", "logarithmic"), [(3.0, False), (1e3, True)])
def test_losses_that_span_decades_have_a_logarithmic_scale(high, logarithmic):
    axes = surface_picture(plane(high=high)).axes[0]
    assert ("logarithmic" in axes.get_zlabel()) == logarithmic
    top = 0.1 * high
    assert axes.get_zlim()[1] == pytest.approx(math.log10(top) if logarithmic else top)
    forced = surface_picture(plane(high=high), log=not logarithmic).axes[0]
    assert ("logarithmic" in forced.get_zlabel()) != logarithmic


def test_what_is_not_finite_is_above_the_scale():
    for hole in (True, False):  # the colour bar ends in an arrow, or does not
        assert contour_picture(plane(hole=hole)).axes[0].collections[0].extend == ("max" if hole else "neither")
    surface_picture(plane(hole=True))
    nothing = Landscape((axis(3), axis(3)), torch.full((3, 3), math.nan))
    with pytest.raises(ValueError, match="no loss of this landscape is finite"):
        contour_picture(nothing)


def test_a_flat_plane_and_a_negative_one_are_drawn():
    for losses in (torch.zeros(3, 3), torch.full((3, 3), -2.0), -plane().losses[:3, :3]):
        landscape = Landscape((axis(3), axis(3)), losses.double())
        contour_picture(landscape)
        surface_picture(landscape)


def test_a_band_goes_from_the_lowest_to_the_highest_direction():
    each = torch.tensor([[1.0, 2.0, 5.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    figure = slices_picture({"SAM": line([2.0, 2.0, 3.0], kind="random", losses=each)})
    axes = figure.axes[0]
    assert axes.get_lines()[0].get_ydata().tolist() == [2.0, 2.0, 3.0]
    corners = axes.collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in corners.tolist()} >= {(-1.0, 1.0), (-1.0, 3.0), (1.0, 1.0), (1.0, 5.0)}
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["SAM, mean of 2 directions", "lowest to highest"]


def test_an_interpolation_has_its_chord_and_its_barrier():
    found = line([1.0, 4.0, 2.0], kind="interpolation", barrier=2.5)
    axes = slices_picture(found).axes[0]
    assert list(axes.get_lines()[1].get_ydata()) == [1.0, 2.0]
    assert [t.get_text().strip() for t in axes.texts if t.get_text()] == ["barrier 2.5"]
    assert axes.get_yscale() == "linear"
    assert slices_picture(line([0.01, 4.0, 2.0])).axes[0].get_yscale() == "log"
    assert axes.get_legend() is None


def test_a_density_is_logarithmic_with_a_mark_at_each_eigenvalue():
    grid = torch.linspace(-1, 2, 50, dtype=torch.float64)
    density = torch.exp(-(grid**2) * 10)
    values = torch.tensor([2.0, 0.5], dtype=torch.float64)
    axes = spectrum_picture(Spectrum(values, grid=grid, density=density, stderr=density / 10), unit="nats").axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "eigenvalue, nats"
    curve, marks = axes.get_lines()
    assert curve.get_ydata().max() == pytest.approx(float(density.max()))
    assert curve.get_ydata().min() == pytest.approx(float(density.max()) * 1e-6)
    assert marks.get_xdata().tolist() == [2.0, 0.5]


def test_eigenvalues_alone_are_drawn_by_rank_with_their_residuals():
    values = torch.tensor([3.0, 1.0, -0.5], dtype=torch.float64)
    axes = spectrum_picture(Spectrum(values, residuals=torch.tensor([0.1, 0.2, 0.3]))).axes[0]
    assert axes.get_lines()[0].get_ydata().tolist() == [3.0, 1.0, -0.5]
    bars = axes.collections[0].get_segments()
    assert [round(float(s[1][1] - s[0][1]), 6) for s in bars] == [0.2, 0.4, 0.6]
    with pytest.raises(ValueError, match="no eigenvalues to draw: the loss is not finite"):
        spectrum_picture(Spectrum(torch.tensor([math.nan]), reason="the loss is not finite"))


def test_files_and_what_does_not_fit(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    for result, kind in ((plane(), None), (plane(), "surface"), (line([1.0, 2.0]), None), (Spectrum(axis(3)), None)):
        for ending in ("png", "svg"):
            path = save_picture(result, tmp_path / "deep" / f"picture.{ending}", kind=kind)
            assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm")
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(ValueError, match="kind must be one of contour, surface, slices, spectrum"):
        save_picture(plane(), tmp_path / "x.png", kind="pie")
    with pytest.raises(ValueError, match="a plane has two axes"):
        contour_picture(line([1.0, 2.0]))
    with pytest.raises(ValueError, match="landscapes with one axis"):
        slices_picture(plane())


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for draw, result in (
        (contour_picture, plane()),
        (slices_picture, line([1.0, 2.0])),
        (spectrum_picture, Spectrum(axis(3))),
    ):
        with pytest.raises(ImportError, match=r"pip install 'sam_optim\[plot\]'"):
            draw(result)
