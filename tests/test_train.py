"""The train and measure commands: what they do, how they stop, go on and refuse."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from limits import ONE_THREAD
from test_data import SHARED, cifar_files, load, picture_tree

from benchmarks import command, measure
from benchmarks.machine import one_thread
from benchmarks.train import __main__ as train
from benchmarks.train import checkpoint, ranks
from benchmarks.train import epoch as engine
from benchmarks.train import run as training
from benchmarks.train.batches import MemoryBatches
from benchmarks.train.options import Options
from benchmarks.train.order import Order
from benchmarks.train.run import Training
from sam_optim.core import errors, files

TIMES = ("seconds", "images_per_s")
DIGITS = ["--label-noise", "0.4", "--sam-rho", "0.1", "--measures", "none"]
PICTURES = ["--data", "folder", "--model", "test_resnet", "--batch-size", "8", "--epochs", "2", "--measures", "none"]


@pytest.fixture(autouse=True)
def a_single_thread():
    """The bits of a sum depend on how many threads share it, and the subprocesses here have one."""
    with one_thread():
        yield


def run(*options: object) -> int:
    """On the CPU, where bits are compared."""
    return errors.run(train.main, ["--device", "cpu", *(str(o) for o in options)])


def signalled(
    number: signal.Signals, line: str, out: Path, options: Sequence[str], *, delay: float = 0.0
) -> tuple[int, str]:
    """The status and errors of a training, in a process of its own, that gets a signal after a line of its output; once
    more if it ends before, as it may where other processes hold up this one."""
    arguments = [sys.executable, "-m", "benchmarks.train", "--device", "cpu", *options, "--out", str(out)]
    environment = os.environ | ONE_THREAD
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for _ in range(10):
        shutil.rmtree(out, ignore_errors=True)
        with subprocess.Popen(arguments, text=True, env=environment, **pipes) as process:
            for printed in process.stdout:
                if printed.startswith(line):
                    time.sleep(delay)
                    process.send_signal(number)
                    break
            err = process.stderr.read()
        if process.returncode != 0:
            return process.returncode, err
    pytest.fail("ten trainings have ended before the signal came")


def final(out: Path) -> dict:
    return checkpoint.newest(out / "checkpoints")


def metrics(out: Path) -> list[dict]:
    records = command.read_jsonl(out / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def assert_same_bits(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same_bits(x, y)
    else:
        assert a == b


def assert_same_run(a: Path, b: Path) -> None:
    assert_same_bits(final(a), final(b))
    assert metrics(a) == metrics(b)


def stop_at(monkeypatch, update: int, signum: int) -> None:
    """A real signal to this process, just before update number `update` is counted."""
    after_update = Training._after_update

    def stopping(self, batch):
        if self.position.updates + 1 == update:
            signal.raise_signal(signum)
        after_update(self, batch)

    monkeypatch.setattr(Training, "_after_update", stopping)


def test_without_a_terminal_a_line_is_printed_now_and_then(tmp_path, monkeypatch, capsys):
    options = [*DIGITS, "--epochs", "1", "--batch-size", "256", "--out", tmp_path / "run"]
    assert run(*options) == 0
    assert "batch" not in capsys.readouterr().out  # an epoch of less than a minute has its own line only
    monkeypatch.setattr(training, "EVERY_LINE", 0.0)
    assert run(*options, "--force") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "batch" in line]
    number = r"\d+\.\d+"
    pattern = rf"epoch 1/1, batch (\d+) of (\d+): loss {number} accuracy {number} sharpness {number} \d+ images/s"
    result = [re.fullmatch(pattern, line) for line in lines]
    assert all(result)
    assert [int(m[1]) for m in result] == list(range(1, int(result[0][2]) + 1))


class TestResume:
    OPTIONS = (
        pytest.param(DIGITS, id="sam"),
        pytest.param(["--label-noise", "0.4", "--measures", "none", "--accumulate", "3"], id="sgd, accumulate"),
        pytest.param([*DIGITS, "--adaptive", "--opt", "adamw", "--model-ema", "0.9", "--mixup", "0.2"], id="asam, ema"),
        pytest.param([*DIGITS, "--amp", "bf16", "--clip-grad", "1", "--sched", "step"], id="bf16, clip"),
    )

    @pytest.mark.parametrize("options", OPTIONS)
    @pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_in_the_middle_of_an_epoch_changes_no_bit(
        self, tmp_path, monkeypatch, capsys, options, signum, code
    ):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        assert run(*options, "--epochs", 3, "--out", whole) == 0
        with monkeypatch.context() as patch:
            stop_at(patch, 7, signum)
            assert run(*options, "--epochs", 3, "--out", cut) == code
        err = capsys.readouterr().err
        assert f"to continue: python -m benchmarks.train --out {cut} --resume" in err
        assert final(cut)["step"] == 7
        assert run("--out", cut, "--resume") == 0
        assert_same_run(whole, cut)

    def test_a_signal_while_evaluating(self, tmp_path, monkeypatch):
        """All batches of the epoch are done then, and are not done again."""
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        assert run(*DIGITS, "--epochs", 2, "--out", whole) == 0
        evaluate = engine.evaluate

        def stopped(*arguments, **options):
            signal.raise_signal(signal.SIGINT)
            return evaluate(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "evaluate", stopped)
            assert run(*DIGITS, "--epochs", 2, "--out", cut) == 130
        assert final(cut)["position"] == {"epoch": 0, "batch": 14, "updates": 14}
        assert run("--out", cut, "--resume") == 0
        assert_same_run(whole, cut)

    def test_a_second_ctrl_c_acts_at_once(self, tmp_path, monkeypatch, capsys):
        def twice(self, batch):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second signal was only noted, too")

        monkeypatch.setattr(Training, "_after_update", twice)
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        try:
            assert run(*DIGITS, "--out", tmp_path) == 130
        finally:
            signal.signal(signal.SIGINT, before)
        assert capsys.readouterr().err == "stopped\n"

    def test_kill_9_at_any_time_changes_no_bit(self, tmp_path):
        """A real process, killed between two checkpoints, then resumed in this one."""
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        options = [*DIGITS, "--epochs", "15", "--checkpoint-steps", "5"]
        assert run(*options, "--out", whole) == 0
        code, _ = signalled(signal.SIGKILL, "epoch   4", cut, options, delay=0.03)  # in the fifth epoch
        assert code == -signal.SIGKILL
        assert final(cut)["step"] < final(whole)["step"]
        assert run("--out", cut, "--resume") == 0
        assert_same_run(whole, cut)

    def test_ctrl_c_in_a_real_process(self, tmp_path):
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        options = [*DIGITS, "--epochs", "15"]
        assert run(*options, "--out", whole) == 0
        code, err = signalled(signal.SIGINT, "epoch   2", cut, options)
        assert code == 130
        assert "stopped by SIGINT" in err
        assert "Traceback" not in err
        assert run("--out", cut, "--resume") == 0
        assert_same_run(whole, cut)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_pictures_with_augmentation_and_dropout_for_any_number_of_workers(self, tmp_path, monkeypatch, workers):
        tree = picture_tree(tmp_path / "data", n=20)
        options = [*PICTURES, "--data-dir", tree, "--aa", "rand-m9-mstd0.5", "--reprob", "0.5", "--cutmix", "1"]
        options += ["--model-kwargs", "drop_rate=0.3", "--sam-rho", "0.05", "--channels-last"]
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        assert run(*options, "--out", whole) == 0
        with monkeypatch.context() as patch:
            stop_at(patch, 3, signal.SIGINT)
            assert run(*options, "--out", cut, "--workers", workers) == 130
        assert run("--out", cut, "--resume", "--workers", workers) == 0
        assert_same_run(whole, cut)

    def test_the_previous_checkpoint_is_used_when_the_newest_is_damaged(self, tmp_path, capsys):
        out, whole = tmp_path / "a", tmp_path / "b"
        assert run(*DIGITS, "--epochs", 3, "--out", whole) == 0
        assert run(*DIGITS, "--epochs", 3, "--out", out) == 0
        newest = checkpoint.newest_first(out / "checkpoints")[0]
        newest.write_bytes(newest.read_bytes()[:-100])
        assert run("--out", out, "--resume") == 0
        assert f"{newest.name} is damaged" in capsys.readouterr().err
        assert_same_run(whole, out)

    def test_other_options_are_refused(self, tmp_path, capsys):
        assert run(*DIGITS, "--epochs", 1, "--out", tmp_path) == 0
        before = snapshot(tmp_path)
        assert run("--out", tmp_path, "--resume", "--lr", "0.3") == 2
        assert "--lr 0.3 differs from the run's 0.05; leave it out to resume" in capsys.readouterr().err
        assert snapshot(tmp_path) == before

    def test_the_same_command_again_goes_on_with_a_tuple_among_its_options(self, tmp_path, capsys):
        argv = [*DIGITS, "--epochs", 1, "--opt", "adamw", "--opt-kwargs", "betas=(0.8, 0.9)", "--resume"]
        assert run(*argv, "--out", tmp_path) == 0
        assert run(*argv, "--out", tmp_path) == 0
        assert "is complete" in capsys.readouterr().out
        assert run("--out", tmp_path, "--resume", "--opt-kwargs", "betas=(0.8, 0.95)") == 2
        assert "{'betas': [0.8, 0.95]} differs from the run's {'betas': [0.8, 0.9]}" in capsys.readouterr().err

    def test_resume_without_a_run_starts_one(self, tmp_path):
        assert run(*DIGITS, "--epochs", 1, "--out", tmp_path / "new", "--resume") == 0


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


class TestOptions:
    COMBINATIONS = (
        ["--model", "test_resnet", "--sam-rho", "0.1", "--amp", "bf16", "--clip-grad", "1"],
        [
            "--model",
            "test_vit",
            "--opt",
            "adamw",
            "--lr",
            "1e-3",
            "--sam-rho",
            "0.2",
            "--adaptive",
            "--layer-decay",
            "0.8",
        ],
        ["--model", "test_vit", "--mixup", "0.4", "--cutmix", "1", "--smoothing", "0.1", "--model-ema", "0.9"],
        ["--model", "test_efficientnet", "--sam-rho", "0.01", "--sam-norm", "inf", "--accumulate", "2"],
        ["--model", "test_resnet", "--sam-rho", "0.5", "--adaptive", "filter", "--channels-last", "--no-aug"],
        ["--opt", "lookahead_adam", "--sam-rho", "0.05", "--sched", "tanh", "--warmup-epochs", "0.5"],
        ["--opt", "lion", "--opt-kwargs", "betas=(0.9, 0.98)", "--validation-fraction", "0.25", "--sched", "none"],
        [
            "--label-noise",
            "0.5",
            "--color-jitter",
            "0.4",
            "--hflip",
            "0",
            "--train-examples",
            "12",
            "--eval-every",
            "9",
        ],
    )

    def test_a_schedule_that_this_timm_does_not_have(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("timm.scheduler.create_scheduler_v2", lambda *args, **kwargs: (None, 3))
        assert run(*DIGITS, "--out", tmp_path / "out", "--sched", "wsd") == 2
        assert "wsd is unknown to this timm" in capsys.readouterr().err

    @pytest.mark.parametrize("options", COMBINATIONS, ids=" ".join)
    def test_combinations(self, tmp_path, options):
        tree = picture_tree(tmp_path / "data", n=8)
        out = tmp_path / "out"
        assert run(*PICTURES, "--data-dir", tree, "--out", out, *options) == 0
        last = metrics(out)[-1]
        assert last["epoch"] == 2
        assert ("ema_test_loss" in last) == ("--model-ema" in options)
        assert ("validation_loss" in last) == ("--validation-fraction" in options)
        assert (last["train_sharpness"] != 0) == ("--sam-rho" in options)

    @pytest.mark.slow
    def test_resnet18_and_vit_tiny(self, tmp_path):
        tree = picture_tree(tmp_path / "data", n=8, size=(32, 32))
        for name in ("resnet18", "vit_tiny_patch16_224"):
            options = [*PICTURES, "--model", name, "--sam-rho", "0.1", "--data-dir", tree, "--out", tmp_path / name]
            assert run(*options) == 0

    @pytest.mark.slow
    def test_compiled(self, tmp_path):
        gc.collect()  # torch.compile warns of global hooks, and optimizers of other tests in cycles may have one
        assert run(*DIGITS, "--epochs", 2, "--compile", "--out", tmp_path / "compiled") == 0
        assert run(*DIGITS, "--epochs", 2, "--out", tmp_path / "eager") == 0
        a, b = (metrics(tmp_path / name)[-1]["train_loss"] for name in ("compiled", "eager"))
        assert a == pytest.approx(b, rel=1e-4)

    def test_cifar_files(self, tmp_path):
        cifar_files(tmp_path / "data")
        options = ["--data", "cifar10", "--data-dir", tmp_path / "data", "--model", "test_resnet", "--measures", "none"]
        assert run(*options, "--epochs", 1, "--batch-size", 32, "--sam-rho", 0.1, "--out", tmp_path / "out") == 0
        facts = files.read_json(tmp_path / "out" / "config.json")
        assert facts["data"]["source"] == "cifar10, not the files of the published archive"

    def test_fp16_scales_and_still_learns(self, tmp_path):
        assert run(*DIGITS, "--epochs", 4, "--amp", "fp16", "--clip-grad", 5, "--out", tmp_path) == 0
        records = metrics(tmp_path)
        assert records[-1]["train_loss"] < records[0]["train_loss"]
        assert final(tmp_path)["scaler"]["scale"] > 0

    def test_rho_0_is_the_base_optimizer_bit_for_bit(self, tmp_path):
        """Against a plain torch loop, written out."""
        from torch import nn

        from benchmarks.train.order import derive
        from sam_optim.vision import models

        assert run("--epochs", 2, "--sam-rho", 0, "--weight-decay", 0, "--sched", "none", "--measures", "none",
                   "--label-noise", 0.2, "--out", tmp_path) == 0  # fmt: skip
        torch.manual_seed(derive(0, "model"))
        model = models.build("cnn3", num_classes=10, image_size=(1, 8, 8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)  # timm's "sgd"
        splits = load("digits", label_noise=0.2)
        batches = MemoryBatches(splits.train, Order(898, 64, shuffle=True, drop_last=True), splits.preprocessing)
        for epoch in range(2):
            batches.set_epoch(epoch)
            for x, y in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
        assert_same_bits(final(tmp_path)["model"], dict(model.state_dict()))

    def test_sam_in_the_engine_is_step_with_a_closure_bit_for_bit(self):
        from torch import nn

        from sam_optim import SAM
        from sam_optim.vision import models

        weights = []
        for closure_loop in (False, True):
            torch.manual_seed(0)
            model = models.build("cnn3", num_classes=10, image_size=(1, 8, 8))
            optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.05, momentum=0.9)
            splits = load("digits")
            batches = MemoryBatches(splits.train, Order(898, 64), splits.preprocessing)
            if closure_loop:
                for x, y in batches:

                    def closure(x=x, y=y, model=model, optimizer=optimizer):
                        optimizer.zero_grad()
                        loss = nn.functional.cross_entropy(model(x), y)
                        loss.backward()
                        return loss

                    optimizer.step(closure)
            else:
                result = engine.train_epoch(model, optimizer, batches, nn.CrossEntropyLoss())
                assert result["sharpness"] > 0
                assert result["num_updates"] == len(batches)
            weights.append(model.state_dict())
        assert_same_bits(dict(weights[0]), dict(weights[1]))

    def test_asam_scales_weights_and_not_biases_in_timms_groups(self):
        from benchmarks.train import recipe
        from sam_optim.vision import models

        options = Options(sam_rho=0.5, adaptive="elementwise", layer_decay=0.7, opt="adamw")
        model = models.build("test_vit", num_classes=10, image_size=(3, 32, 32))
        optimizer = recipe.optimizer(options, model)
        for group in optimizer.param_groups:
            assert "lr_scale" in group
            assert all((p.ndim > 1) == bool(group["adaptive"]) for p in group["params"] if p.ndim != 3)
        held = [id(p) for g in optimizer.param_groups for p in g["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())

    def test_a_run_does_not_depend_on_the_global_generators_and_leaves_them(self, tmp_path):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        assert run(*DIGITS, "--epochs", 1, "--out", tmp_path / "a") == 0
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert run(*DIGITS, "--epochs", 1, "--out", tmp_path / "b") == 0
        assert_same_run(tmp_path / "a", tmp_path / "b")

    def test_the_noise_is_recorded(self, tmp_path):
        assert run(*DIGITS, "--epochs", 1, "--out", tmp_path) == 0
        facts = files.read_json(tmp_path / "config.json")
        assert facts["label_noise"]["num_drawn"] == round(0.4 * 898)
        assert len(facts["label_noise"]["labels_sha256"]) == 64
        assert facts["options"]["seed"] == 0
        assert facts["provenance"]["torch"] == torch.__version__


class TestDevice:
    """Without --device: CUDA where torch sees it, else the CPU."""

    DEFAULTS = ("--epochs", "1", "--train-examples", "64", "--measures", "none")

    def test_auto_is_what_torch_sees_and_is_said_and_recorded(self, tmp_path, capsys):
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert errors.run(train.main, [*self.DEFAULTS, "--out", str(tmp_path)]) == 0
        first = capsys.readouterr().out.splitlines()[0]
        assert first.startswith(f"training on {expected} (")
        assert first.endswith(", 1 process")
        facts = files.read_json(tmp_path / "config.json")
        assert (facts["device"], facts["options"]["device"]) == (expected, "auto")

    @pytest.mark.parametrize(("seen", "expected"), [(True, "cuda"), (False, "cpu")])
    def test_names(self, monkeypatch, seen, expected):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
        assert ranks.named("auto") == expected
        assert [ranks.named(name) for name in ("cpu", "cuda:1", "mps")] == ["cpu", "cuda:1", "mps"]

    def test_an_older_run_goes_on_on_its_cpu(self, tmp_path, monkeypatch):
        """A config.json that says "cpu", where torch now says that it sees CUDA."""
        assert run(*self.DEFAULTS, "--epochs", 2, "--out", tmp_path) == 0
        for path in checkpoint.newest_first(tmp_path / "checkpoints")[:1]:
            path.unlink()  # the last: the second epoch is trained again
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert errors.run(train.main, ["--out", str(tmp_path), "--resume"]) == 0
        assert final(tmp_path)["position"]["epoch"] == 2


class TestComplete:
    def test_a_complete_run_says_so_and_changes_nothing(self, tmp_path, capsys):
        assert run(*DIGITS, "--epochs", 2, "--out", tmp_path) == 0
        before = snapshot(tmp_path)
        capsys.readouterr()
        assert run("--out", tmp_path, "--resume") == 0
        (said,) = capsys.readouterr().out.splitlines()
        assert said.startswith(f"the run in {tmp_path} is complete: epoch 2 of 2, 28 updates")
        assert f"to measure it: python -m benchmarks.measure {tmp_path}" in said
        assert snapshot(tmp_path) == before

    def test_one_that_is_not_goes_on(self, tmp_path, capsys):
        assert run(*DIGITS, "--epochs", 2, "--out", tmp_path) == 0
        checkpoint.newest_first(tmp_path / "checkpoints")[0].unlink()
        capsys.readouterr()
        assert run("--out", tmp_path, "--resume") == 0
        first, second, third = capsys.readouterr().out.splitlines()
        assert first == f"going on in {tmp_path} after 14 updates"
        assert second.startswith("training on cpu (")
        assert third.startswith("epoch   2")


class TestEpochLine:
    def lines(self, out: Path, capsys, *options) -> list[str]:
        assert run("--epochs", 2, "--measures", "none", "--out", out, *options) == 0
        return [text for text in capsys.readouterr().out.splitlines() if text.startswith("epoch")]

    def numbers(self, text: str) -> dict[str, float]:
        result = re.findall(r"  ([a-z][a-z ]*) (-?[0-9.]+)", text)
        return {name: float(value) for name, value in result}

    def test_all_that_is_evaluated_is_printed(self, tmp_path, capsys):
        options = ["--sam-rho", "0.1", "--model-ema", "0.9", "--validation-fraction", "0.2", "--eval-every", "2"]
        first, last = self.lines(tmp_path, capsys, *options)
        assert list(self.numbers(first)) == ["loss", "accuracy", "sharpness"]
        names = [
            f"{a}{split} {k}" for a in ("", "ema ") for split in ("validation", "test") for k in ("loss", "accuracy")
        ]
        result, record = self.numbers(last), metrics(tmp_path)[-1]
        assert list(result) == ["loss", "accuracy", "sharpness", *names]
        for name in names:
            assert result[name] == pytest.approx(record[name.replace(" ", "_")], abs=6e-5)
        assert result["ema test loss"] != result["test loss"]

    def test_plain_sgd_has_no_sharpness(self, tmp_path, capsys):
        for text in self.lines(tmp_path, capsys):
            assert list(self.numbers(text)) == ["loss", "accuracy", "test loss", "test accuracy"]


class TestBadInput:
    """Exit code 2, one line on stderr that says what to do, nothing written."""

    CASES = (
        (["--sam-rho", "-0.1"], "--sam-rho: must be >= 0"),
        (["--sam-rho", "nan"], "--sam-rho: must be >= 0"),
        (["--lr", "0"], "--lr: must be > 0"),
        (["--lr", "fast"], "--lr: must be float"),
        (["--model", "resnet19"], "unknown model 'resnet19'; choose from"),
        (["--opt", "sam_sgd"], "unknown optimizer 'sam_sgd'; choose from"),
        (["--opt", "sgdd"], "unknown optimizer 'sgdd'; choose from sgd"),
        (["--opt", "adahessian"], "second derivatives"),
        (["--opt-kwargs", "nonsense=3"], "--opt sgd cannot be created"),
        (["--sched", "cosin"], "choose from"),
        (["--data", "cifar11", "--data-dir", "."], "unknown data set 'cifar11'; choose from"),
        (["--data", "cifar10"], "needs --data-dir"),
        (["--data", "cifar10", "--data-dir", "/nowhere"], "/nowhere is not a directory"),
        (["--data", "folder", "--data-dir", "/nowhere"], "/nowhere is not a directory"),
        (["--measures", "worst,flatness"], "unknown measure 'flatness'; choose from average"),
        (["--device", "cuda:99"], "cannot be used here"),
        (["--device", "quantum"], "cannot be used here"),
        (["--adaptive"], "--adaptive needs a radius"),
        (["--adaptive", "sometimes", "--sam-rho", "1"], "choose from"),
        (["--mixup", "1", "--batch-size", "7"], "must be even"),
        (["--mixup", "1", "--train-examples", "51"], "51 examples make one of 51: set --batch-size 50"),
        (["--cutmix", "1", "--train-examples", "1"], "1 examples make one of 1: leave --mixup and --cutmix out"),
        (["--warmup-epochs", "40"], "leaves nothing"),
        (["--label-noise", "1.5"], "--label-noise: must be"),
        (["--aa", "rand-m9"], "digits are not augmented"),
        (["--img-size", "32"], "digits come with scikit-learn"),
        (["--model-kwargs", "width"], "must be KEY=VALUE"),
        (["--opt-kwargs", "betas={1, 2}"], "--opt-kwargs: must be a number, word, list or mapping, got 'betas={1, 2}'"),
        (["--resume", "--force"], "choose one"),
        (["--nonsense"], "unrecognized arguments: --nonsense (see --help)"),
        (["--sam_rho", "0.1"], "--sam_rho 0.1; --sam_rho: did you mean --sam-rho"),
        (["--batchsize=32", "--epoch-s", "3"], "--batchsize: did you mean --batch-size"),
        (["--layer-decay", "0.9"], "--layer-decay needs the layer groups of a timm model, and cnn3 has none"),
        (["--layer-decay", "1", "--sam-rho", "0.1", "--adaptive"], "cnn3 has none: leave it out"),
        (["--train-examples", "899"], "there are 898 examples to train on"),
        (["--epochs", "0"], "--epochs: must be >= 1"),
    )

    @pytest.mark.parametrize(("options", "message"), CASES, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
    def test_one_line_and_exit_code_2(self, tmp_path, monkeypatch, capsys, options, message):
        monkeypatch.chdir(tmp_path)
        assert run(*options) == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert list(tmp_path.iterdir()) == []

    def test_in_a_real_process_there_is_no_traceback(self, tmp_path):
        arguments = [sys.executable, "-m", "benchmarks.train", "--model", "resnet19", "--out", str(tmp_path / "x")]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "x").exists()

    def test_a_directory_that_is_not_empty_is_refused_without_resume_or_force(self, tmp_path, capsys):
        (tmp_path / "notes.txt").write_text("mine")
        assert run(*DIGITS, "--epochs", 1, "--out", tmp_path) == 2
        assert "is not empty; continue its run with --resume, replace it with --force" in capsys.readouterr().err
        assert run("--out", tmp_path, "--resume") == 2
        assert "holds no run to resume" in capsys.readouterr().err
        assert snapshot(tmp_path) == {"notes.txt": b"mine"}
        assert run(*DIGITS, "--epochs", 1, "--out", tmp_path, "--force") == 0
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_force_with_bad_options_keeps_the_old_run(self, tmp_path):
        assert run(*DIGITS, "--epochs", 1, "--out", tmp_path) == 0
        before = snapshot(tmp_path)
        assert run("--model", "resnet19", "--out", tmp_path, "--force") == 2
        assert run("--img-size", 99, "--out", tmp_path, "--force") == 2
        assert snapshot(tmp_path) == before

    def test_out_is_a_file(self, tmp_path, capsys):
        (tmp_path / "x").write_text("")
        assert run("--out", tmp_path / "x") == 2
        assert "is a file" in capsys.readouterr().err

    def test_all_checkpoints_damaged(self, tmp_path, capsys):
        assert run(*DIGITS, "--epochs", 2, "--out", tmp_path) == 0
        for path in checkpoint.newest_first(tmp_path / "checkpoints"):
            path.write_bytes(b"")
        before = snapshot(tmp_path)
        assert run("--out", tmp_path, "--resume") == 2
        assert "no valid checkpoint left" in capsys.readouterr().err
        assert snapshot(tmp_path) == before

    def test_a_damaged_config(self, tmp_path, capsys):
        assert run(*DIGITS, "--epochs", 1, "--out", tmp_path) == 0
        (tmp_path / "config.json").write_text("{")
        assert run("--out", tmp_path, "--resume") == 2
        assert "config.json is not valid JSON" in capsys.readouterr().err

    @pytest.mark.parametrize("workers", [0, 1])
    def test_a_truncated_image(self, tmp_path, capsys, workers):
        tree = picture_tree(tmp_path / "data", n=8)
        bad = tree / "train" / "dog" / "5.png"
        bad.write_bytes(bad.read_bytes()[:200])
        assert run(*PICTURES, "--data-dir", tree, "--out", tmp_path / "out", "--workers", workers) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: cannot read image {bad}")
        assert err.count("\n") == 1

    def test_a_loss_that_becomes_nan_stops_and_names_the_last_good_checkpoint(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(Training, "_after_update", poisoned(Training._after_update, update=20))
        assert run(*DIGITS, "--epochs", 3, "--out", tmp_path) == 2
        err = capsys.readouterr().err
        assert "the loss is nan: training diverged; lower --lr" in err
        assert err.count("\n") == 1
        last = checkpoint.newest_first(tmp_path / "checkpoints")
        assert str(last[0]) in err
        assert len(last) == 1
        assert final(tmp_path)["position"] == {"epoch": 1, "batch": 0, "updates": 14}
        assert len(metrics(tmp_path)) == 1

    def test_weights_that_become_nan_in_the_last_update_are_not_saved(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Training, "_after_update", poisoned(Training._after_update, update=28))
        assert run(*DIGITS, "--epochs", 3, "--out", tmp_path) == 2
        assert final(tmp_path)["step"] == 14

    def test_a_learning_rate_that_is_far_too_high(self, tmp_path, capsys):
        assert run("--lr", "1e6", "--measures", "none", "--sched", "none", "--epochs", 3, "--out", tmp_path) == 2
        assert "training diverged" in capsys.readouterr().err


def poisoned(after_update, update: int):
    def after(self, batch):
        after_update(self, batch)
        if self.position.updates == update:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))

    return after


class TestMeasure:
    def test_a_run_is_measured_after_its_last_epoch_and_again_from_its_files(self, tmp_path, capsys):
        options = ["--label-noise", "0.4", "--sam-rho", "0.1", "--epochs", "1", "--measures", "worst,eigenvalue"]
        assert run(*options, "--out", tmp_path) == 0
        report = files.read_json(tmp_path / "measures.json")
        assert report["measures"].keys() == {"worst", "eigenvalue"}
        assert report["measures"]["worst"]["value"] > 0
        assert report["split"] == "train"
        (tmp_path / "measures.json").unlink()
        assert errors.run(measure.main, [str(tmp_path), "--measures", "worst,eigenvalue"]) == 0
        again = files.read_json(tmp_path / "measures.json")
        assert json.dumps(again, sort_keys=True) == json.dumps(report, sort_keys=True)
        assert "worst" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--measures", "flat"], "unknown measure 'flat'; choose from average"),
            (["--measures", "none"], "names none"),
            (["--rho", "-1"], "--rho: must be > 0, got -1"),
            (["--examples", "-1"], "--examples: must be >= 0, got -1"),
            (["--split", "validation"], "no validation split"),
            (["--ema"], "without --model-ema"),
        ],
    )
    def test_bad_options(self, tmp_path_factory, capsys, options, message):
        out = tmp_path_factory.mktemp("run")
        assert run("--epochs", 1, "--measures", "none", "--out", out) == 0
        before = snapshot(out)
        assert errors.run(measure.main, [str(out), *options]) == 2
        assert message in capsys.readouterr().err
        assert snapshot(out) == before

    def test_not_a_run(self, tmp_path, capsys):
        assert errors.run(measure.main, [str(tmp_path)]) == 2
        assert "is not a run directory" in capsys.readouterr().err


@pytest.mark.slow
def test_real_cifar_images(tmp_path):
    """CIFAR-10 (JPEG q75), 100 images of each class: both optimizers learn far beyond chance."""
    archive = SHARED / "cifar10-jpg.tar.gz"
    if not archive.exists():
        pytest.skip(f"{archive} is not there")
    import tarfile

    with tarfile.open(archive) as tar:
        wanted = [m for m in tar if int(m.name[-8:-4]) < (100 if m.name.startswith("train") else 50)]
        tar.extractall(tmp_path / "data", members=wanted, filter="data")
    for rho in (0, 0.05):
        out = tmp_path / f"rho{rho}"
        options = ["--data", "folder", "--data-dir", tmp_path / "data", "--model", "test_efficientnet", "--lr", "0.05"]
        assert run(*options, "--sam-rho", rho, "--epochs", 8, "--measures", "none", "--out", out) == 0
        four_sd_above_chance = 0.1 + 4 * (0.1 * 0.9 / 500) ** 0.5
        assert metrics(out)[-1]["test_accuracy"] > four_sd_above_chance
