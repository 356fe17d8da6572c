"""The page: nothing unescaped, nothing from outside, strict JSON, and no script but the one that sorts."""

import base64
import hashlib
import html
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from chromium import BINARY, REASON, Browser

from sam_optim.core.results import Estimate, Landscape, Spectrum
from sam_optim.report import results_page, write_page
from sam_optim.report.page import POLICY, definitions, element, html_page, html_table, paragraph, section
from sam_optim.statistics.kendall import Correlation
from sam_optim.symmetries import Audit, AuditRow

pytest.importorskip("matplotlib")

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
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{1}{0}$ \\$ 深",
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
        self._inside = attrs if tag == "script" else None

    def handle_data(self, data):
        if self._inside is None:
            self.words.append(data)
        elif ("type", "application/json") in self._inside:
            self.data += data

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
            (torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 4)), torch.arange(20.0).view(5, 4).square() + 0.1
        ),
        f"{name} tau": Correlation(0.5, 0.1, 0.8, 0.01, 25, by_factor={name: 0.2}),
        f"{name} no tau": Correlation(math.nan, reason=f"{name} is the same in all 25 runs"),
        f"{name} audit": Audit((AuditRow(name, name, 1.0, 2.0, 2.0, 0.0, True),), {name: 0.0}),
    }


@pytest.fixture(scope="module")
def page():
    return results_page(results())


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_is_text_everywhere(name):
    page = results_page(results(name), title=name)
    reader = read(page)
    assert reader.tags.count("script") == 1
    assert ("type", "application/json") in reader.attributes
    assert not {"img", "iframe", "object", "embed", "form", "link", "base"} & set(reader.tags)
    assert not [key for key, _ in reader.attributes if key.startswith("on")]
    assert reader.tags.count("style") == 1
    assert not re.search("[\x00-\x08\x0b\x0e-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page)
    shown = re.sub("[\x00-\x1f\u202a-\u202e\ud800-\udfff]", "\ufffd", name)
    assert shown in "".join(reader.words)
    assert name in json.loads(reader.data)


def test_figures_carry_names_as_text_that_is_cut_where_it_is_long():
    words = [w for w in read(results_page({"x" * 500: results()["worst case plane"]})).words if w.startswith("…")]
    assert words
    assert max(map(len, words)) <= 60


def test_the_page_needs_nothing_from_outside(page):
    reader = read(page)
    assert ("content", POLICY) in reader.attributes
    assert "default-src 'none'" in POLICY
    addresses = [
        value for key, value in reader.attributes if key in ("src", "href", "srcset", "data", "action", "xlink:href")
    ]
    assert all(value.startswith("#") for value in addresses)
    assert not re.findall(r"https?://|@import|//cdn", page)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert len(re.findall(r"<svg ", page)) == 4  # the density, the line, the plane, and tau


def test_the_data_in_the_page_are_strict_json_and_complete(page):
    data = read(page).data
    assert "<" not in data
    parsed = json.loads(data, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert parsed == {name: result.to_dict() for name, result in results().items()}
    assert parsed["worst case nan"]["value"] is None


def test_results_read_back_from_json_give_the_same_page(page):
    assert results_page(json.loads(json.dumps({n: r.to_dict() for n, r in results().items()}))) == page


def test_landscapes_read_back_with_gaps_are_drawn():
    infinite = torch.full((3, 3), math.inf)
    losses = torch.tensor([[1.0, math.inf, 2.0], [3.0, 2.0, 1.0]])
    band = Landscape((torch.linspace(-1, 1, 3),), losses.mean(0), {"losses": losses, "norms": [math.nan]})
    way = Landscape((torch.linspace(0, 1, 3),), losses[0], {"kind": "interpolation", "barrier": math.inf})
    given = {"band": band, "way": way, "lost": Landscape((torch.arange(3.0), torch.arange(3.0)), infinite)}
    page = results_page(json.loads(json.dumps({n: r.to_dict() for n, r in given.items()}, allow_nan=False)))
    assert page.count("<svg ") == 2
    assert "lost: no loss is finite." in page


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="'accuracy' is not a result"):
        results_page({"accuracy": 0.9})


def test_a_page_is_whole_or_absent(tmp_path):
    path = tmp_path / "deep" / "report.html"
    assert write_page(path, html_page("one")) == path
    with pytest.raises(UnicodeEncodeError):
        write_page(path, "\ud800")
    assert "<title>one</title>" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_only_what_the_page_makes_is_markup():
    assert element("p", "<b>", element("i", 'a"b'), kind="x<y") == '<p class="x&lt;y">&lt;b&gt;<i>a&#34;b</i></p>'
    assert paragraph("a", None, 3) == "<p>a3</p>"
    assert "<b>" not in section("<b>", "<b>", identifier='"<b>') + definitions([("<b>", "<b>")], kind="pairs")


def test_columns_of_numbers_and_of_words():
    rows = [["<a>", "1", "yes"], ["b", "–", "no"], ["c", element("strong", "−0.5 (−1 to 0)"), None]]
    table = html_table(["name", "value", "said"], rows, "caption", best=[1])
    assert "&lt;a&gt;" in table
    assert '<tr class="best"><th scope="row">b</th>' in table
    assert re.findall(r"<th scope=\"col\"([^>]*)>", table) == [' class="words"', "", ' class="words"']


def test_the_policy_names_the_script_that_sorts_by_its_hash():
    page = html_page("t", html_table(["a"], [["1"]], "c", sortable=True), sortable=True)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"; script-src 'sha256-{digest}'" in html.unescape(page)
    assert "script-src" not in html_page("t")


SORTED = '[...document.querySelectorAll("tbody tr")].map((row) => row.cells[{}].textContent)'


@pytest.mark.skipif(BINARY is None, reason=REASON)
class TestBrowser:
    @pytest.fixture
    def path(self, tmp_path):
        values = ["0.5", "–", "−2.0 (−3 to −1)", "1.5e-3", "< 0.001", "10 ± 3"]
        rows = [[str(i + 1), value, f"{c} name"] for i, (value, c) in enumerate(zip(values, "bdacfe", strict=True))]
        table = html_table(["", "value", "word"], rows, "caption", sortable=True)
        return write_page(tmp_path / "t.html", html_page("t", section("s", table), sortable=True))

    def test_tables_sort_by_numbers_and_back_with_what_is_missing_at_the_end(self, path, tmp_path):
        with Browser(tmp_path / "profile") as browser:
            browser.open(path)
            click = 'document.querySelectorAll("th button")[{}].click()'
            browser.run(click.format(1))
            rising = ["−2.0 (−3 to −1)", "< 0.001", "1.5e-3", "0.5", "10 ± 3", "–"]
            assert browser.run(SORTED.format(1)) == rising
            assert browser.run('document.querySelectorAll("th[scope=col]")[1].ariaSort') == "ascending"
            browser.run(click.format(1))
            assert browser.run(SORTED.format(1)) == [*rising[-2::-1], "–"]
            browser.run(click.format(2))
            assert [word[0] for word in browser.run(SORTED.format(2))] == list("abcdef")
            assert browser.requests == [path.resolve().as_uri()]
            assert browser.problems == []

    def test_without_javascript_the_tables_are_whole(self, path, tmp_path):
        with Browser(tmp_path / "profile", javascript=False) as browser:
            browser.open(path)
            assert browser.run('document.querySelectorAll("th button").length') == 0
            assert browser.run(SORTED.format(0)) == list("123456")

    def test_the_policy_lets_no_other_script_run(self, path, tmp_path):
        changed = tmp_path / "changed.html"
        changed.write_text(path.read_text().replace("</main>", "<script>document.title = 'changed'</script></main>"))
        with Browser(tmp_path / "profile") as browser:
            browser.open(changed)
            assert browser.run("document.title") != "changed"

    @pytest.mark.parametrize("width", [390, 1200])
    def test_a_page_of_results_is_quiet_and_does_not_scroll_sideways(self, page, tmp_path, width):
        hostile = results_page({f"{name}{k}": r for name in HOSTILE for k, r in results().items()}, title=HOSTILE[-1])
        with Browser(tmp_path / "profile") as browser:
            browser.ask(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
            )
            for text in (page, hostile):
                path = write_page(tmp_path / "page.html", text)
                browser.open(path)
                assert browser.run("document.documentElement.scrollWidth") <= width
                assert browser.run('document.querySelectorAll("img, [onload], [onmouseover], [onfocus]").length') == 0
                assert browser.requests == [path.resolve().as_uri()]
                assert browser.problems == []
