"""Compare SAM, its variants and controls, each tuned on held-out data, on one task.

    python -m benchmarks.frontier run benchmarks/studies/frontier_digits.toml
    python -m benchmarks.frontier status benchmarks/studies/frontier_*.toml
    python -m benchmarks.frontier collect benchmarks/studies/frontier_*.toml    # into benchmarks/results/frontier
    python -m benchmarks.frontier report docs/which_sam.md

Each training is a file when it is done: a run that was stopped goes on where it was with the same command, and with
--committed where the committed results are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import Parser, duration
from benchmarks.frontier import plan as plans
from benchmarks.frontier import report
from benchmarks.frontier.plan import Plan
from benchmarks.frontier.runs import available, execute, expected, read_record
from benchmarks.study.trial import Here
from benchmarks.study.worker import terminating
from sam_optim.core.arguments import number
from sam_optim.core.errors import run
from sam_optim.core.files import locked


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    code: int = args.function(args)
    return code


def parser() -> Parser:
    p = Parser(prog="python -m benchmarks.frontier", description=(__doc__ or "").splitlines()[0])
    commands = p.add_subparsers(required=True, metavar="run | status | collect | report")
    running = commands.add_parser("run", help="tune and train what is not done yet")
    running.set_defaults(function=_run)
    running.add_argument("--data-dir", metavar="DIR", help="of images, or of the texts and their model")
    running.add_argument("--committed", action="store_true", help="go on from the runs in benchmarks/results/frontier")
    running.add_argument("--limit", type=number(int, 1), metavar="N", help="train at most N models, then end")
    status = commands.add_parser("status", help="say how much of each comparison is done, and how long the rest takes")
    status.set_defaults(function=_status)
    collect = commands.add_parser("collect", help="write the finished runs to benchmarks/results/frontier")
    collect.set_defaults(function=_collect)
    reporting = commands.add_parser("report", help="write the tables and the picture of a page from those results")
    reporting.set_defaults(function=_report)
    reporting.add_argument("page", type=Path, metavar="PAGE")
    for sub in (running, status, collect):
        sub.add_argument("plans", type=Path, nargs="+", metavar="FILE")
        sub.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    return p


def _run(args: argparse.Namespace) -> int:
    trained = 0
    with terminating():
        for path in args.plans:
            plan = plans.load(path)
            out = args.out / plan.name
            with locked(out.resolve()):
                if args.committed:
                    report.restore(plan, out)
                print(status(plan, out), flush=True)
                for current, record, new in execute(plan, out, Here(out / "runs", args.data_dir)):
                    if not new:
                        continue
                    key = "validation_accuracy" if current.tuning else "test_accuracy"
                    print(f"{current.name}: {key} {record[key]}, {record['cpu_seconds']:.1f} s of CPU", flush=True)
                    trained += 1
                    if trained == args.limit:
                        return 0
                print(status(plan, out), flush=True)
    return 0


def _status(args: argparse.Namespace) -> int:
    for path in args.plans:
        plan = plans.load(path)
        print(status(plan, args.out / plan.name))
    return 0


def _collect(args: argparse.Namespace) -> int:
    for path in args.plans:
        plan = plans.load(path)
        print(report.collect(plan, args.out / plan.name))
    return 0


def _report(args: argparse.Namespace) -> int:
    print(report.write(args.page))
    return 0


def status(plan: Plan, out: Path) -> str:
    """One line. The guess is from the mean CPU time of what is done, else from the plan's `seconds`."""
    paths = [out / "records" / f"{r.name}.json" for c in plan.conditions for r in expected(plan, c, out)]
    records = [read_record(path) for path in paths if path.is_file()]
    seconds = sum(r["cpu_seconds"] for r in records) / len(records) if records else plan.seconds
    left = plan.total - len(records)
    missing = [method for method in plan.methods if not available(plan, method)]
    text = f"{plan.name}: {len(records)} of {plan.total} runs done"
    text += f", about {duration(left * seconds)} of one CPU thread left" if left else ""
    return text + (f"; this version lacks {', '.join(missing)}" if missing else "")


if __name__ == "__main__":
    sys.exit(run(main))
