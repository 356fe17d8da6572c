"""The pages on training: the example runs, the table is that of its file, what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import accuracies
from benchmarks.train import options
from sam_optim.core import errors, files

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {p.stem for p in (ROOT / "benchmarks" / "recipes").glob("*.yaml")}


def test_every_option_that_a_page_names_exists():
    known = {o for action in options.parser()._actions for o in action.option_strings}
    others = {
        "--nproc-per-node",
        "--corruptions",
        "--severities",
        "--cifar-c",
        "--train",
        "--validation",
        "--ema",
        "--rho",
    }
    for name in ("training.md", "accuracies.md"):
        named = set(re.findall(r"--[a-z][a-z-]*", (ROOT / "docs" / name).read_text()))
        assert named <= known | others


def test_the_table_of_accuracies_is_that_of_its_file():
    rows = files.read_json(accuracies.DATA)
    text = accuracies.PAGE.read_text()
    assert accuracies.page(text, rows) == text
    assert [row["recipe"] for row in rows] == list(dict.fromkeys(row["recipe"] for row in rows))
    assert {row["recipe"] for row in rows} == RECIPES
    for row in rows:
        assert row["source"]
        for value in (row["published"], row["measured"]):
            assert value is None or re.fullmatch(r"\d+\.\d+( ± \d+\.\d+)?( \(n = \d+\))?", value)


def test_published_accuracies_are_100_minus_the_errors_of_the_sam_paper():
    """Tables 1 and 2 of arXiv:2010.01412, errors in %."""
    errors = {"cifar10_wrn28_10_sgd": 3.5, "cifar10_wrn28_10_sam": 2.7, "cifar100_wrn28_10_sgd": 18.8}
    errors |= {"cifar100_wrn28_10_sam": 16.5, "imagenet_resnet50_sgd": 22.9, "imagenet_resnet50_sam": 22.5}
    rows = {row["recipe"]: row["published"] for row in files.read_json(accuracies.DATA)}
    for recipe, error in errors.items():
        assert float(rows[recipe].split()[0]) == pytest.approx(100 - error)


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(errors.InputError, match="has lost the marks"):
        accuracies.page("# Accuracies", [])
