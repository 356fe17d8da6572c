"""What pyproject.toml asks for is what is tested: each of its lower bounds is a line of tests/lowest.txt."""

import re
import tomllib
from pathlib import Path

import sam_optim

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = {"mypy", "ruff"}  # of whoever writes the code: any version
PUBLISHED_ONCE = {"pyhessian"}  # as 0.1


def requirements():
    """(name, lower bound or None) of everything that is asked for, but for the extras that name other extras."""
    extras = PROJECT["optional-dependencies"].values()
    for wanted in [*PROJECT["dependencies"], *(line for lines in extras for line in lines)]:
        name, bound = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?(?:>=([\w.]+))?", wanted).groups()
        if name != "sam_optim":
            yield name.lower(), bound


def release(version):
    """2 and 2.0.0 are one release."""
    numbers = [int(part) for part in version.split(".")]
    return tuple(numbers + [0] * (3 - len(numbers)))


def test_every_lower_bound_is_the_version_that_is_tested():
    lines = [line for line in (ROOT / "tests" / "lowest.txt").read_text().splitlines() if not line.startswith("#")]
    tested = {name.lower(): release(version) for name, version in (line.split("==") for line in lines)}
    bounds = {name: release(bound) for name, bound in requirements() if bound}
    assert bounds == tested


def test_the_changelog_begins_with_the_version():
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first[1] == sam_optim.__version__


def test_everything_has_a_lower_bound():
    assert {name for name, bound in requirements() if not bound} == TOOLS | PUBLISHED_ONCE
