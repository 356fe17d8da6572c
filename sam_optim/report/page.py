"""One self-contained HTML page: loads nothing from elsewhere, escapes all text, runs only a script of a known hash.

The functions below return markup (a `str` that jinja2 does not escape again); every other string is text. Templates are
in `page.html`, the style sheet in `page.css`, the script that sorts tables in `sort.js`.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Collection, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sam_optim.core.files import write_atomic
from sam_optim.core.results import plain
from sam_optim.core.text import printable
from sam_optim.report.canvas import Figure, svg

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

LONG = 28  # characters, from which on a column of words is given more room

Markup = str
Child = Markup | str | int | float | None  # markup, text, a number, or nothing


def html_page(title: str, *content: Child, data: Any = None, sortable: bool = False) -> Markup:
    """The whole page. `data` (what `results.plain` takes) travels in it as JSON under the id "data".

    sortable: with the script that sorts tables. The page's policy lets no other script run.
    """
    from jinja2.utils import htmlsafe_json_dumps  # no "<" in it can end its <script>

    script = _file("sort.js") if sortable else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{POLICY}; script-src 'sha256-{digest}'" if script else POLICY
    block = None if data is None else htmlsafe_json_dumps(plain(data), allow_nan=False, separators=(",", ":"))
    return _templates().page(title, policy, _file("page.css"), content, block, script)


def element(name: str, *content: Child, kind: str = "", **attributes: str) -> Markup:
    """<name class=kind ...>content</name>, such as h1, h3, header, strong, code, span."""
    return _templates().element(name, content, {"class": kind or None} | attributes)


def section(heading: Child, *content: Child, identifier: str = "") -> Markup:
    return element("section", element("h2", heading), *content, **({"id": identifier} if identifier else {}))


def paragraph(*content: Child, kind: str = "") -> Markup:
    """kind: "lead", "overline", "aside", or an ordinary one."""
    return element("p", *content, kind=kind)


def bullets(items: Sequence[Child]) -> Markup:
    return element("ul", *(element("li", item) for item in items))


def definitions(items: Sequence[tuple[Child, Child]], *, kind: str) -> Markup:
    """Pairs of a name and its value. kind: "facts", a few numbers set large, or "pairs", line by line."""
    pairs = (element("div", element("dt", name), element("dd", value)) for name, value in items)
    return element("dl", *pairs, kind=kind)


def code_block(source: str) -> Markup:
    return element("pre", element("code", source), tabindex="0")


def drawing(figure: Figure) -> Markup:
    """A matplotlib figure; its titles, labels and legends are text on the page."""
    return _templates().drawing(svg(figure))


def panels(*figures: Figure, wide: bool = False) -> Markup:
    """Figures in rows of three, or of two (`wide`), where there is room for them."""
    return element("div", *map(drawing, figures), kind="panels wide" if wide else "panels")


def figure(content: Markup, caption: Child) -> Markup:
    """Drawings above their caption."""
    return element("figure", content, element("figcaption", caption))


def html_table(
    head: Sequence[Child],
    rows: Sequence[Sequence[Child]],
    caption: Child,
    *,
    best: Collection[int] = (),
    sortable: bool = False,
) -> Markup:
    """The first column names the rows; columns of numbers stand to the right, columns of words to the left and wrap.

    best: the numbers of rows to set off. sortable: by a click on a heading, where the page is.
    """
    kinds = [_kind([row[i] for row in rows]) for i in range(len(head))]
    return _templates().table(head, rows, caption, kinds, best, sortable)


def write_page(path: Path | str, page: Markup) -> Path:
    """Write the page whole or not at all."""
    path = Path(path)
    write_atomic(path, page.encode("utf-8"), "path")
    return path


def _kind(cells: Sequence[Child]) -> str:
    """The class of a column: "" for numbers, "words", or "words long"."""
    texts = [str(cell) for cell in cells if cell is not None]
    if any(re.match(r"(<\w+>)?(< )?[-+−]?\d", text) for text in texts):
        return ""
    return "words long" if any(len(text) > LONG for text in texts) else "words"


def render(template: str, **values: Any) -> Markup:
    """The markup of a jinja2 template. Values are text, unless they are markup of this module."""
    import markupsafe

    return markupsafe.Markup(_environment().from_string(template).render(values))


@cache
def _templates() -> Any:
    return _environment().from_string(_file("page.html")).module


@cache
def _environment() -> Any:
    """jinja2, which makes what it is given printable, then escapes it unless it is markup."""
    import jinja2
    import markupsafe

    def finalize(value: Any) -> Any:
        text = "" if value is None else printable(str(value), one_line=False)
        return markupsafe.Markup(text) if isinstance(value, markupsafe.Markup) else text

    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=finalize)


@cache
def _file(name: str) -> str:
    return resources.files("sam_optim.report").joinpath(name).read_text(encoding="utf-8")
