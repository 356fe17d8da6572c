"""The queue of a study: every combination once, whoever starts, stops and dies; what a trial records; bad settings."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sam_optim.core import errors, files
from sam_optim.core.errors import InputError

pytest.importorskip("optuna", reason="needs Optuna: pip install 'sam_optim[study]'")

from limits import ONE_THREAD, PATIENCE
from test_corruptions import TestPublished as Published
from test_data import cifar_files, load, picture_tree

from benchmarks import evaluate
from benchmarks.command import duration
from benchmarks.study import __main__ as study
from benchmarks.study import config, report, storage, trial
from benchmarks.study.queue import DEATHS, Queue, difference
from benchmarks.study.trial import Here, run_directory
from benchmarks.study.worker import work

pytestmark = pytest.mark.usefixtures("single_thread")

ROOT = Path(__file__).resolve().parents[1]
TINY = """
name = "tiny"
[grid]
lr = [0.02, 0.1]
sam_rho = [0, 0.1]
seed = [0, 1]
[fixed]
model = "cnn3"
data = "digits"
epochs = 2
train_examples = 128
validation_fraction = 0.2
[[measures]]
names = ["worst", "gradient_regret"]
examples = 64
batch_size = 32
rho = 0.05
"""


def normalized(images):
    """CIFAR-10's pixels as a model sees them, (n, h, w, 3) -> (n, 3, h, w)."""
    mean, std = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    return ((torch.from_numpy(images) / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)


def settings(**tables):
    return config.checked({"name": "s", "grid": {"lr": [0.1, 0.2, 0.3], "seed": [0, 1]}} | tables)


@pytest.fixture
def url(tmp_path):
    return f"sqlite:///{tmp_path / 'study.db'}"


def record(claim, **found):
    return {"levels": dict(claim.levels), "failed": None, "targets": {}, "measures": {}, "seconds": 1.0} | found


def drain(queue):
    """Everything that is waiting, finished."""
    done = []
    while claim := queue.claim():
        assert queue.finish(claim, record(claim), value=1.0)
        done.append(dict(claim.levels))
    return done


def worker(folder, *options, heartbeat=1, file="tiny.toml"):
    """A process of its own that works on the study of folder/tiny.toml."""
    command_line = [sys.executable, "-W", "error", "-m", "benchmarks.study", "run", str(folder / file)]
    command_line += ["--out", str(folder / "out"), "--heartbeat", str(heartbeat), *options]
    environment = os.environ | ONE_THREAD
    return subprocess.Popen(
        command_line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process, code=0):
    out, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, error
    return out, error


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


class TestConfig:
    def test_a_grid_has_every_combination_once_and_is_what_train_understands(self, tmp_path):
        (tmp_path / "tiny.toml").write_text(TINY)
        found = config.load(tmp_path / "tiny.toml")
        assert found.total == len({json.dumps(c) for c in found.combinations}) == 8
        assert found.combinations[1] == {"lr": 0.02, "sam_rho": 0, "seed": 1}
        assert "--lr=0.02" in found.argv(found.combinations[0])

    def test_yaml_says_the_same_as_toml(self, tmp_path):
        import tomllib

        import yaml

        (tmp_path / "a.toml").write_text(TINY)
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(tomllib.loads(TINY)))
        assert config.load(tmp_path / "a.toml").to_dict() == config.load(tmp_path / "a.yaml").to_dict()

    def test_a_level_may_stand_for_several_options(self):
        named = {"plain": {"no_aug": True}, "strong": {"aa": "rand-m9", "mixup": 0.2}}
        found = settings(grid={"augmentation": named, "seed": [0]}, fixed={"model": "resnet18", "data": "cifar10"})
        assert found.combinations == [{"augmentation": "plain", "seed": 0}, {"augmentation": "strong", "seed": 0}]
        argv = found.argv(found.combinations[1])
        assert "--aa=rand-m9" in argv
        assert "--no-aug" not in argv
        assert "--no-aug" in found.argv(found.combinations[0])

    def test_file_names_of_combinations_are_plain_and_differ(self):
        names = {config.identifier({"lr": lr, "aug": a}) for lr in (0.1, 1e-7) for a in ("../x", ".. x", "a" * 300)}
        assert len(names) == 6
        assert all(len(n) < 140 and "/" not in n and not n.startswith(".") for n in names)

    def test_the_studies_of_this_repository_are_valid(self):
        for path in (ROOT / "benchmarks" / "studies").glob(
            "[!f]*.toml"
        ):  # frontier_*.toml are plans of benchmarks.frontier
            assert config.load(path).total >= 48

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ({"grid": {}}, "[grid] is empty"),
            ({"grid": {"learning_rate": [1]}}, "unknown option of benchmarks.train 'learning_rate'"),
            ({"grid": {"lr": [0.1, 0.1]}}, "a level twice"),
            ({"grid": {"lr": []}}, "lr must be a list"),
            ({"grid": {"lr": 0.1}}, "lr must be a list"),
            ({"grid": {"lr": [math.nan]}}, "lr must be finite"),
            ({"grid": {"lr": [-1.0]}}, "lr = -1.0: argument --lr: must be > 0"),
            ({"grid": {"data_dir": ["x"]}}, "given on the command line"),
            ({"grid": {"lr": {"low": 0.1, "high": 1.0}}}, "lr is a range"),
            ({"fixed": {"sched": "linear"}}, "invalid choice"),
            ({"measures": [{"names": ["flatness"]}]}, "unknown measure 'flatness'"),
            ({"measures": [{"names": "worst"}]}, "must be a list"),
            ({"measures": [{}, {}]}, "give each a label"),
            ({"measures": [{"radius": 1}]}, "unknown setting of [measures] 'radius'"),
            ({"measures": [{"split": "bogus"}]}, "unknown split of [[measures]] 'bogus'"),
            ({"measures": [{"split": "validation"}]}, 'split = "validation" of [[measures]] needs held-out examples'),
            (
                {"measures": [{"adaptive": "bogus"}]},
                "unknown adaptive of [[measures]] 'bogus'; choose",
            ),
            ({"measures": [{"rho": -1}]}, "rho of [[measures]] is a radius in weight space and must be > 0, got -1"),
            ({"measures": [{"rho": "big"}]}, "must be > 0, got 'big'"),
            ({"measures": [{"examples": -5}]}, "examples of [[measures]] is a number, 0 for all, got -5"),
            ({"measures": [{"batch_size": 0}]}, "batch_size of [[measures]] is a number, at least 1, got 0"),
            ({"evaluate": {"test_examples": -5}}, "test_examples of [evaluate] is a number, 0 for all, got -5"),
            ({"sampler": {"name": "TPESampler"}}, "needs trials"),
            ({"sampler": {"trials": 3, "objective": "ood_error"}}, "needs [corruptions] with names"),
            ({"sampler": {"trials": 3, "objective": "validation_error"}}, "needs held-out examples: give validation"),
            ({"sampler": {"trials": 3, "objective": "speed"}}, "unknown objective"),
            ({"typo": {}}, "unknown table 'typo'"),
            ({"name": "../x"}, "letters, digits"),
        ],
    )
    def test_bad_settings_are_named(self, content, words):
        with pytest.raises(InputError) as caught:
            config.checked({"name": "s", "grid": {"lr": [0.1]}} | content)
        assert words in str(caught.value)

    def test_what_may_be_said_of_measures(self):
        for adaptive in ("no", False, True, None, "filter"):
            block = {"split": "validation", "adaptive": adaptive, "rho": 1, "examples": 0}
            assert settings(fixed={"validation_fraction": 0.1}, measures=[block]).measures[0].rho == 1

    def test_files_that_are_not_settings(self, tmp_path):
        for name, text in (("a.toml", "= ="), ("b.yaml", "- 1"), ("c.yaml", "a: [")):
            (tmp_path / name).write_text(text)
            with pytest.raises(InputError, match=name):
                config.load(tmp_path / name)
        with pytest.raises(InputError, match="not a file"):
            config.load(tmp_path / "none.toml")


class TestStorage:
    def test_urls(self, tmp_path, monkeypatch):
        assert storage.url_of(None, tmp_path) == f"sqlite:///{tmp_path / 'study.db'}"
        assert storage.url_of("postgresql://u@h/d", tmp_path) == "postgresql+psycopg://u@h/d"
        monkeypatch.setenv(storage.ENVIRONMENT, "postgres://u:secret@h/d")
        assert "secret" not in storage.shown(storage.url_of(None, tmp_path))
        for bad in ("study.db", "mysql://x"):
            with pytest.raises(InputError):
                storage.url_of(bad, tmp_path)

    def test_a_grace_that_living_workers_would_exceed_is_refused(self, tmp_path, capsys):
        with pytest.raises(InputError, match=r"--grace 3 is less than two heartbeats \(--heartbeat 2\).* --grace 4"):
            storage.open_storage(f"sqlite:///{tmp_path / 'study.db'}", heartbeat=2, grace=3)
        (tmp_path / "tiny.toml").write_text(TINY)
        argv = ["run", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out"), "--grace", "60"]
        assert errors.run(study.main, argv) == errors.EXIT_BAD_INPUT
        assert "--grace 60 is less than two heartbeats (--heartbeat 60)" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_lock_is_for_one_and_ends_with_its_holder(self, tmp_path, monkeypatch):
        monkeypatch.setattr(storage, "PATIENCE", 0.1)
        url = f"sqlite:///{tmp_path / 'x.db'}"
        busy = pytest.raises(InputError, match="is being written by process")
        with storage.locked(url, "a"), storage.locked(url, "b"), busy, storage.locked(url, "a"):
            pass
        with storage.locked(url, "a"):
            pass

    def test_a_run_directory_in_use_is_left_alone(self, tmp_path):
        arguments = (tmp_path, settings(), {"lr": 0.1, "seed": 0})
        name = config.identifier({"lr": 0.1, "seed": 0})
        with run_directory(*arguments) as first, run_directory(*arguments) as second:
            assert (first.name, second.name) == (name, f"{name}-2")
        with run_directory(*arguments) as again:
            assert again.name == name


def claim_all(url, numbers):
    queue = Queue(settings(grid={"lr": [i / 100 for i in range(1, 21)]}), url)
    while claim := queue.claim():
        numbers.put(claim.levels["lr"])
        queue.finish(claim, record(claim), value=0.5)


class TestQueue:
    def test_every_combination_comes_once(self, url):
        queue = Queue(settings(), url)
        assert sorted(map(json.dumps, drain(queue))) == sorted(map(json.dumps, settings().combinations))
        assert queue.claim() is None
        assert (queue.tally().done, queue.tally().left) == (6, 0)
        assert len(queue.records()) == 6

    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_workers_that_start_at_the_same_time_run_nothing_twice(self, url):
        context = multiprocessing.get_context("fork")
        numbers = context.Queue()
        processes = [context.Process(target=claim_all, args=(url, numbers)) for _ in range(4)]
        for p in processes:
            p.start()
        found = [numbers.get(timeout=PATIENCE) for _ in range(20)]
        for p in processes:
            p.join(PATIENCE)
        assert [p.exitcode for p in processes] == [0] * 4
        assert numbers.empty()
        assert sorted(found) == [i / 100 for i in range(1, 21)]

    def test_a_trial_given_back_comes_again_and_counts_no_death(self, url):
        queue = Queue(settings(grid={"lr": [0.1, 0.2]}), url)
        first = queue.claim()
        for _ in range(DEATHS + 1):
            queue.give_back(first, "SIGTERM")
            again = [queue.claim() for _ in range(2)]
            assert queue.claim() is None
            (match,) = [c for c in again if c.levels == first.levels]
            assert match.deaths == 0
            for claim in again:
                if claim is not match:
                    queue.give_back(claim, "not now")
            first = match
        queue.give_back(first, "SIGTERM")
        assert len(drain(queue)) == 2

    def test_a_combination_that_kills_its_workers_is_given_up(self, url):
        queue = Queue(settings(grid={"lr": [0.1]}), url)
        for deaths in range(DEATHS):
            claim = queue.claim()
            assert claim.deaths == deaths
            queue.give_back(claim, "out of memory", died=True)
        assert queue.claim() is None
        assert (queue.tally().failed, queue.tally().left) == (1, 0)

    def test_a_silent_worker_loses_its_trial_and_its_result(self, url):
        queue = Queue(settings(grid={"lr": [0.1]}), url, heartbeat=1, grace=2)
        silent = queue.claim()
        time.sleep(3.2)  # the database's clock has whole seconds
        other = Queue(settings(grid={"lr": [0.1]}), url, heartbeat=1, grace=2)
        taken = other.claim()
        assert (taken.levels, taken.deaths) == (silent.levels, 1)
        assert not queue.finish(silent, record(silent, seconds=7.0), value=0.0)
        queue.give_back(silent, "SIGTERM")
        assert other.tally().running == 1
        assert other.finish(taken, record(taken), value=1.0)
        (kept,) = other.records()
        assert kept["seconds"] == 1.0

    def test_a_worker_with_a_longer_heartbeat_than_another_is_not_dead_for_it(self, url):
        found = settings(grid={"lr": [0.1]})
        slow = Queue(found, url, heartbeat=60)
        claim = slow.claim()
        assert slow.claim() is None
        time.sleep(3.2)
        assert Queue(found, url, heartbeat=1, grace=2).claim() is None
        assert slow.finish(claim, record(claim), value=1.0)

    def test_killed_between_taking_and_the_first_heartbeat(self, url):
        queue = Queue(settings(grid={"lr": [0.1]}), url)
        with queue._lock():
            queue._reconcile()
            queue.study.ask()  # RUNNING now, and the process is gone
        claim = queue.claim()
        assert claim.levels == {"lr": 0.1}
        assert claim.deaths == 1

    def test_diverged_is_a_result_that_is_not_tried_again(self, url):
        queue = Queue(settings(grid={"lr": [0.1]}), url)
        claim = queue.claim()
        assert queue.finish(claim, record(claim, failed="the loss is nan"), value=None)
        assert queue.claim() is None
        assert (queue.tally().failed, queue.tally().done) == (1, 0)
        assert queue.records()[0]["failed"] == "the loss is nan"

    def test_other_settings_under_the_same_name_are_refused(self, url):
        Queue(settings(fixed={"epochs": 2}), url)
        Queue(settings(fixed={"epochs": 2}), url)
        with pytest.raises(InputError, match=r"fixed\.epochs was 2 and is 3"):
            Queue(settings(fixed={"epochs": 3}), url)
        assert difference({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}) == "a.c was null and is 2"

    def test_settings_may_be_changed_while_no_model_has_finished(self, url):
        before, after = settings(fixed={"epochs": 2}), settings(fixed={"epochs": 3}, grid={"lr": [0.5]})
        queue = Queue(before, url)
        for _ in range(DEATHS):
            queue.give_back(queue.claim(), "out of memory", died=True)
        with pytest.raises(InputError, match="none of its models has finished: `run` starts it anew"):
            Queue(after, url)
        assert queue.study.user_attrs["config"] == before.to_dict()
        again = Queue(after, url, replace=True)
        assert (again.tally().total, again.tally().left) == (1, 1)
        claim = again.claim()
        assert (claim.levels, claim.deaths) == ({"lr": 0.5}, 0)
        with pytest.raises(InputError, match="a worker runs one"):
            Queue(before, url, replace=True)
        again.finish(claim, record(claim), value=1.0)
        with pytest.raises(InputError, match="another name"):
            Queue(before, url, replace=True)
        assert len(Queue(after, url, replace=True).records()) == 1

    def test_settings_are_kept_where_a_model_diverged(self, url):
        queue = Queue(settings(), url)
        claim = queue.claim()
        queue.finish(claim, record(claim, failed="the loss is nan"), value=None)
        with pytest.raises(InputError, match="another name"):
            Queue(settings(fixed={"epochs": 3}), url, replace=True)

    def test_a_study_of_another_program_is_refused(self, url):
        import optuna

        with storage.quiet():
            other = optuna.create_study(study_name="s", storage=storage.open_storage(url))
            other.add_trial(optuna.trial.create_trial(value=1.0))
        with pytest.raises(InputError, match="another program"):
            Queue(settings(), url)

    def test_the_time_left_is_that_of_a_model_so_far(self, url):
        queue = Queue(settings(grid={"sam_rho": [0, 0.1], "seed": [0, 1]}), url)
        claim = queue.claim()
        queue.finish(claim, record(claim, seconds=10.0), value=1.0)
        assert queue.tally(idle_workers=1).seconds_left == pytest.approx(10 + 10 + 10)
        assert "1 of 4 done, 0 running, 0 failed; about 30 s left with 1 worker" in str(queue.tally(idle_workers=1))
        assert [duration(s) for s in (89, 600, 7300)] == ["89 s", "10 min", "2 h 1 min"]

    def test_a_sampler_draws_from_ranges_until_it_has_enough(self, url):
        grid = {
            "lr": {"low": 0.01, "high": 1.0, "log": True},
            "epochs": {"low": 1, "high": 3},
            "adaptive": [None, "layer"],
        }
        found = settings(grid=grid, fixed={"sam_rho": 0.1}, sampler={"trials": 5, "name": "RandomSampler"})
        queue = Queue(found, url)
        claim = queue.claim()
        queue.give_back(claim, "SIGTERM")
        levels = drain(queue)
        assert len(levels) == 5
        assert claim.levels in levels
        assert all(0.01 <= level["lr"] <= 1 and level["epochs"] in (1, 2, 3) for level in levels)
        assert queue.tally().left == 0

    def test_a_sampler_does_not_run_a_combination_twice(self, url):
        queue = Queue(settings(sampler={"trials": 20, "name": "RandomSampler"}), url)
        levels = drain(queue)
        assert len(levels) == len({json.dumps(level) for level in levels}) == 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study that two processes started at the same time and ran to its end."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.toml").write_text(TINY)
    processes = [worker(folder) for _ in range(2)]
    return folder, [ended(p) for p in processes]


def interrupt(runs, signum):
    """Sends a signal to this process when a run has three epochs behind it."""
    wait_for(lambda: any("epoch   3" in p.read_text() for p in runs.glob("*/log.txt")))
    signal.raise_signal(signum)


class TestRuns:
    def test_two_processes_share_a_study_and_run_nothing_twice(self, finished):
        folder, outputs = finished
        started = [line for out, _ in outputs for line in out.splitlines() if line.startswith("trial") and "lr" in line]
        assert len(started) == len({line.split(":", 1)[1] for line in started}) == 8
        assert all("finished: 8 of 8 done, 0 running, 0 failed" in out for out, _ in outputs)
        assert len([p for p in (folder / "out" / "runs").iterdir() if p.is_dir()]) == 8

    def test_every_model_is_evaluated_and_measured(self, finished):
        folder, _ = finished
        queue = Queue(config.load(folder / "tiny.toml"), storage.url_of(None, folder / "out"))
        records = queue.records()
        assert len(records) == 8
        for found in records:
            targets = found["targets"]
            assert targets["gap"] == pytest.approx(targets["test_error"] - targets["train_error"])
            assert 0 < targets["validation_error"] < 100
            assert set(found["measures"]) == {"worst", "gradient_regret"}
            assert all(math.isfinite(v) for v in found["measures"].values())
            assert found["provenance"]["torch"] == torch.__version__
            assert (
                found["details"][""]["ball"]["groups"][0]["rho"] == 0.05
            )  # not the radius that the model was trained with
        assert [t.value for t in queue.study.get_trials()] == [
            next(r for r in records if r["number"] == t.number)["targets"]["test_error"]
            for t in queue.study.get_trials()
        ]

    def test_the_same_command_again_trains_nothing(self, finished, capsys):
        folder, _ = finished
        before = {p: p.stat().st_mtime_ns for p in (folder / "out" / "runs").rglob("*") if p.is_file()}
        argv = [str(folder / "tiny.toml"), "--out", str(folder / "out")]
        assert errors.run(study.main, ["run", *argv]) == 0
        assert errors.run(study.main, ["status", *argv]) == 0
        assert "8 of 8 done" in capsys.readouterr().out
        assert before == {p: p.stat().st_mtime_ns for p in (folder / "out" / "runs").rglob("*") if p.is_file()}

    def test_the_levels_of_a_factor_side_by_side(self, finished, capsys):
        folder, _ = finished
        argv = ["compare", str(folder / "tiny.toml"), "--out", str(folder / "out"), "--by", "sam_rho"]
        assert errors.run(study.main, [*argv, "--targets", "test_accuracy,validation_error"]) == 0
        said = capsys.readouterr().out
        assert "Test accuracy, learning rate 0.02" in said
        assert "Held-out error, learning rate 0.1" in said
        found = files.read_json(folder / "out" / "compare.json")["comparisons"]
        assert [one["setting"] for one in found] == [{"lr": "0.02"}, {"lr": "0.1"}] * 2
        kept = Queue(config.load(folder / "tiny.toml"), storage.url_of(None, folder / "out")).records()
        by_hand = [r["targets"]["test_error"] for r in kept if (r["levels"]["lr"], r["levels"]["sam_rho"]) == (0.02, 0)]
        assert found[0]["rows"][0]["mean"] == pytest.approx(100 - sum(by_hand) / 2)
        assert errors.run(study.main, [*argv, "--baseline", "0.1"]) == 0
        assert "minus 0.1" in capsys.readouterr().out
        for wrong, words in (
            (["--targets", "test_eror"], "test_error"),
            (["--baseline", "0.3"], "level of sam_rho"),
            (["--over", "sam_rho"], "--by and --over"),
            (["--by", "rho"], "factor"),
            (["--targets", ","], "names no column"),
            (["--targets", "seed"], "unknown target"),
        ):
            assert errors.run(study.main, [*argv, *wrong]) == errors.EXIT_BAD_INPUT
            assert words in capsys.readouterr().err

    def test_models_are_joined_with_other_measures_by_their_folders(self, finished, tmp_path, capsys):
        from sam_optim import cli

        folder, _ = finished
        assert errors.run(study.main, ["report", str(folder / "tiny.toml"), "--out", str(folder / "out")]) == 0
        rows = list(csv.DictReader((folder / "out" / "models.csv").read_text().splitlines()))
        runs = sorted(p.name for p in (folder / "out" / "runs").iterdir() if p.is_dir())
        assert sorted(row["checkpoint"] for row in rows) == runs
        found = files.read_json(folder / "out" / "results.json")
        assert "checkpoint" not in {row[k] for row in found["comparisons"] for k in ("measure", "target")}
        digits = load("digits").train
        x, y = digits.x[:32], digits.labels[:32]
        np.savez(tmp_path / "d.npz", x=x.numpy(), y=y.numpy())
        argv = ["measure", str(folder / "out" / "runs" / "*"), "--data", str(tmp_path / "d.npz"), "--quiet"]
        argv += ["--batch-size", "16"]
        assert cli.main([*argv, "--measures", "gradient_regret", "--json", str(tmp_path / "m.json")]) == 0
        page, models = tmp_path / "r.html", folder / "out" / "models.csv"
        argv = ["report", str(tmp_path / "m.json"), "--targets", str(models), "--target", "test_error"]
        assert cli.main([*argv, "--factors", "lr,sam_rho", "--out", str(page)]) == 0
        text = page.read_text()
        assert all(f'{row["checkpoint"]}":{row["test_error"]}' in text for row in rows)

    def test_the_numbers_do_not_depend_on_who_ran_them(self, finished, tmp_path):
        folder, _ = finished
        found = config.load(folder / "tiny.toml")
        kept = Queue(found, storage.url_of(None, folder / "out")).records()[0]
        again = trial.execute(found, kept["levels"], tmp_path / "run", Here(tmp_path))
        assert (again["targets"], again["measures"]) == (kept["targets"], kept["measures"])

    def test_a_signal_saves_gives_the_trial_back_and_the_next_worker_goes_on(self, tmp_path, capsys):
        found = settings(
            grid={"sam_rho": [0.1]},
            fixed={"data": "digits", "epochs": 12, "train_examples": 400},
            measures=[{"names": ["gradient_regret"], "examples": 64}],
        )
        queue, here = Queue(found, f"sqlite:///{tmp_path / 'study.db'}"), Here(tmp_path / "runs")
        interrupting = threading.Thread(target=interrupt, args=(here.runs, signal.SIGTERM))
        interrupting.start()
        assert work(queue, here) == 128 + signal.SIGTERM
        interrupting.join()
        assert "given back" in capsys.readouterr().err
        assert (queue.tally().running, queue.tally().left) == (0, 1)
        assert work(queue, here) == 0
        (log,) = here.runs.glob("*/log.txt")
        assert "going on in" in log.read_text()
        assert log.read_text().count("epoch  12") == 1
        straight = trial.execute(found, found.combinations[0], tmp_path / "straight", Here(tmp_path))
        (kept,) = queue.records()
        assert (kept["targets"], kept["measures"]) == (straight["targets"], straight["measures"])

    def test_a_run_that_another_worker_began_is_measured_with_the_data_of_this_one(self, tmp_path):
        root, _ = cifar_files(tmp_path / "first")
        fixed = {"data": "cifar10", "model": "cnn3", "epochs": 1, "train_examples": 8}
        found = settings(grid={"lr": [0.1]}, fixed=fixed, measures=[{"names": ["gradient_regret"], "examples": 4}])
        before = trial.execute(found, {"lr": 0.1}, tmp_path / "run", Here(tmp_path, str(root), workers=1))
        root.rename(tmp_path / "second")
        after = trial.execute(found, {"lr": 0.1}, tmp_path / "run", Here(tmp_path, str(tmp_path / "second")))
        assert (after["targets"], after["measures"]) == (before["targets"], before["measures"])

    @pytest.mark.slow
    def test_a_killed_worker_is_missed_and_another_goes_on_from_its_checkpoint(self, tmp_path):
        text = TINY.replace("lr = [0.02, 0.1]", "lr = [0.05]").replace("sam_rho = [0, 0.1]", "sam_rho = [0.1]")
        (tmp_path / "tiny.toml").write_text(text.replace("epochs = 2", "epochs = 40").replace("128", "400"))
        logs = tmp_path / "out" / "runs"
        first = worker(tmp_path)
        wait_for(lambda: any("epoch   3" in p.read_text() for p in logs.glob("*/log.txt")))
        first.kill()
        first.communicate()
        out, _ = ended(worker(tmp_path))
        assert "finished: 2 of 2 done, 0 running, 0 failed" in out
        assert any("going on in" in p.read_text() for p in logs.glob("*/log.txt"))
        queue = Queue(config.load(tmp_path / "tiny.toml"), storage.url_of(None, tmp_path / "out"))
        assert sorted(t.state.name for t in queue.study.get_trials()) == ["COMPLETE", "COMPLETE", "FAIL"]

    def test_a_model_that_diverges_has_a_reason_and_the_study_goes_on(self, tmp_path, capsys):
        grid = {"lr": [1e30, 0.05]}
        fixed = {"data": "digits", "epochs": 1, "train_examples": 128}
        found = settings(grid=grid, fixed=fixed, measures=[{"names": ["gradient_regret"], "examples": 64}])
        queue = Queue(found, f"sqlite:///{tmp_path / 'study.db'}")
        assert work(queue, Here(tmp_path / "runs")) == 0
        assert "1 of 2 done, 0 running, 1 failed" in capsys.readouterr().out
        (bad,) = [r for r in queue.records() if r["failed"]]
        assert "diverged" in bad["failed"]

    def test_a_fault_of_the_program_gives_the_trial_back(self, tmp_path, monkeypatch):
        def execute(*_):
            raise AttributeError("no such thing")

        monkeypatch.setattr("benchmarks.study.worker.execute", execute)
        queue = Queue(settings(grid={"lr": [0.1]}), f"sqlite:///{tmp_path / 'study.db'}")
        with pytest.raises(AttributeError, match="no such thing"):
            work(queue, Here(tmp_path / "runs"))
        assert (queue.tally().running, queue.tally().left) == (0, 1)
        assert queue.claim().deaths == 1

    def test_a_sampler_may_look_at_held_out_examples(self, tmp_path):
        found = settings(
            grid={"lr": {"low": 0.05, "high": 0.1}},
            fixed={"data": "digits", "epochs": 1, "train_examples": 64, "validation_fraction": 0.2},
            measures=[],
            sampler={"trials": 2, "objective": "validation_error"},
        )
        queue = Queue(found, f"sqlite:///{tmp_path / 'study.db'}")
        assert work(queue, Here(tmp_path / "runs")) == 0
        values = {t.number: t.value for t in queue.study.get_trials()}
        assert values == {r["number"]: r["targets"]["validation_error"] for r in queue.records()}
        assert len(values) == 2
        with pytest.raises(InputError, match=r"'s' measures nothing, .* use `compare CONFIG --by FACTOR`, or add"):
            report.from_study(found, queue.url)

    def test_a_folder_of_held_out_pictures_will_do(self, tmp_path):
        tree = picture_tree(tmp_path / "data", n=4, size=(16, 16))
        fixed = {"data": "folder", "model": "cnn3"}
        found = settings(grid={"lr": [0.1]}, fixed=fixed, measures=[{"split": "validation"}])
        with pytest.raises(InputError, match="needs held-out examples"):
            trial.check(found, Here(tmp_path, str(tree)))
        (tree / "val").rename(tree / "test")
        picture_tree(tmp_path / "more", n=4, size=(16, 16))
        (tmp_path / "more" / "val").rename(tree / "val")
        trial.check(found, Here(tmp_path, str(tree)))

    def test_a_machine_without_the_data_leaves_the_trial_to_others(self, tmp_path):
        found = settings(fixed={"data": "cifar10", "model": "cnn5"})
        queue = Queue(found, f"sqlite:///{tmp_path / 'study.db'}")
        for _ in range(DEATHS + 2):
            with pytest.raises(InputError, match="not a directory"):
                work(queue, Here(tmp_path / "runs", str(tmp_path / "none")))
        assert (queue.tally().running, queue.tally().left) == (0, 6)
        assert [queue.claim().deaths for _ in range(6)] == [0] * 6

    @pytest.mark.parametrize(
        ("text", "options", "words"),
        [
            (TINY.replace('"digits"', '"cifar10"'), [], "--data-dir"),
            (TINY.replace('"digits"', '"cifar10"'), ["--data-dir", "nowhere"], "not a directory"),
            (TINY, ["--device", "cuda:77"], "--device"),
            (TINY + '[corruptions]\nnames = ["fog"]\n', [], "digits are gray"),
        ],
    )
    def test_what_cannot_run_here_writes_nothing(self, tmp_path, capsys, text, options, words):
        (tmp_path / "tiny.toml").write_text(text)
        argv = ["run", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out"), *options]
        assert errors.run(study.main, argv) == errors.EXIT_BAD_INPUT
        assert words in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_looking_at_a_study_makes_none(self, tmp_path, capsys):
        (tmp_path / "tiny.toml").write_text(TINY)
        argv = [str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out")]
        for words in (["status"], ["report"], ["compare", "--by", "lr"]):
            assert errors.run(study.main, [*words, *argv]) == errors.EXIT_BAD_INPUT
            assert "there is no study 'tiny'" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        url = storage.url_of(None, tmp_path / "out")
        Queue(settings(), url)
        assert storage.has_study(url, "s")
        assert not storage.has_study(url, "tiny")

    def test_a_run_that_was_begun_with_other_settings_is_left_alone(self, tmp_path):
        """Settings may change while no model has finished; the options that are gone must not come back by --resume."""
        grid, measures = {"lr": [0.1]}, [{"names": ["worst"], "examples": 4}]
        fixed = {"data": "digits", "epochs": 1, "train_examples": 64}
        before = settings(grid=grid, fixed=fixed | {"weight_decay": 0.5}, measures=measures)
        after = settings(grid=grid, fixed=fixed, measures=measures)
        here, levels = Here(tmp_path / "runs"), {"lr": 0.1}
        trial.execute(before, levels, here.runs / config.identifier(levels), here)
        assert trial.begun_with(before, levels, here.runs / config.identifier(levels))
        queue = Queue(after, f"sqlite:///{tmp_path / 'study.db'}")
        assert work(queue, here) == 0
        (kept,) = queue.records()
        assert kept["checkpoint"] == config.identifier(levels) + "-2"
        options = [files.read_json(path)["options"]["weight_decay"] for path in sorted(here.runs.glob("*/config.json"))]
        assert options[0] == 0.5
        assert options[1] != 0.5


class TestEvaluation:
    def test_corruptions_are_checked_when_the_settings_are_read(self):
        grid = {"grid": {"lr": [0.1]}}
        colour = grid | {"fixed": {"data": "cifar10", "model": "cnn5"}}
        config.checked(colour | {"corruptions": {"names": ["fog"]}})
        for content, words in (
            (colour | {"corruptions": {"names": ["rain"]}}, "unknown corruption 'rain'"),
            (colour | {"corruptions": {"names": ["fog"], "severities": [6]}}, "from 1 to 5"),
            (colour | {"corruptions": {"names": ["fog"], "examples": "all"}}, "examples of"),
            (colour | {"corruptions": {"names": ["fog"], "published": "yes"}}, "true or false"),
            (grid | {"corruptions": {"names": ["fog"]}}, "digits are gray"),
        ):
            with pytest.raises(InputError, match=words):
                config.checked(content)
        kept = config.checked(colour | {"corruptions": {"names": ["fog"]}}).to_dict()
        assert "published" not in kept["corruptions"]  # a study that was started before there was such a setting

    def test_corruptions_of_a_folder(self, tmp_path):
        """The number is that of the same command on the run."""
        tree = picture_tree(tmp_path / "data", n=6, size=(16, 16))
        found = settings(
            grid={"lr": [0.1]},
            fixed={"data": "folder", "model": "cnn3", "epochs": 1, "batch_size": 8},
            measures=[{"names": ["worst"], "examples": 4}],
            corruptions={"names": ["fog"], "severities": [3], "examples": 6, "seed": 2},
        )
        here = Here(tmp_path / "runs", str(tree))
        trial.check(found, here)
        kept = trial.execute(found, {"lr": 0.1}, tmp_path / "runs" / "a", here)
        argv = [str(tmp_path / "runs" / "a"), "--corruptions", "fog", "--severities", "3", "--examples", "6"]
        assert errors.run(evaluate.main, [*argv, "--seed", "2"]) == 0
        report = files.read_json(tmp_path / "runs" / "a" / "corrupted.json")
        assert kept["corrupted"] == {"fog, 3": pytest.approx(100 * (1 - report["mean"]["accuracy"]))}
        assert kept["targets"]["ood_error"] == kept["corrupted"]["fog, 3"]
        assert kept["checkpoint"] == "a"

    def test_published_corruptions(self, tmp_path):
        root, _ = cifar_files(tmp_path / "data")
        images, labels = Published().folder(tmp_path / "c")
        found = settings(
            fixed={"data": "cifar10", "model": "cnn5"},
            corruptions={"names": ["fog"], "severities": [2], "examples": 0, "published": True},
        )
        with pytest.raises(InputError, match="--cifar-c DIR"):
            trial.check(found, Here(tmp_path, str(root)))
        here = Here(tmp_path, str(root), cifar_c=str(tmp_path / "c"))
        trial.check(found, here)
        np.save(tmp_path / "c" / "labels.npy", labels + 90)
        with pytest.raises(InputError, match="has labels up to 9"):
            trial.check(found, here)
        np.save(tmp_path / "c" / "labels.npy", labels)
        splits = load("cifar10", root)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)).eval()
        published = trial.published(found, here)
        found_errors = trial.corrupted_errors(model, splits, found.corruptions, torch.device("cpu"), published)
        outputs = model(normalized(images[4:8]))
        assert found_errors == {
            "fog, 2": pytest.approx(100 * float((outputs.argmax(1) != torch.from_numpy(labels[4:8])).double().mean()))
        }

    def test_the_corruptions_are_those_of_the_benchmarks(self, tmp_path):
        """The number is that of the same pixels, corrupted here one severity at a time."""
        from benchmarks.corruptions import corrupted

        root, _ = cifar_files(tmp_path)
        splits = load("cifar10", root)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10)).eval()
        images, labels = splits.test.x, splits.test.labels
        chosen = config.Corruptions(["gaussian_noise", "contrast"], severities=[1, 5], examples=0, seed=3)
        found = trial.corrupted_errors(model, splits, chosen, torch.device("cpu"))
        assert len(found) == 4
        for key, error in found.items():
            name, severity = key.split(", ")
            bad = corrupted(images.permute(0, 2, 3, 1).contiguous().numpy(), name, int(severity), seed=3)
            wrong = model(normalized(bad)).argmax(1) != labels
            assert error == pytest.approx(100 * float(wrong.double().mean()))

    def test_a_measure_that_did_not_converge_has_no_number(self):
        assert trial.number_of({"value": 1.0, "converged": False}) is None
        assert trial.number_of({"eigenvalues": [3.0, 1.0], "converged": True}) == 3.0
        assert trial.number_of({"value": 2.0}) == 2.0
        assert trial.number_of({"value": None, "reason": "x"}) is None
