"""The combinations of a study as Optuna trials: each is waiting, running, complete or failed.

`_reconcile` says what must hold and mends what does not, so that a kill at any point costs at most the work since the
last checkpoint: a combination without a trial gets one, and so does one whose worker died or gave it back. (Optuna's
RetryFailedTrialCallback loses the combination of a worker that dies between its two steps.)
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.command import duration
from benchmarks.study import storage as stores
from benchmarks.study.config import Config, Range, Sampler
from sam_optim.core.errors import InputError

DEATHS = 3  # a combination that has killed this many workers is given up
DRAWS = 50  # of a sampler in a row that were all had before: it has no others to offer for now

Levels = Mapping[str, Any]


@dataclass(frozen=True)
class Claim:
    """A trial that this process runs. levels: one for each factor. deaths: of earlier workers on this combination."""

    trial: Any
    levels: Levels
    deaths: int

    @property
    def number(self) -> int:
        return self.trial.number


@dataclass(frozen=True)
class Tally:
    """How many combinations are done, running, failed for good and still to come; and a guess of the time."""

    done: int
    running: int
    failed: int
    total: int
    seconds_left: float
    workers: int

    @property
    def left(self) -> int:
        return self.total - self.done - self.failed

    def __str__(self) -> str:
        text = f"{self.done} of {self.total} done, {self.running} running, {self.failed} failed"
        if not self.left or not math.isfinite(self.seconds_left):
            return text
        workers = f"{self.workers} worker" + ("s" if self.workers != 1 else "")
        return f"{text}; about {duration(self.seconds_left)} left with {workers}"


class Queue:
    """The study of `config` in the storage at `url`; the first to open it records the settings there.

    replace: where the study was started with other settings and no trial of it has finished or runs, it starts anew.

    Raises:
        InputError: the storage has a study of this name with other settings.
    """

    def __init__(
        self, config: Config, url: str, *, heartbeat: int = 60, grace: int | None = None, replace: bool = False
    ):
        self.config, self.url, self.heartbeat = config, url, heartbeat
        self.storage = stores.open_storage(url, heartbeat=heartbeat, grace=grace)
        self._grace = self.storage.grace_period
        with self._lock():
            self.study = self._opened(replace)

    def claim(self) -> Claim | None:
        """The next combination, now this process's; None where nothing waits."""
        with self._lock():
            self._reconcile()
            return self._next()

    def finish(self, claim: Claim, record: Mapping[str, Any], *, value: float | None) -> bool:
        """Stores the record of a finished combination; False where the trial was taken away in the meantime."""
        if value is None or not math.isfinite(value):
            return self._end(claim, "FAIL", record=json.loads(json.dumps(record, allow_nan=False)), ended="failed")
        return self._end(claim, "COMPLETE", value, record=json.loads(json.dumps(record, allow_nan=False)))

    def give_back(self, claim: Claim, why: str, *, died: bool = False) -> None:
        """The trial ends, and its combination waits again; `died` counts against it."""
        self._end(claim, "FAIL", ended="died" if died else "given back", why=why)

    def tally(self, *, idle_workers: int = 0) -> Tally:
        """How much of the study is done. idle_workers: those between two trials, who count in the estimated time."""
        with stores.quiet():
            groups = self._by_levels()
        trials = [trial for group in groups.values() for trial in group]
        running, total = sum(t.state.name == "RUNNING" for t in trials), self.config.total
        done = sum(any(t.state.name == "COMPLETE" for t in group) for group in groups.values())
        failed = sum(_given_up(group) for group in groups.values())
        seconds = [cost for t in trials if (cost := t.user_attrs.get("record", {}).get("seconds"))]
        workers = max(1, running + idle_workers)
        left = (total - done - failed) * math.fsum(seconds) / len(seconds) / workers if seconds else math.nan
        return Tally(done, running, failed, total, left, workers)

    def records(self) -> list[dict[str, Any]]:
        """levels, record and number of every combination that ran to its end, diverged ones included."""
        with stores.quiet():
            trials = [t for t in self._trials() if _is_result(t) and "record" in t.user_attrs]
        records = [{"number": t.number, **t.user_attrs["record"]} for t in trials]
        return sorted(records, key=lambda r: key(r["levels"]))

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with stores.locked(self.url, self.config.name), stores.quiet():
            yield

    # all below only with the lock

    def _opened(self, replace: bool) -> Any:
        import optuna

        self.study, ours = self._created(), self.config.to_dict()
        recorded = self.study.user_attrs.get("config")
        where = f"study {self.config.name!r} in {stores.shown(self.url)}"
        if recorded not in (None, ours):
            reason = f"{where} was started with other settings ({difference(recorded, ours)}); "
            self._fail_stale()
            if remedy := _in_use(self._trials()):
                raise InputError(reason + remedy)
            if not replace:
                raise InputError(reason + "none of its models has finished: `run` starts it anew with these")
            optuna.delete_study(study_name=self.config.name, storage=self.storage)
            self.study, recorded = self._created(), None
        if recorded is None:
            if self._trials():
                raise InputError(f"{where} is a study of another program; choose another name")
            self.study.set_user_attr("config", ours)
        return self.study

    def _created(self) -> Any:
        import optuna

        name, sampler = self.config.name, _sampler(self.config.sampler)
        return optuna.create_study(study_name=name, storage=self.storage, sampler=sampler, load_if_exists=True)

    def _trials(self) -> list[Any]:
        trials = self.study.get_trials(deepcopy=False)
        if not all(map(_is_ours, trials)):
            where = stores.shown(self.url)
            raise InputError(f"a record in {where} is not one of benchmarks.study; it was changed or damaged")
        return trials

    def _reconcile(self) -> None:
        from optuna.trial import TrialState

        self._fail_stale()
        for trial in self._trials():
            if trial.state.name == "RUNNING" and "worker" not in trial.user_attrs:
                # that is written under this lock: whoever took the trial is dead
                self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        groups = self._by_levels()
        # a sampler's combinations are those that it has drawn
        wanted = [json.loads(k) for k in groups] if self.config.sampler else self.config.combinations
        for levels in wanted:
            if not _is_taken(groups.get(key(levels), [])):
                ranges = self.config.ranges
                self.study.enqueue_trial({f: v if f in ranges else json.dumps(v) for f, v in levels.items()})

    def _fail_stale(self) -> None:
        """Trials of dead workers fail. One whose --heartbeat is longer than here is not dead for that."""
        from optuna.storages import fail_stale_trials

        beats = [
            t.user_attrs.get("worker", {}).get("heartbeat", 0) for t in self._trials() if not t.state.is_finished()
        ]
        self.storage.grace_period = max([self._grace, *(2 * seconds for seconds in beats)])
        fail_stale_trials(self.study)

    def _by_levels(self) -> dict[str, list[Any]]:
        """The trials of each combination that has some."""
        groups: dict[str, list[Any]] = {}
        for trial in self._trials():
            chosen = dict(trial.system_attrs.get("fixed_params", {})) | trial.params
            # one that died before it had all levels, or was drawn twice, is of no combination
            if set(chosen) == set(self.config.factors) and trial.user_attrs.get("ended") != "duplicate":
                levels = {f: json.loads(v) if isinstance(v, str) else v for f, v in chosen.items()}
                groups.setdefault(key(levels), []).append(trial)
        return groups

    def _next(self) -> Claim | None:
        from optuna.trial import TrialState

        for _ in range(DRAWS):
            waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            groups = self._by_levels()
            if not waiting and not (self.config.sampler and sum(map(_is_taken, groups.values())) < self.config.total):
                return None
            trial = self.study.ask()
            levels = {factor: suggest(trial, factor, options) for factor, options in self.config.factors.items()}
            earlier = [t for t in groups.get(key(levels), []) if t.number != trial.number]
            if not _is_taken(earlier):
                self.storage.record_heartbeat(trial._trial_id)
                worker = {"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": self.heartbeat}
                trial.set_user_attr("worker", worker)
                return Claim(trial, levels, _deaths(earlier))
            trial.set_user_attr("ended", "duplicate")
            self.study.tell(trial, state=TrialState.PRUNED)
        return None

    def _end(self, claim: Claim, state: str, value: float | None = None, **attributes: Any) -> bool:
        """False where another worker has the trial already."""
        from optuna.trial import TrialState

        with self._lock():
            try:
                for name, attribute in attributes.items():
                    claim.trial.set_user_attr(name, attribute)
            except RuntimeError:  # Optuna's, of a trial that is finished; of a class of its own in later versions
                return False
            self.study.tell(claim.trial, value, state=TrialState[state])
            self._reconcile()
        return True


class Heartbeat:
    """While active, a thread says that this process lives; where the trial is no longer its own, it stops the process.

    That happens to a worker that was suspended, or cut off from the database, for longer than the grace period: its
    trial was given to another.
    """

    def __init__(self, queue: Queue, claim: Claim):
        self.queue, self.claim, self.lost = queue, claim, False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=30)

    def _beat(self) -> None:
        storage, trial_id = self.queue.storage, self.claim.trial._trial_id
        while not self._over.wait(self.queue.heartbeat):
            try:
                if storage.get_trial(trial_id).state.name == "RUNNING":
                    storage.record_heartbeat(trial_id)
                    continue
            except Exception:  # the database is away for a moment; the next beat tries again
                continue
            self.lost = True
            if not self._over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
            return


def suggest(trial: Any, factor: str, levels: Any) -> Any:
    """The level of `factor` that the queue or the sampler chose. Lists travel as JSON: Optuna knows only scalars."""
    if not isinstance(levels, Range):
        return json.loads(trial.suggest_categorical(factor, [json.dumps(level) for level in levels]))
    if isinstance(levels.low, int) and isinstance(levels.high, int):
        return trial.suggest_int(factor, levels.low, levels.high, step=int(levels.step or 1), log=levels.log)
    return trial.suggest_float(factor, levels.low, levels.high, step=levels.step, log=levels.log)


def key(levels: Levels) -> str:
    return json.dumps(levels, sort_keys=True)


def difference(recorded: Any, ours: Any, path: str = "") -> str:
    """The first place where two configs differ, in words."""
    if isinstance(recorded, Mapping) and isinstance(ours, Mapping):
        for name in [*recorded, *(n for n in ours if n not in recorded)]:
            if recorded.get(name) != ours.get(name):
                return difference(recorded.get(name), ours.get(name), f"{path}.{name}".lstrip("."))
    return f"{path} was {json.dumps(recorded)} and is {json.dumps(ours)}"


def _in_use(trials: Sequence[Any]) -> str:
    """What to do where the settings of a study cannot be replaced: a trial has a result, or a worker has one."""
    if any(map(_is_result, trials)):
        return "give the new ones another name, or restore the old ones to continue"
    if any(t.state.name == "RUNNING" and "worker" in t.user_attrs for t in trials):
        return "a worker runs one of its models: stop it, or wait until it counts as dead (--grace)"
    return ""


def _is_ours(trial: Any) -> bool:
    """Whether what a trial says of itself has the types that `trial.execute` and `_next` write."""
    record, worker = trial.user_attrs.get("record"), trial.user_attrs.get("worker", {})
    if not isinstance(worker, dict) or not isinstance(worker.get("heartbeat", 0), int):
        return False
    if record is None:
        return True
    tables = ("levels", "targets", "measures")
    if not isinstance(record, dict) or not all(isinstance(record.get(name), dict) for name in tables):
        return False
    numbers = [record.get("seconds"), *record["targets"].values(), *record["measures"].values()]
    return all(n is None or isinstance(n, (int, float)) for n in numbers)


def _is_result(trial: Any) -> bool:
    """Complete, or failed by itself: training diverged."""
    return trial.state.name == "COMPLETE" or trial.user_attrs.get("ended") == "failed"


def _is_taken(trials: Sequence[Any]) -> bool:
    """Whether nothing more is to be done for a combination: it waits, runs, has a result, or is given up."""
    alive = any(_is_result(t) or t.state.name in ("WAITING", "RUNNING") for t in trials)
    return alive or _deaths(trials) >= DEATHS


def _deaths(trials: Sequence[Any]) -> int:
    """Trials that ended with neither a record nor a word."""
    return sum(t.state.name == "FAIL" and t.user_attrs.get("ended") in (None, "died") for t in trials)


def _given_up(trials: Sequence[Any]) -> bool:
    if any(t.user_attrs.get("ended") == "failed" for t in trials):
        return True
    return _deaths(trials) >= DEATHS and all(t.state.is_finished() and not _is_result(t) for t in trials)


def _sampler(settings: Sampler | None) -> Any:
    import optuna

    if settings is None:
        return optuna.samplers.RandomSampler(seed=0)  # never asked: every trial is enqueued
    kind = getattr(optuna.samplers, str(settings.name), None)
    if not (isinstance(kind, type) and issubclass(kind, optuna.samplers.BaseSampler)):
        raise InputError(f"optuna.samplers has no {settings.name!r}; TPESampler and RandomSampler are two that it has")
    # each process its own draws: with one seed for all, workers that start together draw the same
    seed = (int(settings.seed) * 65_537 + os.getpid()) % 2**31
    try:
        return kind(**({"seed": seed} | dict(settings.options)))
    except (TypeError, ValueError) as error:
        raise InputError(f"[sampler] {settings.name} cannot be created: {error}") from None
