"""`sam-optim landscape` and `sam-optim report`: what is drawn is what was measured, and names are only names."""

import csv
import json
import re

import pytest
import torch
from command_line import run, small, study
from test_report import HOSTILE, read
from torch import nn

from sam_optim import Loss, correlate, hessian_eigenvalues, interpolate, slice_1d, slice_2d
from sam_optim.core.text import cell
from sam_optim.landscape import random_direction
from sam_optim.report.study import study_page
from sam_optim.statistics.table import table
from sam_optim.sweep import store


def made(name="c0.pt", column="trace", *, value=1.0, stderr=0.1, seed=0, sha="a", **loss):
    identity = {
        "checkpoint": sha,
        "measure": column,
        "options": {"seed": seed},
        "loss": {"model": "m", "data": "d"} | loss,
    }
    result = {"type": "Estimate", "value": value, "stderr": stderr, "provenance": {"torch": "2"}}
    return {"checkpoint": name, "column": column, "key": f"{name}{identity}", "identity": identity, "result": result}


def test_a_file_that_is_not_there_is_named(here):
    code, _, err = run("report", "nope.json", "-o", "x.html")
    assert (code, err) == (2, "error: nope.json: no such file or directory\n")


class TestTable:
    def test_rows_are_checkpoints_and_columns_are_measures(self):
        result = table([made("a", "trace", value=1.0), made("b", "trace", value=2.0), made("a", "worst", value=3.0)])
        assert (result.rows, result.columns) == (["a", "b"], ["trace", "worst"])
        assert result.numbers() == [
            {"checkpoint": "a", "trace": 1.0, "worst": 3.0},
            {"checkpoint": "b", "trace": 2.0, "worst": None},
        ]

    def test_other_settings_are_another_column_and_other_content_another_row(self):
        result = table(
            [made(seed=0), made(seed=1), made(seed=0, sha="b"), made(seed=0, data="e"), made(seed=0, ema=True)]
        )
        assert result.columns == ["trace [data=d, seed=0]", "trace [data=d, seed=1]", "trace [data=e, seed=0]"]
        assert result.rows == [
            "c0.pt [checkpoint=a, ema=null]",
            "c0.pt [checkpoint=b, ema=null]",
            "c0.pt [checkpoint=a, ema=true]",
        ]
        assert len(result.cells) == 5

    def test_balls_are_told_apart_in_few_words(self):
        entries = [made(), made()]
        for e, eta, adaptive in zip(entries, (None, 0.0), (False, "elementwise"), strict=True):
            e["identity"] |= {"options": {"ball": {"eta": eta, "adaptive": adaptive}}}
        assert table(entries).columns == ["trace [adaptive=false]", "trace [adaptive=elementwise, eta=0.0]"]

    def test_models_are_rows_of_one_column(self):
        result = table([made("a", model="resnet18"), made("b", model="vit")])
        assert (result.rows, result.columns) == (["a", "b"], ["trace"])

    def test_failures_stand_apart(self):
        entry = {"checkpoint": "bad.pt", "key": "loading", "column": None, "error": "it is damaged"}
        result = table([made(), entry])
        assert result.rows == ["c0.pt"]
        assert result.failures == {"bad.pt": "it is damaged"}


class TestReport:
    def test_the_page_holds_every_number_and_nothing_from_outside(self, here):
        names = study(here)
        assert run("measure", *names, "--target", "study_problem:problem", "--measures", "trace,eigenvalue",
                   "--num-probes", 3, "--json", "o.json")[0] == 0  # fmt: skip
        code, out, err = run("report", "o.json", "-o", "pages/r.html")
        page = (here / "pages" / "r.html").read_text()
        seen = read(page)
        words = " ".join(seen.words)
        assert (code, err) == (0, "")
        assert out.strip() == "pages/r.html"
        for entry in store.read(here / "o.json"):
            assert entry["checkpoint"] in words
            assert cell(entry["result"]) in words
        assert {"script", "svg", "table"} <= set(seen.tags)
        assert not [v for k, v in seen.attributes if k in ("src", "href") and not v.startswith("data:")]
        kept = json.loads(seen.data)["entries"]
        assert [e["result"] for e in kept] == [e["result"] for e in store.read(here / "o.json")]

    def test_hostile_names_are_only_text(self):
        entries = [made(name, column=name, model=name) for name in HOSTILE]
        failed = [{"checkpoint": name, "key": "loading", "column": None, "error": name} for name in HOSTILE]
        rows = table(entries + failed)
        targets = {name: {row: float(i) for i, row in enumerate(rows.rows)} for name in HOSTILE[:2]}
        factors = {HOSTILE[0]: dict.fromkeys(rows.rows, HOSTILE[1])}
        page = study_page(rows, targets=targets, correlations=rows.correlations(targets, factors), title=HOSTILE[0])
        seen = read(page)
        assert seen.tags.count("script") == 1
        assert "img" not in seen.tags
        assert not [k for k, _ in seen.attributes if k.startswith("on")]
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08]", page)
        assert json.loads(seen.data)["entries"][0]["checkpoint"] == HOSTILE[0]

    @pytest.fixture
    def measured(self, here):
        """Six checkpoints, their traces, and targets that are in the order of the traces but for one pair."""
        names = study(here, count=6)
        run("measure", *names, "--target", "study_problem:problem", "--measures", "trace", "--num-probes", 3,
            "--json", "o.json", "--csv", "o.csv")  # fmt: skip
        values = {e["checkpoint"]: e["result"]["value"] for e in store.read(here / "o.json")}
        order = sorted(names, key=values.get)
        order[2], order[3] = order[3], order[2]
        errors = {name: 0.1 * (i + 1) for i, name in enumerate(order)}
        return names, values, errors

    def write(self, path, names, errors, key=str, **more):
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["checkpoint", "test_error", *more])
            for i, name in enumerate(names):
                writer.writerow([key(name), errors[name], *(values[i] for values in more.values())])

    @pytest.mark.parametrize("key", [str, lambda name: name.removesuffix(".pt")], ids=["name", "stem"])
    def test_targets_are_compared_by_correlate(self, here, measured, key):
        names, values, errors = measured
        self.write(here / "t.csv", names, errors, key, lr=[1, 1, 1, 2, 2, 2], note=["x"] * 6)
        code, _, err = run("report", "o.json", "--targets", "t.csv", "--factors", "lr", "-o", "r.html")
        (result,) = json.loads(read((here / "r.html").read_text()).data)["correlations"]
        rows = [{"x": values[n], "y": errors[n], "lr": str(1 + i // 3)} for i, n in enumerate(names)]
        expected = correlate(rows, "x", "y", factors=["lr"]).to_dict()
        assert (code, err) == (0, "")
        assert result["tau"] == pytest.approx(13 / 15)
        for key in ("tau", "low", "high", "p", "n", "granulated"):
            assert result[key] == pytest.approx(expected[key])

    def test_a_table_for_spreadsheets_with_a_column_more_is_enough(self, here, measured):
        _, _, errors = measured
        lines = (here / "o.csv").read_text().splitlines()
        wider = [f"{line},{errors.get(line.split(',')[0], 'test_error')}" for line in lines]
        (here / "wide.csv").write_text("\n".join(wider))
        assert run("report", "wide.csv", "--target", "test_error", "-o", "r.html")[0] == 0
        (result,) = json.loads(read((here / "r.html").read_text()).data)["correlations"]
        assert result["tau"] == pytest.approx(13 / 15)
        assert run("report", "o.csv", "-o", "r.html")[0] == 0

    def test_targets_that_fit_nothing_are_an_error(self, here, measured):
        names, _, errors = measured
        self.write(here / "t.csv", names, errors, lambda name: f"other-{name}")
        code, _, err = run("report", "o.json", "--targets", "t.csv", "-o", "r.html")
        assert code == 2
        assert "no checkpoint of the results is among the targets" in err
        self.write(here / "t.csv", names, errors)
        code, _, err = run("report", "o.json", "--targets", "t.csv", "--target", "accuracy", "-o", "r.html")
        assert code == 2
        assert "unknown target 'accuracy'; choose from test_error" in err
        assert not (here / "r.html").exists()

    def test_a_hundred_checkpoints_share_a_line(self):
        few, many = (study_page(table([made(f"c{i}", value=1.0 + i) for i in range(n)])) for n in (30, 100))
        assert "100 checkpoints, 1 measure." in many
        drawn = [page[page.index("<svg ") : page.index("</svg>")] for page in (few, many)]
        assert ["c29" in svg for svg in drawn] == [True, False]
        assert drawn[1].count("<use ") > 100  # a marker for each, and ticks


class TestLandscape:
    def losses(self, here, *argv):
        code, _, err = run("landscape", *argv, "--target", "study_problem:problem", "--out", "l.json")
        assert (code, err) == (0, "")
        result = json.loads((here / "l.json").read_text())
        return result["losses"], result["coordinates"]

    @pytest.fixture
    def loss(self, here):
        study(here, count=2)
        import study_problem

        return Loss(small(0), nn.CrossEntropyLoss(), study_problem.data())

    def test_a_random_line_and_plane(self, here, loss):
        losses, (axis,) = self.losses(here, "c0.pt", "--points", 5, "--range", 2, "--seed", 3)
        assert axis == [-2, -1, 0, 1, 2]
        assert losses == slice_1d(loss, seed=3, coordinates=axis).losses.tolist()
        losses, (a, b) = self.losses(here, "c0.pt", "--points", 3, "--two")
        assert losses == slice_2d(loss, coordinates=(a, b)).losses.tolist()

    def test_along_the_gradient_and_the_leading_eigenvector(self, here, loss):
        g = loss.gradient()
        length = torch.cat([x.flatten() for x in g]).norm()
        losses, (axis,) = self.losses(here, "c0.pt", "--points", 3, "--directions", "gradient")
        assert losses == pytest.approx(
            slice_1d(loss, [x / length for x in g], coordinates=axis).losses.tolist(), rel=1e-5
        )
        losses, (axis,) = self.losses(here, "c0.pt", "--points", 3, "--range", 0.01, "--directions", "eigen")
        vector = hessian_eigenvalues(loss, which="magnitude", tol=1e-5).eigenvectors[0]
        expected = slice_1d(loss, vector, coordinates=axis).losses.tolist()
        assert losses == pytest.approx(expected, rel=1e-4) or losses[::-1] == pytest.approx(expected, rel=1e-4)

    def test_the_way_to_another_checkpoint(self, here, loss):
        losses, (axis,) = self.losses(here, "c0.pt", "--points", 4, "--other", "c1.pt")
        assert axis == pytest.approx([0, 1 / 3, 2 / 3, 1])
        assert losses == interpolate(loss, small(1), coordinates=axis).losses.tolist()
        code, *_ = run("landscape", "c0.pt", "--other", "c1.pt", "--target", "study_problem:loading", "--points", 4,
                       "--out", "m.json")  # fmt: skip
        assert code == 0
        assert json.loads((here / "m.json").read_text())["losses"] == losses

    @pytest.mark.parametrize(
        ("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("html", b"<!doctype html>")]
    )
    @pytest.mark.parametrize("flags", [[], ["--two"]], ids=["line", "plane"])
    def test_pictures(self, here, loss, suffix, magic, flags):
        pytest.importorskip("matplotlib")
        code, out, _ = run("landscape", "c0.pt", "--target", "study_problem:problem", "--points", 3, *flags,
                           "--out", f"l.{suffix}")  # fmt: skip
        assert code == 0
        assert (here / out.strip()).read_bytes().startswith(magic)

    def test_a_report_takes_landscapes_too(self, here, loss):
        self.losses(here, "c0.pt", "--points", 3, "--two")
        assert run("report", "l.json", "-o", "r.html")[0] == 0
        assert "Loss around the weights" in (here / "r.html").read_text()

    def test_a_loss_that_is_not_finite_somewhere_is_exit_code_1(self, here, loss):
        code, *_ = run("landscape", "c0.pt", "--target", "study_problem:problem", "--points", 3, "--range", "1e39",
                       "--out", "l.html")  # fmt: skip
        assert code == 1
        assert random_direction(loss)
