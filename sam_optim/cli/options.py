"""The options of `sam-optim`: declared, checked, and turned into what the functions of `sweep` take."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sam_optim._version import __version__
from sam_optim.core.arguments import Parser, number, numbers, numbers_of_any_sign, pair
from sam_optim.core.errors import InputError, unknown
from sam_optim.measures.registry import MEASURES, chosen
from sam_optim.sweep import FunctionProblem, Grid, ImageProblem, Measures, TextProblem

ADAPTIVE = ("elementwise", "filter", "layer")
MATRICES = ("hessian", "ggn", "fisher", "empirical_fisher", "fisher_mc")
DEFAULT_RHO = 0.05
NAMES = "\n".join(f"  {name:20s} {row.about}" for name, row in MEASURES.items())
MEASURE = f"""Measure how sharp the loss is around trained weights.

  sam-optim measure run-*.pt --model resnet18 --data images/ --measures worst,eigenvalue --rho 0.05,0.1 --json out.json
  sam-optim measure --target study:problem --measures trace
  torchrun --nproc-per-node 2 -m sam_optim measure ...      divides the batches; the numbers are the same

measures:
{NAMES}

With --json every result is saved as soon as it is computed, and the same command continues after a stop.
Exit code: 0; 1 where a checkpoint failed or a number is not finite; 2 for a wrong command; 130 after Ctrl-C."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    args = parser().parse_args(_explicit(argv))
    if args.command != "report":
        _check(args)
    return args


def problem(args: argparse.Namespace) -> ImageProblem | FunctionProblem | TextProblem:
    """Which model, loss and data."""
    kind: Any = FunctionProblem if args.target else TextProblem if args.text else ImageProblem
    values = vars(args) | {"function": args.target, "model_kwargs": dict(args.model_kwargs)}
    return kind(**{field.name: values[field.name] for field in fields(kind)})


def measures(args: argparse.Namespace) -> Measures:
    options_of: dict[str, dict[str, Any]] = defaultdict(dict)
    for measure, option, value in args.set:
        options_of[measure][option] = value
    return Measures(
        args.measures,
        rho=args.rho,
        noise_rho=args.noise_rho or (),
        adaptive=args.adaptive,
        eta=args.eta,
        norm=float(args.norm),
        matrices=args.matrix or (),
        num_steps=args.num_steps,
        num_restarts=args.restarts,
        num_samples=args.num_samples,
        num_probes=args.num_probes,
        options_of=options_of,
        seed=args.seed,
    )


def grid(args: argparse.Namespace) -> Grid:
    return Grid(args.directions, args.two, args.range, args.points, args.seed)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="sam-optim", description="Sharpness of trained models: measure it, draw it, report it.")
    p.add_argument("--version", action="version", version=f"sam_optim {__version__}")
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    raw = argparse.RawDescriptionHelpFormatter
    about = "numbers of many checkpoints in one table"
    _measure(commands.add_parser("measure", help=about, description=MEASURE, formatter_class=raw))
    about = "the loss on a line or a plane through the weights"
    _landscape(commands.add_parser("landscape", help=about, description=f"Draw {about}."))
    about = "one page of results, for any browser"
    _report(commands.add_parser("report", help=about, description=f"Write {about}, that loads nothing from elsewhere."))
    return p


def _measure(p: argparse.ArgumentParser) -> None:
    add, count, natural = p.add_argument, number(int, 1), number(int, 0)
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="files, directories, globs")
    _problem(p)
    add("--measures", default="worst,average,eigenvalue,trace", help="separated by commas (default: %(default)s)")
    add("--rho", type=numbers, default=[DEFAULT_RHO], metavar="RHO,...", help="radii, one column each (default: 0.05)")
    about = "standard deviations for the measure average (default: those of --rho)"
    add("--noise-rho", "--sigma", type=numbers, metavar="SIGMA,...", help=about)
    add(
        "--adaptive",
        nargs="?",
        const="elementwise",
        choices=ADAPTIVE,
        help="distances relative to each weight (elementwise), filter or layer; curvature measures then take T H T",
    )
    add("--eta", type=number(float, 0), default=0.01, help="added to |w| where adaptive (default: 0.01)")
    add("--norm", choices=("2", "inf"), default="2", help="p of the ball (default: 2)")
    add("--matrix", type=_matrices, metavar="NAME,...", help=f"of {', '.join(MATRICES)} (default: hessian)")
    add("--num-steps", type=count, help="of each search for the worst point (default: 40)")
    add(
        "--restarts",
        type=count,
        metavar="N",
        help="searches for the worst point (default: 8), all but one from random points",
    )
    add("--num-samples", type=count, help="draws of noise for average (default: 100)")
    add("--num-probes", type=count, help="random vectors for trace (default: 100)")
    add(
        "--set",
        action="append",
        type=_setting,
        default=[],
        metavar="MEASURE.OPTION=VALUE",
        help="any other option of a measure",
    )
    add("--seed", type=natural, default=0, help="of all random draws (default: 0)")
    add("--json", type=Path, metavar="FILE", help="save results here; what it already holds is not measured again")
    add("--csv", type=Path, metavar="FILE", help="write the table here, for a spreadsheet")
    add("--quiet", action="store_true", help="no progress on standard error")


def _problem(p: argparse.ArgumentParser) -> None:
    """Which model, loss and data."""
    add, count = p.add_argument, number(int, 1)
    g = p.add_argument_group("model")
    g.add_argument("--model", metavar="NAME", help="a timm model, cnn3, cnn5 or wrn28_10 (default: that of the run)")
    g.add_argument(
        "--model-kwargs", nargs="+", type=pair, default=[], metavar="KEY=VALUE", help="for timm.create_model"
    )
    g.add_argument("--num-classes", type=count, help="default: the rows of the checkpoint's last layer")
    g.add_argument("--small-stem", action="store_true", help="3x3 first convolution, stride 1, no max-pool (CIFAR)")
    g.add_argument("--ema", action="store_true", help="the averaged weights of a checkpoint that has both")
    g.add_argument("--key", metavar="NAME", help="the entry of a checkpoint that holds the weights")
    g.add_argument("--target", metavar="MODULE:FUNCTION", help="any model, loss and data: see docs/measures/command.md")
    g = p.add_argument_group("data")
    g.add_argument(
        "--data", metavar="WHERE", help="directory of images or of CIFAR/MNIST, .npz/.safetensors/.pt, digits, timm"
    )
    g.add_argument("--data-dir", metavar="DIR", help="directory of a data set that timm knows by name (torch/cifar10)")
    g.add_argument("--split", help="train (default where there is one), val, test, or a folder of that name")
    g.add_argument("--class-to-idx", type=Path, metavar="FILE", help='.json, {"cat": 0, ...} (default: sorted names)')
    g.add_argument(
        "--examples", type=number(int, 0), default=512, help="number of examples, the first ones; 0: all (default: 512)"
    )
    g.add_argument("--order", choices=("file", "mixed"), default="file", help="mixed: a fixed random sample of all")
    g.add_argument("--batch-size", type=count, default=128, help="the m of m-sharpness (default: 128)")
    g.add_argument("--image-size", type=count, metavar="PIXELS", help="default: the run's, else the model's")
    g.add_argument(
        "--mean", type=numbers_of_any_sign, metavar="R,G,B", help="of the pixels in [0, 1] (default: the model's)"
    )
    g.add_argument("--std", type=numbers, metavar="R,G,B", help="as --mean")
    g.add_argument("--crop-pct", type=number(float, 0, 1, above=True), help="share of the resized image that is kept")
    g.add_argument(
        "--text", type=Path, metavar="FILE", help=".tsv or .csv; each CHECKPOINT is a folder of transformers"
    )
    g.add_argument(
        "--text-columns", type=_words, default=[], metavar="NAME,...", help="columns of --text: one, or two for pairs"
    )
    g.add_argument(
        "--label-column", default="label", metavar="NAME", help="column of --text with the classes (default: label)"
    )
    g.add_argument("--max-length", type=count, default=128, help="tokens taken of each text (default: 128)")
    g = p.add_argument_group("loss")
    g.add_argument("--normalize-logits", action="store_true", help="center the logits and divide them by their norm")
    g.add_argument(
        "--batch-statistics", action="store_true", help="normalization layers use the statistics of each batch"
    )
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    add("--dtype", choices=("float32", "float64"), help="default: float32; with --target that of the model")


def _landscape(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="one file or directory")
    _problem(p)
    add("--other", metavar="CHECKPOINT", help="draw the loss on the line to these weights instead")
    add(
        "--directions",
        choices=("random", "eigen", "gradient"),
        default="random",
        help="default: random, scaled per filter",
    )
    add("--two", action="store_true", help="a plane instead of a line")
    add("--range", type=number(float, 0, above=True), default=1.0, help="from -RANGE to RANGE (default: 1)")
    add("--points", type=number(int, 2), default=21, help="points in each direction (default: 21)")
    add("--seed", type=number(int, 0), default=0)
    add("--out", type=Path, required=True, metavar="FILE", help=".html, .json, .png or .svg (.json without matplotlib)")
    add("--quiet", action="store_true", help="no progress on standard error")


def _report(p: argparse.ArgumentParser) -> None:
    add = p.add_argument
    add("results", nargs="+", type=Path, metavar="FILE", help=".json of measure or landscape, .csv of measure")
    add("-o", "--out", type=Path, required=True, metavar="FILE", help="the page, .html")
    add("--targets", type=Path, metavar="FILE", help=".csv with a column checkpoint and one or more columns of numbers")
    add(
        "--target",
        metavar="COLUMN",
        help="column of --targets or of a .csv that sharpness is compared with (default: all)",
    )
    add(
        "--factors",
        default="",
        metavar="COLUMN,...",
        help="columns that were varied between runs: also tau within each",
    )
    add("--title", default="Sharpness of checkpoints")


def _setting(text: str) -> tuple[str, str, Any]:
    key, value = pair(text)
    measure, dot, option = key.partition(".")
    if not dot or measure not in MEASURES:
        raise argparse.ArgumentTypeError(f"must be MEASURE.OPTION=VALUE, got {text!r}; measures: {', '.join(MEASURES)}")
    return measure, option, value


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _matrices(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in MATRICES:
            raise argparse.ArgumentTypeError(str(unknown("matrix", name, MATRICES)))
    return names


def _explicit(argv: Sequence[str]) -> list[str]:
    """`--adaptive CHECKPOINT` means `--adaptive elementwise CHECKPOINT`: argparse would take the file for a value."""
    words = []
    for i, word in enumerate(argv):
        following = argv[i + 1] if i + 1 < len(argv) else ""
        words.append("--adaptive=elementwise" if word == "--adaptive" and following not in ADAPTIVE else word)
    return words


def _check(args: argparse.Namespace) -> None:
    if ((args.target or args.text) and (args.model or args.data)) or (args.target and args.text):
        raise InputError("--target and --text bring their own model and data: leave --model and --data out")
    if not (args.target or args.text or args.data):
        raise InputError(
            "say what the loss is over: --data WHERE (with --model), --text FILE, or --target MODULE:FUNCTION"
        )
    if args.command == "landscape":
        if args.out.suffix not in (".html", ".json", ".png", ".svg"):
            raise InputError(f"--out must end in .html, .json, .png or .svg, got {args.out}")
        if args.other and (args.two or args.directions != "random"):
            raise InputError("--other names the direction: leave --two and --directions out")
        return
    args.measures = chosen(args.measures)
    if not args.measures:
        raise InputError(f"--measures names none; choose from {', '.join(MEASURES)}")
    if args.num_samples is not None and args.num_samples < 2:
        raise InputError(f"--num-samples must be >= 2 (draws come in pairs), got {args.num_samples}")
    if args.json is not None and args.json == args.csv:
        raise InputError(f"--json and --csv are both {args.json}; give them different names")
