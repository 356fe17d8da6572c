"""One self-contained HTML page: no address outside it, no script but one that is named by its hash."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from sam_optim.report.markup import Child, Markup, join, json_script, tag
from sam_optim.report.sortable import script_hash

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def html_page(title: str, *content: Child, data: Any = None, script: str | None = None) -> Markup:
    """The page; `data` (what `results.plain` takes) travels in it as JSON under the id "data".

    script: JavaScript of ours, written as it stands and let run by its hash; no other can.
    """
    if script is not None and "</" in script:
        raise ValueError("a script on a page must not hold '</', which could end it")
    policy = POLICY if script is None else f"{POLICY}; script-src '{script_hash(script)}'"
    style = resources.files("sam_optim.report").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    block = None if data is None else json_script(data, "data")
    running = None if script is None else Markup(f"<script>{script}</script>")
    return join(
        Markup("<!doctype html>\n"),
        tag("html", head, tag("body", tag("main", *content), block, running), lang="en"),
        "\n",
    )


def section(heading: Child, *content: Child, identifier: str | None = None) -> Markup:
    return tag("section", tag("h2", heading), *content, id=identifier)


def paragraph(*content: Child, class_: str | None = None) -> Markup:
    return tag("p", *content, class_=class_)


def bullets(items: Sequence[Child]) -> Markup:
    return tag("ul", *(tag("li", item) for item in items))


def facts(items: Sequence[tuple[Child, Child]]) -> Markup:
    """A few numbers set large, each with what it is."""
    return tag("dl", *(tag("div", tag("dt", what), tag("dd", value)) for value, what in items), class_="facts")


def code_block(source: str) -> Markup:
    return tag("pre", tag("code", source), tabindex=0)


def write_page(path: Path | str, page: Markup) -> Path:
    """Write the page whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
