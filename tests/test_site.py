"""The site: formulas of docstrings become TeX, examples in docstrings run, and all of it builds without a warning."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys

import examples
import pytest
from limits import PATIENCE

import sam_optim

DOCS = examples.ROOT / "docs"
PUBLIC = [name for name in sam_optim.__all__ if name != "__version__"]


@pytest.fixture
def docs_folder(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)


@pytest.mark.parametrize(
    ("plain", "tex"),
    [
        ("e = rho T^2 g / ||T g||_2", r"e = \rho  T^{2} g / \|T g\|_{2}"),
        ("<g, e> over ||T^-1 e||_p <= rho", r"\langle g, e\rangle  \text{ over } \|T^{-1} e\|_{p} \le  \rho "),
        ("1/4 sum_i log(w_i),   N examples", r"1/4 \sum _{i} \operatorname{log} (w_{i}),\quad N \text{ examples}"),
        ("sqrt(s^2 + eps) for a model", r"\sqrt{s^{2} + \varepsilon } \text{ for a model}"),
        ("L(w + a d) -> sum_{j != i} B_ij^2", r"L(w + a d) \to  \sum _{j \ne  i} B_{ij}^{2}"),
        ("g = p.grad, A as in `hessian_trace`", r"g = \text{p.grad}, A \text{ as in } \text{hessian\_trace}"),
    ],
)
def test_plain_formulas_become_tex(plain, tex, docs_folder):
    import formulas

    assert formulas.tex(plain) == tex


def test_a_docstring_becomes_a_list_a_formula_and_links(docs_folder):
    import docstrings

    text = """The rise |w|, see `SAM`s.

    S = E[L(w + d)]

Args:
    loss, ball: as in `Loss.value`.
        Goes on.

Raises:
    ValueError: rho_b < 0.

Source: arXiv:2010.01412."""
    lines = [line for line in docstrings.rst(text.split("\n"), {"SAM", "Loss"}) if line]
    assert lines == [
        r"The rise \|w\|, see :py:obj:`SAM <sam_optim.SAM>`\ s.",
        ".. math::",
        "    S = E[L(w + d)]",
        "**Args**",
        "- ``loss, ball``: as in :py:obj:`Loss.value <sam_optim.Loss>`. Goes on.",
        "**Raises**",
        "- ``ValueError``: rho_b < 0.",
        "Source: `arXiv:2010.01412 <https://arxiv.org/abs/2010.01412>`__.",
    ]


def test_the_examples_in_docstrings_run():
    rooms = ["core", "optim", "loss", "measures", "landscape", "symmetries", "statistics"]
    attempted = 0
    for room in rooms:
        package = importlib.import_module(f"sam_optim.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if "triton" not in module.name:
                result = doctest.testmod(importlib.import_module(module.name))
                assert result.failed == 0, module.name
                attempted += result.attempted
    assert attempted >= 5


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("furo", "myst_parser", "sphinx"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("site")
    for builder in ("html", "doctest"):
        command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", builder, "-c", "docs", "."]
        ran = subprocess.run(
            [*command, str(folder / builder)], cwd=examples.ROOT, capture_output=True, text=True, timeout=PATIENCE,
            env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return folder / "html"


@pytest.mark.slow
def test_the_site_has_every_page_and_every_public_name(site):
    pages = [page.relative_to(examples.ROOT).with_suffix(".html") for page in DOCS.rglob("*.md")]
    assert [page for page in pages if not (site / page).exists()] == []
    reference = "".join(page.read_text() for page in (site / "docs" / "reference").glob("*.html"))
    assert [name for name in PUBLIC if f'id="sam_optim.{name}"' not in reference] == []
    assert reference.count("<math") > 40
    assert "docs/index.html" in (site / "index.html").read_text()


@pytest.mark.slow
def test_no_page_of_the_site_holds_markup_that_was_not_understood(site):
    for page in site.rglob("*.html"):
        text = re.sub(r"<pre>.*?</pre>", "", page.read_text(), flags=re.DOTALL)
        assert not re.search(r'class="(problematic|system-message)|<merror|eval-rst', text), page
