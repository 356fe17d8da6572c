"""The page: nothing unescaped, nothing from outside, strict JSON. The figures: contours and scales that are known."""

import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from sam_optim.core.results import Estimate, Landscape, Spectrum
from sam_optim.report import results_page, write_page
from sam_optim.report.axes import Scale, linear_ticks, log_ticks, scale_over, short
from sam_optim.report.charts import Curves, Group, Interval, curves, intervals, mean_and_std, scatter, strip
from sam_optim.report.heatmap import Levels, contour, contour_map
from sam_optim.report.markup import Markup, join, json_script, tag
from sam_optim.report.page import POLICY, html_page
from sam_optim.report.tables import html_table, number, spread, text_table
from sam_optim.statistics.kendall import Correlation

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)",
    "javascript:alert(1)",
    "</svg><svg onload=alert(1)>",
    "]]><!--",
    "&lt;b&gt; & &amp;",
    "\u202etxt.exe\u202c",
    "\x00\x07\x1b[31m\ud800",
    "</style><style>*{display:none}",
    "x" * 10_000,
]


class Reader(HTMLParser):
    """What a browser would see: tags, attributes, text, and the JSON block."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.words, self.data, self._inside = [], [], [], "", None

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = tag

    def handle_data(self, data):
        if self._inside == "script":
            self.data += data
        else:
            self.words.append(data)

    def handle_endtag(self, tag):
        self._inside = None


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    return reader


def results(name="worst case"):
    return {
        name: Estimate(0.25, 0.01, 8, settings={name: name}, provenance={"torch": name}, reason=name),
        f"{name} nan": Estimate(math.nan, reason="diverged"),
        f"{name} spectrum": Spectrum(torch.tensor([3.0, 1.0, -0.5]), torch.tensor([1e-5, 1e-4, 1e-3])),
        f"{name} density": Spectrum(
            torch.tensor([3.0]), grid=torch.linspace(-1, 3, 9), density=torch.linspace(0.0, 1, 9), settings={"k": name}
        ),
        f"{name} line": Landscape((torch.linspace(-1, 1, 5),), torch.tensor([2.0, 1, 0.5, 1, math.inf])),
        f"{name} plane": Landscape(
            (torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 4)), torch.rand(5, 4, dtype=torch.float64) + 0.1
        ),
        f"{name} tau": Correlation(0.5, 0.1, 0.8, 0.01, 25, by_factor={name: 0.2}),
        f"{name} no tau": Correlation(math.nan, reason=f"{name} is the same in all 25 runs"),
    }


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text_everywhere(name):
    page = results_page(results(name), title=name)
    reader = read(page)
    assert reader.tags.count("script") == 1
    assert ("type", "application/json") in reader.attributes
    assert not {"img", "iframe", "object", "embed", "form", "link", "base"} & set(reader.tags)
    assert not [key for key, _ in reader.attributes if key.startswith("on")]
    assert page.count("<style>") == 1
    assert not re.search("[\x00-\x08\x0b\x0e-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    shown = re.sub("[\x00-\x1f\u202a-\u202e\ud800-\udfff]", "\ufffd", name)
    assert shown in "".join(reader.words)
    assert name in json.loads(reader.data)


def test_the_page_needs_nothing_from_outside():
    page = results_page(results())
    reader = read(page)
    assert ("content", POLICY) in reader.attributes
    assert "default-src 'none'" in POLICY
    addresses = [
        value for key, value in reader.attributes if key in ("src", "href", "srcset", "data", "action", "xlink:href")
    ]
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in addresses)
    assert not re.findall(r"https?://|@import|url\(|//cdn", page)


def test_the_data_in_the_page_are_strict_json_and_complete():
    given = results()
    data = read(results_page(given)).data
    assert "<" not in data
    found = json.loads(data, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert found == {name: result.to_dict() for name, result in given.items()}
    assert found["worst case nan"]["value"] is None


def test_results_read_back_from_json_give_the_same_page():
    given = results()
    assert results_page(json.loads(json.dumps({n: r.to_dict() for n, r in given.items()}))) == results_page(given)


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="'accuracy' is no result"):
        results_page({"accuracy": 0.9})


def test_a_page_is_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "report.html"
    assert write_page(path, html_page("one")) == path
    with pytest.raises(UnicodeEncodeError):
        write_page(path, Markup("\ud800"))
    assert "<title>one</title>" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_markup_escapes_what_is_not_markup():
    assert tag("p", "<b>", tag("i", 'a"b'), class_="x<y") == '<p class="x&lt;y">&lt;b&gt;<i>a&quot;b</i></p>'
    assert tag("br") == "<br>"
    assert join("a", None, 3, separator=", ") == "a, , 3"
    assert tag("circle", cx=1.0, r=2.346, stroke_width=None) == '<circle cx="1" r="2.35"></circle>'
    assert json.loads(json_script({"a": "</script>&"}, "d").split(">", 1)[1].rsplit("<", 1)[0]) == {"a": "</script>&"}


def all_figures():
    groups = [Group("SGD", [80.0, 82.0, math.nan], 0), Group("SAM <", [91.0], 3), Group("failed", [math.nan], 4)]
    lines = [Curves("SGD", [1, 2, 3], [[3.0, 2.0, 1.0], [3.5, math.nan, 1.5]], 0)]
    yield strip("strip", groups, x_label="accuracy")
    yield curves("curves", lines, x_label="epoch", y_label="loss", log=True, limit=3.0)
    yield scatter("scatter", [(groups[0], [1.0, 2.0, 3.0])], x_label="sharpness", y_label="error", note="tau = 0.3")
    yield intervals(
        "intervals", [Interval("a", 0.5, 0.1, 0.8), Interval("b", math.nan, math.nan, math.nan)], x_label="tau"
    )
    yield contour_map("map", [-1, 0, 1], [-1, 0, 1], [[1, 2, 3], [2, math.inf, 4], [3, 4, 9]], Levels.geometric(1, 9))


@pytest.mark.parametrize("drawn", list(all_figures()), ids=lambda d: re.search("<title>(.*?)</title>", d)[1])
def test_every_figure_is_valid_and_says_what_it_shows(drawn):
    root = ElementTree.fromstring(drawn)
    assert root.find("title").text
    assert len(root.find("desc").text) > 10
    assert root.get("role") == "img"
    numbers = re.findall(r'(?:x|y|x1|x2|y1|y2|cx|cy|d|points)="([^"]*)"', drawn)
    assert not [n for n in numbers if "nan" in n or "inf" in n]


def test_figures_of_runs_that_all_failed_are_still_drawn():
    nothing = [Group("SGD", [math.nan, math.nan], 0)]
    for drawn in (
        strip("s", nothing, x_label="x"),
        scatter("p", [(nothing[0], [math.nan, math.nan])], x_label="x", y_label="y"),
        curves("c", [Curves("SGD", [1, 2], [[math.nan, math.nan]], 0)], x_label="x", y_label="y"),
    ):
        assert "nan" not in drawn.split("</desc>")[1]


def test_the_contour_of_a_plane_is_a_straight_line_at_its_level():
    plane = [[i + 2.0 * j for j in range(6)] for i in range(5)]
    segments = contour(plane, 4.5)
    assert segments
    for (i0, j0), (i1, j1) in segments:
        assert i0 + 2 * j0 == pytest.approx(4.5)
        assert i1 + 2 * j1 == pytest.approx(4.5)


def test_the_contour_of_a_cone_has_the_length_of_its_circle():
    n, radius = 41, 12.3
    cone = [[math.hypot(i - 20, j - 20) for j in range(n)] for i in range(n)]
    length = sum(math.dist(*segment) for segment in contour(cone, radius))
    assert length == pytest.approx(2 * math.pi * radius, rel=2e-3)


def test_a_saddle_is_cut_on_the_side_of_its_middle():
    low, high = contour([[1, 0], [0, 1]], 0.4), contour([[1, 0], [0, 1]], 0.6)  # the middle is 0.5
    ends = {tuple(sorted(segment)) for segment in low}
    assert ends == {((0, 0.6), (0.4, 1)), ((0.6, 0), (1, 0.4))}  # above 0.4: the ones are joined, the zeros cut off
    assert {tuple(sorted(segment)) for segment in high} == {((0, 0.4), (0.4, 0)), ((0.6, 1), (1, 0.6))}


def test_levels_and_colours():
    levels = Levels.geometric(0.1, 10, 5)
    assert levels.values == pytest.approx((0.1, 0.1 * 10**0.5, 1, 10**0.5, 10))
    assert [levels.band(v) for v in (0.05, 0.1, 1.5, 10, math.inf, math.nan)] == [0, 1, 3, 5, 5, 5]
    assert (levels.colours()[0], levels.colours()[-1]) == ("#440154", "#fde725")


def test_scales_and_ticks():
    assert Scale(0, 10, 100, 200)(5) == 150
    assert Scale(1, 100, 0, 2, log=True)(10) == pytest.approx(1)
    assert linear_ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert linear_ticks(-0.31, 0.3, 3) == [-0.2, 0, 0.2]
    assert log_ticks(0.5, 2000, 5) == [1, 10, 100, 1000]
    assert log_ticks(2, 9, 5) == [2, 4, 6, 8]
    assert log_ticks(1.04, 1.9, 5) == [1.2, 1.4, 1.6, 1.8]
    assert log_ticks(210, 290, 5) == [220, 240, 260, 280]
    found = scale_over([3.0, 3.0, math.nan], 0, 1)
    assert found.low < 3 < found.high
    assert [short(v) for v in (0, 0.05, 1500, 25000, 1e-5, 3e7)] == ["0", "0.05", "1500", "25k", "1e-5", "3e7"]


def test_numbers_with_their_spread():
    assert mean_and_std([1, 2, 3]) == (2, 1)
    assert spread([81.72, 80.0, 83.0]) == "81.6 ± 1.5"
    assert spread([0.0123, 0.0150]) == "0.0136 ± 0.0019"
    assert spread([5.0, None, math.nan]) == "5.00"
    assert spread([]) == "–"
    assert [number(v) for v in (None, math.nan, 0, 1234567, 0.00001234, 12.345)] == [
        "–",
        "–",
        "0",
        "1.23e+06",
        "1.23e-05",
        "12.3",
    ]


def test_tables_for_a_page_and_for_a_terminal():
    table = html_table(["name", "value"], [["<a>", "1"], ["b", "2"]], "caption", best=[1])
    assert "&lt;a&gt;" in table
    assert '<tr class="best">' in table
    assert text_table(["name", "v"], [["a", "10"], ["long name", "2"]]).splitlines() == [
        "name        v",
        "---------  --",
        "a          10",
        "long name   2",
    ]
