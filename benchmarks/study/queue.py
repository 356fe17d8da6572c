"""The combinations of a study as Optuna trials: each is waiting, running, complete or failed, whoever works on it.

`reconcile` says what must hold and mends what does not, so that a kill at any point costs at most the work since the
last checkpoint: a combination without a trial gets one, and so does one whose worker died or gave it back.
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

from benchmarks.command import InputError
from benchmarks.study import storage as stores
from benchmarks.study.config import Config, Range

DEATHS = 3  # a combination that has cost so many workers their lives is given up
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
    seconds_left: float = math.nan
    workers: int = 0

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
        self.study = self._opened(replace)

    def _opened(self, replace: bool) -> Any:
        import optuna

        with self._lock():
            study, ours = self._made(), self.config.to_dict()
            kept = study.user_attrs.get("config")
            if kept not in (None, ours):
                reason = f"{self._where()} was started with other settings ({difference(kept, ours)}); "
                self._fail_stale(study)
                if remedy := _in_use(study):
                    raise InputError(reason + remedy)
                if not replace:
                    raise InputError(reason + "none of its models has finished: `run` starts it anew with these")
                optuna.delete_study(study_name=self.config.name, storage=self.storage)
                study, kept = self._made(), None
            if kept is None:
                if study.get_trials(deepcopy=False):
                    raise InputError(f"{self._where()} is a study of another program; choose another name")
                study.set_user_attr("config", ours)
        return study

    def _made(self) -> Any:
        import optuna

        return optuna.create_study(
            study_name=self.config.name,
            storage=self.storage,
            sampler=_sampler(self.config),
            direction="minimize",
            load_if_exists=True,
        )

    def _where(self) -> str:
        return f"study {self.config.name!r} in {stores.shown(self.url)}"

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with stores.locked(self.url, self.config.name), stores.quiet():
            yield

    def claim(self) -> Claim | None:
        """The next combination, now this process's; None where nothing waits."""
        with self._lock():
            self._reconcile()
            return self._next()

    def finish(self, claim: Claim, record: Mapping[str, Any], *, value: float | None) -> bool:
        """Stores the record of a finished combination; False where the trial was taken away in the meantime."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        known = value is not None and math.isfinite(value)
        with self._lock():
            try:
                claim.trial.set_user_attr("record", json.loads(json.dumps(record, allow_nan=False)))
            except UpdateFinishedTrialError:
                return False
            state = TrialState.COMPLETE if known else TrialState.FAIL
            if not known:
                claim.trial.set_user_attr("ended", "failed")
            self.study.tell(claim.trial, value if known else None, state=state)
        return True

    def give_back(self, claim: Claim, why: str, *, died: bool = False) -> None:
        """The trial ends, and its combination waits again; `died` counts against it."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with self._lock():
            try:
                claim.trial.set_user_attr("ended", "died" if died else "given back")
                claim.trial.set_user_attr("why", why)
            except UpdateFinishedTrialError:
                return  # another worker has it already
            self.study.tell(claim.trial, state=TrialState.FAIL)
            self._reconcile()

    def tally(self, *, own: int = 0) -> Tally:
        """Where the study is. own: workers that are between two trials, and count for the time that is left."""
        with stores.quiet():
            return self._tally(self.study.get_trials(deepcopy=False), own)

    def records(self) -> list[dict[str, Any]]:
        """levels, record and number of every combination that ran to its end, diverged ones included."""
        with stores.quiet():
            trials = self.study.get_trials(deepcopy=False)
        ended = [t for t in trials if t.state.name == "COMPLETE" or t.user_attrs.get("ended") == "failed"]
        found = [{"number": t.number, **t.user_attrs["record"]} for t in ended if "record" in t.user_attrs]
        return sorted(found, key=lambda r: json.dumps(r["levels"], sort_keys=True))

    # all below only with the lock

    def _reconcile(self) -> None:
        from optuna.trial import TrialState

        self._fail_stale(self.study)
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "worker" not in trial.user_attrs:  # written under this lock: whoever took the trial is dead
                self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        found = self._by_levels()
        for levels in self._wanted(found):
            states = found.get(key(levels), [])
            if not any(_alive(t) for t in states) and _deaths(states) < DEATHS:
                self.study.enqueue_trial(self._fixed(levels))

    def _fail_stale(self, study: Any) -> None:
        """Trials of dead workers fail. One whose --heartbeat is longer than here is not dead for that."""
        from optuna.storages import fail_stale_trials

        trials = study.get_trials(deepcopy=False)
        beats = [t.user_attrs.get("worker", {}).get("heartbeat", 0) for t in trials if t.state.name == "RUNNING"]
        self.storage.grace_period = max([self._grace, *(2 * seconds for seconds in beats)])
        fail_stale_trials(study)

    def _fixed(self, levels: Levels) -> dict[str, Any]:
        ranges = [f for f, found in self.config.factors.items() if isinstance(found, Range)]
        return {f: level if f in ranges else json.dumps(level) for f, level in levels.items()}

    @property
    def _grid(self) -> bool:
        return self.config.sampler is None

    def _by_levels(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            if (levels := self._levels(trial)) is not None:
                found.setdefault(key(levels), []).append(trial)
        return found

    def _wanted(self, found: Mapping[str, Sequence[Any]]) -> list[Levels]:
        if self._grid:
            return self.config.combinations
        return [json.loads(k) for k in found]  # a sampler's are those that it has drawn

    def _levels(self, trial: Any) -> Levels | None:
        """Of a trial in any state; None for one that died before it had them all, or was drawn twice."""
        if trial.user_attrs.get("ended") == "duplicate":
            return None
        fixed = dict(trial.system_attrs.get("fixed_params", {})) | trial.params
        if set(fixed) != set(self.config.factors):
            return None
        return {f: json.loads(fixed[f]) if isinstance(fixed[f], str) else fixed[f] for f in self.config.factors}

    def _next(self) -> Claim | None:
        from optuna.trial import TrialState

        for _ in range(DRAWS):
            waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
            before = self._by_levels()
            if not waiting and (self._grid or sum(map(_counts, before.values())) >= self.config.total):
                return None
            trial = self.study.ask()
            levels = {factor: suggest(trial, factor, found) for factor, found in self.config.factors.items()}
            earlier = [t for t in before.get(key(levels), []) if t.number != trial.number]
            if not any(_alive(t) for t in earlier) and _deaths(earlier) < DEATHS:
                self.storage.record_heartbeat(trial._trial_id)
                worker = {"host": socket.gethostname(), "pid": os.getpid(), "heartbeat": self.heartbeat}
                trial.set_user_attr("worker", worker)
                return Claim(trial, levels, _deaths(earlier))
            trial.set_user_attr("ended", "duplicate")
            self.study.tell(trial, state=TrialState.PRUNED)
        return None

    def _tally(self, trials: Sequence[Any], own: int) -> Tally:
        groups = self._by_levels()
        done = sum(any(t.state.name == "COMPLETE" for t in ts) for ts in groups.values())
        running = [t for t in trials if t.state.name == "RUNNING"]
        failed = sum(_given_up(ts) for ts in groups.values())
        total = self.config.total
        left, workers = total - done - failed, max(1, len(running) + own)
        seconds = [cost for t in trials if (cost := t.user_attrs.get("record", {}).get("seconds"))]
        weights = [self._passes(self._levels(t) or {}) for t in trials if t.user_attrs.get("record", {}).get("seconds")]
        guess = math.nan
        if seconds:
            unit = math.fsum(seconds) / math.fsum(weights)
            gone = math.fsum(_age(t) for t in running)
            pending = self._weight_left(groups, left) * unit
            guess = max(pending - gone, 0.0) / workers
        return Tally(done, len(running), failed, total, guess, workers)

    def _weight_left(self, groups: Mapping[str, Sequence[Any]], left: int) -> float:
        if not self._grid:
            return 1.5 * left
        over = {k for k, ts in groups.items() if any(t.state.name == "COMPLETE" for t in ts) or _given_up(ts)}
        return math.fsum(self._passes(levels) for levels in self.config.combinations if key(levels) not in over)

    def _passes(self, levels: Levels) -> int:
        """2 for SAM's two forward and backward passes, 1 without."""
        rho = levels.get("sam_rho", self.config.fixed.get("sam_rho", 0))
        return 2 if rho else 1


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
                state = storage.get_trial(trial_id).state
                if state.name == "RUNNING":
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
    if isinstance(levels, Range):
        whole = all(isinstance(v, int) for v in (levels.low, levels.high))
        if whole:
            return trial.suggest_int(factor, levels.low, levels.high, step=int(levels.step or 1), log=levels.log)
        return trial.suggest_float(factor, levels.low, levels.high, step=levels.step, log=levels.log)
    return json.loads(trial.suggest_categorical(factor, [json.dumps(level) for level in levels]))


def key(levels: Levels) -> str:
    return json.dumps(levels, sort_keys=True)


def difference(kept: Any, ours: Any, path: str = "") -> str:
    """The first place where two configs differ, in words."""
    if isinstance(kept, Mapping) and isinstance(ours, Mapping):
        for name in [*kept, *(n for n in ours if n not in kept)]:
            if kept.get(name) != ours.get(name):
                return difference(kept.get(name), ours.get(name), f"{path}.{name}".lstrip("."))
    return f"{path} was {json.dumps(kept)} and is {json.dumps(ours)}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def _in_use(study: Any) -> str:
    """What to do where the settings of a study cannot be replaced: a trial has a result, or somebody works on one."""
    trials = study.get_trials(deepcopy=False)
    if any(t.state.name == "COMPLETE" or t.user_attrs.get("ended") == "failed" for t in trials):
        return "give the new ones another name, or restore the old ones to go on"
    if any(t.state.name == "RUNNING" and "worker" in t.user_attrs for t in trials):
        return "a worker runs one of its models: stop it, or wait until it counts as dead (--grace)"
    return ""


def _alive(trial: Any) -> bool:
    """Nothing more is to be done for its combination: it waits, runs, is complete, or failed by itself."""
    return trial.state.name in ("WAITING", "RUNNING", "COMPLETE") or trial.user_attrs.get("ended") == "failed"


def _deaths(trials: Sequence[Any]) -> int:
    """Trials that ended with neither a record nor a word."""
    return sum(t.state.name == "FAIL" and t.user_attrs.get("ended") in (None, "died") for t in trials)


def _given_up(trials: Sequence[Any]) -> bool:
    failed = any(t.user_attrs.get("ended") == "failed" for t in trials)
    return failed or (_deaths(trials) >= DEATHS and not any(_alive(t) for t in trials))


def _counts(trials: Sequence[Any]) -> bool:
    return any(_alive(t) for t in trials) or _deaths(trials) >= DEATHS


def _age(trial: Any) -> float:
    from datetime import datetime

    return max((datetime.now() - trial.datetime_start).total_seconds(), 0.0) if trial.datetime_start else 0.0


def _sampler(config: Config) -> Any:
    import optuna

    if config.sampler is None:
        return optuna.samplers.RandomSampler(seed=0)  # never asked: every trial is enqueued
    name, options = config.sampler["name"], dict(config.sampler["options"])
    made = getattr(optuna.samplers, str(name), None)
    if not (isinstance(made, type) and issubclass(made, optuna.samplers.BaseSampler)):
        raise InputError(f"optuna.samplers has no {name!r}; TPESampler and RandomSampler are two that it has")
    # each process its own draws: with one seed for all, workers that start together draw the same
    seed = (int(config.sampler["seed"]) * 65_537 + os.getpid()) % 2**31
    try:
        return made(**({"seed": seed} | options))
    except (TypeError, ValueError) as error:
        raise InputError(f"[sampler] {name} cannot be made: {error}") from None
