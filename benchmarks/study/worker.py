"""A worker: takes combinations until none is left, whoever else works on the study."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.command import duration
from benchmarks.study.queue import Claim, Heartbeat, Queue
from benchmarks.study.trial import Here, check, execute, run_directory
from sam_optim.core.errors import InputError, one_line, say, show

MAX_POLL = 30.0  # seconds between looks at the queue while others finish


def work(queue: Queue, here: Here, *, limit: int | None = None, wait: bool = True) -> int:
    """Runs combinations; 0 when there are no more, 128 + the signal's number when a signal ends it.

    limit: run at most so many. wait: while other workers run the last ones, stay, to take over from one that dies.
    """
    done, poll = 0, 1.0
    with terminating():
        print(queue.tally(), flush=True)
        while limit is None or done < limit:
            claim = queue.claim()
            if claim is not None:
                if code := _run(queue, claim, here):
                    return code
                done, poll = done + 1, 1.0
                continue
            running = queue.tally().running
            if not (running and wait):
                break
            if poll == 1.0:
                print(f"nothing is waiting; {running} run elsewhere: staying in case one fails", flush=True)
            time.sleep(poll)
            poll = min(1.5 * poll, MAX_POLL)
    print(f"finished: {queue.tally()}", flush=True)
    return 0


def _run(queue: Queue, claim: Claim, here: Here) -> int:
    words = ", ".join(f"{factor} {level}" for factor, level in claim.levels.items())
    show(f"trial {claim.number}: {words}")
    heart = Heartbeat(queue, claim)
    lost = f"trial {claim.number} was given to another worker while this one was silent"
    try:
        with heart, run_directory(here.runs, queue.config, claim.levels) as directory:
            record = execute(queue.config, claim.levels, directory, here)
    except KeyboardInterrupt as stop:
        if heart.lost:
            say(lost)
            return 0
        signum = next((a for a in stop.args if isinstance(a, int)), signal.SIGINT)
        queue.give_back(claim, f"signal {signum}")
        say(f"trial {claim.number} was stopped and given back; the same command continues it")
        return 128 + signum
    except Exception as error:  # whatever it is: else the trial would run for the others until the grace passes
        queue.give_back(claim, one_line(error), died=_can_run(queue, here))
        if not isinstance(error, (ValueError, OSError, RuntimeError)):
            raise
        raise InputError(f"trial {claim.number} ({words}): {one_line(error)}") from error
    sampler = queue.config.sampler
    value = record["targets"].get(sampler.objective if sampler else "test_error")
    if not queue.finish(claim, record, value=value):
        say(lost)
        return 0
    show(f"trial {claim.number}: {_outcome(record)}, {duration(record['seconds'])}")
    print(queue.tally(idle_workers=1), flush=True)
    return 0


def _can_run(queue: Queue, here: Here) -> bool:
    """False where this machine lacks the data or the device: no combination is to blame for that."""
    try:
        check(queue.config, here)
    except Exception:  # whatever it is, the trial did not cause it: none has been trained here
        return False
    return True


def _outcome(record: dict[str, Any]) -> str:
    if record["failed"]:
        return f"diverged ({record['failed']})"
    targets = record["targets"]
    return f"test error {targets['test_error']:.2f} %, training loss {targets['train_loss']:.4g}"


@contextmanager
def terminating() -> Iterator[None]:
    """SIGTERM acts like Ctrl-C; while training runs, its own handler saves first."""

    def stop(signum: int, _: object) -> None:
        raise KeyboardInterrupt(signum)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: no signals arrive here
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
