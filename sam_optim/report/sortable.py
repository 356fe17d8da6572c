"""Tables that a reader can sort. Without JavaScript they are plain tables, in the order in which they were made."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

from sam_optim.report.markup import Child, Markup, tag

# Headings become buttons; rows go by data-key (a number, else a word); what has no number stays at the end.
SCRIPT = """\
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const key = (row, i) => row.cells[i].dataset.key ?? row.cells[i].textContent;
  const number = (text) => (text.trim() === "" ? NaN : Number(text));
  heads.forEach((head, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const keys = new Map([...body.rows].map((row) => [row, key(row, i)]));
      const words = [...keys.values()].some((text) => text.trim() !== "" && Number.isNaN(number(text)));
      const empty = (text) => (words ? text.trim() === "" : Number.isNaN(number(text)));
      body.append(...[...body.rows].sort((a, b) => {
        const [x, y] = [keys.get(a), keys.get(b)];
        if (empty(x) || empty(y)) return empty(x) - empty(y);
        const order = words ? x.localeCompare(y) : number(x) - number(y);
        return rising ? order : -order;
      }));
    });
  });
}
"""


LONG = 28  # characters, from which on a cell of words gets a wider column


class Cell(NamedTuple):
    """What is shown, and what it is sorted by: a number (nan and None go last), or a word."""

    shown: Child
    key: float | str | None = None


def sortable_table(
    head: Sequence[Child], rows: Sequence[Sequence[Cell | Child]], caption: Child, *, label: str | None = None
) -> Markup:
    """The first column names the rows. The page needs `SCRIPT` for the sorting, and is a table without it."""
    words = [bool(rows) and all(_is_word(row[i]) for row in rows) for i in range(len(head))]
    classes = ["words" if found else None for found in words]
    top = tag("thead", tag("tr", *(tag("th", h, scope="col", class_=c) for h, c in zip(head, classes, strict=True))))
    body = tag("tbody", *(tag("tr", *(_cell(c, first=i == 0) for i, c in enumerate(row))) for row in rows))
    table = tag("table", top, body, class_="sortable")
    scroll = tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=label or str(caption))
    return tag("figure", tag("figcaption", caption), scroll, class_="table")


def script_hash(source: str) -> str:
    """What a content security policy calls the only script that it lets run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _cell(cell: Cell | Child, *, first: bool) -> Markup:
    shown, key = cell if isinstance(cell, Cell) else (cell, None)
    if isinstance(key, float) and not math.isfinite(key):
        key = ""
    attributes = {
        "data_key": repr(float(key)) if isinstance(key, (int, float)) else key,
        "class_": ("words long" if len(str(key)) > LONG else "words") if _is_word(cell) else None,
    }
    return tag("th", shown, scope="row", **attributes) if first else tag("td", shown, **attributes)


def _is_word(cell: Cell | Child) -> bool:
    return isinstance(cell.key, str) if isinstance(cell, Cell) else False
