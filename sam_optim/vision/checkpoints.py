"""Checkpoints: found, hashed, and read without running anything that is in them."""

from __future__ import annotations

import argparse
import glob
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.errors import InputError, one_line

SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar")
WHOLE = ("model.safetensors", "pytorch_model.bin")  # of a Hugging Face directory
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of one in several files
OF_A_RUN = re.compile(r"checkpoint-(\d{9})-([0-9a-f]{16})\.pt")  # benchmarks.train: step, SHA-256
EMA = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
OWN = ("state_dict", "model", "model_state_dict", "net", "module", "weights")
REMEDY = "save the weights alone, torch.save(model.state_dict(), path), or as .safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """name: as the user gave it. files: that hold the weights. run: the options of benchmarks.train, if it is its, with
    what became of its images: "image_size" (C, H, W), "preprocessing"."""

    name: str
    files: tuple[Path, ...]
    run: Mapping[str, Any] | None = field(default=None, compare=False)

    def digest(self) -> str:
        """SHA-256 of the content, the first 16 hexadecimal digits."""
        found = hashlib.sha256()
        for path in self.files:
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    found.update(block)
        return found.hexdigest()[:16]


@dataclass(frozen=True)
class Weights:
    """state: name -> tensor, on the CPU. key: where in the file it was, "" for the file itself."""

    state: dict[str, Tensor]
    key: str


def find(names: Sequence[str]) -> list[Checkpoint]:
    """The checkpoints that the words of a command name: a file, a directory that is one (of Hugging Face, a run of
    benchmarks.train), a directory of them, or a glob; each once, in natural order within a directory or glob.

    Raises:
        InputError: a name that leads to none.
    """
    found: dict[Checkpoint, None] = {}
    for name in names:
        path = Path(name)
        if path.exists():
            of_this = _in_directory(path) if path.is_dir() else [Checkpoint(name, (path,))]
        else:
            matches = sorted(glob.glob(name, recursive=True), key=_natural)
            of_this = [c for m in matches for c in ([_single(Path(m))] if _is_checkpoint(Path(m)) else [])]
        if not of_this:
            is_pattern = any(c in name for c in "*?[")
            reason = "has no checkpoint in it" if path.is_dir() else "matches none" if is_pattern else "does not exist"
            raise InputError(f"{name} {reason}; give files ({', '.join(SUFFIXES)}), directories or globs")
        found |= dict.fromkeys(of_this)
    return list(found)


def read(checkpoint: Checkpoint, *, ema: bool = False) -> Weights:
    """The weights. With `ema` the averaged ones that training scripts keep beside the model's own.

    Raises:
        InputError: not readable, more than tensors and plain values, no state dict in it, no averaged weights, a weight
            that is not finite.
    """
    state: dict[str, Tensor] = {}
    key = ""
    for path in checkpoint.files:
        part, key = _state(read_file(path), path, ema)
        state |= part
    for name, w in state.items():
        if w.is_floating_point() and not bool(torch.isfinite(w).all()):
            raise InputError(f"{checkpoint.name}: {name} is not finite everywhere; nothing can be measured there")
    return Weights(state, key)


def _is_checkpoint(path: Path) -> bool:
    return _one_of_directory(path) is not None if path.is_dir() else path.suffix in SUFFIXES


def _single(path: Path) -> Checkpoint:
    return (_one_of_directory(path) if path.is_dir() else None) or Checkpoint(str(path), (path,))


def _in_directory(path: Path) -> list[Checkpoint]:
    if one := _one_of_directory(path):
        return [one]
    inside = sorted((p for p in path.iterdir() if not p.name.startswith(".")), key=lambda p: _natural(p.name))
    return [_single(p) for p in inside if _is_checkpoint(p)]


def _one_of_directory(path: Path) -> Checkpoint | None:
    """The checkpoint that a directory is, if it is one."""
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        names = [p for p in (path / "checkpoints").iterdir() if OF_A_RUN.fullmatch(p.name)]
        config = _json(path / "config.json")
        facts, options = config.get("data"), config.get("options", {})
        if isinstance(facts, dict):
            options = options | {key: facts[key] for key in ("image_size", "preprocessing") if key in facts}
        newest = sorted(names, key=lambda p: (p.name.split("-")[1], p.stat().st_mtime_ns))[-1:]
        return Checkpoint(str(path), tuple(newest), options) if newest else None
    for name in WHOLE:
        if (path / name).is_file():
            return Checkpoint(str(path), (path / name,))
    for name in INDEX:
        if (path / name).is_file():
            files = sorted({str(file) for file in _json(path / name).get("weight_map", {}).values()})
            if any(Path(file).name != file for file in files):
                raise InputError(f"{path / name} names files outside its directory; it was changed or damaged")
            return Checkpoint(str(path), tuple(path / file for file in files))
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({one_line(error)}); it was changed or damaged") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object; it was changed or damaged")
    return found


def read_file(path: Path) -> Any:
    """What a file holds, if it holds nothing but tensors and plain values."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if (named := OF_A_RUN.fullmatch(path.name)) and (got := Checkpoint("", (path,)).digest()) != named[2]:
        raise InputError(f"{path} is damaged: its SHA-256 begins with {got}, its name says {named[2]}")
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


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path} needs safetensors: pip install 'sam_optim[bench]'") from None
    try:
        return load_file(path, device="cpu")
    except Exception as error:  # safetensors has its own class, which is no ValueError
        raise InputError(f"{path} is damaged or no safetensors file: {one_line(error)[:200]}") from None


def _state(content: Any, path: Path, ema: bool) -> tuple[dict[str, Tensor], str]:
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds {type(content).__name__}, not weights by name; {REMEDY}")
    keys = EMA if ema else OWN
    for key in keys:
        if (found := _tensors(content.get(key))) is not None:
            return found, key
    if ema:
        has = ", ".join(str(k) for k in list(content)[:6])
        raise InputError(f"{path} has no averaged weights ({', '.join(EMA)}), only {has}; leave --ema out")
    if (found := _tensors(content)) is not None:
        return found, ""
    has = ", ".join(str(k) for k in list(content)[:6])
    raise InputError(f"{path} has no weights under {', '.join(OWN)}, only {has}; {REMEDY}")


def _tensors(value: Any) -> dict[str, Tensor] | None:
    """A mapping of names to tensors (and to a few plain values, as counters are); None for anything else."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return None
    found = {name: x for name, x in value.items() if isinstance(x, Tensor)}
    return found if found and len(found) >= len(value) / 2 else None


def _natural(name: str) -> list[Any]:
    """epoch-9 before epoch-10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
