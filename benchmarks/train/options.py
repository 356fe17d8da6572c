"""The options of `benchmarks.train`: declared, checked, written to config.json and read back for a resume."""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.command import InputError, one_line, read_json, unknown
from benchmarks.train.preprocessing import CROP_MODES, INTERPOLATIONS, of_weights
from sam_optim.cli.options import number
from sam_optim.vision.cifar import LAYOUT

SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "plateau", "constant", "none")
MAY_CHANGE = (  # on a resume
    *("out", "resume", "force", "config", "device", "workers", "data_dir", "checkpoint_steps", "measures"),
    "initial_checkpoint",
)
REQUIRED = "REQUIRED"  # as the value of initial-checkpoint in a recipe: it makes no sense without
SWITCH = argparse.BooleanOptionalAction  # --fsdp, and --no-fsdp against a --config that has it
NOT_KEPT = ("out", "resume", "force", "config")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}{self._nearest(message)} (see --help)")

    def _nearest(self, message: str) -> str:
        """For each option that does not exist those with names like it; underscores are taken for hyphens."""
        head, _, rest = message.partition(": ")
        if head != "unrecognized arguments":
            return ""
        known = [o[2:] for action in self._actions for o in action.option_strings if o.startswith("--")]
        said = []
        for word in (w.partition("=")[0] for w in rest.split() if w.startswith("--")):
            if near := get_close_matches(word[2:].replace("_", "-"), known, n=3):
                said.append(f"; {word}: did you mean {' or '.join('--' + name for name in near)}?")
        return "".join(said)


def _pair(text: str) -> tuple[str, Any]:
    """KEY=VALUE, VALUE a Python literal or a bare word."""
    key, separator, value = text.partition("=")
    if not separator or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    try:
        literal = ast.literal_eval(value)
        json.dumps(literal)
    except (ValueError, SyntaxError):
        return key, value
    except TypeError:
        raise argparse.ArgumentTypeError(f"must be a number, word, list or mapping, got {text!r}") from None
    return key, literal


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m benchmarks.train", description="Train an image classifier with or without SAM.")
    add, positive, fraction = p.add_argument, number(float, 0, above=True), number(float, 0, 1)
    amount, count, natural = number(float, 0), number(int, 1), number(int, 0)
    add("--config", type=Path, metavar="FILE", help="YAML with any of these options; those given here replace them")
    add("--model", default="cnn3", help="any timm name, cnn3 (default), cnn5 or wrn28_10")
    add("--model-kwargs", nargs="*", type=_pair, default=[], metavar="KEY=VALUE", help="for timm.create_model")
    add(
        "--data",
        default="digits",
        help="digits (default), cifar10, cifar100, folder, or a name of timm's create_dataset",
    )
    add("--data-dir", metavar="DIR")
    add("--img-size", type=count, help="pixels; default: small images as they are, others as the model was made for")
    unless = "; default: that of --initial-checkpoint's model, else"
    add("--mean", type=amount, nargs="+", help=f"of pixels in [0, 1], for each channel or all{unless} ImageNet's")
    add("--std", type=positive, nargs="+", help="the same; CIFAR in memory has its own mean and std")
    add("--crop-pct", type=number(float, 0, 1, above=True), help=f"evaluated part of a side{unless} 0.875")
    add("--interpolation", choices=INTERPOLATIONS, help=f"of a resized image{unless} bilinear")
    add("--crop-mode", choices=CROP_MODES, help=f"how evaluation crops{unless} center")
    add("--num-classes", type=count, help="of a streamed data set (wds/NAME); others are counted")
    add("--label-noise", type=fraction, default=0.0, help="fraction of the training labels that is drawn anew")
    add("--train-labels", metavar="FILE.npz:ARRAY", help="other labels for the training images, as CIFAR-10N's are")
    add("--validation-fraction", type=number(float, 0, 0.99), default=0.0, help="of the training set, held out")
    add("--train-examples", type=count, metavar="N", help="only so many, drawn by --seed; default: all")
    add("--workers", type=natural, default=0, help="processes that decode images")

    add("--opt", default="sgd", help="any timm optimizer")
    add("--opt-kwargs", nargs="*", type=_pair, default=[], metavar="KEY=VALUE")
    add("--lr", type=positive, default=0.05)
    add("--momentum", type=fraction, default=0.9)
    add("--weight-decay", type=amount, default=5e-4, help="not on biases and normalisation parameters, as in timm")
    add("--decay-all", action=SWITCH, default=False, help="weight decay also on biases and normalisation parameters")
    add("--layer-decay", type=positive, help="factor on the learning rate from each layer to the one below")
    add("--sched", choices=SCHEDULES, default="cosine")
    add(
        "--patience-epochs",
        type=natural,
        default=10,
        help="of --sched plateau: epochs without a better loss in training; with a validation split evaluations of it",
    )
    add("--decay-rate", type=positive, default=0.1, help="of --sched plateau, step and multistep")
    add("--warmup-epochs", type=amount, default=0.0)
    add("--min-lr", type=amount, default=0.0)
    add("--epochs", type=count, default=30)
    add("--batch-size", type=count, default=64, help="of each process, where torchrun starts several")
    add("--accumulate", type=count, default=1, help="batches for one update, each with its own perturbation")
    add("--clip-grad", type=positive, help="largest 2-norm of an update's gradient")

    add("--sam-rho", type=amount, default=0.0, help="radius; 0 (default) is the base optimizer")
    add("--adaptive", nargs="?", const="elementwise", choices=("elementwise", "filter", "layer"), help="ASAM")
    add("--sam-eta", type=amount, default=0.01)
    add("--sam-norm", choices=("2", "inf"), default="2")

    add("--sync-ascent", action=SWITCH, default=False, help="one perturbation for all processes, not one for each")

    add("--no-aug", action="store_true", help="no augmentation")
    add("--aug", action="store_false", dest="no_aug", help="the augmentation that a --config turns off")
    add("--hflip", type=fraction, default=0.5)
    add("--aa", metavar="POLICY", help="timm's auto-augment string, e.g. rand-m9-mstd0.5")
    add("--color-jitter", type=amount, default=0.0)
    add("--reprob", type=fraction, default=0.0, help="random erasing")
    add("--crop-scale", type=number(float, 0, 1, above=True), default=0.08, help="smallest area of a resized crop")
    add("--mixup", type=amount, default=0.0, metavar="ALPHA")
    add("--cutmix", type=amount, default=0.0, metavar="ALPHA")
    add("--smoothing", type=number(float, 0, 0.99), default=0.0)
    add("--model-ema", type=number(float, 0, 1), metavar="DECAY", help="also evaluate an average of the weights")

    add("--initial-checkpoint", metavar="FILE", help="weights of the timm model, to start from; a new head if it must")
    add("--grad-checkpointing", action=SWITCH, default=False, help="less memory, one more forward pass")
    add("--fsdp", action=SWITCH, default=False, help="weights, gradients and state spread over the processes (FSDP2)")

    add(
        "--device",
        default="auto",
        help="auto (default): CUDA where torch sees a device, else the CPU; cpu, cuda, cuda:1",
    )
    add("--amp", choices=("bf16", "fp16"))
    add("--channels-last", action=SWITCH, default=False)
    add("--compile", action=SWITCH, default=False)
    add("--seed", type=natural, default=0)
    add("--measures", default="worst,average,eigenvalue,trace", help="after the last epoch; 'none' for no measures")
    add("--out", type=Path, metavar="RUN_DIR", help="default: runs/DATA-MODEL-...")
    add("--eval-every", type=count, default=1, metavar="EPOCHS", help="and after the last epoch")
    add("--checkpoint-steps", type=count, help="also every so many updates, not only after each epoch")
    add("--resume", action="store_true", help="go on from the newest valid checkpoint of --out; its options hold")
    add("--force", action="store_true", help="replace the run in --out")
    for action in p._actions:
        if action.default is None and action.nargs in (None, "?") and action.dest not in NOT_KEPT:
            _may_be_none(action)
    return p


def _may_be_none(action: argparse.Action) -> None:
    """The word none takes back what a --config says of an option that is unset by default."""
    convert: Callable[[str], Any] = action.type if callable(action.type) else str
    action.type = lambda text: None if text == "none" else convert(text)
    if action.choices:
        action.metavar = "{" + ",".join([*action.choices, "none"]) + "}"
        action.choices = [*action.choices, None]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a run; on a resume those in its config.json, which options given now may not contradict."""
    argv = _with_config(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    args.out = args.out or Path("runs") / default_name(args)
    if not (args.resume and (args.out / "config.json").exists()):
        _check(args)
        _as_pretrained(args)
        return args
    kept = read_json(args.out / "config.json").get("options", {})
    for key in given(argv) - ({"initial_checkpoint"} if args.initial_checkpoint == REQUIRED else set()):
        if key not in MAY_CHANGE and key in kept and kept[key] != plain(args)[key]:
            option = "--" + key.replace("_", "-")
            raise InputError(f"{option} {plain(args)[key]} differs from the run's {kept[key]}; leave it out to resume")
        kept[key] = getattr(args, key)
    return restored(kept, out=args.out, resume=True, force=False)


def _with_config(argv: Sequence[str]) -> list[str]:
    """The options of --config FILE before those of the command line, which so replace them."""
    p = Parser(add_help=False)
    p.add_argument("--config", type=Path)
    path = p.parse_known_args(argv)[0].config
    return [*from_file(path), *argv] if path else list(argv)


def from_file(path: Path) -> list[str]:
    """A YAML mapping as a command line: `lr: 0.1`, `no-aug: true`, `opt-kwargs: {nesterov: false}`.

    Raises:
        InputError: no such file, no mapping, an option that does not exist.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"--config {path} cannot be read: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise InputError(f"--config {path} must be a mapping of options to values, like `lr: 0.1`")
    known = {o.removeprefix("--") for action in parser()._actions for o in action.option_strings if o.startswith("--")}
    argv: list[str] = []
    for key, value in values.items():
        name = str(key).replace("_", "-")
        if name not in known - {"help", "config", "out", "resume", "force"}:
            raise unknown(f"option in {path}", name, known)
        if value is False and f"no-{name}" in known:
            argv.append(f"--no-{name}")
        if value is False or value is None:
            continue
        argv.append(f"--{name}")
        if isinstance(value, dict):
            argv += [f"{k}={v}" for k, v in value.items()]
        elif isinstance(value, list):
            argv += [str(v) for v in value]
        elif value is not True:
            argv.append(str(value))
    return argv


def restored(kept: dict[str, Any], **overrides: Any) -> argparse.Namespace:
    """Options from config.json; what it does not have (an older run) is at its default."""
    args = parser().parse_args([])
    values = {key: value for key, value in kept.items() if key in vars(args)} | overrides
    args.__dict__.update(values)
    for key in ("opt_kwargs", "model_kwargs"):
        setattr(args, key, [tuple(pair) for pair in getattr(args, key)])
    return args


def add_run(p: argparse.ArgumentParser) -> None:
    """The run that a command is about, and what may be another one than where it was trained; for `of_run`."""
    p.add_argument("run", type=Path, metavar="RUN_DIR")
    p.add_argument("--data-dir", metavar="DIR", help="default: that of the run")
    p.add_argument("--device", help="default: that of the run")


def of_run(args: argparse.Namespace) -> argparse.Namespace:
    """The options of the trained run, where its data, workers and device are given now with these."""
    path = args.run / "config.json"
    if not path.is_file():
        raise InputError(f"{args.run} is not a run directory: it has no config.json; make one with benchmarks.train")
    replaced = {k: v for k, v in vars(args).items() if k in ("data_dir", "workers", "device") and v is not None}
    return restored(read_json(path).get("options", {}), out=args.run, **replaced)


def given(argv: Sequence[str] | None) -> set[str]:
    """Names of the options that stand on the command line."""
    p = parser()
    for action in p._actions:
        action.default = argparse.SUPPRESS
    return set(vars(p.parse_args(sys.argv[1:] if argv is None else argv)))


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """For config.json: all options but where the run lives and how it was started, as they are read again: a tuple in
    --opt-kwargs is a list there."""
    values = {k: v for k, v in vars(args).items() if k not in NOT_KEPT}
    return json.loads(json.dumps(values))


def default_name(args: argparse.Namespace) -> str:
    sam = f"-{'asam' if args.adaptive else 'sam'}{args.sam_rho:g}" if args.sam_rho else ""
    noise = f"-noise{args.label_noise:g}" if args.label_noise else ""
    noise += f"-{args.train_labels.rpartition(':')[2]}" if args.train_labels else ""
    name = f"{args.data}-{args.model}-{args.opt}{sam}{noise}-s{args.seed}"
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".")[:120]


def _as_pretrained(args: argparse.Namespace) -> None:
    """Images as the weights of --initial-checkpoint know them, where no option says otherwise. It is in the options of
    config.json from then on: runs from before that go on, and are measured, as they were trained."""
    if args.initial_checkpoint and args.data not in ("digits", *LAYOUT):
        for name, value in of_weights(args.model).items():
            if getattr(args, name) is None:
                setattr(args, name, value)


def _check(args: argparse.Namespace) -> None:
    if args.initial_checkpoint == REQUIRED:
        raise InputError(f"this recipe fine-tunes: give --initial-checkpoint FILE (weights of {args.model})")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        raise InputError(
            f"--mixup and --cutmix pair the images of a batch: --batch-size must be even, got {args.batch_size}"
        )
    mean_std, resizing = args.mean or args.std, args.crop_pct or args.interpolation or args.crop_mode
    if args.data == "digits" and (mean_std or resizing):
        raise InputError("digits are normalised as they are read: leave --mean, --std and --crop-pct out")
    if args.data in LAYOUT and resizing:
        raise InputError(f"--data {args.data} is not resized: leave --crop-pct, --crop-mode and --interpolation out")
    if args.adaptive and not args.sam_rho:
        raise InputError("--adaptive needs a radius: give --sam-rho, e.g. 0.5")
    if args.sync_ascent and not args.sam_rho:
        raise InputError("--sync-ascent needs a radius: give --sam-rho, e.g. 0.05")
    if args.fsdp and args.amp == "fp16":
        raise InputError("--fsdp has no scaler for --amp fp16: use --amp bf16")
    if args.sched == "plateau" and args.warmup_epochs:
        raise InputError("--sched plateau follows the loss and has no warm-up: leave --warmup-epochs out")
    if args.resume and args.force:
        raise InputError("--resume goes on with a run and --force replaces it: choose one")
