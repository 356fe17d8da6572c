"""The options of `benchmarks.train`: declared, checked, written to config.json and read back for a resume."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.command import SWITCH, Parser, add_options, option, read_settings
from sam_optim.core import files
from sam_optim.core.arguments import number
from sam_optim.core.arguments import pair as any_pair
from sam_optim.core.errors import InputError, one_line, unknown
from sam_optim.core.files import read_json_object
from sam_optim.vision.cifar import LAYOUT
from sam_optim.vision.models import check_options
from sam_optim.vision.preprocessing import CROP_MODES, INTERPOLATIONS, Preprocessing

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "plateau", "constant", "none")
PIXELS = ("mean", "std", "crop_pct", "interpolation", "crop_mode")
MAY_CHANGE = (  # on a resume
    *("out", "resume", "force", "device", "workers", "data_dir", "checkpoint_steps", "measures"),
    "initial_checkpoint",
)
SAM_VARIANTS = {  # their names here -> the classes of the package
    "gsam": "GSAM",
    "friendly": "FriendlySAM",
    "msam": "MSAM",
    "looksam": "LookSAM",
    "vasso": "VaSSO",
    "stale": "StaleSAM",
}
REQUIRED = "REQUIRED"  # as the value of initial-checkpoint in a recipe: it makes no sense without
PAIRS = ("opt_kwargs", "model_kwargs", "sam_kwargs")
NOT_RECORDED = ("out", "resume", "force")
HUBS = ("hfds/", "hfids/", "tfds/")  # prefixes of data sets that timm asks the network for

_amount, _positive, _fraction = number(float, 0), number(float, 0, above=True), number(float, 0, 1)
_count, _natural, _below_one = number(int, 1), number(int, 0), number(float, 0, 0.99)
_share = number(float, 0, 1, above=True)


def _pair(text: str) -> tuple[str, Any]:
    """KEY=VALUE, VALUE a Python literal that JSON knows, or a bare word."""
    key, value = any_pair(text)
    try:
        json.dumps(value)
    except TypeError:
        raise argparse.ArgumentTypeError(f"must be a number, word, list or mapping, got {text!r}") from None
    return key, value


_pairs: dict[str, Any] = {"nargs": "*", "type": _pair, "metavar": "KEY=VALUE"}
_unless = "; default: that of --initial-checkpoint's model, else"


@dataclass(frozen=True)
class Options:
    """The options of a run. `parse` makes them from a command line, `of_run` from a config.json."""

    model: str = option("cnn3", "any timm name, cnn3 (default), cnn5, wrn28_10, cifar_resnet20")
    model_kwargs: dict[str, Any] = option({}, "for timm.create_model", **_pairs)
    data: str = option("digits", "digits (default), cifar10, cifar100, folder, or a name of timm's create_dataset")
    data_dir: str | None = option(None, "where --data is; not needed for digits", metavar="DIR")
    img_size: int | None = option(
        None, "side in pixels; default: small images unchanged, others resized to what the model expects", type=_count
    )
    mean: list[float] | None = option(
        None, f"of pixels in [0, 1], one for each channel or for all{_unless} ImageNet's", type=_amount, nargs="+"
    )
    std: list[float] | None = option(
        None, "as --mean; CIFAR in memory has its own mean and std", type=_positive, nargs="+"
    )
    crop_pct: float | None = option(None, f"share of each side that evaluation keeps{_unless} 0.875", type=_share)
    interpolation: str | None = option(None, f"for resizing{_unless} bilinear", choices=INTERPOLATIONS)
    crop_mode: str | None = option(None, f"how evaluation crops{_unless} center", choices=CROP_MODES)
    num_classes: int | None = option(
        None, "only for streamed data sets (wds/NAME); for others it is counted", type=_count
    )
    label_noise: float = option(0.0, "share of the training labels that is redrawn at random", type=_fraction)
    train_labels: str | None = option(
        None, "other labels for the training images, in their order, as CIFAR-10N's are", metavar="FILE.npz:ARRAY"
    )
    validation_fraction: float = option(0.0, "share of the training set that is held out", type=_below_one)
    train_examples: int | None = option(
        None, "number of training examples, drawn by --seed; default: all", type=_count, metavar="N"
    )
    workers: int = option(0, "processes that decode images", type=_natural)

    opt: str = option("sgd", "any timm optimizer")
    opt_kwargs: dict[str, Any] = option({}, "for the optimizer, e.g. nesterov=True", **_pairs)
    lr: float = option(0.05, "learning rate (default: 0.05)", type=_positive)
    momentum: float = option(0.9, "default: 0.9", type=_fraction)
    weight_decay: float = option(
        5e-4, "default: 5e-4; not on biases and normalization parameters, as in timm", type=_amount
    )
    decay_all: bool = option(False, "weight decay also on biases and normalization parameters", action=SWITCH)
    layer_decay: float | None = option(
        None, "factor on the learning rate from each layer to the one below", type=_positive
    )
    sched: str = option("cosine", choices=SCHEDULES)
    patience_epochs: int = option(
        10,
        "for --sched plateau: epochs without a better training loss; with a validation split: evaluations of it",
        type=_natural,
    )
    decay_rate: float = option(0.1, "for --sched plateau, step and multistep (default: 0.1)", type=_positive)
    warmup_epochs: float = option(0.0, "of the learning rate (default: 0)", type=_amount)
    min_lr: float = option(0.0, "at the end of the schedule (default: 0)", type=_amount)
    epochs: int = option(30, "default: 30", type=_count)
    batch_size: int = option(64, "of each process (default: 64)", type=_count)
    accumulate: int = option(1, "batches in one update, each with its own perturbation (default: 1)", type=_count)
    clip_grad: float | None = option(None, "largest 2-norm of an update's gradient", type=_positive)

    sam_rho: float = option(0.0, "radius of SAM; 0 (default): the base optimizer", type=_amount)
    adaptive: str | None = option(
        None,
        "ASAM: distances relative to each weight (default), filter or layer",
        nargs="?",
        const="elementwise",
        choices=("elementwise", "filter", "layer"),
    )
    sam_eta: float = option(0.01, "added to |w| where adaptive (default: 0.01)", type=_amount)
    sam_norm: str = option("2", "p of the ball (default: 2)", choices=("2", "inf"))
    sam_variant: str | None = option(None, "default: SAM itself", choices=tuple(SAM_VARIANTS))
    sam_kwargs: dict[str, Any] = option({}, "for the variant, e.g. alpha=0.4", **_pairs)
    sam_schedule: str | None = option(
        None, "schedule of the radius: late_phase:0.7, periodic:5, warmup:0.1; below 1: a share of all updates"
    )
    sam_norm_only: bool = option(False, "SAM-ON: perturb only normalization parameters", action=SWITCH)
    sync_ascent: bool = option(False, "one perturbation for all processes, not one for each", action=SWITCH)

    no_aug: bool = option(False, "no augmentation", action="store_true")
    hflip: float = option(0.5, "probability of a horizontal flip (default: 0.5)", type=_fraction)
    aa: str | None = option(None, "timm's auto-augment string, e.g. rand-m9-mstd0.5", metavar="POLICY")
    color_jitter: float = option(0.0, "strength, as in timm (default: 0)", type=_amount)
    reprob: float = option(0.0, "probability of random erasing (default: 0)", type=_fraction)
    crop_scale: float = option(0.08, "smallest share of the image in a random crop (default: 0.08)", type=_share)
    mixup: float = option(0.0, "as in timm; 0 (default): off", type=_amount, metavar="ALPHA")
    cutmix: float = option(0.0, "as in timm; 0 (default): off", type=_amount, metavar="ALPHA")
    smoothing: float = option(0.0, "of the labels (default: 0)", type=_below_one)
    update_bn: bool = option(
        False,
        "BatchNorm's running statistics at the last weights, from the training images (one-pass variants always do it)",
        action=SWITCH,
    )
    model_ema: float | None = option(
        None, "also evaluate an exponential average of the weights", type=_fraction, metavar="DECAY"
    )

    initial_checkpoint: str | None = option(
        None,
        "weights of the timm model to start from; the head is new where the number of classes differs",
        metavar="FILE",
    )
    grad_checkpointing: bool = option(False, "less memory for one more forward pass", action=SWITCH)
    fsdp: bool = option(False, "shard weights, gradients and state over the processes (FSDP2)", action=SWITCH)

    device: str = option("auto", "auto (default): CUDA where torch sees a device, else the CPU; cpu, cuda, cuda:1")
    amp: str | None = option(None, "autocast in training", choices=("bf16", "fp16"))
    channels_last: bool = option(False, "memory format of model and images", action=SWITCH)
    compile: bool = option(False, "torch.compile the model in training", action=SWITCH)
    seed: int = option(0, "default: 0", type=_natural)
    monitor: float = option(
        0.0, "share of the time for a SharpnessMonitor, e.g. 0.05; writes RUN_DIR/sharpness.jsonl", type=_below_one
    )
    measures: str = option(
        "worst,average_in_ball,eigenvalue,trace", "taken after the last epoch; 'none' for no measures"
    )
    out: Path = option(None, "default: runs/DATA-MODEL-...", type=Path, metavar="RUN_DIR")
    eval_every: int = option(
        1, "evaluate after every so many epochs and after the last; 0: never", type=_natural, metavar="EPOCHS"
    )
    checkpoint_steps: int | None = option(
        None, "save a checkpoint after every so many updates, too, not only after each epoch", type=_count
    )
    resume: bool = option(
        False, "continue from the newest valid checkpoint in --out, with its options", action="store_true"
    )
    force: bool = option(False, "replace the run in --out", action="store_true")

    def recorded(self) -> dict[str, Any]:
        """All options for config.json, except where the run is and how it was started, as JSON returns them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_RECORDED}
        return json.loads(json.dumps(values))


def parser() -> Parser:
    p = Parser(prog="python -m benchmarks.train", description="Train an image classifier with or without SAM.")
    p.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML with any of these options; the command line replaces them"
    )
    add_options(p, Options)
    p.add_argument(
        "--aug", action="store_false", dest="no_aug", help="turn augmentation on again that a --config turns off"
    )
    for action in p._actions:
        if action.default is None and action.nargs in (None, "?") and action.dest not in ("config", "out"):
            _may_be_none(action)
    return p


def _may_be_none(action: argparse.Action) -> None:
    """The word none takes back what a --config says of an option that is unset by default."""
    convert: Callable[[str], Any] = action.type if callable(action.type) else str
    action.type = lambda text: None if text == "none" else convert(text)
    if action.choices:
        action.metavar = "{" + ",".join([*action.choices, "none"]) + "}"
        action.choices = [*action.choices, None]


def parse(argv: Sequence[str] | None = None) -> Options:
    """The options of a run; on a resume those in its config.json, which options given now may not contradict."""
    argv = with_config(sys.argv[1:] if argv is None else argv)
    options = options_of(vars(parser().parse_args(argv)))
    if options.out is None:
        options = replace(options, out=Path("runs") / default_name(options))
    if not (options.resume and (options.out / "config.json").exists()):
        return checked(options)
    said = given(argv)
    run = of_run(options.out, options.data if "data" in said else None)
    earlier, now = run.recorded(), options.recorded()
    changed = said - ({"initial_checkpoint"} if options.initial_checkpoint == REQUIRED else set())
    for key in changed - set(MAY_CHANGE):
        if earlier[key] != now[key]:
            name = "--" + key.replace("_", "-")
            raise InputError(f"{name} {now[key]} differs from the run's {earlier[key]}; leave it out to resume")
    values = {key: getattr(options, key) for key in changed} | {"resume": True, "force": False}
    return replace(run, **values)


def options_of(values: dict[str, Any]) -> Options:
    """Options of what `parser` gives."""
    pairs = {key: dict(values[key]) for key in PAIRS}
    return Options(**{f.name: values[f.name] for f in fields(Options)} | pairs)


def _check_hub(file: str, name: str, said: str | None) -> None:
    """A file may be a stranger's: what it names is not asked for over the network unless the command line says it too.

    Raises:
        InputError: the data set `name` is one of a hub, and is not the one that is `said`.
    """
    if name.lower().startswith(HUBS) and said != name:
        hub = f"{file} names the data set {name!r}, which would be asked for over the network"
        raise InputError(f"{hub}; if that is what you want, say it on the command line, too: --data {name}")


def of_run(directory: Path, data: str | None = None, **replaced: Any) -> Options:
    """The options of a trained run, where its folder of data, workers and device are those given now, unless they are
    None.

    What stands in its config.json is checked like a command line. What does not (an older run) is at its default.

    Args:
        data: the data set that the command line names; needed if the run's is one of a hub.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory} is not a run directory: it has no config.json; make one with benchmarks.train")
    changes = {key: value for key, value in replaced.items() if value is not None}
    recorded = read_json_object(path).get("options") or {}
    try:
        if not isinstance(recorded, dict):
            raise InputError(f"its options are {type(recorded).__name__}")
        names = {f.name for f in fields(Options)} - set(NOT_RECORDED)
        pairs = {key: dict(recorded[key]) for key in PAIRS if key in recorded}
        argv = [word for key, value in (recorded | pairs).items() if key in names for word in words(key, value)]
        options = options_of(vars(parser().parse_args(argv)))
        _check_model(options)
    except (TypeError, ValueError) as error:
        reason = one_line(error)
        raise InputError(f"{path} is not of a run of benchmarks.train ({reason}); it was changed or damaged") from None
    _check_hub(str(path), options.data, data)
    return replace(options, out=directory, **changes)


@dataclass(frozen=True, kw_only=True)
class OfRun:
    """The run that a command is about, and what may be another one than where it was trained."""

    run: Path = option(flags=["run"], type=Path, metavar="RUN_DIR")
    data: str | None = option(None, "the run's own data set: to be said again if it is one of a hub", metavar="NAME")
    data_dir: str | None = option(None, "default: that of the run", metavar="DIR")
    device: str | None = option(None, "default: that of the run")
    workers: int | None = option(None, "processes that decode images; default: as many as the run's", type=_natural)
    ema: bool = option(False, "the averaged weights of --model-ema", action="store_true")

    def locked(self) -> AbstractContextManager[None]:
        """A lock: no other process trains, measures or evaluates the run."""
        return files.locked(self.run.resolve(), "run")

    def options(self) -> Options:
        options = of_run(self.run, self.data, data_dir=self.data_dir, device=self.device, workers=self.workers)
        if self.data not in (None, options.data):
            raise InputError(f"--data {self.data} differs from the run's {options.data}; leave it out")
        return options


def given(argv: Sequence[str]) -> set[str]:
    """Names of the options that stand on the command line."""
    p = parser()
    for action in p._actions:
        action.default = argparse.SUPPRESS
    return set(vars(p.parse_args(argv))) - {"config"}


def with_config(argv: Sequence[str]) -> list[str]:
    """The options of --config FILE before those of the command line, which so replace them."""
    p = Parser(add_help=False)
    p.add_argument("--config", type=Path)
    p.add_argument("--data")
    command, _ = p.parse_known_args(argv)
    if command.config is None:
        return list(argv)
    recipe = from_file(command.config)
    _check_hub(str(command.config), p.parse_known_args(recipe)[0].data or "", command.data)
    return [*recipe, *argv]


def from_file(path: Path) -> list[str]:
    """A YAML mapping as a command line: `lr: 0.1`, `no-aug: true`, `opt-kwargs: {nesterov: false}`.

    Raises:
        InputError: no such file, no mapping, an option that does not exist.
    """
    values = read_settings(path, yaml=True)
    names = {o.removeprefix("--") for action in parser()._actions for o in action.option_strings if o.startswith("--")}
    argv: list[str] = []
    for key, value in values.items():
        name = str(key).replace("_", "-")
        if name not in names - {"help", "config", "out", "resume", "force"}:
            raise unknown(f"option in {path}", name, names)
        if value is False and f"no-{name}" in names:
            argv.append(f"--no-{name}")
        argv += words(name, value)
    return argv


def words(name: str, value: Any) -> list[str]:
    """One option of a file on a command line; none for False and None.

    Raises:
        InputError: a list or mapping holds what would be an option of its own (`opt-kwargs: ["--force"]`).
    """
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if not isinstance(value, (list, dict)):
        return [f"{flag}={value}"]
    parts = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [str(part) for part in value]
    if wrong := [part for part in parts if part.startswith("-")]:
        raise InputError(f"{name} must not hold an option, got {wrong[0]}")
    return [flag, *parts]


def default_name(options: Options) -> str:
    sam = (
        f"-{options.sam_variant or ('asam' if options.adaptive else 'sam')}{options.sam_rho:g}"
        if options.sam_rho
        else ""
    )
    sam += f"-{options.sam_schedule}" if options.sam_schedule else ""
    noise = f"-noise{options.label_noise:g}" if options.label_noise else ""
    noise += f"-{options.train_labels.rpartition(':')[2]}" if options.train_labels else ""
    name = f"{options.data}-{options.model}-{options.opt}{sam}{noise}-s{options.seed}"
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".")[:120]


def _as_pretrained(options: Options) -> Options:
    """Images as the weights of --initial-checkpoint know them, where no option says otherwise. It is in the options of
    config.json from then on: older runs are resumed and measured as they were trained."""
    if not options.initial_checkpoint or options.data in ("digits", *LAYOUT):
        return options
    of_weights = Preprocessing.of_model(options.model).to_dict()
    return replace(options, **{name: of_weights[name] for name in PIXELS if getattr(options, name) is None})


def checked(options: Options) -> Options:
    """The checked options of a new run; unset pixel options are those of --initial-checkpoint's model."""
    _check(options)
    return _as_pretrained(options)


def _check_model(options: Options) -> None:
    check_options(options.model, options.model_kwargs)
    if "num_classes" in options.model_kwargs:
        raise InputError("--model-kwargs num_classes: the data say how many there are, or --num-classes for a stream")


def _check(options: Options) -> None:
    _check_model(options)
    if options.initial_checkpoint == REQUIRED:
        raise InputError(f"this recipe fine-tunes: give --initial-checkpoint FILE (weights of {options.model})")
    if (options.mixup or options.cutmix) and options.batch_size % 2:
        raise InputError(
            f"--mixup and --cutmix pair the images of a batch: --batch-size must be even, got {options.batch_size}"
        )
    resizing = options.crop_pct or options.interpolation or options.crop_mode
    if options.data == "digits" and (options.mean or options.std or resizing):
        raise InputError("digits are normalized as they are read: leave --mean, --std and --crop-pct out")
    if options.data in LAYOUT and resizing:
        raise InputError(f"--data {options.data} is not resized: leave --crop-pct, --crop-mode and --interpolation out")
    for name in ("adaptive", "sync_ascent", "sam_variant", "sam_kwargs", "sam_schedule", "sam_norm_only"):
        if getattr(options, name) and not options.sam_rho:
            rho = 0.5 if name == "adaptive" else 0.05
            raise InputError(f"--{name.replace('_', '-')} needs a radius: give --sam-rho, e.g. {rho}")
    if options.adaptive and options.sam_norm_only:
        raise InputError("--adaptive leaves normalization parameters at T = 1, and --sam-norm-only moves no others")
    if options.fsdp and options.amp == "fp16":
        raise InputError("--fsdp has no scaler for --amp fp16: use --amp bf16")
    if options.sched == "plateau" and options.warmup_epochs:
        raise InputError("--sched plateau follows the loss and has no warm-up: leave --warmup-epochs out")
    if options.resume and options.force:
        raise InputError("--resume continues a run and --force replaces it: choose one")
