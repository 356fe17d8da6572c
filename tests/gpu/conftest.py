import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where what the tests share is


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: what the interpreter cannot stand for")


def pytest_collection_modifyitems(items):
    """Without a device only in Triton's interpreter, in which `tests/test_triton.py` runs what can run there."""
    if torch.cuda.is_available():
        return
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if "tests/gpu/" in str(item.path) and not (is_interpreted and item.get_closest_marker("cuda") is None):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
