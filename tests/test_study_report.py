"""What a study's report says follows from its intervals; the page sorts, stands without JavaScript, escapes names."""

from __future__ import annotations

import csv
import io
import json
import math
import random
import re
from dataclasses import replace

import pytest
from chromium import BINARY, REASON, Browser
from PIL import Image
from test_report import HOSTILE, Reader, read

from benchmarks.study import __main__ as study
from benchmarks.study import report
from benchmarks.study.analysis import Table, analyse, conclusion, direction, headline, verdict
from benchmarks.study.compare import Runs, compare, difference, text
from benchmarks.study.compare import page as compare_page
from benchmarks.study.page import page
from sam_optim.core import errors
from sam_optim.core.errors import InputError
from sam_optim.core.text import csv_text

LRS, RHOS, SEEDS = (0.02, 0.06, 0.2), (0.0, 0.05, 0.1, 0.2), (0, 1, 2, 3)


def models(measure, target, seed=0):
    """48 models; measure and target are functions of (learning rate, rho, what the seeds of a setting share, noise)."""
    draw = random.Random(seed)
    rows = []
    for lr in LRS:
        for rho in RHOS:
            z = draw.gauss(0, 1)
            for s in SEEDS:
                values = {"lr": lr, "sam_rho": rho, "seed": s}
                values["sharpness"] = measure(math.log(lr), rho, z, draw.gauss(0, 1))
                values["test_error"] = target(math.log(lr), rho, z, draw.gauss(0, 1))
                rows.append(values)
    return Table("t", rows, ["sharpness"], ["test_error"], ["lr", "sam_rho", "seed"], "lr")


CASES = {
    "positive, also at a fixed learning rate": models(lambda a, r, z, e: z, lambda a, r, z, e: z + 0.3 * e),
    "negative, also at a fixed learning rate": models(lambda a, r, z, e: -z, lambda a, r, z, e: z + 0.3 * e),
    "positive, but no evidence at a fixed learning rate": models(
        lambda a, r, z, e: 3 * a + e, lambda a, r, z, e: 3 * a + e
    ),
    "positive, but negative at a fixed learning rate": models(
        lambda a, r, z, e: 5 * a + z, lambda a, r, z, e: 5 * a - z + 0.2 * e
    ),
    "no evidence of a trend over all models, but positive at a fixed learning rate": models(
        lambda a, r, z, e: a + z, lambda a, r, z, e: -a + z + 0.2 * e
    ),
    "no evidence of a trend": models(lambda a, r, z, e: e, lambda a, r, z, e: e),
}


@pytest.mark.parametrize("words", CASES)
def test_the_verdict_is_what_the_data_were_made_to_be(words):
    result = analyse(CASES[words], num_resamples=400)
    assert result["comparisons"][0]["verdict"] == words
    assert words in result["conclusions"][0]


def row(low, high, p, within=None, measure="m"):
    result = {"measure": measure, "target": "test_error", "tau": (low + high) / 2, "low": low, "high": high, "n": 48}
    result["p_adjusted"] = p
    if within:
        result["fixed"] = {"within": sum(within[:2]) / 2, "within_low": within[0], "within_high": within[1]}
        result["fixed"] |= {"within_p_adjusted": within[2], "measure_given": 0.0}
    return result


def test_an_interval_alone_is_not_enough_after_many_tests():
    assert direction(0.1, 0.4, 0.01, 0.95) == 1
    assert direction(-0.4, -0.1, 0.01, 0.95) == -1
    assert direction(0.1, 0.4, 0.2, 0.95) == 0
    assert direction(-0.1, 0.4, 0.01, 0.95) == 0
    assert direction(None, None, None, 0.95) == 0
    assert verdict(row(0.1, 0.4, 0.2), None) == "no evidence of a trend after correction"
    assert verdict(row(-0.1, 0.4, 0.2), None) == "no evidence of a trend"
    assert verdict(row(0.1, 0.4, 0.01), None) == "positive"
    assert verdict(row(-0.1, 0.4, 0.2, (-0.4, -0.1, 0.01)), "lr").startswith(
        "no evidence of a trend over all models, but negative"
    )
    assert verdict({"tau": None, "reason": "3 runs"}, "lr") == "not computed: 3 runs"


UP, DOWN, FLAT = (0.2, 0.5, 0.001), (-0.5, -0.2, 0.001), (-0.2, 0.2, 1.0)


@pytest.mark.parametrize(
    ("overall", "fixed", "words"),
    [
        ([UP, UP], [UP, UP], "Both measures rise with test error; at a fixed learning rate both rise."),
        (
            [DOWN, DOWN],
            [FLAT, FLAT],
            "Both measures fall as test error rises; at a fixed learning rate there is no evidence that any does.",
        ),
        (
            [UP, DOWN, FLAT],
            None,
            "Of 3 measures 1 rises with test error, 1 falls and 1 shows no clear trend, over 48 models.",
        ),
        ([FLAT, FLAT], None, "No evidence that any of 2 measures goes with test error, over 48 models."),
        ([UP], [DOWN], "M0 rises with test error; at a fixed learning rate it falls."),
        ([FLAT, FLAT], [UP, FLAT], "at a fixed learning rate 1 rises with it and 1 shows no clear trend."),
    ],
)
def test_the_headline_counts_directions(overall, fixed, words):
    rows = [
        row(*o, within=f, measure=f"m{i}") for i, (o, f) in enumerate(zip(overall, fixed or [None] * 9, strict=False))
    ]
    table = Table("t", [], [r["measure"] for r in rows], ["test_error"], (), "lr" if fixed else None)
    assert words in headline(rows, table)


def test_a_measure_that_follows_the_learning_rate_more_closely_is_named():
    rows = [row(*UP, within=FLAT, measure="a"), row(*UP, within=FLAT, measure="b")]
    table = Table("t", [], ["a", "b"], ["test_error"], ["lr"], "lr")
    follows = [
        {"measure": "a", "tau": -0.8, "low": -0.9, "high": -0.7},
        {"measure": "b", "tau": 0.4, "low": -0.1, "high": 0.9},
    ]
    said = conclusion(rows, table, "test_error", follows=follows)
    assert said.endswith("for a and b. A follows the learning rate more closely than test error.")


def test_seeds_of_one_setting_are_no_independent_evidence():
    """Copies of models give no smaller p, and no narrower interval; Q is that of the shown taus and intervals."""
    table = CASES["no evidence of a trend"]
    single = [row for row in table.rows if row["seed"] == 0]
    copies = [dict(row, seed=seed) for row in single for seed in range(4)]
    alone, copied = (
        analyse(replace(table, rows=rows), num_resamples=500)["comparisons"][0] for rows in (single, copies)
    )
    assert copied["p"] > 0.7 * alone["p"] - 0.01
    assert copied["high"] - copied["low"] > 0.7 * (alone["high"] - alone["low"])
    groups = copied["groups"]
    taus, widths = zip(*[(t["tau"], t["high"] - t["low"]) for t in groups["taus"].values()], strict=True)
    weights = [(2 * 1.959964 / width) ** 2 for width in widths]
    mean = sum(w * t for w, t in zip(weights, taus, strict=True)) / sum(weights)
    q = sum(w * (t - mean) ** 2 for w, t in zip(weights, taus, strict=True))
    assert groups["heterogeneity_p"] == pytest.approx(math.exp(-q / 2), rel=1e-4)  # chi-squared, 2 degrees of freedom


def test_the_picture_has_the_correlations_over_all_models_and_at_fixed_factors_side_by_side(tmp_path):
    table = CASES["positive, but no evidence at a fixed learning rate"]
    sizes = {}
    for given in (table.given, None):
        report.write(replace(table, given=given), tmp_path, num_resamples=20)
        with Image.open(tmp_path / "correlations.png") as picture:
            sizes[given] = picture.size
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 40  # a colour scale
    (both, height), (single, same_height) = sizes[table.given], sizes[None]
    assert height == same_height
    assert both == pytest.approx(2 * single, rel=0.2)  # the title of the second one is longer


def test_a_report_can_be_made_again_from_its_results(tmp_path):
    """With other factors held fixed, and of a part of the models."""
    table = CASES["no evidence of a trend"]
    report.write(table, tmp_path / "first", num_resamples=20)
    again = report.from_results(tmp_path / "first" / "results.json", None, None, given="lr,sam_rho")
    assert (again.rows, list(again.measures), again.held) == (
        [dict(r) for r in table.rows],
        table.measures,
        ["lr", "sam_rho"],
    )
    part = report.where(again, "test_error<0")
    assert part.rows == [row for row in table.rows if row["test_error"] < 0]
    with pytest.raises(InputError, match="COLUMN<NUMBER"):
        report.where(again, "test_error>0")
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(InputError, match=r"not a results\.json"):
        report.from_results(tmp_path / "empty.json", None, None)


def test_all_tests_of_the_page_are_corrected_together():
    """2 measures x 2 targets, each over all models and at a fixed learning rate: 8 tests."""
    rows = [dict(r, other=-r["sharpness"], gap=r["test_error"] ** 2) for r in CASES["no evidence of a trend"].rows]
    table = Table("t", rows, ["sharpness", "other"], ["test_error", "gap"], ["lr", "sam_rho", "seed"], "lr")
    result = analyse(table, num_resamples=20)
    assert result["num_tests"] == 8
    smallest = min(c["p"] for c in result["comparisons"])
    fixed = min(c["fixed"]["within_p"] for c in result["comparisons"])
    adjusted = [c["p_adjusted"] for c in result["comparisons"]] + [
        c["fixed"]["within_p_adjusted"] for c in result["comparisons"]
    ]
    assert min(adjusted) == pytest.approx(min(1.0, 8 * min(smallest, fixed)))


def as_csv(rows):
    head = list(rows[0])
    return csv_text(head, [[row[key] for key in head] for row in rows])


class TestCsv:
    def test_a_table_of_somebody_else_gets_the_same_analysis(self, tmp_path, capsys):
        table = CASES["positive, but no evidence at a fixed learning rate"]
        path = tmp_path / "theirs.csv"
        path.write_text(as_csv(table.rows))
        argv = ["report", "--csv", str(path), "--measures", "sharpness", "--targets", "test_error"]
        argv += ["--factors", "lr,sam_rho,seed", "--out", str(tmp_path / "out"), "--resamples", "200"]
        assert errors.run(study.main, argv) == 0
        assert "no evidence at a fixed learning rate" in capsys.readouterr().out
        theirs = json.loads((tmp_path / "out" / "results.json").read_text())
        ours = analyse(table, num_resamples=200)
        assert theirs["comparisons"] == json.loads(json.dumps(ours["comparisons"]))
        again = list(csv.DictReader(io.StringIO((tmp_path / "out" / "models.csv").read_text())))
        assert [float(r["sharpness"]) for r in again] == [r["sharpness"] for r in table.rows]

    @pytest.mark.parametrize("separator", [";", "\t"])
    def test_cells_that_are_no_numbers_are_missing_and_a_byte_order_mark_is_nothing(self, tmp_path, separator):
        lines = ["lr,a,b", "0.1,1,2", "1e-1,nan,3", "0.1,,4", "0.2,x,5", "0.2,6,inf"]
        (tmp_path / "t.csv").write_text("\ufeff" + "\n".join(lines).replace(",", separator), encoding="utf-8")
        table = report.from_csv(tmp_path / "t.csv", ["a"], ["b"], ["lr"])
        assert [r["a"] for r in table.rows] == [1.0, None, None, None, 6.0]
        assert table.rows[4]["b"] is None
        assert {r["lr"] for r in table.rows} == {0.1, 0.2}
        assert table.given == "lr"

    @pytest.mark.parametrize(
        ("text", "options", "words"),
        [
            ("a,b\n1,2\n", (None, ["b"]), "name the columns"),
            ("a,b\n1,2\n", (["a"], ["c"]), "unknown column 'c'"),
            ("a,b\n", (["a"], ["b"]), "no rows"),
            ("a,a,b\n1,2,3\n", (["a"], ["b"]), "a column twice: a"),
            ("", (["a"], ["b"]), "unknown column 'a'"),
            ("a,b\nflat,1\n,2\nsharp,3\n", (["a"], ["b"]), "column 'a' of"),
            ("a,b\n1,good\n2,bad\n", (["a"], ["b"]), "has no number, only text like 'good'"),
        ],
    )
    def test_bad_tables_are_named(self, tmp_path, text, options, words):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(InputError, match=re.escape(words)):
            report.from_csv(tmp_path / "t.csv", *options)

    def test_a_factor_to_hold_fixed_must_vary(self, tmp_path):
        (tmp_path / "t.csv").write_text("a,b,lr\n1,2,3\n2,3,3\n")
        with pytest.raises(InputError, match="--given lr"):
            report.from_csv(tmp_path / "t.csv", ["a"], ["b"], ["lr"], given="lr")

    def test_a_few_rows_have_reasons_instead_of_numbers(self, tmp_path):
        (tmp_path / "t.csv").write_text("a,b,lr\n1,2,3\n2,3,4\n")
        result = report.from_csv(tmp_path / "t.csv", ["a"], ["b"], ["lr"])
        assert report.write(result, tmp_path / "out", num_resamples=10) == 0
        text = (tmp_path / "out" / "report.html").read_text()
        assert "not computed: 2 runs with finite numbers" in text
        assert "nan" not in re.sub(r"<script.*</script>", "", text, flags=re.S).lower().replace("provenance", "")

    def test_either_a_study_or_a_table(self, capsys):
        assert errors.run(study.main, ["report"]) == 2
        assert "one of them" in capsys.readouterr().err


def big_table():
    base = CASES["positive, but no evidence at a fixed learning rate"].rows
    rows = [
        dict(
            r,
            flat=math.exp(-3 * r["sharpness"]),
            gap=r["test_error"] - 5,
            aug=("a", "b")[i % 2],
            trace=None if i < 3 else i * 1.0,
        )
        for i, r in enumerate(base)
    ]
    return Table(
        "study", rows, ["sharpness", "flat", "trace"], ["test_error", "gap"], ["lr", "sam_rho", "seed", "aug"], "lr"
    )


class TestPage:
    def test_everything_is_on_the_page_and_nothing_comes_from_outside(self, tmp_path):
        table = big_table()
        result = analyse(table, num_resamples=50)
        text = page(table, result)
        assert result["headline"] in text
        for identifier in ("map", "given", "comparisons", "scatter", "models", "reading", "settings"):
            assert f'id="{identifier}"' in text
        assert not re.findall(r"https?://|url\((?!#)|@import", text)
        assert re.findall("<script[^>]*>", text) == ['<script type="application/json" id="data">', "<script>"]
        data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
        assert len(data["models"]) == 48
        assert len(data["comparisons"]) == 6

    @pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
    def test_hostile_names_stay_text(self, name):
        rows = [
            {name: r["sharpness"], "e" + name: r["test_error"], "f" + name: name + str(r["lr"])}
            for r in big_table().rows
        ]
        about = {name: name, "unconverged": {name: 2}, "config": {name: [name]}}
        table = Table(
            name,
            rows,
            [name],
            ["e" + name],
            ["f" + name],
            "f" + name,
            about,
            [{"levels": {name: name}, "reason": name}],
        )
        reader = Reader()
        reader.feed(page(table, analyse(table, num_resamples=10)))
        assert reader.tags.count("script") == 2
        assert reader.tags.count("style") == 1
        assert "img" not in reader.tags
        assert not [a for a, _ in reader.attributes if a.startswith("on")]
        assert not [v for a, v in reader.attributes if a == "src" or (a == "href" and not v.startswith("#"))]


SORTED = """(() => {
  const rows = [...document.querySelectorAll("#models table.sortable tbody tr")];
  return rows.map((row) => row.cells[COLUMN].textContent);
})()"""


def column(browser, i):
    return browser.run(SORTED.replace("COLUMN", str(i)))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    report.write(big_table(), folder, num_resamples=50)
    return folder / "report.html"


@pytest.mark.skipif(BINARY is None, reason=REASON)
class TestBrowser:
    def test_tables_sort_by_numbers_and_back_with_what_is_missing_at_the_end(self, path, tmp_path):
        with Browser(tmp_path / "profile") as browser:
            browser.open(path)
            heads = browser.run('[...document.querySelectorAll("#models th[scope=col]")].map((h) => h.textContent)')
            i = heads.index("trace")
            click = f'document.querySelectorAll("#models th[scope=col] button")[{i}].click()'
            browser.run(click)
            numbers = column(browser, i)
            assert numbers[-3:] == ["–"] * 3
            rising = [float(n) for n in numbers[:-3]]
            assert rising == sorted(rising)
            assert browser.run(f'document.querySelectorAll("#models th[scope=col]")[{i}].ariaSort') == "ascending"
            browser.run(click)
            falling = column(browser, i)
            assert falling == [*reversed(numbers[:-3]), *numbers[-3:]]
            browser.run('document.querySelectorAll("#models th[scope=col] button")[4].click()')  # a name: a, b
            assert column(browser, 4) == ["a"] * 24 + ["b"] * 24
            assert browser.requests == [path.resolve().as_uri()]
            assert browser.problems == []

    def test_without_javascript_the_tables_are_whole(self, path, tmp_path):
        with Browser(tmp_path / "profile", javascript=False) as browser:
            browser.open(path)
            assert browser.run('document.querySelectorAll("th button").length') == 0
            assert browser.run('document.querySelectorAll("#models tbody tr").length') == 48
            assert browser.run('document.querySelectorAll("#comparisons tbody tr").length') == 6
            assert len(column(browser, 0)) == 48

    def test_no_hostile_name_runs_and_our_script_still_does(self, tmp_path):
        rows = [dict(r) for r in big_table().rows]
        names = [n[:200] for n in HOSTILE if n.isprintable()]
        for r in rows:
            r.update(dict.fromkeys(names, r["sharpness"]))
        table = Table("<script>document.title='x'</script>", rows, names, ["test_error"], ["lr"], "lr")
        report.write(table, tmp_path, num_resamples=10)
        with Browser(tmp_path / "profile") as browser:
            browser.open(tmp_path / "report.html")
            assert browser.run("document.title").startswith("<script>")
            assert browser.run('document.querySelectorAll("img, iframe, object, [onmouseover], [onfocus]").length') == 0
            assert browser.run('document.querySelectorAll("th button").length') > 0
            assert browser.problems == []

    @pytest.mark.parametrize("width", [390, 1200])
    def test_the_page_itself_does_not_scroll_sideways(self, path, tmp_path, width):
        with Browser(tmp_path / "profile") as browser:
            browser.ask(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
            )
            browser.open(path)
            assert browser.run("document.documentElement.scrollWidth") <= width


ACCURACIES = {
    "SGD": {0: 60.0, 1: 62.0, 2: 61.0, 3: 59.5},
    "SAM": {0: 63.0, 1: 62.5, 2: 64.0, 3: 61.0},
    "ASAM": {0: 63.5, 2: 61.0, 3: 60.5},
}


def methods(labels=("noisy", "clean"), names=tuple(ACCURACIES)):
    """SAM above SGD with both kinds of labels; one run of ASAM diverged, and has no number."""
    rows = [
        {"labels": kind, "method": method, "seed": str(seed), "failed": False, "test_accuracy": value - shift}
        for kind, shift in (("noisy", 10.0), ("clean", 0.0))
        for method, runs in ACCURACIES.items()
        for seed, value in runs.items()
    ]
    rows.append({"labels": "clean", "method": "ASAM", "seed": "1", "failed": True})
    return Runs("t", rows, {"labels": labels, "method": names, "seed": ["0", "1", "2", "3"]})


def by_method(runs, **options):
    return compare(runs, "method", targets=["test_accuracy"], **options)


def test_differences_are_paired_by_seed():
    from scipy import stats

    noisy, clean = by_method(methods())
    assert (noisy["setting"], clean["setting"]) == ({"labels": "noisy"}, {"labels": "clean"})
    sgd, sam, asam = clean["rows"]
    assert sgd["difference"] is None
    assert (sgd["n"], sam["n"], asam["n"], asam["num_failed"]) == (4, 4, 3, 1)
    assert noisy["rows"][2]["num_failed"] == 0
    assert (sam["mean"], sam["std"]) == (pytest.approx(62.625), pytest.approx(1.25))
    a, b = ([ACCURACIES[m][s] for s in range(4)] for m in ("SAM", "SGD"))
    theirs = stats.ttest_rel(a, b)
    interval = theirs.confidence_interval(0.95)
    result = sam["difference"]
    assert (result["mean"], result["n"]) == (pytest.approx(2.0), 4)
    assert (result["low"], result["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert result["p"] == pytest.approx(theirs.pvalue)
    assert result["p_adjusted"] == pytest.approx(min(1, 4 * theirs.pvalue))  # the smallest of four
    assert asam["difference"]["n"] == 3  # seeds that both have
    assert asam["difference"]["mean"] == pytest.approx((3.5 + 0 + 1) / 3)


def test_a_difference_of_too_few_runs_has_no_interval():
    assert difference({"0": 1.0}, {"0": 0.5}) == {"mean": 0.5, "low": None, "high": None, "p": None, "n": 1}
    assert difference({"0": 1.0}, {"1": 0.5})["mean"] is None
    assert difference({"0": 1.0, "1": 2.0}, {"0": 0.0, "1": 1.0})["low"] is None  # no spread to judge by
    counts = {"0": 6014, "1": 6113}, {"0": 6001, "1": 6100}  # both 13 more, of 10,000
    a, b = ({seed: 100 - 100 * (1 - c / 10_000) for seed, c in result.items()} for result in counts)
    assert a["0"] - b["0"] != a["1"] - b["1"]
    assert difference(a, b)["p"] is None


def test_levels_stand_in_the_order_of_the_settings():
    result = by_method(methods(("clean", "noisy"), ("ASAM", "SAM", "SGD")), baseline="SGD")
    assert [one["setting"]["labels"] for one in result] == ["clean", "noisy"]
    assert [row["level"] for row in result[0]["rows"]] == ["ASAM", "SAM", "SGD"]
    assert result[0]["rows"][2]["difference"] is None
    assert by_method(methods())[0]["rows"][0]["difference"] is None  # without a baseline: the first


def test_a_level_without_runs_has_its_place_and_no_numbers():
    noisy, _ = by_method(methods(names=("LARS", *ACCURACIES)))
    assert noisy["baseline"] == "LARS"
    assert (noisy["rows"][0]["n"], noisy["rows"][0]["mean"]) == (0, None)
    assert noisy["rows"][1]["difference"]["mean"] is None
    assert "LARS" in str(compare_page([noisy], methods()))


def test_levels_of_any_kind_have_names():
    assert [text(x) for x in (True, 1, 0.0, None, [0.9, 0.99], "sgd")] == [
        "true",
        "1",
        "0.0",
        "null",
        "[0.9, 0.99]",
        "sgd",
    ]


def test_the_page_of_methods_has_every_number():
    runs = methods()
    page = str(compare_page(by_method(runs), runs))
    assert "3, 1 diverged" in page
    assert "62.62 ± 1.25" in page
    assert page.count("<svg") == 2


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_of_methods_stay_text(name):
    runs = methods(names=[name + method for method in ACCURACIES])
    for row in runs.rows:
        row["method"] = name + row["method"]
    reader = read(compare_page(by_method(runs), runs))
    assert reader.tags.count("script") == 1  # the data
    assert not {"img", "iframe", "object", "embed", "form", "link", "base"} & set(reader.tags)
    assert not [key for key, _ in reader.attributes if key.startswith("on")]
