"""Pictures show the numbers that they are given: read back from matplotlib's own objects, and from files."""

import builtins
import math

import pytest
import torch

from sam_optim.core.results import Landscape, Spectrum
from sam_optim.report import contour_picture, save_picture, slices_picture, spectrum_picture, surface_picture
from sam_optim.report.canvas import COLOURS, is_logarithmic, label, log_ticks, set_scale, styled, svg
from sam_optim.report.figures import Curves, Group, Interval, curves, heat_map, intervals, legend, scatter, strip

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


def test_contours_are_labelled_with_their_losses():
    axes = contour_picture(plane()).axes[0]
    levels = axes.collections[1].levels.tolist()
    assert levels == pytest.approx([0.1, 0.3, 1, 3, 10, 30])
    assert {text.get_text() for text in axes.texts} <= {f"{level:g}" for level in levels}
    assert len(axes.texts) >= 4


def test_planes_that_are_compared_share_their_colours():
    low, high = 0.01, 50.0
    first, second = (
        contour_picture(plane(high=h), limits=(low, high), log=True).axes[0].collections[0] for h in (3, 1e3)
    )
    assert first.levels.tolist() == second.levels.tolist()
    assert (first.levels[0], first.levels[-1]) == pytest.approx((low, high))
    assert (first.extend, second.extend) == ("neither", "max")
    assert contour_picture(plane(), limits=(1.0, 50.0)).axes[0].collections[0].extend == "both"


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
        low, high = losses.min().item(), losses.max().item()
        colors = contour_picture(landscape).axes[0].collections[0].get_clim()
        heights = surface_picture(landscape).axes[0].get_zlim()
        for bottom, top in (colors, heights):
            assert bottom < top
            assert bottom <= low
            assert high <= top


def test_a_band_goes_from_the_lowest_to_the_highest_direction():
    each = torch.tensor([[1.0, 2.0, 5.0], [3.0, 2.0, 1.0]], dtype=torch.float64)
    figure = slices_picture({"SAM": line([2.0, 2.0, 3.0], kind="random", losses=each)})
    axes = figure.axes[0]
    assert axes.get_lines()[0].get_ydata().tolist() == [2.0, 2.0, 3.0]
    corners = axes.collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in corners.tolist()} >= {(-1.0, 1.0), (-1.0, 3.0), (1.0, 1.0), (1.0, 5.0)}
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["SAM, mean of 2 directions", "lowest to highest"]


def test_an_interpolation_has_its_chord_and_its_barrier():
    result = line([1.0, 4.0, 2.0], kind="interpolation", barrier=2.5)
    axes = slices_picture(result).axes[0]
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
    for draw, *given in (
        (contour_picture, plane()),
        (slices_picture, line([1.0, 2.0])),
        (spectrum_picture, Spectrum(axis(3))),
        (legend, [("a", 0)]),
    ):
        with pytest.raises(ImportError, match=r"pip install 'sam_optim\[plot\]'"):
            draw(*given)


def names(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def test_intervals_have_a_row_each_and_a_rule_at_zero():
    rows = [Interval("worst case", 0.5, 0.1, 0.8), Interval("", 0.2, -0.1, 0.5, 1), Interval("trace", *[math.nan] * 3)]
    axes = intervals("tau", rows, x_label="Kendall's tau", span=(-1, 1)).axes[0]
    assert names(axes.yaxis) == ["worst case", "trace"]
    assert axes.get_yticks().tolist() == [0.0, pytest.approx(1.4)]  # the nameless one stands 0.4 below the first
    drawn = [(list(map(float, line.get_xdata())), line.get_color()) for line in axes.get_lines()]
    assert drawn[0] == ([0.1, 0.8], COLOURS[0])
    assert drawn[1] == ([0.5], COLOURS[0])
    assert drawn[2] == ([-0.1, 0.5], COLOURS[1])
    assert drawn[-1][0] == [0, 0]
    assert axes.get_xlim() == (-1, 1)
    assert axes.yaxis_inverted()
    assert intervals("none", [], x_label="tau").axes[0].get_yticks().tolist() == []


def test_a_strip_has_every_run_and_their_mean_with_one_standard_deviation():
    groups = [Group("SGD", [80.0, 82.0, math.nan], 0), Group("SAM", [91.0], 3), Group("failed", [math.nan], 4)]
    axes = strip("Last epoch", groups, x_label="test accuracy, %").axes[0]
    drawn = [list(map(float, line.get_xdata())) for line in axes.get_lines()]
    assert drawn[:3] == [[81 - math.sqrt(2), 81 + math.sqrt(2)], [80, 82], [81]]
    assert drawn[3:6] == [[91, 91], [91], [91]]
    assert names(axes.yaxis) == ["SGD", "SAM", "failed"]
    assert axes.get_xlabel() == "test accuracy, %"
    wide = strip("log", [Group("a", [1.0, 1.0, 100.0])], x_label="x", log=True).axes[0]  # 1 - std < 0
    assert wide.get_xscale() == "log"
    assert 0 < wide.get_xlim()[0] < 1


def test_curves_are_the_mean_of_runs_within_their_range():
    lines = [
        Curves("SGD", [1, 2, 3], [[3.0, 2.0, 1.0], [3.5, math.nan, 1.5]]),
        Curves("lost", [1, 2, 3], [[math.nan] * 3]),
    ]
    axes = curves("Training loss", lines, x_label="epoch", y_label="loss, nats").axes[0]
    mean, lost = axes.get_lines()
    assert mean.get_ydata().tolist() == [3.25, 2.0, 1.25]
    assert all(math.isnan(y) for y in lost.get_ydata())
    corners = {tuple(v) for v in axes.collections[0].get_paths()[0].vertices.tolist()}
    assert corners >= {(1, 3.0), (1, 3.5), (2, 2.0), (3, 1.0), (3, 1.5)}
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["SGD", "lost"]
    overflow = curves("c", [Curves("", [1, 2], [[1.0, math.inf], [1.0, 2.0]])], x_label="x", y_label="y").axes[0]
    assert overflow.get_lines()[0].get_ydata().tolist() == [1.0, math.inf]  # no mean of the others alone


def test_a_scatter_drops_what_is_not_finite_and_says_its_note():
    points = [(Group("0.1", [0.1, 1.0, math.nan], 0), [3.0, 4.0, 5.0]), (Group("0.2", [10.0], 5), [math.inf])]
    axes = scatter("trace", points, x_label="trace", y_label="error, %", note="τ = +0.30", ordered=True).axes[0]
    first, second = axes.get_lines()
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([0.1, 1.0], [3.0, 4.0])
    assert len(second.get_xdata()) == 0
    assert first.get_color() != second.get_color()
    assert axes.get_title(loc="left") == "τ = +0.30"
    assert axes.get_xscale() == "log"
    assert (
        scatter("t", [(Group("a", [-1.0, 2.0]), [1.0, 2.0])], x_label="x", y_label="y").axes[0].get_xscale() == "linear"
    )


def test_a_heat_map_has_the_number_in_each_cell_and_frames_what_is_firm():
    values = [[0.5, -1.0], [math.nan, 0.0]]
    axes = heat_map("tau", ["a", "b"], ["x", "y"], values, firm=[[True, False], [True, False]]).axes[0]
    texts = [(t.get_text(), t.get_weight()) for t in axes.texts]
    assert texts == [("+0.50", "bold"), ("−1.00", "normal"), ("–", "normal"), ("+0.00", "normal")]
    assert len(axes.patches) == 1
    red, _, blue = axes.collections[0].to_rgba([1.0, 0.0, -1.0])[:, [0, 2]]
    assert red[0] > red[1]
    assert blue[0] < blue[1]
    assert (names(axes.xaxis), names(axes.yaxis)) == (["x", "y"], ["a", "b"])


def test_a_legend_names_markers():
    (drawn,) = legend([("SGD", 0), ("SAM", 1)]).legends
    assert [t.get_text() for t in drawn.get_texts()] == ["SGD", "SAM"]
    assert [h.get_marker() for h in drawn.legend_handles] == ["o", "s"]


def test_text_in_a_figure_is_cut_wrapped_and_no_formula():
    assert label("$x^2$ costs $") == r"\$x^2\$ costs \$"
    assert label("a\u202eb\nc") == "a\ufffdb\ufffdc"
    assert label("x" * 70) == "…" + "x" * 59
    assert label("one two three", width=8) == "one two\nthree"
    assert ">$\\frac{1}{0}$ and 深<" in svg(contour_picture(plane(), title="$\\frac{1}{0}$ and 深"))


def test_an_svg_stands_alone_and_is_the_same_every_time():
    figures = [contour_picture(plane(hole=True), title="t") for _ in range(2)]
    first, second = map(svg, figures)
    assert first == second
    assert first.startswith("<svg viewBox=")
    assert "<style" not in first
    assert "http" not in first
    assert "<metadata" not in first


def test_ticks_are_round_numbers():
    assert log_ticks(0.5, 20000) == [1, 10, 100, 1000, 10000]
    assert log_ticks(2, 9) == pytest.approx([2, 3, 4, 5, 6, 7, 8, 9])
    assert log_ticks(0.5, 20) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert not is_logarithmic([], None)
    assert not is_logarithmic([-1.0, 100.0], True)
    assert is_logarithmic([1.0, 11.0], None)
    assert not is_logarithmic([1.0, 9.0], None)
    with styled() as figure:
        axes = figure.add_subplot()
        set_scale(axes.xaxis, [210.0, 290.0], True)
        set_scale(axes.yaxis, [1e-5, 1e5], True)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    low, high = axes.get_xlim()
    assert low < 210 < 290 < high
