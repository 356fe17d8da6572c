"""Checkpoints: which files a name means, and the weights in them."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from sam_optim.core.errors import InputError, one_line
from sam_optim.core.files import read_json_object
from sam_optim.vision.models import check_options
from sam_optim.vision.preprocessing import Preprocessing
from sam_optim.vision.state_dicts import Weights, check_values, choose
from sam_optim.vision.tensor_files import NAMED_BY_CONTENT, SUFFIXES, digest, read_file

WHOLE = ("model.safetensors", "pytorch_model.bin")  # of a Hugging Face directory
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of one in several files
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
        """SHA-256 of the content, the first 16 hexadecimal digits. `read` refuses another content from then on."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return digest(*self.files)


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


def read(checkpoint: Checkpoint, *, ema: bool = False, key: str | None = None) -> Weights:
    """The weights.

    Args:
        ema: the averaged ones that training scripts save beside the model's own.
        key: the entry of the file that holds the weights, with dots for entries in it, or what stands before their
            names; None: the first of `WEIGHTS` that is there, or the file itself.

    Raises:
        InputError: not readable, more than tensors and plain values, no such weights, a file that has changed since
            `Checkpoint.digest`, or values that no training gives.
    """
    if ema and key:
        raise InputError(f"--ema and --key {key} both say which weights are meant: leave one out")
    sha256 = hashlib.sha256()
    state: dict[str, Tensor] = {}
    for path in checkpoint.files:
        weights = choose(read_file(path, sha256), path, ema, key)
        state |= weights.state
    if sha256.hexdigest()[:16] != checkpoint.digest():
        raise InputError(f"{checkpoint.name} has changed while it was read; wait until it is written, and try again")
    for name, w in state.items():
        check_values(checkpoint.name, name, w)
    return dataclasses.replace(weights, state=state)


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
        return Checkpoint(str(path), (newest,), _run(path / "config.json"))
    for name in WHOLE:
        if (path / name).is_file():
            return Checkpoint(str(path), (path / name,))
    for name in INDEX:
        if (path / name).is_file():
            return Checkpoint(str(path), _parts(path / name))
    return None


def _run(path: Path) -> Run:
    """Reads a config.json. Only names and plain values are taken from it: no path, URL or hub name."""
    config = read_json_object(path)
    try:
        options, about = config.get("options") or {}, config.get("data") or {}
        run = Run(
            model=options.get("model", "cnn3"),
            model_kwargs=dict(options.get("model_kwargs") or []),
            preprocessing=Preprocessing.of_run(about),
            changed_examples=tuple(f"--{key.replace('_', '-')}" for key in CHANGING if options.get(key)),
        )
        check_options(run.model, run.model_kwargs)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not of a run of benchmarks.train ({one_line(error)}); it was changed") from None
    return run


def _parts(path: Path) -> tuple[Path, ...]:
    """The files of a checkpoint of Hugging Face in several parts."""
    names = read_json_object(path).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise InputError(f'{path} has no "weight_map" of names to files; it was changed or damaged')
    parts = sorted(set(names.values()))
    if any(part in ("", "..") or "\0" in part or Path(part).name != part for part in parts):
        raise InputError(f"{path} names files outside its directory; it was changed or damaged")
    return tuple(path.with_name(part) for part in parts)


def _natural(name: str) -> list[Any]:
    """Sorts epoch-9 before epoch-10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)]
