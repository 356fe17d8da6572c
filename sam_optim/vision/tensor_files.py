"""Files of tensors, read without running anything that is in them."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from sam_optim.core.errors import InputError, one_line

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")
NAMED_BY_CONTENT = re.compile(r"checkpoint-(\d{9})-([0-9a-f]{16})\.pt")  # benchmarks.train: step, SHA-256
REMEDY = "save the weights alone, torch.save(model.state_dict(), path), or as .safetensors"


def digest(*paths: Path) -> str:
    """SHA-256 of the content, the first 16 hexadecimal digits."""
    content = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    return content.hexdigest()[:16]


def read_file(path: Path) -> Any:
    """What a file holds, if it holds nothing but tensors and plain values.

    Raises:
        InputError: damaged, or it needs more than that.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if (name := NAMED_BY_CONTENT.fullmatch(path.name)) and (actual := digest(path)) != name[2]:
        raise InputError(f"{path} is damaged: its SHA-256 begins with {actual}, its name says {name[2]}")
    try:
        # timm's scripts save their options as a Namespace, which is plain attributes, and metrics as NumPy's numbers
        with torch.serialization.safe_globals([argparse.Namespace, *_numbers()]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickle's protocol; what does not load is an error
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if needs := re.search(r"GLOBAL (\S+)", str(error)):
            refused = f"it refers to {needs[1]}, and nothing in it was run"
            raise InputError(f"{path} holds more than weights: {refused}; {REMEDY}") from None
        reason = re.search(r"WeightsUnpickler error: (.+)", str(error))
        raise InputError(f"{path} is damaged or no checkpoint of torch: {reason[1] if reason else 'pickle'}") from None
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is {_damage(path, error)}; copy it again, or leave it out") from None


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path} needs safetensors: pip install 'sam_optim[bench]'") from None
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {one_line(error)[:200]}") from None


def _numbers() -> list[Any]:
    """What a pickled number of NumPy refers to, under the names of NumPy 1 and 2. None of it runs anything."""
    try:
        import numpy as np
    except ImportError:
        return []
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(code)) for code in "?bBhHiIlLqQefdg"]
    return [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")] + [np.dtype, *kinds]


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch cannot open; the text of a KeyError or EOFError is a byte of it."""
    if path.is_file() and path.stat().st_size == 0:
        return "empty"
    reason = "" if isinstance(error, (KeyError, EOFError)) else one_line(error).split(". ")[0][:200]
    return f"damaged or no checkpoint of torch{reason and ': '}{reason}"
