"""The wheel and the source archive: whole, and at work where torch and numpy are all that is installed."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from limits import PATIENCE

import sam_optim

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

PROGRAM = """
import importlib.util

import torch

import sam_optim
from sam_optim import SAM, Ball, Loss, hessian_eigenvalues, worst_case_sharpness

assert "site-packages" in sam_optim.__file__, sam_optim.__file__
extras = ("timm", "scipy", "sklearn", "matplotlib", "optuna", "transformers", "lightning", "pytest")
assert not [name for name in extras if importlib.util.find_spec(name)]
w = torch.tensor([3.0, 4.0], requires_grad=True)
optimizer = SAM([w], torch.optim.SGD, rho=0.5, lr=0.1)


def closure():
    optimizer.zero_grad()
    loss = 0.5 * (w**2).sum()
    loss.backward()
    return loss


optimizer.step(closure)
torch.testing.assert_close(w.detach(), torch.tensor([2.67, 3.56]))  # w - 0.1 (w + 0.5 w / ||w||)

model = torch.nn.Linear(2, 1, bias=False)
torch.nn.init.zeros_(model.weight)
loss = Loss(model, torch.nn.MSELoss(), [(torch.diag(torch.tensor([2.0, 1.0])), torch.zeros(2, 1))])
assert abs(hessian_eigenvalues(loss).eigenvalues[0].item() - 4) < 1e-4
assert abs(worst_case_sharpness(loss, Ball(0.5)).value - 0.5) < 1e-4
try:
    sam_optim.correlate([{"a": i, "b": i} for i in range(9)], "a", "b")
except ImportError as error:
    assert "sam_optim[bench]" in str(error)
else:
    raise AssertionError("scipy is not here")
print("ran with", sam_optim.__version__)
"""


def requirements(name, seen):
    """Puts an installed distribution and all that it needs into `seen`."""
    if name not in seen:
        seen[name] = distribution = metadata.distribution(name)
        from packaging.requirements import Requirement

        for line in distribution.requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                requirements(re.sub(r"[-_.]+", "-", needed.name).lower(), seen)


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True, timeout=600)
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, source


@pytest.fixture(scope="module")
def bare(archives, tmp_path_factory):
    """A new environment: the wheel is installed, torch and numpy are linked."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    seen: dict = {}
    requirements("torch", seen)
    requirements("numpy", seen)
    for distribution in seen.values():
        for top in {Path(file).parts[0] for file in distribution.files or ()} - {".."}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--no-deps"]
    subprocess.run([*command, "--no-index", "--quiet", str(archives[0])], check=True, timeout=PATIENCE)
    return folder / "bin"


def run(*command, cwd):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def test_a_step_and_a_measure_run_with_torch_alone(bare, tmp_path):
    ran = run(str(bare / "python"), "-W", "error", "-c", PROGRAM, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == f"ran with {sam_optim.__version__}"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["measure", "--help"], ["landscape", "--help"], ["report", "--help"]]
)
def test_the_command_helps_with_torch_alone(bare, tmp_path, arguments):
    ran = run(str(bare / "sam-optim"), *arguments, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("usage: sam-optim")


def test_a_command_that_needs_an_extra_names_it(bare, tmp_path):
    (tmp_path / "w.pt").write_bytes(b"")
    ran = run(str(bare / "sam-optim"), "measure", "w.pt", "--model", "resnet18", "--data", "digits", cwd=tmp_path)
    assert ran.returncode == 2
    assert "sam_optim[bench]" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_wheel_holds_the_package_and_nothing_else(archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        names = wheel.namelist()
        described = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "sam_optim").rglob("*") if path.suffix != ".pyc"}
    files = {name for name in tracked if (ROOT / name).is_file()}
    assert {name for name in names if ".dist-info/" not in name} == files
    assert "sam_optim/py.typed" in files
    for line in (
        "License-Expression: Apache-2.0",
        "Requires-Python: >=3.11",
        "Description-Content-Type: text/markdown",
    ):
        assert line in described
    assert f"Version: {sam_optim.__version__}\n" in described


def test_the_source_archive_builds_the_same_wheel(archives, tmp_path):
    with tarfile.open(archives[1]) as source:
        source.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    for name in ("LICENSE", "README.md", "CHANGELOG.md", "Makefile", "tests/conftest.py", "docs/conf.py"):
        assert (folder / name).exists(), name
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "again")]
    subprocess.run(command, cwd=folder, check=True, timeout=600)
    (wheel,) = (tmp_path / "again").glob("*.whl")
    with zipfile.ZipFile(wheel) as new, zipfile.ZipFile(archives[0]) as old:
        assert {i.filename: i.CRC for i in new.infolist()} == {i.filename: i.CRC for i in old.infolist()}
