"""Settings, runs and tables that somebody else wrote, for the commands of benchmarks: one line each, nothing else."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from limits import ONE_THREAD, PATIENCE
from test_frontier import PLAN

pytest.importorskip("timm")
pytest.importorskip("optuna")

from benchmarks import command, evaluate, finetune_text, measure, pretrained, tune
from benchmarks.corruptions import Published
from benchmarks.frontier import plan as frontier_plan
from benchmarks.frontier.__main__ import main as frontier
from benchmarks.study import config as study_config
from benchmarks.study import report as study_report
from benchmarks.study.__main__ import main as study
from benchmarks.study.queue import Queue
from benchmarks.train import options
from benchmarks.train.__main__ import main as train
from sam_optim import sweep
from sam_optim.core.errors import InputError, run
from sam_optim.core.files import locked, write_atomic
from sam_optim.vision.data import open_split

ROOT = Path(__file__).resolve().parents[1]
SMUGGLED = [
    'opt-kwargs: ["--force"]',
    'opt-kwargs: ["--forc"]',
    'opt-kwargs: ["--out=elsewhere"]',
    'opt-kwargs: {"--out": elsewhere}',
    'model-kwargs: ["--resume"]',
    'mean: ["0.5", "--force"]',
    'lr: ["0.1", "--force"]',
]
LOADING = [
    "checkpoint_path: evil.pth",
    'pretrained_cfg_overlay: {url: "http://127.0.0.1:9/x"}',
    "pretrained: true",
    "cache_dir: x",
    "act_layer: ../x",
]
ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{last}'] * 9)}]\n" for last, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize("line", SMUGGLED)
def test_a_recipe_cannot_give_what_it_may_not_say(tmp_path, line):
    (tmp_path / "c.yaml").write_text(f"epochs: 1\n{line}\n")
    with pytest.raises(InputError, match="must not hold an option"):
        options.parse(["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")])


def test_nor_can_a_study(tmp_path):
    for line in ('fixed = {opt_kwargs = ["--force"]}\ngrid = {lr = [0.1]}', 'grid = {opt_kwargs = [["--out=x"], []]}'):
        (tmp_path / "s.toml").write_text(line)
        with pytest.raises(InputError, match="must not hold an option"):
            study_config.load(tmp_path / "s.toml")


def test_a_study_is_of_models_that_can_be_trained(tmp_path):
    (tmp_path / "s.toml").write_text(f'name = "x"\n[grid]\nseed = {list(range(3000))}\nepochs = {list(range(1, 3000))}')
    with pytest.raises(InputError, match="has 8,997,000 models"):
        study_config.load(tmp_path / "s.toml")
    (tmp_path / "s.toml").write_text('name = "x"\n[grid]\nlr = [0.1]')
    for url in ("sqlite://", "sqlite:///:memory:"):
        with pytest.raises(InputError, match="is in memory"):
            Queue(study_config.load(tmp_path / "s.toml"), url)


@pytest.mark.parametrize("line", LOADING)
def test_no_file_names_weights_urls_or_hubs_for_timm(tmp_path, line):
    (tmp_path / "c.yaml").write_text(f"model: test_resnet\nmodel-kwargs: {{{line}}}\n")
    with pytest.raises(InputError, match=r"may be set from a file|must be a number or a word"):
        options.parse(["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")])
    key, value = line.split(": ", 1)
    recorded = {"model": "test_resnet", "model_kwargs": {key: value}}
    (tmp_path / "config.json").write_text(json.dumps({"options": recorded}))
    with pytest.raises(InputError, match="is not of a run of benchmarks"):
        options.of_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 0.1\nlr: 0.2\n", "has 'lr' twice"),
        ("opt-kwargs: {nesterov: true, nesterov: false}\n", "has 'nesterov' twice"),
        ("lr: 1:30\n", "1:30 is a number to the base 60 in YAML"),
        ("mean: [0.5, 190:20:30.15]\n", "is a number to the base 60 in YAML"),
    ],
)
def test_yaml_that_means_something_else_than_it_seems_to(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        options.parse(["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    ("name", "split"), [("wds/pipe:touch x", "train"), ("wds/x", "pipe:touch x"), ("wds/http://127.0.0.1:9/x", "train")]
)
def test_a_data_set_is_no_program_and_no_address(tmp_path, name, split):
    with pytest.raises(InputError, match="would run a program or make a request"):
        open_split(name, tmp_path, split)


@pytest.mark.parametrize("name", ["hfds/some/one", "HFDS/some/one", "hfids/some/one", "tfds/mnist"])
def test_a_file_has_no_data_set_asked_for_over_the_network(tmp_path, name):
    (tmp_path / "c.yaml").write_text(f"data: {name}\ndata-dir: .\n")
    recipe = ["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "new")]
    (tmp_path / "config.json").write_text(json.dumps({"options": {"data": name, "data_dir": "."}}))
    resumed = ["--resume", f"--out={tmp_path}"]
    for argv in (recipe, [*recipe, "--data=hfds/another"], resumed):
        with pytest.raises(InputError, match=f"asked for over the network.* too: --data {name}$"):
            options.parse(argv)
    for argv in (recipe, resumed):
        assert options.parse([*argv, "--data", name]).data == name
    for main in (measure.main, evaluate.main):
        with pytest.raises(InputError, match="asked for over the network"):
            main([str(tmp_path)])
        with pytest.raises(InputError, match="no checkpoint in"):
            main([str(tmp_path), "--data", name])
        with pytest.raises(InputError, match="asked for over the network"):
            main([str(tmp_path), "--data", "digits"])
    (tmp_path / "config.json").write_text(json.dumps({"options": {"data": "digits"}}))
    with pytest.raises(InputError, match=f"--data {name} differs from the run's digits"):
        measure.main([str(tmp_path), "--data", name])


@pytest.mark.parametrize("line", ["data: '--'", "initial-checkpoint: '--'", "device: '--'", "sam-schedule: '--'"])
def test_two_dashes_are_no_value(tmp_path, line):
    (tmp_path / "c.yaml").write_text(f"{line}\n")
    with pytest.raises(InputError, match="=-- has no value"):
        options.parse(["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("value", ["2020-01-01", "2020-01-01T00:00:00", "0x" + "f" * 5000])
def test_what_no_option_can_be_is_refused_with_the_name_of_the_file(tmp_path, value):
    (tmp_path / "s.yaml").write_text(f"fixed: {{lr: {value}}}\n")
    (tmp_path / "s.toml").write_text(f"[fixed]\nlr = {value}\n")
    for load, name in ((study_config.load, "s.yaml"), (study_config.load, "s.toml"), (frontier_plan.load, "s.toml")):
        with pytest.raises(InputError, match=rf"{name} cannot be read"):
            load(tmp_path / name)


def test_very_many_names_are_read_in_time(tmp_path):
    (tmp_path / "c.yaml").write_text("".join(f"{i:x}:\n" for i in range(4096, 4096 + 40_000)))
    started = time.process_time()
    with pytest.raises(InputError, match="unknown option"):
        options.from_file(tmp_path / "c.yaml")
    assert time.process_time() - started < 20


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/elsewhere", "..", "a/b", "\\u001b[2J"])
def test_the_name_of_a_plan_is_no_path(tmp_path, name):
    """Its runs are below --out, and its results in the folder of results."""
    (tmp_path / "p.toml").write_text(PLAN.replace('name = "small"', f'name = "{name}"'))
    with pytest.raises(InputError, match="name must be letters, digits"):
        frontier_plan.load(tmp_path / "p.toml")


@pytest.mark.parametrize("name", ["hf-hub:a/b", "local-dir:/tmp", "../x"])
def test_a_model_is_a_name(tmp_path, name):
    (tmp_path / "c.yaml").write_text(f"model: '{name}'\n")
    with pytest.raises(InputError, match="must be a name"):
        options.parse(["--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")])


@pytest.mark.parametrize(
    "recorded",
    [[1], 3, {"epochs": "x"}, {"epochs": -3}, {"lr": [1, 2]}, {"model": "hf-hub:x/y"}, {"mixup": "a"},
     {"opt_kwargs": 3},
     {"model": "test_vit", "model_kwargs": {"num_classes": 5}},
     {"opt_kwargs": ["--force"]}, {"opt_kwargs": [["--force", 1]]}, {"model": ["cnn3", "--force"]}],
)  # fmt: skip
def test_what_a_config_json_says_is_checked_like_a_command_line(tmp_path, recorded):
    (tmp_path / "config.json").write_text(json.dumps({"options": recorded}))
    for read in (lambda: options.of_run(tmp_path), lambda: options.parse(["--resume", f"--out={tmp_path}"])):
        with pytest.raises(InputError, match=r"config\.json is not of a run") as error:
            read()
        assert "\n" not in str(error.value)


def test_what_a_run_recorded_comes_back():
    argv = "--model test_vit --model-kwargs drop_path_rate=0.1 act_layer=gelu --opt adamw --data folder --lr 0.1"
    argv = [
        *argv.split(),
        "--opt-kwargs",
        "betas=(0.8, 0.9)",
        "--std",
        "0.25",
        "--adaptive",
        "--sam-rho",
        "0.3",
        "--fsdp",
    ]
    given = options.parse([*argv, "--out", "x"])
    words = [word for key, value in given.recorded().items() for word in options.words(key, value)]
    assert options.parse([*words, "--out", "x"]).recorded() == given.recorded()


@pytest.mark.parametrize(
    "content",
    ["lr: &a [*a]", ALIASES, "lr: " + "[" * 5000, "epochs: " + "9" * 5000, "\0", "!!python/name:os.system", "- 1"],
)
def test_a_yaml_file_that_is_more_than_a_mapping(tmp_path, content):
    (tmp_path / "c.yaml").write_text(content)
    for load in (study_config.load, options.from_file):
        with pytest.raises(InputError, match=r"c\.yaml (cannot be read|must be a mapping)"):
            load(tmp_path / "c.yaml")


def test_settings_are_no_pipe_and_not_endless(tmp_path):
    os.mkfifo(tmp_path / "c.yaml")
    with pytest.raises(InputError, match="not a regular file"):
        options.from_file(tmp_path / "c.yaml")
    (tmp_path / "s.toml").write_text("#" * (1 << 19))
    with pytest.raises(InputError, match="more than 262,144 bytes"):
        study_config.load(tmp_path / "s.toml")


@pytest.mark.parametrize(
    "line",
    ["fixed = [1]", "measures = 3", "measures = [3]", "measures = {names = [3]}", "measures = {label = 3}",
     'corruptions = {names = ["fog"], severities = ["a"]}', 'corruptions = {names = ["fog"], severities = 3}',
     "corruptions = {names = 3}", "sampler = 3", 'sampler = {trials = 2, seed = "x"}',
     "evaluate = {train_examples = []}",
     "sampler = {trials = 2, options = 3}", "sampler = {trials = true}",
     'sampler = {name = "CmaEsSampler", trials = 2}'],
)  # fmt: skip
def test_a_study_of_other_shapes(tmp_path, line):
    """CmaEsSampler unpickles what stands in the storage."""
    (tmp_path / "s.toml").write_text(f"{line}\n[grid]\nlr = [0.1]\n")
    with pytest.raises(InputError, match=r"s\.toml: ") as error:
        study_config.load(tmp_path / "s.toml")
    assert "\n" not in str(error.value)


def test_a_range_of_a_sampler_is_of_numbers():
    for change in ({"low": "a"}, {"low": 2.0}, {"log": "x"}, {"step": "a"}, {"step": 0}, {"high": float("nan")}):
        with pytest.raises(InputError, match=r"range of numbers|needs low < high"):
            study_config.checked({"grid": {"lr": {"low": 0.1, "high": 1.0} | change}, "sampler": {"trials": 2}})


def test_tables_and_logs_of_other_shapes(tmp_path):
    path = tmp_path / "x.jsonl"
    for content in (b"3\n4\n", b"[" * 100_000 + b"\n{}\n", b"\xff\n{}\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="line 1 is not valid JSON"):
            command.read_jsonl(path)
    for content in ("[" * 100_000, '{"a": ' + "9" * 5000 + "}", "[1]\n"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"x\.jsonl(,| cannot be read)"):
            finetune_text.read(path)
    (tmp_path / "t.csv").write_text("a,b\n" + "x" * 200_000 + ",1\n")
    with pytest.raises(InputError, match=r"t\.csv cannot be read"):
        study_report.from_csv(tmp_path / "t.csv", ["a"], ["b"])


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\0\x10\0{'descr': (((((}\n"], ids=["empty", "header"])
def test_published_corruptions_that_are_damaged(tmp_path, content):
    (tmp_path / "fog.npy").write_bytes(content)
    np.save(tmp_path / "labels.npy", np.zeros(20, np.int64))
    with pytest.raises(InputError, match=r"fog\.npy cannot be read"):
        Published(tmp_path).images("fog", 1)


@pytest.mark.parametrize("record", [3, {"a": 1}, {"levels": 3, "targets": 5}, {"levels": {}, "targets": {"a": "b"}}])
def test_a_storage_that_was_changed(tmp_path, record):
    (tmp_path / "s.toml").write_text('name = "x"\n[grid]\nlr = [0.1, 0.2]\n')
    url, settings = f"sqlite:///{tmp_path / 's.db'}", study_config.load(tmp_path / "s.toml")
    queue = Queue(settings, url)
    trial = queue.claim().trial
    trial.set_user_attr("record", record)
    queue.study.tell(trial, 1.0)
    with pytest.raises(InputError, match=r"s\.db is not one of benchmarks\.study"):
        Queue(settings, url).tally()


@pytest.mark.parametrize("option", ["json", "csv", "out"])
def test_where_nothing_can_be_written_is_said_before_anything_is_computed(tmp_path, option):
    def problem():
        raise AssertionError("it began")

    (tmp_path / "file").write_text("x")
    function, measures = sweep.FunctionProblem(problem), sweep.Measures(["trace"])
    refused = pytest.raises(InputError, match=r"is a directory; name a file|is not a directory; choose another")
    for path in (tmp_path, tmp_path / "file" / "x.json"):
        if option == "out":
            with refused:
                sweep.draw_landscape([], function, path)
        else:
            with refused:
                sweep.measure_checkpoints([], function, measures, **{option: path})


DIGITS = ["--epochs", "1", "--train-examples", "60", "--measures", "none"]


DIGITS_PLAN = "frontier-digits"
WRITERS = {  # of benchmarks, and the words for it
    "measure": (measure.main, "{out}"),
    "evaluate": (evaluate.main, "{out}"),
    "tune": (tune.main, "--epochs 1 --out {out}"),
    "pretrained": (pretrained.main, "{x} --data-dir {x} --out {out}"),
    "finetune_text": (finetune_text.main, "--model {x} --train {x} --validation {x} --out {out}"),
    "frontier": (frontier, "run benchmarks/studies/frontier_digits.toml --out {out}"),
}


def test_names_that_break_lines_leave_an_error_in_one(tmp_path, capsys):
    (tmp_path / "t.csv").write_text('"a\nb",c\n1,2\n')
    argv = ["report", "--csv", str(tmp_path / "t.csv"), "--measures", "m", "--targets", "c", "--out", str(tmp_path)]
    assert run(study, argv) == 2
    assert capsys.readouterr().err == "error: unknown column 'm'; choose from a�b, c\n"


class TestTwoAtOnce:
    def test_one_folder_has_one_training(self, tmp_path, capsys):
        with locked(tmp_path / "run"):
            code = run(train, [*DIGITS, "--out", str(tmp_path / "run")])
        assert code == 2
        assert (
            f"run is being written by process {os.getpid()}; wait for it, or choose another --out"
            in capsys.readouterr().err
        )
        assert list(tmp_path.iterdir()) == []
        assert run(train, [*DIGITS, "--out", str(tmp_path / "run")]) == 0
        assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]

    @pytest.mark.parametrize("name", list(WRITERS))
    def test_whatever_writes_results_says_who_does_already(self, name, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(ROOT)  # of the plan
        program, words = WRITERS[name]
        (tmp_path / "x").touch()
        with locked(tmp_path / "out" / DIGITS_PLAN if name == "frontier" else tmp_path / "out"):
            assert run(program, words.format(out=tmp_path / "out", x=tmp_path / "x").split()) == 2
        assert capsys.readouterr().err.count(f"is being written by process {os.getpid()}; wait for it") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]

    def test_two_reports_wait_for_each_other(self, tmp_path, monkeypatch):
        rows = [f"{lr},{lr},{10 * lr + i}" for lr in (1, 2) for i in range(3)]
        (tmp_path / "t.csv").write_text("\n".join(["lr,m,e", *rows]))
        argv = ["report", "--csv", tmp_path / "t.csv", "--measures", "m", "--targets", "e", "--factors", "lr"]
        argv = [*map(str, argv), "--out", str(tmp_path), "--resamples", "20"]
        monkeypatch.setattr(study_report, "PATIENCE", 0.1)
        with locked(tmp_path / "results.json"):
            assert run(study, argv) == 2
        assert not (tmp_path / "report.html").exists()
        assert run(study, argv) == 0

    def test_a_lock_leaves_no_folder_behind(self, tmp_path):
        with locked(tmp_path / "a" / "b" / "run"):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_a_forked_process_that_outlives_its_parent_holds_no_lock(self, tmp_path):
        code = "import os, signal, time; from pathlib import Path; from sam_optim.core.files import locked\n"
        code += (
            "with locked(Path('x')):\n if not os.fork(): time.sleep(60)\n print('held', flush=True)\n time.sleep(60)"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        parent = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, start_new_session=True
        )
        try:
            assert parent.stdout.readline() == b"held\n"
            parent.kill()
            parent.wait()
            with locked(tmp_path / "x"):
                pass
        finally:
            os.killpg(parent.pid, signal.SIGKILL)
            parent.stdout.close()

    def test_a_run_whose_folder_vanishes_ends(self, tmp_path):
        out, log = tmp_path / "run", tmp_path / "log"
        argv = [sys.executable, "-m", "benchmarks.train", "--epochs", "400", "--measures", "none", "--out", str(out)]
        environment = os.environ | ONE_THREAD
        with open(log, "w") as file:
            training = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            while not (out / "checkpoints").exists():
                assert training.poll() is None, log.read_text()
                time.sleep(0.1)
            out.rename(tmp_path / "elsewhere")
            assert training.wait(timeout=PATIENCE) == 2
        finally:
            training.kill()
        # whichever file it was about to read or write: the words are not the same
        assert re.search(r"no such file or directory|was deleted while the run wrote to it", log.read_text(), re.I)
        assert not out.exists()


def test_what_is_interrupted_while_it_is_written_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "x.json", b"1")
    assert list(tmp_path.iterdir()) == []


def test_standard_error_may_be_closed_and_standard_output_a_file(tmp_path):
    argv = [sys.executable, "-m", "benchmarks.train", *DIGITS, "--out", "run"]
    environment = os.environ | {**ONE_THREAD, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "out", "wb") as out:
        done = subprocess.run(
            argv, cwd=tmp_path, env=environment, stdout=out, preexec_fn=lambda: os.close(2), timeout=PATIENCE
        )
    assert done.returncode == 0
    assert "epoch   1" in (tmp_path / "out").read_text()
    argv = ["measure", "run", "--data", "digits", "--measures", "trace", "--num-probes", "2", "--quiet"]
    with open(tmp_path / "out", "wb") as out:  # a file that is opened again would be written from its start
        argv = [sys.executable, "-m", "sam_optim", *argv, "--json", "/dev/stdout"]
        done = subprocess.run(
            argv, cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.DEVNULL, timeout=PATIENCE
        )
    assert done.returncode == 0
    written, end, table = (tmp_path / "out").read_text().partition("\n]}\n")
    assert len(json.loads(written + end)["entries"]) == 1
    assert table.startswith("checkpoint")
