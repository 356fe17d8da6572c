"""The docstrings of the package as reStructuredText: formulas typeset, code and public names linked."""

from __future__ import annotations

import ast
import re

import formulas

SECTION = re.compile(r"(Args|Attributes|Returns|Raises):$")
ENTRY = re.compile(r"(\w+(?:, \w+)*): ")
ROW = re.compile(r'("\w+"|\w+=\w+|\w+_\w+_?\w*) {3,}')  # of a table: a name in code, then a formula
INLINE = re.compile(r"`([^`]+)`(?=(\w)?)|arXiv:(\d{4}\.\d{4,5})|[*|\\]|(?<=\w)_(?!\w)")


def rst(lines: list[str], public: set[str]) -> list[str]:
    """A docstring without its indentation, line by line."""
    result: list[str] = []
    section = None
    for paragraph in paragraphs(lines):
        if not paragraph[0].startswith(" "):
            section = (match := SECTION.match(paragraph[0])) and match[1]
            if section:
                result += ["", f"**{section}**", ""]
                paragraph = paragraph[1:]
        elif section is None:
            result += block(paragraph)
            continue
        if section == "Returns":
            result += ["", inline(" ".join(line.strip() for line in paragraph), public), ""]
        else:
            result += entries(paragraph, public) if section else text(paragraph, public)
    return result


def paragraphs(lines: list[str]) -> list[list[str]]:
    """Split at empty lines; indented code with empty lines in it stays whole."""
    groups: list[list[str]] = []
    for part in "\n".join(lines).strip("\n").split("\n\n"):
        group = part.split("\n")
        indented = all(line.startswith("    ") for line in group)
        if groups and indented and all(line.startswith("    ") or not line for line in groups[-1]):
            groups[-1] += ["", *group]
        else:
            groups.append(group)
    return groups


def is_python(lines: list[str]) -> bool:
    """Many a formula parses, too; code has a dot or a comment."""
    code = "\n".join(line[4:] for line in lines)
    try:
        return bool(ast.parse(code) and re.search(r"[a-z_]\.[a-z_]|#", code))
    except SyntaxError:
        return False


def block(lines: list[str]) -> list[str]:
    """An indented block: Python, a table of names and formulas, or formulas line by line."""
    if lines[0].startswith("    >>>"):
        return ["", *(line[4:] for line in lines), ""]
    if is_python(lines):
        return ["", ".. code-block:: python", "", *lines, ""]
    rows: list[str] = []
    for line in lines:  # a line that begins further right goes on with the one above it
        if rows and line.startswith(" " * 5):
            rows[-1] += "  " + line.strip()
        else:
            rows.append(line.strip())
    matches = [ROW.match(row) for row in filter(None, rows)]
    if any(matches) and not all(matches):  # a table in words
        return ["", "::", "", *lines, ""]
    if all(matches):
        return ["", *(f"- ``{m[1]}``  :math:`{formulas.tex(m.string[m.end() :].strip())}`" for m in matches), ""]
    return [line for row in filter(None, rows) for line in ("", ".. math::", "", "    " + formulas.tex(row), "")]


def text(lines: list[str], public: set[str]) -> list[str]:
    """A paragraph; one that begins with `name: ` is a list of such entries."""
    if ENTRY.match(lines[0]) and not lines[0].startswith(("Source", "Memory")):
        return entries(["    " + line for line in lines], public)
    whole = " ".join(line.rstrip() for line in lines)
    before, colon, formula = whole.rpartition(":  ")
    if colon:
        return ["", inline(before + ":", public), "", ".. math::", "", "    " + formulas.tex(formula.strip()), ""]
    if re.search(r"\S {2,}\S", whole):  # a formula in words
        return ["", ".. math::", "", "    " + formulas.tex(whole), ""]
    return ["", inline(whole, public), ""]


def entries(lines: list[str], public: set[str]) -> list[str]:
    """`name: text` as a list; a line that is indented further goes on with the entry above it."""
    items: list[str] = []
    for line in lines:
        if items and (line.startswith("     ") or not ENTRY.match(line.strip())):
            items[-1] += " " + line.strip()
        else:
            items.append(line.strip())
    parts = [item.partition(": ") for item in items]
    return ["", *(f"- ``{names}``: {inline(description, public)}" for names, _, description in parts), ""]


def inline(line: str, public: set[str]) -> str:
    """Code, links to public names and papers; everything else is escaped."""

    def replaced(match: re.Match) -> str:
        if code := match[1]:
            name = re.match(r"\w*", code)[0]
            linked = f":py:obj:`{code} <sam_optim.{name}>`" if name in public else f"``{code}``"
            return linked + ("\\ " if match[2] else "")
        if match[3]:
            return f"`arXiv:{match[3]} <https://arxiv.org/abs/{match[3]}>`__"
        return "\\" + match[0]

    return INLINE.sub(replaced, line)
