"""`make gpu` and `step_cost --device cuda` where there is no device: one line, and all of it on a device that is none.

`tests/dry_gpu.py` runs every line of the benchmark in Triton's interpreter, in a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import ONE_THREAD

from benchmarks.speed import step as step_cost

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("words", [["benchmarks.gpu"], ["benchmarks.speed.step", "--device", "cuda"]], ids=" ".join)
def test_without_a_device_it_is_one_line(words):
    out = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 2
    assert out.stderr.splitlines() == [
        "error: this needs a CUDA device, and torch sees none: run it on a machine with a GPU and its driver"
    ]
    assert not out.stdout


def test_the_wide_resnet_has_its_36_million_parameters():
    """36.5 M in the paper that it is from, arXiv:1605.07146, table 4."""
    assert sum(s.numel() for s in step_cost.shapes_of("wide-resnet-28-10")) == 36_479_194


def test_a_dry_run():
    pytest.importorskip("triton")
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "tests/dry_gpu.py"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", **ONE_THREAD},
    )
    assert out.returncode == 0, out.stdout[-4000:] + out.stderr[-1000:]
