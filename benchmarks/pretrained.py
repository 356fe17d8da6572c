"""Every measure at trained ResNets for CIFAR-10, those of github.com/akamaster/pytorch_resnet_cifar10 say:

    python -m benchmarks.pretrained pretrained/resnet*.th --data-dir DIR

measures each with all that `sam-optim measure` knows on 512 training images, counts its errors on the test images, and
writes a page, a picture of the spectra and a table, which it prints, too. DIR holds cifar-10-batches-py. Hours on one
CPU thread; what is done is kept, and the same command goes on.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
import pickle
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import command
from benchmarks.command import InputError, one_line
from benchmarks.examples import cifar_resnet
from benchmarks.train import data, options
from sam_optim import cli
from sam_optim.cli import options as cli_options
from sam_optim.cli.options import number as at_least
from sam_optim.core.errors import EXIT_FAILED
from sam_optim.measures import registry
from sam_optim.report.pictures import COLOURS, DASHES, styled
from sam_optim.report.study import cell
from sam_optim.report.tables import number
from sam_optim.sweep import study
from sam_optim.sweep.store import Entry
from sam_optim.vision.checkpoints import find

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TARGET = "benchmarks.examples.cifar_resnet:problem"
IN_A_BALL, IN_A_GEOMETRY = ("worst", "average"), ("worst", "average", "eigenvalue", "trace")
# Options of `sam-optim measure`, and the measures that they are for: the ball of SAM, and that of ASAM, whose radius is
# in units of |w| + eta.
PLAIN = (("--rho 0.05", IN_A_BALL), ("--noise-rho 0.01", ("average",)))
ADAPTIVE = (("--adaptive", IN_A_GEOMETRY), ("--rho 0.5", IN_A_BALL), ("--noise-rho 0.05", ("average",)))
OWN = (
    ("--num-probes 40", [name for name in registry.MEASURES if registry.takes(name, "num_probes")]),
    ("--num-samples 40", [name for name in registry.MEASURES if registry.takes(name, "num_samples")]),
    ("--set density.num_probes=2 --set density.num_lanczos=15", ("density",)),
    ("--set regret_fisher.damping=10 --set regret_fisher.tol=0.01", ("regret_fisher",)),
    ("--set regret_fisher.max_products=200 --set regret_fisher.num_probes=0", ("regret_fisher",)),
)

ROWS = (  # (measure, in the ball of ASAM, what it is called in the table)
    ("worst", False, "worst-case rise of the loss, rho 0.05"),
    ("worst", True, "the same for ASAM's ball, rho 0.5"),
    ("average", False, "mean rise under noise of 0.01"),
    ("average", True, "the same for noise of 0.05 (\\|w\\| + 0.01)"),
    ("eigenvalue", False, "largest eigenvalue of H"),
    ("eigenvalue", True, "largest eigenvalue of T H T"),
    ("eigenvalues", False, "the next four of H"),
    ("density", False, "smallest Ritz value of H (15 steps)"),
    ("trace", False, "trace of H"),
    ("trace", True, "trace of T H T"),
    ("frobenius", False, "Frobenius norm of H"),
    ("contrastive_eigenvalue", False, "contrastive largest eigenvalue"),
    ("gradient_regret", False, "gradient regret"),
    ("regret_fisher", False, "gradient regret, Fisher metric, damping 10"),
    ("coherence", False, "gradient coherence"),
    ("noise_scale", False, "gradient noise scale, examples"),
    ("fisher_rao", False, "Fisher-Rao norm, squared"),
    ("relative_flatness", False, "relative flatness, last layer"),
    ("pac_bayes_sigma", False, "PAC-Bayes sigma, rise of 0.1"),
)

Results = Mapping[tuple[str, str, bool], Mapping[str, Any]]  # (checkpoint, measure, in the ball of ASAM) -> result


def measure(
    checkpoints: Sequence[str], out: Path, *, data_dir: Path, images: int, measures: Sequence[str]
) -> tuple[int, list[Entry]]:
    """`sam-optim measure` in both geometries: the worse of its exit codes, and all that it found."""
    os.environ |= {"SAM_OPTIM_CIFAR10": str(data_dir), "SAM_OPTIM_IMAGES": str(images)}
    worst, found = 0, []
    for names, ball in ((measures, PLAIN), ([name for name in measures if name in IN_A_GEOMETRY], ADAPTIVE)):
        words = ["measure", *checkpoints, "--target", TARGET, "--json", str(out), "--measures", ",".join(names)]
        words += [word for text, takers in ball + OWN if set(takers) & set(names) for word in text.split()]
        if names:
            code, entries = study.measured(cli_options.parse(words))
            worst = max(worst, code)
            found += entries.values()
        if worst > EXIT_FAILED:
            break
    return worst, found


@torch.no_grad()
def test_error(checkpoint: str, x: Tensor, y: Tensor) -> float:
    """In percent. x: pixels, (n, 3, 32, 32), uint8."""
    try:
        model = cifar_resnet.pretrained(checkpoint).eval()
    except (RuntimeError, ValueError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{checkpoint} is not of a ResNet for CIFAR without projections: {one_line(error)}") from None
    mean, std = (torch.tensor(t)[:, None, None] for t in (cifar_resnet.MEAN, cifar_resnet.STD))
    wrong = 0
    for pixels, labels in zip(tqdm(x.split(250), desc=f"{checkpoint}, test", disable=None), y.split(250), strict=True):
        wrong += int((model((pixels.float() / 255 - mean) / std).argmax(1) != labels).sum())
    return 100 * wrong / len(y)


def errors(checkpoints: Sequence[str], path: Path, data_dir: Path) -> dict[str, float]:
    """Of each checkpoint on all test images; what the file has of the same weights and images is not counted again."""
    images = data.load("cifar10", data_dir).test.tensors
    seen = hashlib.sha256(b"".join(x.numpy().tobytes() for x in images)).hexdigest()[:16]
    known = {(line["sha256"], line["data"]): float(line["test_error"]) for line in read_errors(path)}
    found = {}
    for checkpoint in find(checkpoints):
        key = (checkpoint.digest(), seen)
        found[checkpoint.name] = (*key, known[key] if key in known else test_error(checkpoint.name, *images))
        text = io.StringIO()
        lines = [(name, *values) for name, values in found.items()]
        csv.writer(text, lineterminator="\n").writerows([("checkpoint", "sha256", "data", "test_error"), *lines])
        command.write_atomic(path, text.getvalue().encode())
    return {name: error for name, (*_, error) in found.items()}


def read_errors(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def results(entries: Iterable[Entry]) -> Results:
    """By measure and geometry; of one command, for it keeps only the last of several settings."""
    found = {}
    for entry in entries:
        if "result" in entry:
            ball = entry["identity"]["options"].get("ball")
            found[entry["checkpoint"], entry["measure"], bool(ball and ball["adaptive"])] = entry["result"]
    return found


def table(found: Results, errors: Mapping[str, float]) -> str:
    """Markdown: a column for each checkpoint, a row for each measure that some have; a dash for what is not there."""
    names = list(errors)
    any_of = {name: next((r["settings"] for (n, *_), r in found.items() if n == name), {}) for name in names}
    rows = [
        ["", *(Path(name).stem.partition("-")[0] for name in names)],
        ["---", *("---:" for _ in names)],
        ["parameters", *(f"{any_of[name].get('num_parameters', 0):,}" for name in names)],
        ["test error, %", *(f"{errors[name]:.2f}" for name in names)],
        ["loss on the measured images", *(number(base_loss(found.get((name, "worst", False)))) for name in names)],
    ]
    for measure, adaptive, title in ROWS:
        if any((name, measure, adaptive) in found for name in names):
            rows.append([title, *(shown(measure, found.get((name, measure, adaptive))) for name in names)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def base_loss(worst: Mapping[str, Any] | None) -> float | None:
    """The mean over the images, of batches that are of one size but for the last."""
    if worst is None:
        return None
    losses, m, n = worst["details"]["base_losses"], worst["settings"]["m"], worst["settings"]["n"]
    sizes = [min(m, n - m * i) for i in range(len(losses))]
    return math.fsum(size * loss for size, loss in zip(sizes, losses, strict=True)) / n


def shown(measure: str, result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "–"
    if measure == "density":
        known = "" if result["converged"] else " (not converged)"
        return number(min(min(nodes) for nodes in result["details"]["nodes"])) + known
    if measure == "eigenvalues":
        return ", ".join(number(value) for value in result["eigenvalues"][1:])
    return cell(result)


def spectra(found: Results) -> Figure:
    """The spectral densities of all checkpoints, one above the other's line."""
    densities = {name: r for (name, measure, _), r in found.items() if measure == "density"}
    with styled(7.2, 4.2) as figure:
        axes = figure.add_subplot()
        for i, (name, r) in enumerate(densities.items()):
            label = Path(name).stem.partition("-")[0]
            style: Any = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.2}
            axes.plot(r["grid"], r["density"], label=label, **style)
        top = max(max(r["density"]) for r in densities.values())
        axes.set(yscale="log", ylim=(top * 1e-7, top * 3), xlabel="eigenvalue of H", ylabel="density (logarithmic)")
        axes.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    p = options.Parser(prog="python -m benchmarks.pretrained", description=__doc__)
    p.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="of a ResNet for CIFAR without projections")
    p.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="holds cifar-10-batches-py")
    p.add_argument("--images", type=at_least(int, 1), default=512, help="training images, evenly spaced (default: 512)")
    p.add_argument("--measures", type=registry.chosen, default=list(registry.MEASURES), help="default: all")
    p.add_argument("--out", type=Path, default=Path("runs/pretrained"), metavar="DIR", help="default: runs/pretrained")
    args = p.parse_args(argv)
    if missing := [name for name in args.checkpoints if not Path(name).is_file()]:
        raise InputError(f"{missing[0]} is not a file; give the checkpoints themselves")
    counted = errors(args.checkpoints, args.out / "errors.csv", args.data_dir)
    path = args.out / "measures.json"
    code, entries = measure(args.checkpoints, path, data_dir=args.data_dir, images=args.images, measures=args.measures)
    if code > EXIT_FAILED:
        return code
    found = results(entries)
    page = ["report", str(path), "--targets", str(args.out / "errors.csv"), "--target", "test_error"]
    title = f"{len(counted)} trained ResNets on CIFAR-10"
    code = max(code, cli.main([*page, "-o", str(args.out / "report.html"), "--title", title]))
    if any(measure == "density" for _, measure, _ in found):
        spectra(found).savefig(args.out / "spectra.png", dpi=160)
    text = table(found, counted)
    command.write_atomic(args.out / "table.md", f"{text}\n".encode())
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(command.run(main))
