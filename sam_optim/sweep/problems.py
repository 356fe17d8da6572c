"""From the options to the loss of each checkpoint: a timm model on images, or whatever a user's function makes."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core.errors import InputError, one_line, unknown
from sam_optim.core.results import plain
from sam_optim.loss import Loss
from sam_optim.loss.batches import moved
from sam_optim.sweep.processes import Processes
from sam_optim.vision import checkpoints, data, models, weights
from sam_optim.vision.checkpoints import Checkpoint

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def problem(args: argparse.Namespace, here: Processes, found: Sequence[Checkpoint]) -> Images | Target:
    """What makes the loss of each checkpoint.

    Raises:
        InputError: for what is wrong with all of them: an unknown model, no data, a function that cannot be found.
    """
    return Target(args, here) if args.target else Images(args, here, found)


class Images:
    """Cross-entropy of a timm model over the examples of --data."""

    def __init__(self, args: argparse.Namespace, here: Processes, found: Sequence[Checkpoint]):
        self._args, self._here = args, here
        self._dtype = DTYPES[args.dtype or "float32"]
        name = args.model or next((c.run["model"] for c in found if c.run and "model" in c.run), None)
        if name is None:
            raise InputError("say which model the checkpoints are of: --model NAME, as timm calls it, or --target")
        self._config = models.data_config(name, **dict(args.model_kwargs))
        known = [data.of_run(c.run) for c in found]
        seen = known[0] if known and all(k == known[0] for k in known) else None
        self.data = data.load(args, self._config | (seen or {}), self._dtype)
        is_pixels = "mean" in self.data.about
        if is_pixels and not (args.mean or seen) and any(c.run for c in found):
            raise InputError(
                "runs of benchmarks.train normalise pixels their own way, and these do not all say the same one: use "
                "python -m benchmarks.measure RUN_DIR, or give --mean, --std and --image-size"
            )
        self.notes = [*self.data.notes, *data.not_of_runs(args, [c.run for c in found if c.run])]
        self._built: tuple[str, nn.Module] = ("", nn.Module())

    def identity(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """All that the loss depends on but the content of the checkpoint."""
        args = self._args
        name, kwargs, small = self._recipe(checkpoint)
        return {
            "model": name,
            "model_kwargs": plain(kwargs),
            "num_classes": args.num_classes,
            "small_stem": small,
            "ema": args.ema,
            "data": self.data.checksum,
            "batch_size": args.batch_size,
            "normalize_logits": args.normalize_logits,
            "batch_statistics": args.batch_statistics,
            "dtype": str(self._dtype).removeprefix("torch."),
            "device": self._here.device.type,
        }

    @property
    def about(self) -> dict[str, Any]:
        """For the reader: where the data come from."""
        return plain(dict(self.data.about))

    def loss(self, checkpoint: Checkpoint | None) -> Loss:
        assert checkpoint is not None
        found = checkpoints.read(checkpoint, ema=self._args.ema)
        model = self._model(checkpoint, found.state)
        weights.load_(model, found.state, checkpoint.name)
        return Loss(
            model,
            nn.CrossEntropyLoss(),
            self._here.share(self.data.batches),
            normalize_logits=self._args.normalize_logits,
            batch_statistics=self._args.batch_statistics,
            device=self._here.device,
        )

    def state(self, checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
        """The weights of another checkpoint under the names of the model."""
        found = checkpoints.read(checkpoint, ema=self._args.ema).state
        return weights.checked(model, found, checkpoint.name)

    def _recipe(self, checkpoint: Checkpoint | None) -> tuple[str, dict[str, Any], bool]:
        """Name, options for create_model, and whether the stem is that for small images."""
        args, run = self._args, checkpoint.run if checkpoint else None
        if run is None:
            if args.model is None:
                raise InputError(f"{checkpoint.name if checkpoint else ''} does not say its model: give --model")
            return args.model, dict(args.model_kwargs), args.small_stem
        name = run.get("model", "cnn3")
        if args.model not in (None, name):
            raise InputError(f"{checkpoint.name if checkpoint else ''} is a run of {name}, not of --model {args.model}")
        options = {str(k): v for k, v in run.get("model_kwargs", [])} | dict(args.model_kwargs)
        return name, options, self.data.shape[-1] <= models.SMALL

    def _model(self, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> nn.Module:
        """The model with as many outputs as the checkpoint has; the last one again, if it is the same."""
        name, kwargs, small = self._recipe(checkpoint)
        num = self._args.num_classes or kwargs.pop("num_classes", None) or self._num_outputs(name, state)
        kwargs.pop("num_classes", None)
        if num is None:
            raise InputError(
                f"{checkpoint.name} has no last layer of {name}: choose its --model, or give --num-classes"
            )
        if self.data.largest >= num or self.data.num_classes not in (None, num):
            has = f"{self.data.num_classes} classes" if self.data.num_classes else f"labels up to {self.data.largest}"
            raise InputError(f"the data have {has}, {checkpoint.name} has {num} outputs: other --data or --model")
        key = json.dumps([name, plain(kwargs), small, num])
        if self._built[0] != key:
            made = self._make(name, num, small, kwargs)
            self._built = (key, made.to(self._here.device, self._dtype))
        return self._built[1]

    def _make(self, name: str, num: int, small: bool, kwargs: dict[str, Any]) -> nn.Module:
        shape = self.data.shape
        if models.own(name) or small:
            if len(shape) != 3:
                raise InputError(f"{name} takes images, (C, H, W), and x has the shape {shape}")
            return models.build(name, num_classes=num, image_size=(shape[0], shape[1], shape[2]), **kwargs)
        import timm

        if len(shape) == 3:
            own = models.sized(timm, name, (shape[0], shape[1], shape[2]), patch=False)
            kwargs = {"in_chans": shape[0]} | (own if shape[1:] != self._config["input_size"][1:] else {}) | kwargs
        try:
            return timm.create_model(name, num_classes=num, **kwargs)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise InputError(f"{name} cannot be built with {kwargs}: {one_line(error)}") from None

    def _num_outputs(self, name: str, state: Mapping[str, Tensor]) -> int | None:
        if make := models.own(name):
            with torch.device("meta"):
                return weights.num_outputs(make(2, (1, 8, 8)), state)
        import timm

        with torch.device("meta"):
            return weights.num_outputs(timm.create_model(name), state)


class Target:
    """What MODULE:FUNCTION returns: a Loss, or (model, criterion, batches).

    A function with a parameter is called for each checkpoint with its path (None without checkpoints) and loads the
    weights itself. One without is called once; each checkpoint is then loaded into its model.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, args: argparse.Namespace, here: Processes):
        self._args, self._here = args, here
        self._function = _function(args.target)
        self._loads = bool(inspect.signature(self._function).parameters)
        self._cached: tuple[Checkpoint | None, Loss] | None = None
        if self._loads and args.ema:
            raise InputError(f"{args.target} loads the weights itself, so --ema means nothing: leave it out")

    def identity(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        loss = self._made(checkpoint)
        file = inspect.getsourcefile(inspect.unwrap(self._function))
        source = Path(file).read_bytes() if file and Path(file).is_file() else b""
        about = loss.settings() | {"target": self._args.target, "ema": self._args.ema}
        return plain(about | {"source": hashlib.sha256(source).hexdigest()[:16], "m": list(loss.batch_sizes)})

    @property
    def about(self) -> dict[str, Any]:
        return {"source": self._args.target}

    def loss(self, checkpoint: Checkpoint | None) -> Loss:
        loss = self._made(checkpoint)
        if checkpoint is not None and not self._loads:
            state = checkpoints.read(checkpoint, ema=self._args.ema).state
            weights.load_(loss.model, state, checkpoint.name)
            return loss
        return loss

    def state(self, checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
        if not self._loads:
            return weights.checked(model, checkpoints.read(checkpoint, ema=self._args.ema).state, checkpoint.name)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        other = self._made(checkpoint).model
        found = {name: x.clone() for name, x in other.state_dict().items()}
        if other is model:  # a function that loads into one model of its own
            model.load_state_dict(before)
        return found

    def _made(self, checkpoint: Checkpoint | None) -> Loss:
        if self._cached is None or (self._loads and self._cached[0] != checkpoint):
            path = None
            if checkpoint is not None:
                path = str(checkpoint.files[0] if len(checkpoint.files) == 1 else checkpoint.name)
            self._cached = (checkpoint, self._loss(self._called(path)))
        return self._cached[1]

    def _called(self, path: str | None) -> Any:
        try:
            return self._function(path) if self._loads else self._function()
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename}, line {last.lineno}"
            raise InputError(
                f"{self._args.target} raised {type(error).__name__}: {one_line(error)} ({where})"
            ) from error

    def _loss(self, made: Any) -> Loss:
        args, flags = self._args, (self._args.normalize_logits, self._args.batch_statistics, self._args.dtype)
        if isinstance(made, Loss):
            if any(flags):
                raise InputError(
                    f"{args.target} returns a Loss, which has its own settings: leave --normalize-logits, "
                    "--batch-statistics and --dtype out, or return (model, criterion, batches)"
                )
            return made
        if not isinstance(made, tuple) or len(made) != 3 or not isinstance(made[0], nn.Module):
            got = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
            raise InputError(f"{args.target} must return a Loss or (model, criterion, batches), got {got}")
        model, criterion, batches = made
        dtype = DTYPES[args.dtype] if args.dtype else None
        return Loss(
            model.to(self._here.device, dtype),
            criterion,
            _Part(batches, self._here, dtype) if self._here.count > 1 or dtype else batches,
            normalize_logits=args.normalize_logits,
            batch_statistics=args.batch_statistics,
            device=self._here.device,
        )


class _Part:
    """Every count-th batch of a user's, its floating-point tensors in the dtype."""

    def __init__(self, batches: Any, here: Processes, dtype: torch.dtype | None):
        self._batches, self._here, self._dtype = batches, here, dtype

    def __iter__(self) -> Iterator[Any]:
        for batch in islice(iter(self._batches), self._here.rank, None, self._here.count):
            yield batch if self._dtype is None else _converted(batch, self._dtype)


def _converted(batch: Any, dtype: torch.dtype) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _converted(value, dtype) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        return type(batch)(_converted(value, dtype) for value in batch)
    return moved(batch, torch.device("cpu"))


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(f"--target must be MODULE:FUNCTION, got {name!r}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; the console script does not
    importlib.invalidate_caches()  # it may have been written a moment ago
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"--target {name}: cannot import {module} from {here} ({one_line(error)})") from None
    for part in function.split("."):
        if not hasattr(found, part):
            public = [n for n, v in vars(found).items() if callable(v) and not n.startswith("_")]
            raise unknown(f"function of {module}", part, public)
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"--target {name} is {type(found).__name__}, not a function")
    return found
