"""Train many models, measure all of them, and report whether flatness goes with generalization.

python -m benchmarks.study run CONFIG
python -m benchmarks.study status CONFIG
python -m benchmarks.study report CONFIG
python -m benchmarks.study compare CONFIG --by FACTOR
python -m benchmarks.study report --csv FILE --measures a,b --targets c --factors lr,seed
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from benchmarks.command import Parser
from benchmarks.study import config, storage
from sam_optim.core.arguments import number
from sam_optim.core.errors import InputError, run
from sam_optim.core.files import intact


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    source = getattr(args, "csv", None) or f"the storage of {args.config}"
    with storage.readable(source), nullcontext() if args.function is _run else intact(source):
        return args.function(args)


def parser() -> Parser:
    count, natural = number(int, 1), number(int, 0)
    p = Parser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = p.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    run = commands.add_parser(
        "run", help="train the models of a study; several processes and machines may work on it together"
    )
    run.set_defaults(function=_run)
    run.add_argument("--data-dir", metavar="DIR", help="where the data are on this machine")
    run.add_argument("--cifar-c", metavar="DIR", help="where CIFAR-10-C is, for published = true of [corruptions]")
    run.add_argument("--device", default="auto", help="default: CUDA where torch sees it, else the CPU")
    run.add_argument("--decoders", type=natural, default=0, metavar="N", help="processes that decode images")
    run.add_argument(
        "--heartbeat", type=count, default=60, metavar="SECONDS", help="between two signs of life (default: 60)"
    )
    run.add_argument(
        "--grace",
        type=count,
        metavar="SECONDS",
        help="silence after which a worker is dead (default: three heartbeats)",
    )
    run.add_argument("--limit", type=count, metavar="N", help="train at most N models, then end")
    run.add_argument("--no-wait", action="store_true", help="end while other workers train the last models")
    status = commands.add_parser("status", help="say how much of a study is done")
    status.set_defaults(function=_status)
    report = commands.add_parser("report", help="write one page: which measures go with which errors")
    report.set_defaults(function=_report)
    compare = commands.add_parser(
        "compare", help="compare the levels of one factor: mean and deviation over seeds, differences"
    )
    compare.set_defaults(function=_compare)
    compare.add_argument("--by", required=True, metavar="FACTOR", help="whose levels are compared, e.g. method")
    compare.add_argument(
        "--over", default="seed", metavar="FACTOR", help="what the runs of one level differ in (default: seed)"
    )
    compare.add_argument(
        "--baseline", metavar="LEVEL", help="level that the others are compared with; default: the first"
    )
    compare.add_argument("--targets", type=_names, default=["test_accuracy"], help="default: test_accuracy")
    for sub in (run, status, report, compare):
        sub.add_argument("config", type=Path, nargs="?" if sub is report else None, metavar="CONFIG")
        sub.add_argument("--out", type=Path, metavar="DIR", help="runs and report; default: runs/study-NAME")
        sub.add_argument(
            "--storage",
            metavar="URL",
            help=f"sqlite:///FILE or postgresql://USER@HOST/DATABASE; default: ${storage.ENVIRONMENT}, or OUT/study.db",
        )
    report.add_argument(
        "--csv", type=Path, metavar="FILE", help="a table with one row for each model, or a report's results.json"
    )
    report.add_argument("--measures", type=_names, help="columns of --csv; for a study: only these")
    report.add_argument("--targets", type=_names, help="columns of --csv; for a study: only these")
    report.add_argument("--factors", type=_names, default=[], help="columns of --csv that were varied")
    report.add_argument("--given", metavar="FACTOR[,FACTOR]", help="factors to hold fixed; default: lr, else the first")
    report.add_argument("--where", metavar="COLUMN<NUMBER", help="only these models, e.g. train_error<21")
    report.add_argument("--resamples", type=count, default=2000, help="of the bootstrap")
    report.add_argument("--seed", type=natural, default=0, help="of the bootstrap")
    return p


def _run(args: argparse.Namespace) -> int:
    from benchmarks.study.queue import Queue
    from benchmarks.study.trial import Here, check
    from benchmarks.study.worker import work

    study, out, url = _study(args)
    here = Here(out / "runs", args.data_dir, args.device, args.decoders, args.cifar_c)
    check(study, here)  # before anything is written
    queue = Queue(study, url, heartbeat=args.heartbeat, grace=args.grace, replace=True)
    print(f"study {study.name}, {study.total} models, in {storage.shown(url)}", flush=True)
    return work(queue, here, limit=args.limit, wait=not args.no_wait)


def _status(args: argparse.Namespace) -> int:
    from benchmarks.study.queue import Queue

    study, _, url = _started(args)
    print(Queue(study, url).tally())
    return 0


def _report(args: argparse.Namespace) -> int:
    from benchmarks.study import report

    if (args.csv is None) == (args.config is None):
        raise InputError("give a study's CONFIG or --csv FILE, one of them")
    if args.csv:
        named = args.measures, args.targets
        if args.csv.suffix == ".json":
            table = report.from_results(args.csv, *named, given=args.given)
        else:
            table = report.from_csv(args.csv, *named, args.factors, given=args.given)
        out = args.out or Path("runs") / f"study-{args.csv.stem}"
    else:
        study, out, url = _started(args)
        table = report.from_study(study, url, args.measures, args.targets, given=args.given)
    if args.where:
        table = report.where(table, args.where)
    return report.write(table, out, num_resamples=args.resamples, seed=args.seed)


def _compare(args: argparse.Namespace) -> int:
    from benchmarks.study import compare

    study, out, url = _started(args)
    runs = compare.runs_of(study, url)
    compared = compare.compare(runs, args.by, over=args.over, baseline=args.baseline, targets=args.targets)
    return compare.write(compared, out, runs)


def _study(args: argparse.Namespace) -> tuple[config.Config, Path, str]:
    study = config.load(args.config)
    out = args.out or Path("runs") / f"study-{study.name}"
    return study, out, storage.url_of(args.storage, out)


def _started(args: argparse.Namespace) -> tuple[config.Config, Path, str]:
    """As `_study`; looking at a study makes none."""
    study, out, url = _study(args)
    if not storage.has_study(url, study.name):
        where = f"there is no study {study.name!r} in {storage.shown(url)} yet"
        raise InputError(f"{where}; start it: python -m benchmarks.study run {args.config}")
    return study, out, url


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(run(main))
