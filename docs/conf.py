"""The site: `make docs`. Its pages are the Markdown files of the repository, so that they read well on GitHub, too."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import docstrings  # noqa: E402

import sam_optim  # noqa: E402

project, version, release = "sam_optim", sam_optim.__version__, sam_optim.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.doctest"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**.md", "benchmarks/results/README.md"]
exclude_patterns = [".*", "build", "dist", "runs", "sam_optim", "tests"]
html_theme = "furo"
html_title = f"sam_optim {release}"
html_extra_path = ["index.html"]  # leads to docs/index.html
html_math_renderer = "mathml"
html_copy_source = html_show_copyright = False
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # docstrings say what each argument is
doctest_global_setup = "import torch; from sam_optim import *"

PUBLIC = {name for name in sam_optim.__all__ if not name.startswith("__")}
# Which rooms of the package each page of the reference shows.
REFERENCE = {
    "optimizers": ("optim",),
    "measures": ("loss", "measures", "monitor"),
    "landscapes": ("landscape", "symmetries"),
    "values": ("core", "statistics"),
}


def names_on(page: str) -> list[str]:
    """The public names whose documentation a page of the reference shows."""
    names = (n for n in PUBLIC if getattr(sam_optim, n).__module__.split(".")[1] in REFERENCE[page])
    return sorted(names, key=lambda name: (name not in ("SAM", "Loss", "Ball"), name.lower()))


def complete(app, docname: str, source: list[str]) -> None:
    """The index names its pages in tables: the sidebar follows them. A page of the reference gets its docstrings."""
    if docname == root_doc:
        for section in re.split(r"^## ", source[0], flags=re.MULTILINE)[1:]:
            cells = " ".join(row.split("|")[1] for row in section.splitlines() if row.startswith("|"))
            pages = dict.fromkeys(re.findall(r"\]\(([^)#]+)\.md\)", cells))  # of the first column
            tree = [":hidden:", f":caption: {section.splitlines()[0]}", "", *pages]
            source[0] += "\n".join(["\n```{toctree}", *tree, "```\n"])
    folder, _, page = docname.rpartition("/")
    if folder == "docs/reference":
        objects = [
            f".. autoclass:: {n}\n   :members:\n"
            if isinstance(getattr(sam_optim, n), type)
            else f".. autofunction:: {n}\n"
            for n in names_on(page)
        ]
        source[0] += "\n".join(["\n```{eval-rst}", ".. currentmodule:: sam_optim\n", *objects, "```\n"])


def rewrite_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = docstrings.rst(lines, PUBLIC)


def visit_math(self, node) -> None:
    self.body.append(tex2mathml(node.astext(), as_block=node.tagname == "math_block"))
    raise SkipNode


def setup(app) -> None:
    if missing := PUBLIC.difference(*map(names_on, REFERENCE)):
        raise ValueError(f"no page of the reference shows {sorted(missing)}: add their room to REFERENCE")
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("source-read", complete)
    app.connect("autodoc-process-docstring", rewrite_docstring)
