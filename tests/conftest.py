"""Every test begins in the same state and leaves none behind, so their order is free: `pytest --order SEED` draws one.

What is the process's, not a test's: the global generators, torch's settings, the environment, the folder, the handlers
of signals, a process group. A test that leaves a setting changed fails by itself, instead of another one after it.
"""

from __future__ import annotations

import os
import random
import signal
import sys

import numpy as np
import pytest
import torch

from benchmarks.machine import one_thread

SIGNALS = (signal.SIGINT, signal.SIGTERM)
if torch.__version__.startswith(("2.8.", "2.9.")):
    os.environ["SAM_OPTIM_TRUST_PICKLES"] = "1"  # the pickles of the tests are their own, also in other processes


def pytest_addoption(parser):
    parser.addoption("--order", type=int, metavar="SEED", help="run files, and tests within a file, in a random order")


@pytest.hookimpl(tryfirst=True)  # before pytest puts tests of one fixture side by side
def pytest_collection_modifyitems(config, items):
    """Files stay whole, for what they set up once; all workers of pytest-xdist draw the same order."""
    if (seed := config.getoption("--order")) is None:
        return
    draw, files = random.Random(seed), {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    shuffled = list(files.values())
    draw.shuffle(shuffled)
    for tests in shuffled:
        draw.shuffle(tests)
    items[:] = [item for tests in shuffled for item in tests]


def seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def settings() -> dict[str, object]:
    """What a test must leave as it was, by the name under which it is reported."""
    return {
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "torch.is_autocast_enabled('cpu')": torch.is_autocast_enabled("cpu"),
        "torch.are_deterministic_algorithms_enabled()": torch.are_deterministic_algorithms_enabled(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.backends.mkldnn.enabled": torch.backends.mkldnn.enabled,
        "a process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        "os.getcwd()": os.getcwd(),
        "signal handlers": [signal.getsignal(number) for number in SIGNALS],
    }


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """The same numbers for a fixture whichever test asks for it first."""
    seed_generators(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    """And for a test, whether or not it was the one for which a shared fixture drew."""
    seed_generators(1)


@pytest.fixture(autouse=True)
def leaves_no_trace():
    """Frameworks write into the environment for good (their ranks, their caches), and Accelerate has one state for the
    process: both are undone without complaint."""
    environment, before = dict(os.environ), settings()
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()
    changed = {name: (value, now) for (name, value), now in zip(before.items(), settings().values(), strict=True)}
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    assert not changed, f"the test changed for those after it (before, after): {changed}"


@pytest.fixture(scope="module")
def single_thread():
    """As the worker processes have it whose bits are compared."""
    with one_thread():
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory; the module of `command_line.study` in it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("study_problem", None)
