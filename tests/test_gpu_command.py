"""`make gpu` where there is no device, and the parts of it that need none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_is_one_line():
    out = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 2
    assert out.stderr.splitlines() == [
        "error: this needs a CUDA device, and torch sees none: run it on a machine with a GPU and its driver"
    ]
    assert not out.stdout


def test_the_wide_resnet_has_its_36_million_parameters():
    """36.5 M in the paper that it is from, arXiv:1605.07146, table 4."""
    assert sum(s.numel() for s in gpu.shapes("wide-resnet-28-10")) == 36_479_194


def test_what_cannot_be_measured_is_named():
    def fails():
        raise ImportError("No module named 'pytorch_optimizer'")

    missing = []
    assert gpu.attempt("resnet18 peer", fails, missing) is None
    facts = dict.fromkeys(("device", "cuda", "torch", "triton", "sam_optim"), "?")
    step = {"model": "resnet50", "kind": "SAM", "fused": True, "graph": False, "ms": 12.5}
    results = {"facts": facts, "copy TB/s": 4.0, "tests": "3 passed", "own part": [], "whole step": [step]}
    lines = gpu.table(results | {"missing": missing}).splitlines()
    assert lines[-1] == "missing: resnet18 peer: No module named 'pytorch_optimizer'"
    assert lines[-2].split() == ["resnet50", "SAM", "12.50", "nan", "True"]
