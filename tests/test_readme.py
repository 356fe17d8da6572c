"""The README's Python is run as it stands, and prints what the README says that it prints."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"```python\n(.*?)```\s*(?:```text\n(.*?)```)?", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
RELATIVE = 0.02  # the last digits of a trained network differ between processors


def blocks():
    return [(code, shown) for code, shown in BLOCK.findall(README.read_text())]


def test_every_example_runs_and_prints_what_it_shows(monkeypatch):
    pytest.importorskip("sklearn")
    from benchmarks.train.data import load
    from benchmarks.train.options import Options
    from sam_optim.vision.models import build

    torch.manual_seed(0)
    splits = load(Options(label_noise=0.4, seed=0))
    x, y = splits.train.x, splits.train.labels
    names = {
        "torch": torch,
        "model": build("cnn3", num_classes=10, image_size=splits.image_size),
        "criterion": torch.nn.CrossEntropyLoss(),
        "batches": [(x[i : i + 64], y[i : i + 64]) for i in range(0, len(x), 64)],
    }
    found = blocks()
    assert len(found) >= 3
    for code, shown in found:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, str(README), "exec"), names)
        if shown:
            assert NUMBER.sub("#", out.getvalue()).split() == NUMBER.sub("#", shown).split()
            for got, said in zip(NUMBER.findall(out.getvalue()), NUMBER.findall(shown), strict=True):
                assert float(got) == pytest.approx(float(said), rel=RELATIVE, abs=1e-9)


def test_nothing_is_left_to_be_filled_in():
    assert not re.search(r"\b(BENCH|NOTE|OUTPUT|TODO|TBD)\b", README.read_text())
