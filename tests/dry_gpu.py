"""`benchmarks.gpu` from its first line to its last, on a device that is none: CPU tensors, clocks that show the host's
time, graphs that run again. `tests/test_gpu_command.py` runs this file with TRITON_INTERPRET=1."""

import contextlib
import json
import subprocess
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import gpu
from benchmarks.speed import cuda as cuda_cost
from benchmarks.speed import device, whole_step
from benchmarks.speed import step as step_cost
from sam_optim.core import errors

SHAPES = {"resnet50": [(30,)], "efficientnet_b0": [()], "vit_giant_patch14_224": [(50, 41)]}


class Event:
    def __init__(self, *, enable_timing):
        assert enable_timing

    def record(self):
        self.seconds = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.seconds - self.seconds)


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


class Graph:
    """Runs nothing again: what was captured has run once."""

    replays = 0

    def replay(self):
        Graph.replays += 1


@contextlib.contextmanager
def entered(*_, **__):
    yield


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """torch.cuda as far as the benchmark asks for it."""
    replaced = {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "_sleep": lambda cycles: None,
        "Event": Event,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": entered,
        "CUDAGraph": Graph,
        "graph": entered,
        "get_device_name": lambda: "none",
        "get_device_properties": lambda i: SimpleNamespace(total_memory=2**33, multi_processor_count=1),
    }
    for name, fake in replaced.items():
        assert hasattr(torch.cuda, name), name
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(device, "DEVICE", "cpu")
    monkeypatch.setattr(device, "COPIED", 2**16)
    monkeypatch.setattr(device, "FLUSHED", 2**10)
    monkeypatch.setattr(device, "WARM_UP", 1)
    monkeypatch.setattr(torch, "compile", lambda f: f)
    monkeypatch.setattr(cuda_cost, "MODELS", tuple(SHAPES))
    monkeypatch.setattr(cuda_cost, "shapes_of", lambda model: [torch.Size(s) for s in SHAPES[model]])
    monkeypatch.setattr(whole_step, "build", small)
    monkeypatch.setattr(gpu, "ROUNDS", 2)
    small_ones = {
        name: replace(s, size=8, classes=10, batch=8, small_stem=False) for name, s in cuda_cost.NETWORKS.items()
    }
    monkeypatch.setattr(cuda_cost, "NETWORKS", small_ones)


def small(name, size, classes):
    assert size == 8
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(144, classes, bias=False))


def test_all_of_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "tests", lambda seconds: (True, "3 passed"))
    monkeypatch.setattr(gpu, "measures", lambda model, seconds, folder: f"those of {model}")
    path = tmp_path / "some" / "results.json"
    Graph.replays = 0
    assert errors.run(gpu.main, ["--json", str(path)]) == 0
    out = capsys.readouterr().out
    results = json.loads(path.read_text())
    assert results["missing"] == [], out
    assert out.splitlines()[-1] == "tests/gpu: 3 passed"
    assert "measures of vit_base_patch16_224:\nthose of vit_base_patch16_224" in out
    measured = {(r["model"], r["design"]) for r in results["own part"]}
    assert {d for _, d in measured} == set(cuda_cost.DESIGNS)
    assert ("vit_giant_patch14_224", "fused ASAM") in measured
    assert len(results["whole step"]) == 2 * 3 * 5  # eager and as a graph; base, and SAM fused or not
    assert Graph.replays == 3 * 5 * (2 + device.WARM_UP)
    assert {"device", "driver", "cuda", "torch", "triton", "timm", "commit", "sam_optim"} <= set(results["facts"])
    assert {"measured", "bound", "met", "what", "at_least"} == set(results["targets"][0])
    assert sum(t["met"] is None for t in results["targets"]) == 1  # no model here has 25 M parameters
    for line in ("a copy moves", "resnet50: SAM / base", "efficientnet_b0: davda54 / fused SAM", "roofline"):
        assert line in out


def test_step_cost_takes_some_models(capsys, monkeypatch):
    monkeypatch.setattr(cuda_cost, "NETWORKS", {})
    assert errors.run(step_cost.main, ["--device", "cuda", "--models", "resnet50", "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert "resnet50" in out
    assert "vit_giant" not in out


def test_what_does_not_fit_into_the_time_is_named(capsys):
    words = ["--device", "cuda", "--models", "resnet50", "--rounds", "2", "--minutes", "0"]
    assert errors.run(step_cost.main, words) == 0
    out = capsys.readouterr().out
    assert "missing: resnet50, fused SAM: no time left" in out
    assert "missing: resnet18, SAM 25 %, fused=True, as a graph: no time left" in out
    assert out.count("not measured") == 6


class Odd(Exception):
    """As Triton's are: of no kind that Python has."""


def test_what_fails_is_named_and_the_rest_goes_on(monkeypatch, capsys, tmp_path):
    path = tmp_path / "results.json"

    def unknown(params):
        raise ImportError("No module named 'torch._inductor'")

    def failing(params):
        assert len(json.loads(path.read_text())["own part"]) == 2  # what was measured before is there
        raise Odd("out of resources")

    changed = {"foreach SAM": failing, "compiled SAM": unknown}
    designs = {k: changed.get(k, make) for k, make in cuda_cost.DESIGNS.items() if k != "davda54 SAM"}
    monkeypatch.setattr(cuda_cost, "DESIGNS", designs)
    monkeypatch.setattr(cuda_cost, "NETWORKS", {})
    words = ["--device", "cuda", "--models", "efficientnet_b0", "--rounds", "2", "--json", str(path)]
    assert errors.run(step_cost.main, words) == 0
    out = capsys.readouterr().out
    assert "missing: efficientnet_b0, compiled SAM: ImportError: No module named 'torch._inductor'" in out
    assert "missing: efficientnet_b0, foreach SAM: Odd: out of resources" in out
    assert "foreach ASAM" in out
    assert len(json.loads(path.read_text())["missing"]) == 2


def test_a_device_that_has_failed_does_not_hide_what_failed(monkeypatch):
    def forget():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(device, "forget", forget)
    plan = cuda_cost.Plan(time.monotonic() + 60, [])
    assert plan.attempt("one", lambda: 1, 1.0) == 1
    assert plan.attempt("another", lambda: 1 / 0, 1.0) is None
    assert plan.missing == ["another: ZeroDivisionError: division by zero"]


def test_what_takes_longer_than_it_was_given_is_stopped():
    plan = cuda_cost.Plan(time.monotonic() + 1, [])
    assert plan.attempt("compiled", lambda: time.sleep(3600), 0.0) is None
    assert plan.missing == ["compiled: TimeoutError: the time was over before it had ended"]


def test_targets_are_compared():
    own = [
        {"model": "resnet50", "design": "fused SAM", "parameters": 25_557_032, "roofline": 0.9, "device_us": 211.0},
        *[
            {"model": "efficientnet_b0", "design": d, "parameters": 5_288_548, "whole_us": us}
            for d, us in (("davda54 SAM", 5000.0), ("fused SAM", 500.0))
        ],
    ]
    step = {"model": "resnet50", "kind": "SAM", "fused": True, "graph": False, "times_eager_base": 2.03}
    result = {
        t["what"]: t["met"]
        for t in cuda_cost.targets(own, [step, step | {"kind": "SAM 25 %", "times_eager_base": 1.3}])
    }
    assert result == {
        "resnet50: share of the roofline, fused SAM": True,
        "resnet50: device us, fused SAM": False,
        "efficientnet_b0: davda54 / fused SAM": True,
        "resnet50: SAM / base": False,
        "resnet50: SAM with 25 % ascent / base": True,
        "resnet18, CIFAR: SAM as a graph / eager base": None,
    }


def test_the_tests_are_run(monkeypatch, capsys):
    answer = SimpleNamespace(returncode=1, stdout="E assert\n1 failed in 2 s\n", stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    assert gpu.tests(1.0) == (False, "1 failed in 2 s")
    assert "E assert" in capsys.readouterr().out
    monkeypatch.setattr(answer, "returncode", 0)
    assert gpu.tests(1.0) == (True, "1 failed in 2 s")

    def late(*_, **__):
        raise subprocess.TimeoutExpired("pytest", 1.0, output=b"half")

    monkeypatch.setattr(subprocess, "run", late)
    assert gpu.tests(1.0) == (False, "not finished in 1 s")
    assert "half" in capsys.readouterr().out


def test_the_measures_are_run(monkeypatch, tmp_path):
    asked = []
    answer = SimpleNamespace(returncode=0, stdout="a table\n", stderr="a warning")
    monkeypatch.setattr(subprocess, "run", lambda words, **__: asked.append(words) or answer)
    assert gpu.measures("resnet50", 1.0, tmp_path) == "a table"
    assert {"--device", "cuda", "resnet50", str(tmp_path / "measure_cost_resnet50.json")} <= set(asked[0])
    monkeypatch.setattr(answer, "returncode", 2)
    assert gpu.measures("resnet50", 1.0, tmp_path) == "a warning"

    def late(*_, **__):
        raise subprocess.TimeoutExpired("measure_cost", 1.0)

    monkeypatch.setattr(subprocess, "run", late)
    assert gpu.measures("resnet50", 1.0, tmp_path) == "not finished in 1 s"


def test_the_profiler_counts_what_is_on_the_device(monkeypatch):
    kind = torch.autograd.DeviceType
    events = [("perturb", kind.CUDA), ("Memcpy HtoD (Pinned)", kind.CUDA), ("Memcpy DtoD", kind.CUDA), ("a", kind.CPU)]
    seen = [SimpleNamespace(name=name, device_type=k) for name, k in events]

    @contextlib.contextmanager
    def profile(activities):
        assert torch.profiler.ProfilerActivity.CUDA in activities
        yield SimpleNamespace(events=lambda: seen)

    monkeypatch.setattr(torch.profiler, "profile", profile)
    assert device.num_launches(lambda: None, lambda: None) == 2
    seen.clear()
    assert device.num_launches(lambda: None, lambda: None) is None
