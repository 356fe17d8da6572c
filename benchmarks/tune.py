"""Which rho, and is SAM worth it? Tunes SAM's radius and, as its control, the weight decay of the base.

    python -m benchmarks.tune --data digits --label-noise 0.4 --epochs 30 --out runs/tune

Takes the options of benchmarks.train. Each value of a grid is trained once and judged on held-out training data; those
that lag stop early (asynchronous successive halving, arXiv:1810.05934). The winners are trained again with new seeds
and compared on the test data. After a stop the same command continues.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.command import Interrupted, Signals
from benchmarks.paired import Difference, difference
from benchmarks.study import storage
from benchmarks.train import data, recipe
from benchmarks.train import options as train_options
from benchmarks.train.epoch import NonFiniteLoss
from benchmarks.train.options import Options
from benchmarks.train.run import Training
from sam_optim.core import random as rng
from sam_optim.core.errors import InputError, run
from sam_optim.core.files import locked, write_json
from sam_optim.core.results import plain
from sam_optim.core.text import mean_and_std

RHOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
DECAYS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
REDUCTION = 3  # one in so many runs at a rung continues
FIRST_SEED = 1000  # of the runs that are compared, which no value was chosen by


@dataclass(frozen=True)
class Arm:
    """One way to train, and the values of the option that is tuned for it."""

    name: str
    option: str
    values: tuple[float, ...]
    options: Options

    def with_value(self, value: float, **changes: Any) -> Options:
        return replace(self.options, **{self.option: value}, **changes)


@dataclass(frozen=True)
class Chosen:
    """value: with the best held-out accuracy, which is `accuracy` after the last epoch; low, high: values that were
    trained to the end and are within one standard error of it. tests: test accuracy of each seed."""

    arm: str
    option: str
    value: float
    low: float
    high: float
    accuracy: float
    num_trials: int
    num_stopped: int
    tests: tuple[float, ...]


@dataclass(frozen=True)
class Tuned:
    sam: Chosen
    base: Chosen
    gain: Difference

    def __str__(self) -> str:
        def shown(c: Chosen, what: str) -> str:
            mean, std = mean_and_std([100 * x for x in c.tests])
            return f"{what} {c.value:g} ({c.low:g} to {c.high:g}): test accuracy {mean:.1f} ± {std:.1f} %"

        gain = self.gain
        interval = f", 95 % interval {gain.low:+.1f} to {gain.high:+.1f}" if math.isfinite(gain.low) else ""
        if gain.low > 0:
            verdict = "SAM is better, at twice the time of a step"
        elif gain.high < 0:
            verdict = "SAM is not worth it: the base with tuned decay is better"
        elif math.isnan(gain.low):
            verdict = "No interval, so neither is shown to be better"
        else:
            verdict = "No difference seen, so SAM is not shown to be worth twice the time of a step"
        return (
            f"{shown(self.sam, 'SAM, rho')}; {shown(self.base, 'base, decay')}; SAM - base {gain.mean:+.1f} points"
            f"{interval} (n = {gain.n}). {verdict}"
        )


def tune(
    options: Options,
    *,
    rhos: Sequence[float] = RHOS,
    decays: Sequence[float] = DECAYS,
    num_seeds: int = 3,
    check: Callable[[], None] = lambda: None,
) -> Tuned:
    """Tunes both arms in `options.out`, from where an earlier call got; see the module.

    Args:
        options: of a run; its rho, if it has one, and its weight decay are replaced where they are tuned.
        check: called between epochs; may raise to stop.

    Raises:
        InputError: no values, no held-out data; `out` was begun with other options.
    """
    if not rhos or not decays or min(rhos) <= 0 or num_seeds < 1:
        raise InputError("tuning needs rhos > 0, decays and at least one seed")
    options = replace(options, validation_fraction=options.validation_fraction or 0.2, measures="none", monitor=0.0)
    arms = [
        Arm("sam", "sam_rho", tuple(rhos), options),
        Arm("base", "weight_decay", tuple(decays), replace(options, sam_rho=0.0)),
    ]
    with locked(options.out.resolve()), rng.preserved():
        sam, base = (_choose(arm, num_seeds, check) for arm in arms)
        tuned = Tuned(sam, base, difference(*([100 * x for x in c.tests] for c in (sam, base))))
        results = {"sam": vars(sam), "base": vars(base), "gain": tuned.gain._asdict()}
        write_json(options.out / "tuned.json", plain(results))
    return tuned


def train(options: Options, report: Callable[[int, float], None], check: Callable[[], None]) -> Training:
    """A whole run in memory; `report` gets (epochs done, held-out accuracy) after each."""
    splits = data.load(options)
    training = Training(options, splits, recipe.device(options))
    for number in range(1, options.epochs + 1):
        training.train_epoch()
        training.next_epoch()
        report(number, training.evaluate("validation")["validation_accuracy"])
        check()
    return training


def _choose(arm: Arm, num_seeds: int, check: Callable[[], None]) -> Chosen:
    import optuna

    study = _opened(arm)
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):  # of a process that was killed
        study.tell(trial.number, state=states.FAIL)
    middle = arm.values[len(arm.values) // 2]
    for value in sorted(arm.values, key=lambda v: abs(math.log((v or 1e-9) / (middle or 1e-9)))):
        done = study.get_trials(states=(states.COMPLETE, states.PRUNED))
        if value not in [trial.user_attrs["value"] for trial in done]:
            with storage.quiet():
                _try(arm, study, value, check)
    done = study.get_trials(states=(states.COMPLETE, states.PRUNED))
    whole = {trial.user_attrs["value"]: trial.value for trial in done if trial.state == states.COMPLETE}
    if not whole:
        raise InputError(f"every {arm.option} of {', '.join(map(str, arm.values))} diverged; lower --lr")
    best = max(whole, key=whole.__getitem__)
    held_out = len(data.load(arm.options).validation)
    error = math.sqrt(2 * max(whole[best] * (1 - whole[best]), 0.25 / held_out) / held_out)  # of a difference
    close = [value for value, a in whole.items() if a >= whole[best] - error]
    tests = []
    for seed in range(FIRST_SEED, FIRST_SEED + num_seeds):
        key = f"{best:g} seed {seed}"
        if key not in study.user_attrs:
            print(f"{arm.name}: {arm.option} {best:g}, seed {seed}", flush=True)
            study.set_user_attr(key, _test(arm.with_value(best, seed=seed), check))
        tests.append(study.user_attrs[key])
    counts = len(done), len(done) - len(whole)
    return Chosen(arm.name, arm.option, best, min(close), max(close), whole[best], *counts, tuple(tests))


def _try(arm: Arm, study: Any, value: float, check: Callable[[], None]) -> None:
    """One trial: trained to the end, stopped early, or diverged."""
    import optuna

    trial = study.ask()
    trial.set_user_attr("value", value)

    def report(number: int, held_out: float) -> None:
        print(f"{arm.name}: {arm.option} {value:g}, epoch {number}: held-out accuracy {held_out:.4f}", flush=True)
        last.append(held_out)
        trial.report(held_out, number)
        if number < arm.options.epochs and trial.should_prune():
            raise optuna.TrialPruned

    last: list[float] = []
    state = optuna.trial.TrialState
    try:
        train(arm.with_value(value), report, check)
        study.tell(trial, last[-1])
    except (optuna.TrialPruned, NonFiniteLoss):
        study.tell(trial, state=state.PRUNED)
    except BaseException:
        study.tell(trial, state=state.FAIL)  # it is tried again
        raise


def _test(options: Options, check: Callable[[], None]) -> float:
    try:
        return train(options, lambda number, held_out: None, check).evaluate("test")["test_accuracy"]
    except NonFiniteLoss:
        return 1 / data.load(options).num_classes  # as good as a guess


def _opened(arm: Arm) -> Any:
    url = storage.url_of(f"sqlite:///{(arm.options.out / 'tune.db').absolute()}", arm.options.out)
    opened = storage.open_storage(url)
    import optuna

    pruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=max(1, arm.options.epochs // REDUCTION**2), reduction_factor=REDUCTION
    )
    with storage.quiet():
        study = optuna.create_study(
            storage=opened, study_name=arm.name, direction="maximize", pruner=pruner, load_if_exists=True
        )
    recorded = {k: v for k, v in arm.options.recorded().items() if k not in (arm.option, *train_options.MAY_CHANGE)}
    before = study.user_attrs.setdefault("options", recorded)
    if before != recorded:
        differing = [key for key in recorded if before.get(key) != recorded[key]]
        raise InputError(
            f"--out {arm.options.out} was started with another {', '.join(differing)}; choose another --out"
        )
    study.set_user_attr("options", recorded)
    return study


def main(argv: Sequence[str] | None = None) -> int:
    p = train_options.parser()
    p.prog, p.description = "python -m benchmarks.tune", (__doc__ or "").splitlines()[0]
    p.add_argument("--rhos", type=float, nargs="+", default=list(RHOS), help="radii of SAM to try")
    p.add_argument("--decays", type=float, nargs="+", default=list(DECAYS), help="weight decays of the base to try")
    p.add_argument(
        "--num-seeds", type=int, default=3, help="runs with the chosen values, for the comparison (default: 3)"
    )
    given: Mapping[str, Any] = vars(p.parse_args(train_options.with_config(sys.argv[1:] if argv is None else argv)))
    options = train_options.options_of(given)
    out = options.out or Path("runs") / f"tune-{train_options.default_name(options)}"
    with Signals() as signals:
        try:
            tuned = tune(
                train_options.checked(replace(options, out=out, sam_rho=options.sam_rho or given["rhos"][0])),
                rhos=given["rhos"],
                decays=given["decays"],
                num_seeds=given["num_seeds"],
                check=signals.check,
            )
        except Interrupted as stop:
            print(f"stopped by {stop.name}; the same command continues", file=sys.stderr)
            return 128 + stop.signum
    print(tuned)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
