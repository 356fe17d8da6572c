"""The tests on other machines, as far as one machine can stand for them: one combination after the other, then a table.

    python tests/matrix.py                                         # this Python: processors, threads, orders, load
    python tests/matrix.py --python 2.8=venv/bin/python            # and another torch, on this processor
    python tests/matrix.py --only order tests/test_loss.py         # some combinations, some tests
    python tests/matrix.py --list

What has run is not run again: the same command goes on after Ctrl-C, and a commit or an edit begins anew. Exit status 1
if a test failed anywhere.

A processor without AVX-512 or AVX2 is one that torch, oneDNN and MKL are told to take this one for.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
PROCESSORS = {
    "sse": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
}
ORDERS = range(1, 6)
BUSY = 4  # loops beside the tests


@dataclass(frozen=True)
class Combination:
    name: str
    python: str
    environment: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    order: int | None = None
    busy: int = 0


def combinations(pythons: dict[str, str]) -> list[Combination]:
    """One thing changed at a time; of other Pythons, the Python."""
    here = sys.executable
    return [
        Combination("as it is", here),
        *(Combination(f"processor {name}", here, environment) for name, environment in PROCESSORS.items()),
        Combination("threads 2", here, threads=2),
        *(Combination(f"order {seed}", here, order=seed) for seed in ORDERS),
        Combination(f"busy {BUSY}", here, busy=BUSY),
        *(Combination(f"python {name}", str(Path(path).absolute())) for name, path in pythons.items()),
    ]


def fingerprint(arguments: list[str]) -> str:
    """Of the code and the arguments for pytest; a result under another one is of something else."""
    git = ["git", "-C", str(ROOT)]
    commit, edits, untracked = (
        subprocess.run([*git, *command], check=True, capture_output=True).stdout
        for command in (["rev-parse", "HEAD"], ["diff", "HEAD"], ["ls-files", "--others", "--exclude-standard"])
    )
    contents = [Path(ROOT, name).read_bytes() for name in untracked.decode().splitlines()]
    return hashlib.sha256(b"\0".join([commit, edits, *contents, *map(str.encode, arguments)])).hexdigest()[:12]


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run(one: Combination, arguments: list[str], log: Path) -> dict:
    """The tests of one combination: counts, and the names of those that failed."""
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    command = [one.python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *arguments]
    command += [] if one.order is None else ["--order", str(one.order)]
    threads = str(one.threads)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} | one.environment
    began = time.monotonic()
    with busy_loops(one.busy), log.open("w") as out:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT).returncode
    result = {"name": one.name, "code": code, "seconds": time.monotonic() - began, "failed": []}
    if not report.exists():  # pytest itself came to nothing: the log says why
        return result | {"passed": 0, "skipped": 0, "failed": ["(no test ran)"]}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    names = sorted({f"{c.get('classname')}::{c.get('name')}" for c in failed})
    return result | {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": names}


def table(results: list[dict]) -> str:
    lines = [f"{'combination':<20}{'passed':>8}{'failed':>8}{'skipped':>8}{'minutes':>9}"]
    for r in results:
        counts = f"{r['passed']:>8}{len(r['failed']):>8}{r['skipped']:>8}"
        lines.append(f"{r['name']:<20}{counts}{r['seconds'] / 60:>9.1f}")
        lines += [f"    {name}" for name in r["failed"]]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="with another torch")
    parser.add_argument("--only", action="append", metavar="PATTERN", help="combinations whose name matches, `order*`")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "matrix", help="logs and results")
    parser.add_argument("--list", action="store_true", help="print the names of the combinations, and run nothing")
    args, rest = parser.parse_known_args(argv)
    chosen = combinations(dict(pair.split("=", 1) for pair in args.python))
    if args.only:
        chosen = [c for c in chosen if any(fnmatch.fnmatch(c.name, f"{pattern}*") for pattern in args.only)]
    if args.list or not chosen:
        print("\n".join(c.name for c in chosen) or "no combination has such a name")
        return 0 if args.list else 2
    arguments = rest or ["-n", "2", "--dist", "loadfile", "--max-worker-restart", "0"]
    folder = args.out / fingerprint(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for one in chosen:
        log = folder / f"{one.name.replace(' ', '-')}.log"
        file = log.with_suffix(".json")
        if not file.exists():
            print(f"{one.name}: {log}", flush=True)
            file.write_text(json.dumps(run(one, arguments, log), indent=1))
        results.append(json.loads(file.read_text()))
    print(table(results))
    return int(any(r["code"] for r in results))


if __name__ == "__main__":
    raise SystemExit(main())
