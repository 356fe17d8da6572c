"""SGD, SAM and ASAM on real digits with noisy labels: train, measure, and write one page with everything.

    python -m benchmarks.demo --out runs/demo

Finished runs are kept under --out and reused when their settings are the same, so it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.demo.findings import mean, select, summary
from benchmarks.demo.page import page
from benchmarks.demo.plan import METHODS, QUICK, Plan, final_jobs, fingerprint, shorter, tuning_jobs
from sam_optim.report import write_page

Job = Mapping[str, Any]
Results = dict[str, dict[str, Any]]
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    start = time.perf_counter()
    plan = shorter(QUICK if options.quick else Plan(), epochs=options.epochs, num_seeds=options.seeds)
    out = Path(options.out)
    _prepare(out)
    try:
        tuning = run_all(tuning_jobs(plan), out / "runs", options.workers, "tuning on the validation split")
        chosen = choose(plan, tuning)
        for method, value in chosen.items():
            print(f"  {METHODS[method].name}: {METHODS[method].tuned} = {value:g}")
        final = run_all(final_jobs(plan, chosen), out / "runs", options.workers, "training and measuring")
    except KeyboardInterrupt:
        print("\nInterrupted. Finished runs are kept; the same command goes on from here.", file=sys.stderr)
        return EXIT_INTERRUPTED
    report(plan, chosen, tuning, final, out, quick=options.quick, seconds=time.perf_counter() - start)
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__.split("\n")[0])
    found.add_argument("--out", default="runs/demo", help="everything is written below it (default: runs/demo)")
    found.add_argument("--workers", type=_count, default=2, help="processes of one thread each (default: 2)")
    found.add_argument("--seeds", type=_positive, help="runs of each method (default: 5)")
    found.add_argument("--epochs", type=_positive, help="epochs of one training (default: 30)")
    found.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes, to see that it works; no result"
    )
    return found


def run_all(jobs: Mapping[str, Job], folder: Path, workers: int, title: str) -> Results:
    """The result of every job, from its file where it was run before with these settings."""
    paths = {name: folder / f"{name}-{fingerprint(job)}.json" for name, job in jobs.items()}
    found = {name: command.read_json(path) for name, path in paths.items() if path.exists()}
    if found:
        print(f"{len(found)} of {len(jobs)} runs ({title}) have the same settings and code as before and are reused.")
    left = {name: job for name, job in jobs.items() if name not in found}
    with _progress(jobs, found, title) as bar:
        for name, result in _execute(left, workers):
            command.write_json(paths[name], result)
            found[name] = result
            bar.set_postfix_str(name, refresh=False)
            bar.update(_cost(jobs[name]))
    return {name: found[name] for name in jobs}


def choose(plan: Plan, tuning: Results) -> dict[str, float]:
    """For each tuned method the value with the highest mean validation accuracy at the last epoch."""
    return {
        method: max(grid, key=lambda value: mean(select(tuning, method, METHODS[method].tuned, value)))
        for method, grid in plan.grids.items()
    }


def report(
    plan: Plan, chosen: Mapping[str, float], tuning: Results, final: Results, out: Path, *, quick: bool, seconds: float
) -> None:
    """Write the page and the numbers, close with a table and the path."""
    found = summary(plan, chosen, tuning, final) | {"quick": quick, "seconds": seconds}
    command.write_json(out / "results.json", found)
    path = write_page(out / "report.html", page(plan, found, final))
    print(f"\n{found['terminal_table']}\n\n{found['headline']}")
    if quick:
        print("(--quick: this shows that the demo works; its numbers mean nothing.)")
    print(f"\n{_duration(seconds)}. Open {path.resolve().as_uri()}")


def _execute(jobs: Mapping[str, Job], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) as they finish; longest first, so that no worker is left alone with one at the end."""
    from benchmarks.demo.runs import execute

    names = sorted(jobs, key=lambda name: -_cost(jobs[name]))
    if not workers or len(jobs) <= 1:
        for name in names:
            yield name, execute(jobs[name])
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts)
    running = {}
    try:
        running = {pool.submit(execute, jobs[name]): name for name in names}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise command.InputError("a worker process died (out of memory?); start again with --workers 1") from None
    except KeyboardInterrupt:
        print("\nFinishing the runs in progress (seconds) ...", file=sys.stderr)
        for future in [f for f in running if not f.cancel()]:
            yield running[future], future.result()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal; the parent decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _progress(jobs: Mapping[str, Job], found: Mapping[str, Any], title: str) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        raise command.InputError("the demo needs tqdm and scikit-learn: pip install 'sam_optim[bench]'") from None
    done, total = (sum(_cost(jobs[name]) for name in names) for names in (found, jobs))
    shape = "{desc}: {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left  {postfix}"
    return tqdm(total=total, initial=done, desc=title, bar_format=shape, dynamic_ncols=True, leave=True)


def _cost(job: Job) -> float:
    """What a job costs, in epochs of SGD: SAM takes two passes, the measures of a reported run as much as 90 epochs."""
    passes = 1 if job["rho"] is None else 1.8
    measured = job.get("measuring")
    return job["epochs"] * passes + (90 + 80 * job["plane"] if measured else 0)


def _prepare(out: Path) -> None:
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise command.InputError(f"cannot create {str(out)!r} ({error}); choose another --out") from None
    if (out / "report.html").exists() and not (out / "results.json").exists():
        raise command.InputError(f"{out / 'report.html'} is there already and not from this demo; choose another --out")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds // 60:.0f} minutes {seconds % 60:.0f} seconds"


if __name__ == "__main__":
    sys.exit(command.run(main))
