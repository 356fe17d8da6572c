"""Plain text: digits that an error leaves, aligned tables, CSV without formulas, names without escapes."""

import csv
import io
import math

import pytest

from sam_optim.core.text import (
    cell,
    csv_text,
    headline,
    is_finite,
    mean_and_std,
    number,
    printable,
    shortened,
    signed,
    spread,
    text_table,
    with_error,
)


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.23456, 0.0123, "1.235 ± 0.012"),
        (123.456, 12.3, "123 ± 12"),
        (0.0, 0.5, "0.00 ± 0.50"),
        (1.23456e-9, 2e-11, "1.235e-09 ± 2.0e-11"),
        (1.23456789, 1e-9, "1.23457 ± 1.0e-09"),
        (1.5, None, "1.500"),
        (1.5, 0.0, "1.500"),
        (None, 1.0, "–"),
    ],
)
def test_numbers_have_the_digits_that_their_errors_leave(value, error, text):
    assert with_error(value, error) == text


def test_numbers_with_their_spread():
    assert mean_and_std([1, 2, 3]) == (2, 1)
    assert mean_and_std([5]) == (5, 0)
    assert math.isnan(mean_and_std([])[0])
    assert spread([81.72, 80.0, 83.0]) == "81.6 ± 1.5"
    assert spread([0.0123, 0.0150]) == "0.0136 ± 0.0019"
    assert spread([5.0, None, math.nan]) == "5.00"
    assert spread([]) == "–"
    shown = [number(v) for v in (None, math.nan, 0, 1234567, 0.00001234, 12.345)]
    assert shown == ["–", "–", "0", "1.23e+06", "1.23e-05", "12.3"]
    assert [signed(v) for v in (0.314, -0.5, None)] == ["+0.31", "−0.50", "–"]


def test_what_is_not_finite_or_not_converged_is_said():
    assert cell({"value": None, "reason": "x"}) == "no number"
    assert cell({"eigenvalues": [1.0, None]}) == "no number"
    assert not is_finite({"density": [1.0, None]})
    assert cell({"value": 1.0, "stderr": 0.1, "converged": False}) == "1.00 ± 0.10 (not converged)"
    assert cell({"eigenvalues": [2.0, 1.0], "residuals": [0.1, 0.1]}) == "2.000, 1.000"
    assert cell({"eigenvalues": [2.0], "residuals": [0.1]}) == "2.00 ± 0.10"
    assert cell({"eigenvalues": [2.0], "density": [0.1, 0.2]}) == "density at 2 points"


def test_the_number_of_a_result_and_its_error():
    assert headline({"value": 1.0, "stderr": 0.1}) == (1.0, 0.1)
    assert headline({"eigenvalues": [2.0, 1.0], "residuals": [0.2, 0.1], "errors": [0.02, 0.01]}) == (2.0, 0.02)
    assert headline({"eigenvalues": []}) == (None, None)
    assert headline({"eigenvalues": [2.0], "density": [0.1]}) == (None, None)


def test_a_table_for_a_terminal_is_aligned():
    assert text_table(["name", "v"], [["a", "10"], ["long name", "2"]]).splitlines() == [
        "name        v",
        "---------  --",
        "a          10",
        "long name   2",
    ]


HARMFUL = [
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\u202egpj.exe\u202c",
    "\u2066x\u2069",
    "a\u200fb",
    "\ud800",
]


@pytest.mark.parametrize("name", [*HARMFUL, "two\nlines", "a\tb", "a\rb", "a\u2028b"])
def test_no_escape_bidi_control_or_line_break_of_a_name_reaches_the_terminal(name):
    table = text_table([name, "v"], [[name, name]])
    assert len(table.splitlines()) == 3
    assert all(c == "\n" or c.isprintable() for c in table)
    assert "\ufffd" in table
    assert table.encode("utf-8")


def test_printable_leaves_what_is_text():
    for text in ("naïve ± 1 µ – τ", "Größe", "深层", "שלום", "👩‍🔬"):
        assert printable(text) == text
    assert printable("a\n\tb", one_line=False) == "a\n\tb"
    assert printable("a\x1b\n", one_line=False) == "a\ufffd\n"


@pytest.mark.parametrize("formula", ["=1+1", "+cmd|' /C calc'!A0", "-2+3+cmd", "@SUM(A1)", "\t=1", " =1", "\r=1", "-"])
def test_text_that_a_spreadsheet_would_run_is_only_text(formula):
    head, row = csv.reader(io.StringIO(csv_text([formula, "b"], [[formula, formula]]), newline=""))
    assert head[0] == row[0] == row[1] == "'" + printable(formula)


def test_numbers_and_names_are_written_as_they_are():
    values = [-1.5, "-1.5", "+3", "1e-3", None, "a-b", "runs/=x.pt", "-inf"]
    (row,) = csv.reader(io.StringIO(csv_text(["x"] * len(values), [values]).partition("\n")[2]))
    assert row == ["-1.5", "-1.5", "+3", "1e-3", "", "a-b", "runs/=x.pt", "-inf"]


def test_a_long_name_keeps_its_end():
    assert shortened("runs/" + "x" * 50 + "/sam.pt", 20) == "…" + ("x" * 12 + "/sam.pt")
    assert shortened("short") == "short"
