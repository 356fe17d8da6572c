"""The Python of README and the docs: it runs as it stands, and what it prints is compared with what the page shows.

The words are compared to the letter. A number is free by what the page itself cannot promise:

    | printed - shown |  <=  one unit of the last digit shown  +  its standard error  +  spread * |shown|

- The last digit: both numbers are rounded, so two that hardly differ may show neighboring digits (0.0032, 0.0033).
- The standard error: of `v ± s` it is s, which the page prints beside v. s itself, from n values, has the relative
  standard error 1 / sqrt(2 (n - 1)), where the page prints `(n = ...)`. Without an n it may be a bound of what an
  iteration has left, which is as good at half its size: s is then free by s. It is also the distance of numbers of the
  size of v, each of which is free by the spread of v.
- The spread over processors: sums are added in another order by another vector width, number of threads or version, and
  a training carries that on. The test of a page states it, from what `tests/matrix.py` measured.

A whole number is a count, and exact.

    python tests/examples.py docs/gallery/*.md      # runs pages where they are: writes their outputs and pictures
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A Python block and the output below it; between the two may stand, indented, the command that runs the one.
BLOCK = re.compile(r"```python\n(.*?)```\n(?:\n| {4}[^\n]+\n)*(?:```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")
ESTIMATE = re.compile(rf"({NUMBER.pattern}) ± ({NUMBER.pattern})(?: \(n = (\d+)\))?")


def blocks(page: Path) -> list[tuple[str, str]]:
    """The Python blocks of a page, each with the text that it shows as its output, or ''."""
    return BLOCK.findall(page.read_text())


def output(code: str, page: Path, names: dict) -> str:
    """What a block prints; `names` are those that the blocks of its page share."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(page), "exec"), names)
    return printed.getvalue()


def rewrite(page: Path) -> None:
    """Runs a page in its folder, where it saves its pictures, and puts what it prints into its text blocks."""
    names: dict = {}

    def filled(block: re.Match) -> str:
        printed = output(block[1], page, names)
        return block[0] if block[2] is None else block[0][: block.start(2) - block.start()] + printed + "```"

    with contextlib.chdir(page.parent):
        page.write_text(BLOCK.sub(filled, page.read_text()))


def run(page: Path, names: dict | None = None, *, leave_out: str | None = None) -> list[tuple[str, str]]:
    """(printed, shown) of each block that shows its output; the blocks share their names, as in a notebook.

    Lines that match `leave_out` are a framework's own, and are not on the page.
    """
    names, pairs = {} if names is None else names, []
    for code, shown in blocks(page):
        printed = output(code, page, names)
        if shown:
            lines = printed.splitlines()
            pairs.append(("\n".join(line for line in lines if not (leave_out and re.match(leave_out, line))), shown))
    return pairs


def last_digit(number: str) -> float:
    """One unit of it: 0.01 for 3.14, 1e-06 for 8.3e-05, 0 for a whole number, which is a count."""
    mantissa, _, exponent = number.partition("e")
    _, point, decimals = mantissa.partition(".")
    return 10.0 ** (int(exponent or 0) - len(decimals)) if point or exponent else 0.0


def standard_errors(text: str, spread: float) -> dict[int, float]:
    """By where a number begins in the text: its standard error, of those that have one, and what s is free by."""
    errors = {}
    for match in ESTIMATE.finditer(text):
        value, error, count = match.groups()
        errors[match.start(1)] = float(error)
        error_of_error = float(error) / (math.sqrt(2 * (int(count) - 1)) if count else 1.0)
        errors[match.start(2)] = error_of_error + spread * abs(float(value))
    return errors


def form(text: str) -> list[str]:
    """The words; numbers, and the rules under the heads of tables, whose length follows from them, each as one sign."""
    return re.sub("-{2,}", "--", NUMBER.sub("#", text)).split()


def differences(printed: str, shown: str, spread: float) -> list[str]:
    """What is not as the page shows it, in words; none if all is. `spread` is relative."""
    if form(printed) != form(shown):
        return [f"other words: printed\n{printed}\nwhere the page shows\n{shown}"]
    errors = standard_errors(shown, spread)
    wrong = []
    for said, got in zip(NUMBER.finditer(shown), NUMBER.findall(printed), strict=True):
        value = float(said[0])
        tolerance = last_digit(said[0])
        if tolerance:
            tolerance += errors.get(said.start(), 0.0) + spread * abs(value)
        if not abs(float(got) - value) <= tolerance * (1 + 1e-9):  # the distance is rounded as well
            wrong.append(f"printed {got} where the page shows {said[0]}, which is free by {tolerance:.2g}")
    return wrong


def check(pairs: list[tuple[str, str]], *, spread: float) -> None:
    wrong = [line for printed, shown in pairs for line in differences(printed, shown, spread)]
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        rewrite(Path(name).resolve())
