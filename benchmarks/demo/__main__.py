"""SGD, SAM and ASAM on real digits with noisy labels: train, measure, and write one page with everything.

    python -m benchmarks.demo --out runs/demo

Finished runs are kept under --out and reused when their settings are the same, so it can be stopped and started again.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from benchmarks.command import duration
from benchmarks.demo.findings import mean, summary, tuning_table
from benchmarks.demo.page import page
from benchmarks.demo.plan import METHODS, QUICK, Plan, final_jobs, fingerprint, shorter, tuning_jobs
from sam_optim.core.arguments import Parser, number
from sam_optim.core.errors import EXIT_INTERRUPTED, InputError, run
from sam_optim.core.files import intact, locked, read_json, write_json
from sam_optim.report import write_page

Job = Mapping[str, Any]
Results = dict[str, dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    out = Path(options.out)
    _prepare(out)
    with locked(out.resolve()):
        return _run(options, out)


def _run(options: Namespace, out: Path) -> int:
    start = time.perf_counter()
    plan = shorter(QUICK if options.quick else Plan(), epochs=options.epochs, num_seeds=options.seeds)
    try:
        anything = {method: grid[0] for method, grid in plan.grids.items()}
        later = sum(map(_cost, final_jobs(plan, anything).values()))  # whatever is chosen, it costs the same
        title = "tuning on the validation split"
        tuning = run_all(tuning_jobs(plan), out / "runs", options.workers, title, later=later)
        with intact(out / "runs"):
            chosen = choose(plan, tuning)
        for method, value in chosen.items():
            print(f"  {METHODS[method].name}: {METHODS[method].tuned} = {value:g}")
        final = run_all(final_jobs(plan, chosen), out / "runs", options.workers, "training and measuring")
    except KeyboardInterrupt:
        print("\nInterrupted. Finished runs are kept; the same command continues from here.", file=sys.stderr)
        return EXIT_INTERRUPTED
    with intact(out / "runs"):
        report(plan, chosen, tuning, final, out, quick=options.quick, seconds=time.perf_counter() - start)
    return 0


def parser() -> Parser:
    p, count = Parser(prog="python -m benchmarks.demo", description=__doc__.split("\n")[0]), number(int, 1)
    p.add_argument("--out", default="runs/demo", help="everything is written below it (default: runs/demo)")
    p.add_argument("--workers", type=number(int, 0), default=2, help="processes of one thread each (default: 2)")
    p.add_argument("--seeds", type=count, help="runs of each method (default: 5)")
    p.add_argument("--epochs", type=count, help="epochs of one training (default: 30)")
    p.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes: shows that the demo works, not a result"
    )
    return p


def run_all(jobs: Mapping[str, Job], folder: Path, workers: int, title: str, *, later: float = 0) -> Results:
    """The result of every job, from its file where it was run before with these settings.

    later: what is to be run after these jobs, as `_cost` counts; the time that is left is of all, at the pace measured.
    """
    paths = {name: folder / f"{name}-{fingerprint(job)}.json" for name, job in jobs.items()}
    results = {name: read_json(path) for name, path in paths.items() if path.exists()}
    if results:
        print(f"{len(results)} of {len(jobs)} runs ({title}) have the same settings and code as before and are reused.")
    left = {name: job for name, job in jobs.items() if name not in results}
    with _progress(jobs, results, title, later) as bar:
        for name, result in _execute(left, workers):
            write_json(paths[name], result)
            results[name] = result
            bar.set_postfix_str(name, refresh=False)
            bar.update(_cost(jobs[name]))
    return {name: results[name] for name in jobs}


def choose(plan: Plan, tuning: Results) -> dict[str, float]:
    """For each tuned method the value with the highest mean validation accuracy at the last epoch."""
    return {m: max(values, key=lambda v: mean(values[v])) for m, values in tuning_table(plan, tuning).items()}


def report(
    plan: Plan, chosen: Mapping[str, float], tuning: Results, final: Results, out: Path, *, quick: bool, seconds: float
) -> None:
    """Write the page and the numbers, close with a table and the path."""
    results = summary(plan, chosen, tuning, final) | {"quick": quick, "seconds": seconds}
    write_json(out / "results.json", results)
    path = write_page(out / "report.html", page(plan, results, final))
    print(f"\n{results['terminal_table']}\n\n{results['headline']}")
    if quick:
        print("(--quick: this shows that the demo works; its numbers mean nothing.)")
    print(f"\n{duration(seconds)}. Open {path.resolve().as_uri()}")


def _execute(jobs: Mapping[str, Job], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) as they finish; longest first, so that no worker is left alone with one at the end."""
    from benchmarks.demo.runs import execute, ignore_interrupts

    names = sorted(jobs, key=lambda name: -_cost(jobs[name]))
    if not workers or len(jobs) <= 1:
        for name in names:
            yield name, execute(jobs[name])
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=ignore_interrupts) as pool:
        running = {pool.submit(execute, jobs[name]): name for name in names}
        try:
            for future in as_completed(running):
                yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise InputError("a worker process died (out of memory?); start again with --workers 1") from None
        except KeyboardInterrupt:
            print("\nFinishing the runs in progress (seconds) ...", file=sys.stderr)
            yield from [(running[future], future.result()) for future in running if not future.cancel()]
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _progress(jobs: Mapping[str, Job], results: Mapping[str, Any], title: str, later: float) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        raise InputError("the demo needs tqdm and scikit-learn: pip install 'sam_optim[bench]'") from None
    done, total = (sum(_cost(jobs[name]) for name in names) for names in (results, jobs))
    shape = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left  {postfix}"
    return tqdm(total=total + later, initial=done, desc=title, bar_format=shape, dynamic_ncols=True)


def _cost(job: Job) -> float:
    """What a job costs, in epochs of SGD: SAM takes two passes, the measures of a reported run as much as 90 epochs."""
    training = job["epochs"] * (1 if job["rho"] is None else 1.8)
    return training + (90 + 80 * job["plane"] if job["kind"] == "final" else 0)


def _prepare(out: Path) -> None:
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot create {str(out)!r} ({error}); choose another --out") from None
    if (out / "report.html").exists() and not (out / "results.json").exists():
        raise InputError(f"{out / 'report.html'} already exists and is not from this demo; choose another --out")


if __name__ == "__main__":
    sys.exit(run(main))
