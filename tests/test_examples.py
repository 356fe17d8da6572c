"""What the comparison of a page with what its examples print lets pass, and what it does not."""

import pytest
from examples import blocks, differences, form, last_digit, run


@pytest.mark.parametrize(
    ("shown", "printed", "spread"),
    [
        ("loss 1.754", "loss 1.755", 0.0),  # the last digit
        ("0.9688 ± 0.0032 (n = 15)", "0.9719 ± 0.0032 (n = 15)", 0.0),  # less than its standard error
        ("0.1 ± 0.0032 (n = 15)", "0.1 ± 0.0038 (n = 15)", 0.0),  # of 15 values it is known to 19 %
        ("1.014830 ± 3.3e-05", "1.014840 ± 6.6e-06", 0.0),  # a bound, which may be better
        ("6e-05 and 1.5e+04", "7e-05 and 1.6e+04", 0.0),
        ("top 3.066", "top 3.132", 0.03),
        ("0.02343 ± 0.00051 (n = 2)", "0.02316 ± 0.0014 (n = 2)", 0.03),  # of two values that are each free by 3 %
        ("head\n----- 1.0", "head\n-- 1.0", 0.0),
        ("-0.03 to 0.01", "-0.03 to -0.00", 0.0),
        ("ResNet-18 on 2 cores", "ResNet-18  on 2 cores", 0.0),
    ],
)
def test_what_a_page_cannot_promise_is_free(shown, printed, spread):
    assert differences(printed, shown, spread) == []


@pytest.mark.parametrize(
    ("shown", "printed", "spread"),
    [
        ("loss 1.754", "Loss 1.754", 1.0),  # words
        ("loss 1.754", "loss 1.754 1.754", 1.0),
        ("loss 1.754", "loss nan", 1.0),
        ("cnn3 1.0", "cnn4 1.0", 1.0),  # part of a name
        ("144 steps", "145 steps", 1.0),  # a count
        ("loss 1.754", "loss 1.757", 0.0),
        ("0.9688 ± 0.0032 (n = 15)", "0.9730 ± 0.0032 (n = 15)", 0.0),
        ("0.1 ± 0.0032 (n = 15)", "0.1 ± 0.0042 (n = 15)", 0.0),
        ("0.1 ± 0.0032 (n = 15)", "0.1 ± 0.0032 (n = 14)", 0.0),
        ("1.014830 ± 3.3e-05", "1.014830 ± 6.8e-05", 0.0),
        ("top 3.066", "top 3.170", 0.03),
        ("0.02343 ± 0.00051 (n = 2)", "0.02343 ± 0.0018 (n = 2)", 0.03),
        ("-0.61", "0.61", 0.1),
    ],
)
def test_what_it_says_is_checked(shown, printed, spread):
    assert len(differences(printed, shown, spread)) == 1


def test_the_last_digit():
    numbers = {"3.14": 0.01, "8.3e-05": 1e-6, "2e-05": 1e-5, "1.922e+04": 10.0, "15": 0.0, "-7": 0.0}
    assert {number: pytest.approx(last_digit(number)) for number in numbers} == numbers


def test_blocks_share_their_names_and_those_without_output_run_too(tmp_path):
    page = tmp_path / "page.md"
    second = "```python\nprint('noise 3')\nprint('x', x * y)\n```\n\n```text\nx 3.0\n```\n"
    page.write_text("# Page\n```python\nx = 1.5\n```\nThen\n\n" + second)
    assert run(page, {"y": 2}, leave_out="noise") == [("x 3.0", "x 3.0\n")]
    assert form("x 3.0") == ["x", "#"]


def test_the_output_may_stand_below_the_command(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(1)\n```\n\n    torchrun page.py\n\n```text\n1\n```\n\n```python\nprint(2)\n```\nWords.\n"
    )
    assert blocks(page) == [("print(1)\n", "1\n"), ("print(2)\n", "")]
