"""What is measured: the loss of each checkpoint, of a timm model on images or of whatever a function returns."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sam_optim.core.errors import InputError, one_line, unknown
from sam_optim.core.results import plain
from sam_optim.loss import Loss
from sam_optim.loss.batches import tree_map
from sam_optim.sweep.processes import Processes
from sam_optim.sweep.settings import Losses, Settings
from sam_optim.sweep.text import TextProblem
from sam_optim.vision import models, weights
from sam_optim.vision.checkpoints import Checkpoint
from sam_optim.vision.data import Examples, evaluation_batches, open_split
from sam_optim.vision.images import TRAIN_FOLDERS, read_class_to_idx
from sam_optim.vision.preprocessing import Preprocessing, described


@dataclass(frozen=True)
class ImageProblem(Settings):
    """Cross-entropy of a timm model over the first examples of a data set.

    Args:
        data, data_dir, split: as `name`, `directory` and `split` of `vision.data.open_split`.
        class_to_idx: a JSON file with the number of each class folder; None: in the order of their names.
        examples, order, batch_size: the first so many (0: all), "file" or "mixed"; m of m-sharpness.
        image_size, mean, std, crop_pct: in place of the run's, or of what timm says of the model; see `Preprocessing`.
        model, model_kwargs: as for timm.create_model, or a name of `vision.models`; None: what the run says.
        num_classes: None: the rows of the checkpoint's last layer.
        small_stem: the stem for small images, as in `vision.models.build`.
        ema, key, normalize_logits, batch_statistics, dtype: as in `Settings`.
    """

    data: str
    data_dir: str | None = None
    split: str | None = None
    class_to_idx: Path | None = None
    examples: int = 512
    order: str = "file"
    batch_size: int = 128
    image_size: int | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop_pct: float | None = None
    model: str | None = None
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    small_stem: bool = False

    @property
    def name(self) -> str:
        return self.model or ""

    def open(self, here: Processes, rows: Sequence[Checkpoint]) -> ImageLosses:
        return ImageLosses(self, here, rows)


@dataclass(frozen=True)
class FunctionProblem(Settings):
    """What a function returns: a Loss, or (model, criterion, batches).

    Args:
        function: a callable, or "MODULE:FUNCTION", imported from the working directory. One with a parameter is called
            with the path of each checkpoint (None without checkpoints) and loads the weights itself. One without is
            called once; each checkpoint is then loaded into its model.
        ema, key, normalize_logits, batch_statistics, dtype: as in `Settings`.
    """

    function: str | Callable[..., Any]
    default_dtype: ClassVar[None] = None

    @property
    def name(self) -> str:
        if isinstance(self.function, str):
            return self.function
        function = _unwrapped(self.function)
        return f"{function.__module__}:{function.__qualname__}"

    def open(self, here: Processes, rows: Sequence[Checkpoint]) -> FunctionLosses:
        return FunctionLosses(self, here)


Problem = ImageProblem | FunctionProblem | TextProblem


class ImageLosses(Losses):
    def __init__(self, problem: ImageProblem, here: Processes, rows: Sequence[Checkpoint]):
        super().__init__(problem, here)
        if not rows:
            raise InputError("no CHECKPOINT is given; name files, a directory or a glob")
        self._problem = problem
        runs = [checkpoint.run for checkpoint in rows if checkpoint.run]
        name = problem.model or (runs[0].model if runs else None)
        if name is None:
            raise InputError("say which model the checkpoints are of: --model NAME, as timm calls it, or --target")
        models.check_name(name)
        preprocessings = [checkpoint.run and checkpoint.run.preprocessing for checkpoint in rows]
        shared = preprocessings[0] if all(p == preprocessings[0] for p in preprocessings) else None
        channels = problem.model_kwargs.get("in_chans")
        usual = shared or Preprocessing.of_model(name, channels=channels, image_size=problem.image_size)
        self.data = load_examples(problem, usual)
        if "mean" in self.data.about and not (problem.mean or shared) and runs:
            raise InputError(
                "runs of benchmarks.train normalize pixels their own way, and these do not all say the same one: use "
                "python -m benchmarks.measure RUN_DIR, or give --mean, --std and --image-size"
            )
        # the examples in a file of arrays may be of any split
        self.is_training = problem.split in (None, *TRAIN_FOLDERS) and self.data.about["source"] != "arrays"
        origin = "those of the runs' config.json" if shared else f"timm's for {name}"
        if not shared and not models.is_configured(name):
            origin = f"timm's defaults, which know nothing of {name}"
        self.notes = [*self.data.notes, _treatment(problem, self.data.about, origin)]
        changed = dict.fromkeys(option for run in runs for option in run.changed_examples)
        if self.is_training and changed:
            self.notes.append(
                "the examples are those of --data, and not the runs' own, which were trained with "
                f"{', '.join(changed)}; python -m benchmarks.measure RUN_DIR takes those"
            )
        self._built: tuple[str, nn.Module] = ("", nn.Module())

    @property
    def about(self) -> dict[str, Any]:
        """The source of the data, for the report."""
        return plain(dict(self.data.about))

    def identity(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        """Everything the loss depends on, except the content of the checkpoint."""
        assert checkpoint is not None
        name, kwargs, small = self._recipe(checkpoint)
        return self._identity() | {
            "model": name,
            "model_kwargs": plain(kwargs),
            "num_classes": self._problem.num_classes,
            "small_stem": small,
            "data": self.data.checksum,
            "batch_size": self._problem.batch_size,
        }

    def loss(self, checkpoint: Checkpoint | None) -> Loss:
        assert checkpoint is not None
        state = self._read(checkpoint)
        model = self._model(checkpoint, state)
        self._compare(state, model)
        weights.load_(model, state, checkpoint.name)
        return self._loss(model, nn.CrossEntropyLoss(), self._here.share(self.data.batches))

    def state(self, checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
        """The weights of another checkpoint under the names of the model."""
        return weights.fitted(model, self._read(checkpoint, model), checkpoint.name)

    def _recipe(self, checkpoint: Checkpoint) -> tuple[str, dict[str, Any], bool]:
        """Name and options of the model, and whether it has the stem for small images."""
        problem, run = self._problem, checkpoint.run
        if run is None:
            if problem.model is None:
                raise InputError(f"{checkpoint.name} does not say its model: give --model")
            return problem.model, dict(problem.model_kwargs), problem.small_stem
        if problem.model not in (None, run.model):
            raise InputError(f"{checkpoint.name} is a run of {run.model}, not of --model {problem.model}")
        return run.model, {**run.model_kwargs, **problem.model_kwargs}, self.data.shape[-1] <= models.SMALL

    def _model(self, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> nn.Module:
        """The model with as many outputs as the checkpoint; the previous one again if it is the same."""
        data, (name, kwargs, small) = self.data, self._recipe(checkpoint)
        in_kwargs = kwargs.pop("num_classes", None)
        num = self._problem.num_classes or in_kwargs or models.num_outputs(name, state)
        if num is None:
            raise InputError(
                f"{checkpoint.name} has no last layer of {name}: choose its --model, or give --num-classes"
            )
        if data.largest >= num or data.num_classes not in (None, num):
            has = f"{data.num_classes} classes" if data.num_classes else f"labels up to {data.largest}"
            raise InputError(f"the data have {has}, {checkpoint.name} has {num} outputs: other --data or --model")
        key = json.dumps([name, plain(kwargs), small, num])
        if self._built[0] != key:
            if len(data.shape) != 3:
                raise InputError(f"{name} takes images, (C, H, W), and x has the shape {data.shape}")
            channels, height, width = data.shape
            size = (channels, height, width)
            with weights.limited(state, checkpoint.name) if checkpoint.run else nullcontext():
                model = models.build(name, num_classes=num, image_size=size, small_stem=small, **kwargs)
            self._built = (key, model)
        return self._built[1]


def load_examples(problem: ImageProblem, usual: Preprocessing) -> Examples:
    """The examples of a problem. usual: the preprocessing where the problem does not say another."""
    class_to_idx = None if problem.class_to_idx is None else read_class_to_idx(problem.class_to_idx)
    split = open_split(problem.data, problem.data_dir, problem.split, class_to_idx=class_to_idx)
    if split.fixed_size and (problem.image_size or problem.crop_pct):
        raise InputError(f"{split.name} are not resized: leave --image-size and --crop-pct out")
    mean, std = problem.mean, problem.std
    if not split.fixed_size:
        preprocessing = usual.replaced(image_size=problem.image_size, mean=mean, std=std, crop_pct=problem.crop_pct)
    elif split.x is not None and split.x.dtype == torch.uint8:
        _, *size = split.x.shape
        preprocessing = Preprocessing((size[0], size[1], size[2]), mean or usual.mean, std or usual.std)
    elif mean or std:
        raise InputError(f"--mean and --std are for pixels (uint8); x in {problem.data} is taken as it is")
    else:
        preprocessing = usual
    return evaluation_batches(
        split,
        preprocessing,
        num=problem.examples,
        mixed=problem.order == "mixed",
        batch_size=problem.batch_size,
        dtype=problem.torch_dtype or torch.float32,
    )


def _treatment(problem: ImageProblem, about: Mapping[str, Any], origin: str) -> str:
    """What is done to images, and who says so: weights that were trained with something else measure as others."""
    options = {"mean": "mean", "std": "std", "input_size": "image_size", "crop_pct": "crop_pct"}
    said = {f"--{name.replace('_', '-')}": getattr(problem, name) for key, name in options.items() if key in about}
    given = " and ".join(flag for flag, value in said.items() if value)
    rest = ", ".join(flag for flag, value in said.items() if not value)
    if not said:
        is_digits = about["source"] == "digits"
        return "digits are normalized by mean and std of the training half" if is_digits else described(about)
    given += " say" if " and " in given else " says"
    source = origin if not any(said.values()) else f"as {given}, the rest {origin}" if rest else f"as {given}"
    return f"{described(about)}: {source}" + (f"; {rest} take others" if rest else "")


class FunctionLosses(Losses):
    def __init__(self, problem: FunctionProblem, here: Processes):
        super().__init__(problem, here)
        self._problem = problem
        self._function = _imported(problem.function) if isinstance(problem.function, str) else problem.function
        self._loads_weights = bool(inspect.signature(self._function).parameters)
        self._cached: tuple[Checkpoint | None, Loss] | None = None
        if self._loads_weights and (problem.ema or problem.key):
            raise InputError(f"{problem.name} loads the weights itself: leave --ema and --key out")

    @property
    def about(self) -> dict[str, Any]:
        return {"source": self._problem.name}

    def identity(self, checkpoint: Checkpoint | None) -> dict[str, Any]:
        loss = self._call(checkpoint)
        file = inspect.getsourcefile(_unwrapped(self._function))
        source = Path(file).read_bytes() if file and Path(file).is_file() else b""
        about = self._identity() | loss.settings() | {"target": self._problem.name, "m": list(loss.batch_sizes)}
        return plain(about | {"source": hashlib.sha256(source).hexdigest()[:16]})

    def loss(self, checkpoint: Checkpoint | None) -> Loss:
        loss = self._call(checkpoint)
        if checkpoint is not None and not self._loads_weights:
            loss.model.load_state_dict(self.state(checkpoint, loss.model), strict=False)
        return loss

    def state(self, checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
        """The weights of a checkpoint under the names of the model; of a folder of Hugging Face as it reads them."""
        if not self._loads_weights:
            return weights.fitted_or_converted(model, self._read(checkpoint, model), checkpoint.name)
        before = {name: x.clone() for name, x in model.state_dict().items()}
        other = self._call(checkpoint).model
        state = {name: x.clone() for name, x in other.state_dict().items()}
        if other is model:  # a function that loads every checkpoint into one model
            model.load_state_dict(before)
        return state

    def _call(self, checkpoint: Checkpoint | None) -> Loss:
        if self._cached is None or (self._loads_weights and self._cached[0] != checkpoint):
            try:
                returned = self._function(checkpoint and checkpoint.name) if self._loads_weights else self._function()
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                reason = f"{type(error).__name__}: {one_line(error)} ({last.filename}, line {last.lineno})"
                raise InputError(f"{self._problem.name} raised {reason}") from error
            self._cached = (checkpoint, self._loss_of(returned))
        return self._cached[1]

    def _loss_of(self, returned: Any) -> Loss:
        problem = self._problem
        if isinstance(returned, Loss):
            if problem.normalize_logits or problem.batch_statistics or problem.dtype:
                raise InputError(
                    f"{problem.name} returns a Loss, which has its own settings: leave --normalize-logits, "
                    "--batch-statistics and --dtype out, or return (model, criterion, batches)"
                )
            return returned
        if not isinstance(returned, tuple) or len(returned) != 3 or not isinstance(returned[0], nn.Module):
            got = f"a tuple of {len(returned)}" if isinstance(returned, tuple) else type(returned).__name__
            raise InputError(f"{problem.name} must return a Loss or (model, criterion, batches), got {got}")
        model, criterion, batches = returned
        if self._here.count > 1 or problem.dtype:
            batches = _Share(batches, self._here, problem.torch_dtype)
        return self._loss(model, criterion, batches)


class _Share:
    """Every `count`-th batch, floating-point tensors converted to the dtype."""

    def __init__(self, batches: Any, here: Processes, dtype: torch.dtype | None):
        self._batches, self._here, self._dtype = batches, here, dtype

    def __iter__(self) -> Iterator[Any]:
        for batch in islice(iter(self._batches), self._here.rank, None, self._here.count):
            yield tree_map(self._convert, batch)

    def _convert(self, x: Any) -> Any:
        return x.to(self._dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _unwrapped(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return inspect.unwrap(function)


def _imported(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    if not module or not function:
        raise InputError(f"--target must be MODULE:FUNCTION, got {name!r}")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does; the console script does not
    importlib.invalidate_caches()  # it may have been written a moment ago
    try:
        value: Any = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"--target {name}: cannot import {module} from {here} ({one_line(error)})") from None
    for part in function.split("."):
        if not hasattr(value, part):
            public = [n for n, v in vars(value).items() if callable(v) and not n.startswith("_")]
            raise unknown(f"function of {module}", part, public)
        value = getattr(value, part)
    if not callable(value):
        raise InputError(f"--target {name} is {type(value).__name__}, not a function")
    return value
