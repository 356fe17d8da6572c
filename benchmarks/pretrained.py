"""Every measure at trained ResNets for CIFAR-10, such as those of github.com/akamaster/pytorch_resnet_cifar10:

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

from benchmarks.command import Parser
from benchmarks.examples import cifar_resnet
from sam_optim.core.arguments import number as at_least
from sam_optim.core.errors import InputError, one_line, run, show
from sam_optim.core.files import intact, locked, read_bytes, write_atomic
from sam_optim.core.text import MISSING, cell, csv_text, mean_and_std, number, printable
from sam_optim.measures import registry
from sam_optim.report.canvas import COLOURS, DASHES, save, styled
from sam_optim.sweep import Entry, FunctionProblem, Measures, measure_checkpoints, write_report
from sam_optim.vision.checkpoints import find
from sam_optim.vision.data import open_split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

IN_A_BALL, IN_A_GEOMETRY = ("worst", "average"), ("worst", "average", "eigenvalue", "trace")
OPTIONS_OF = {
    "density": {"num_probes": 2, "num_lanczos": 15},
    "regret_fisher": {"damping": 10, "tol": 0.01, "max_products": 200, "num_probes": 0},
}

OF_BATCHES = "eigenvalue of a batch"  # not measured again: the contrastive one has them
ROWS = (  # (measure, in the ball of ASAM, what it is called in the table)
    ("worst", False, "worst-case rise of the loss, rho 0.05"),
    ("worst", True, "the same for ASAM's ball, rho 0.5"),
    ("average", False, "mean rise under noise of 0.01"),
    ("average", True, "the same for noise of 0.05 (\\|w\\| + 0.01)"),
    ("average_in_ball", False, "mean rise under noise as long as rho, 0.05"),
    ("critical", False, "critical sharpness along the gradient"),
    ("eigenvalue", False, "largest eigenvalue of H"),
    (OF_BATCHES, False, "the same of one batch, mean over batches"),
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
    checkpoints: Sequence[str], out: Path, *, data_dir: Path, images: int, names: Sequence[str]
) -> tuple[int, list[Entry]]:
    """Every measure in the ball of SAM, and those of a geometry in that of ASAM, whose radius is in units of |w| + eta:
    the worse exit code, and all entries."""
    os.environ |= {"SAM_OPTIM_CIFAR10": str(data_dir), "SAM_OPTIM_IMAGES": str(images)}
    problem = FunctionProblem("benchmarks.examples.cifar_resnet:problem")
    geometries = [
        (names, {"rho": (0.05,), "noise_rho": (0.01,)}),
        (
            [name for name in names if name in IN_A_GEOMETRY],
            {"rho": (0.5,), "noise_rho": (0.05,), "adaptive": "elementwise"},
        ),
    ]
    code, entries = 0, []
    for measured, ball in geometries:
        if measured:
            sweep = measure_checkpoints(checkpoints, problem, settings(measured, ball), json=out, quiet=False)
            print(sweep.text())
            code = max(code, sweep.exit_code)
            entries += sweep.entries.values()
    return code, entries


def settings(names: Sequence[str], ball: Mapping[str, Any]) -> Measures:
    """These measures, with the options that any of them takes."""
    options: dict[str, Any] = {
        key: 40 for key in ("num_probes", "num_samples") if any(registry.takes(name, key) for name in names)
    }
    if not set(names) & set(IN_A_BALL):
        ball = {key: value for key, value in ball.items() if key == "adaptive"}
    elif "average" not in names:
        ball = {key: value for key, value in ball.items() if key != "noise_rho"}
    options_of = {name: chosen for name, chosen in OPTIONS_OF.items() if name in names}
    return Measures(names, **ball, **options, options_of=options_of)


@torch.no_grad()
def test_error(checkpoint: str, x: Tensor, y: Tensor) -> float:
    """Test error in percent. x: pixels, (n, 3, 32, 32), uint8."""
    try:
        model = cifar_resnet.pretrained(checkpoint).eval()
    except (RuntimeError, ValueError, TypeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"{checkpoint} is not of a ResNet for CIFAR without projections: {one_line(error)}") from None
    mean, std = (torch.tensor(t)[:, None, None] for t in (cifar_resnet.MEAN, cifar_resnet.STD))
    wrong = 0
    bar = tqdm(x.split(250), desc=printable(f"{checkpoint}, test"), disable=None)
    for pixels, labels in zip(bar, y.split(250), strict=True):
        wrong += int((model((pixels.float() / 255 - mean) / std).argmax(1) != labels).sum())
    return 100 * wrong / len(y)


def errors(checkpoints: Sequence[str], path: Path, data_dir: Path) -> dict[str, float]:
    """Test error of each checkpoint; what the file has for the same weights and images is not computed again."""
    images = open_split("cifar10", data_dir, "test")
    fingerprint = hashlib.sha256(images.x.numpy().tobytes() + images.labels.numpy().tobytes()).hexdigest()[:16]
    cached = {(line["sha256"], line["data"]): line["test_error"] for line in read_errors(path)}
    lines: list[tuple[str, str, str, float]] = []
    for checkpoint in find(checkpoints):
        key = (checkpoint.digest(), fingerprint)
        error = cached[key] if key in cached else test_error(checkpoint.name, images.x, images.labels)
        lines.append((checkpoint.name, *key, error))
        write_atomic(path, csv_text(("checkpoint", "sha256", "data", "test_error"), lines).encode())
    return {name: error for name, *_, error in lines}


def read_errors(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with intact(path):
        lines = csv.DictReader(io.StringIO(read_bytes(path).decode(), newline=""))
        return [
            {key: line[key] for key in ("checkpoint", "sha256", "data")} | {"test_error": float(line["test_error"])}
            for line in lines
        ]


def results(entries: Iterable[Entry]) -> Results:
    """Results by measure and geometry; of several settings only the last is kept."""
    by_measure = {}
    for entry in entries:
        if "result" in entry:
            ball = entry["identity"]["options"].get("ball")
            by_measure[entry["checkpoint"], entry["measure"], bool(ball and ball["adaptive"])] = entry["result"]
            if entry["measure"] == "contrastive_eigenvalue":
                values = entry["result"]["details"]["batch_values"]
                mean, std = mean_and_std(values)
                over_batches = {"value": mean, "stderr": std / len(values) ** 0.5}
                by_measure[entry["checkpoint"], OF_BATCHES, False] = entry["result"] | over_batches
    return by_measure


def table(by_measure: Results, errors: Mapping[str, float]) -> str:
    """Markdown: a column for each checkpoint, a row for each measure that some have; a dash for what is not there."""
    names = list(errors)
    any_of = {name: next((r["settings"] for (n, *_), r in by_measure.items() if n == name), {}) for name in names}
    rows = [
        ["", *(Path(name).stem.partition("-")[0] for name in names)],
        ["---", *("---:" for _ in names)],
        ["parameters", *(f"{any_of[name].get('num_parameters', 0):,}" for name in names)],
        ["test error, %", *(f"{errors[name]:.2f}" for name in names)],
        ["loss on the measured images", *(number(base_loss(by_measure.get((name, "worst", False)))) for name in names)],
    ]
    for measure, adaptive, title in ROWS:
        if any((name, measure, adaptive) in by_measure for name in names):
            rows.append([title, *(shown(measure, by_measure.get((name, measure, adaptive))) for name in names)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def base_loss(worst: Mapping[str, Any] | None) -> float | None:
    """The mean over the images; all batches but the last have one size."""
    if worst is None:
        return None
    losses, m, n = worst["details"]["base_losses"], worst["settings"]["m"], worst["settings"]["n"]
    sizes = [min(m, n - m * i) for i in range(len(losses))]
    return math.fsum(size * loss for size, loss in zip(sizes, losses, strict=True)) / n


def shown(measure: str, result: Mapping[str, Any] | None) -> str:
    if result is None:
        return MISSING
    if measure == "density":
        note = "" if result["converged"] else " (not converged)"
        return number(min(min(nodes) for nodes in result["details"]["nodes"])) + note
    if measure == "eigenvalues":
        return ", ".join(number(value) for value in result["eigenvalues"][1:])
    return cell(result)


def spectra(by_measure: Results) -> Figure:
    """The spectral densities of all checkpoints, one above the other's line."""
    densities = {name: r for (name, measure, _), r in by_measure.items() if measure == "density"}
    with styled((7.2, 4.2)) as figure:
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
    p = Parser(prog="python -m benchmarks.pretrained", description=__doc__)
    p.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="of a CIFAR ResNet with identity shortcuts")
    p.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="holds cifar-10-batches-py")
    p.add_argument("--images", type=at_least(int, 1), default=512, help="training images, evenly spaced (default: 512)")
    p.add_argument("--measures", type=registry.chosen, default=list(registry.MEASURES), help="default: all")
    p.add_argument("--out", type=Path, default=Path("runs/pretrained"), metavar="DIR", help="default: runs/pretrained")
    args = p.parse_args(argv)
    if missing := [name for name in args.checkpoints if not Path(name).is_file()]:
        raise InputError(f"{missing[0]} is not a file; give the checkpoints themselves")
    with locked(args.out.resolve()):
        counted = errors(args.checkpoints, args.out / "errors.csv", args.data_dir)
        path = args.out / "measures.json"
        code, entries = measure(args.checkpoints, path, data_dir=args.data_dir, images=args.images, names=args.measures)
        by_measure = results(entries)
        title = f"{len(counted)} trained ResNets on CIFAR-10"
        targets = {"targets": args.out / "errors.csv", "target": "test_error"}
        print(write_report([path], args.out / "report.html", **targets, title=title))
        if any(measure == "density" for _, measure, _ in by_measure):
            save(spectra(by_measure), args.out / "spectra.png", dpi=160)
        text = table(by_measure, counted)
        write_atomic(args.out / "table.md", f"{text}\n".encode())
        show(text)
    return code


if __name__ == "__main__":
    sys.exit(run(main))
