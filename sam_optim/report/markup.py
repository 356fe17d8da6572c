"""HTML and SVG whose text is escaped by construction: what is not `Markup` already is text."""

from __future__ import annotations

import html
import json
from typing import Any

from sam_optim.core.results import plain

VOID = {"br", "hr", "img", "meta", "link"}


class Markup(str):
    """A string that is markup; made by `tag` and `join` only, so that no other string gets into a page unescaped."""

    __slots__ = ()


Child = Markup | str | int | float | None


def text(value: Child) -> Markup:
    """`value` as it is if it is markup, escaped if it is not, nothing if it is None."""
    if isinstance(value, Markup):
        return value
    return Markup("" if value is None else html.escape(_printable(str(value)), quote=True))


def tag(name: str, /, *children: Child, **attributes: Any) -> Markup:
    """<name attributes>children</name>. `class_` is class, `stroke_width` is stroke-width; None leaves one out."""
    found = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID:
        return Markup(f"<{name}{found}>")
    return Markup(f"<{name}{found}>{join(*children)}</{name}>")


def join(*children: Child, separator: str = "") -> Markup:
    return Markup(text(separator).join(text(child) for child in children))


def json_script(data: Any, identifier: str) -> Markup:
    """`data` as a block that the browser does not run: strict JSON in which no "<" can end the block."""
    found = json.dumps(plain(data), allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    found = found.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(f'<script type="application/json" id="{text(identifier)}">{found}</script>')


def _number(value: Any) -> Any:
    """Coordinates to a hundredth of a pixel: the page is read, not measured."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def _printable(value: str) -> str:
    """Without the characters that reorder or hide the text around them, and those that XML forbids."""
    return "".join("�" if _hidden(ord(c)) else c for c in value)


def _hidden(c: int) -> bool:
    control = c < 32 and c not in (9, 10, 13)
    return control or 0x7F <= c < 0xA0 or 0x202A <= c <= 0x202E or 0x2066 <= c <= 0x2069 or 0xD800 <= c <= 0xDFFF
