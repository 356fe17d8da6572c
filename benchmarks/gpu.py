"""All that needs a device, in one command: the tests in tests/gpu, `python -m benchmarks.speed.step --device cuda`, and
two rows of `python -m benchmarks.speed.measures --device cuda`.

python -m benchmarks.gpu [--minutes 8] [--json FILE] [--skip-tests]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.speed import cuda, device
from sam_optim.core.errors import run
from sam_optim.core.files import reserved

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 20
TESTS = 150.0  # seconds, at most
MEASURED = ("resnet50", "vit_base_patch16_224")
MEASURES = 35.0  # seconds for each of these
ENDING = 20.0  # seconds in which all of it ends after what was last begun
RESULTS = ROOT / "runs" / "gpu" / "step_cost.json"


def tests(seconds: float) -> tuple[bool, str]:
    """Whether they passed, and the last line of pytest; what this machine's torch deprecates is no failure here."""
    words = ["-m", "pytest", "tests/gpu", "-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider"]
    try:
        out = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as late:
        print(_text(late.stdout)[-3000:])
        return False, f"not finished in {seconds:.0f} s"
    lines = (out.stdout + out.stderr).strip().splitlines()
    if out.returncode:
        print("\n".join(lines[-60:]))
    return out.returncode == 0, lines[-1] if lines else f"exit code {out.returncode}"


def measures(model: str, seconds: float, folder: Path) -> str:
    """The table of `measure_cost` for this model, or why there is none."""
    words = ["-m", "benchmarks.speed.measures", "--device", "cuda", "--model", model, "--quick", "--batch-size", "32"]
    words += ["--images", "32", "--rows", "lambda_max", "trace", "--json", str(folder / f"measure_cost_{model}.json")]
    try:
        out = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:.0f} s"
    lines = out.stderr.strip().splitlines()
    return out.stdout.strip() if not out.returncode else (lines[-1] if lines else f"exit code {out.returncode}")


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results are written")
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args(argv)
    device.check_device()
    deadline = time.monotonic() + 60 * args.minutes - ENDING
    with reserved(args.json, "--json"):
        passed, line = (True, "left out") if args.skip_tests else tests(TESTS)
        tables = {model: measures(model, MEASURES, args.json.parent) for model in MEASURED}
        code = cuda.measure_all(None, ROUNDS, (deadline - time.monotonic()) / 60, args.json)
    for model, table in tables.items():
        print(f"measures of {model}:\n{table}")
    print(f"tests/gpu: {line}")
    return code if passed else 1


if __name__ == "__main__":
    sys.exit(run(main))
