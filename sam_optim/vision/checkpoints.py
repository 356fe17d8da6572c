"""Checkpoints: which files a name means, and the weights in them."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.errors import InputError
from sam_optim.core.files import read_json
from sam_optim.vision.preprocessing import Preprocessing
from sam_optim.vision.tensor_files import NAMED_BY_CONTENT, REMEDY, SUFFIXES, digest, read_file

WHOLE = ("model.safetensors", "pytorch_model.bin")  # of a Hugging Face directory
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of one in several files
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
WEIGHTS = ("state_dict", "model", "model_state_dict", "net", "module", "weights")
CHANGING = ("train_examples", "validation_fraction", "label_noise", "train_labels")  # of a run: its training examples


@dataclass(frozen=True)
class Run:
    """What the config.json of a run of benchmarks.train says.

    model, model_kwargs: as in `models.build`. preprocessing: of its images, None where it does not say.
    changed_examples: its options that make other training examples of those of the data set.
    """

    model: str
    model_kwargs: Mapping[str, Any]
    preprocessing: Preprocessing | None
    changed_examples: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoint:
    """name: as the user gave it. files: that hold the weights. run: whose checkpoint it is, if it is one of a run."""

    name: str
    files: tuple[Path, ...]
    run: Run | None = field(default=None, compare=False)

    def digest(self) -> str:
        """SHA-256 of the content, the first 16 hexadecimal digits."""
        return digest(*self.files)


@dataclass(frozen=True)
class Weights:
    """state: name -> tensor, on the CPU. key: where in the file it was, "" for the file itself."""

    state: dict[str, Tensor]
    key: str


def find(names: Sequence[str | Path]) -> list[Checkpoint]:
    """The checkpoints that the words of a command name: a file, a directory that is one (of Hugging Face, a run of
    benchmarks.train), a directory of them, or a glob; each once, in natural order within a directory or glob.

    Raises:
        InputError: a name that leads to none.
    """
    checkpoints: dict[Checkpoint, None] = {}
    for name in map(str, names):
        path = Path(name)
        if path.is_dir():
            matches = _in_directory(path)
        elif path.exists():
            matches = [Checkpoint(name, (path,))]
        else:
            paths = sorted(glob.glob(name, recursive=True), key=_natural)
            matches = [checkpoint for match in paths if (checkpoint := _at(Path(match)))]
        if not matches:
            is_pattern = any(c in name for c in "*?[")
            reason = "has no checkpoint in it" if path.is_dir() else "matches none" if is_pattern else "does not exist"
            raise InputError(f"{name} {reason}; give files ({', '.join(SUFFIXES)}), directories or globs")
        checkpoints |= dict.fromkeys(matches)
    return list(checkpoints)


def read(checkpoint: Checkpoint, *, ema: bool = False) -> Weights:
    """The weights. With `ema` the averaged ones that training scripts save beside the model's own.

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


def _in_directory(path: Path) -> list[Checkpoint]:
    """The checkpoint that a directory is, or those in it."""
    if checkpoint := _of_directory(path):
        return [checkpoint]
    inside = sorted((p for p in path.iterdir() if not p.name.startswith(".")), key=lambda p: _natural(p.name))
    return [checkpoint for p in inside if (checkpoint := _at(p))]


def _at(path: Path) -> Checkpoint | None:
    """The checkpoint that a file or directory is, if it is one."""
    if path.is_dir():
        return _of_directory(path)
    return Checkpoint(str(path), (path,)) if path.suffix in SUFFIXES else None


def _of_directory(path: Path) -> Checkpoint | None:
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        files = [p for p in (path / "checkpoints").iterdir() if NAMED_BY_CONTENT.fullmatch(p.name)]
        if not files:
            return None
        newest = max(files, key=lambda p: (p.name.split("-")[1], p.stat().st_mtime_ns))
        return Checkpoint(str(path), (newest,), _run(_json_object(path / "config.json")))
    for name in WHOLE:
        if (path / name).is_file():
            return Checkpoint(str(path), (path / name,))
    for name in INDEX:
        if (path / name).is_file():
            parts = sorted({str(part) for part in _json_object(path / name).get("weight_map", {}).values()})
            if any(Path(part).name != part for part in parts):
                raise InputError(f"{path / name} names files outside its directory; it was changed or damaged")
            return Checkpoint(str(path), tuple(path / part for part in parts))
    return None


def _run(config: Mapping[str, Any]) -> Run:
    options = config.get("options", {})
    return Run(
        model=options.get("model", "cnn3"),
        model_kwargs={str(key): value for key, value in options.get("model_kwargs", [])},
        preprocessing=Preprocessing.of_run(config.get("data") or {}),
        changed_examples=tuple(f"--{key.replace('_', '-')}" for key in CHANGING if options.get(key)),
    )


def _json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object; it was changed or damaged")
    return content


def _state(content: Any, path: Path, ema: bool) -> tuple[dict[str, Tensor], str]:
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds {type(content).__name__}, not weights by name; {REMEDY}")
    for key in AVERAGED if ema else WEIGHTS:
        if (state := _tensors(content.get(key))) is not None:
            return state, key
    has = ", ".join(str(k) for k in list(content)[:6])
    if ema:
        raise InputError(f"{path} has no averaged weights ({', '.join(AVERAGED)}), only {has}; leave --ema out")
    if (state := _tensors(content)) is not None:
        return state, ""
    raise InputError(f"{path} has no weights under {', '.join(WEIGHTS)}, only {has}; {REMEDY}")


def _tensors(value: Any) -> dict[str, Tensor] | None:
    """The tensors of a mapping of names to tensors and to a few plain values (counters); None of anything else."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        return None
    state = {name: x for name, x in value.items() if isinstance(x, Tensor)}
    return state if state and len(state) >= len(value) / 2 else None


def _natural(name: str) -> list[Any]:
    """Sorts epoch-9 before epoch-10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
