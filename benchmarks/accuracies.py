"""The table of docs/accuracies.md, made from benchmarks/results/accuracies.json.

python -m benchmarks.accuracies            # writes the table into the page
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.train import options
from sam_optim.core.errors import InputError, run
from sam_optim.core.files import read_json, write_atomic

ROOT = Path(__file__).resolve().parents[1]
DATA, PAGE = ROOT / "benchmarks" / "results" / "accuracies.json", ROOT / "docs" / "accuracies.md"
BEGIN, END = "<!-- table: python -m benchmarks.accuracies -->", "<!-- end of the table -->"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; what was not published, or has not been run, is empty."""
    lines = ["| recipe | published, % | measured, % | source of the published one |", "|---|---|---|---|"]
    for row in rows:
        recipe = f"[{row['recipe']}](../benchmarks/recipes/{row['recipe']}.yaml)"
        lines.append(f"| {recipe} | {row['published'] or ''} | {row['measured'] or ''} | {row['source']} |")
    return "\n".join(lines)


def page(text: str, rows: list[dict[str, Any]]) -> str:
    """`text` with the table between its two marks."""
    if BEGIN not in text or END not in text:
        raise InputError(f"{PAGE} has lost the marks of its table: {BEGIN} and {END}")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n{table(rows)}\n{END}{text.partition(END)[2]}"


def main(argv: Sequence[str] | None = None) -> int:
    options.Parser(prog="python -m benchmarks.accuracies", description=__doc__).parse_args(argv)
    write_atomic(PAGE, page(PAGE.read_text(), read_json(DATA)).encode())
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
