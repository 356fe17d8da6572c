"""benchmarks.train on two processes: against one process with their batches together, stopped, resumed, sharded."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import ONE_THREAD, PATIENCE
from ranks import spawn
from test_data import picture_tree

from benchmarks import command
from benchmarks.command import Interrupted, Signals
from benchmarks.train import __main__ as train
from benchmarks.train import checkpoint, data, options, ranks, recipe, trained
from benchmarks.train import epoch as engine
from benchmarks.train.batches import Augment, batches
from benchmarks.train.data import Examples
from benchmarks.train.order import Loading, Order
from benchmarks.train.run import Training
from sam_optim.core import errors, files
from sam_optim.core.errors import InputError
from sam_optim.vision.data import Split
from sam_optim.vision.preprocessing import Preprocessing

TIMES = ("seconds", "images_per_s")
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}  # two sums of half a batch against one of the batch, over an epoch
BASE = ("--device", "cpu", "--measures", "none", "--epochs", "1", "--train-examples", "320")


def metrics(out: Path) -> dict:
    return {k: v for k, v in command.read_jsonl(out / "metrics.jsonl")[-1].items() if k not in TIMES}


def everything(rank, cases, out):
    """All that needs two processes, in one start of them, which takes longer than the runs."""
    codes = [errors.run(train.main, [str(o) for o in case]) for case in cases]
    return {"codes": codes, "stopped": stopped(rank, out), "statistics": mean_statistics(rank)}


def stopped(rank, out):
    """A signal to one rank only; both stop after the same update, save, and go on to where a whole run is."""
    argv = [*BASE, "--batch-size", "16", "--sam-rho", "0.1"]
    after = Training._after_update

    def stopping(self, batch):
        if rank == 1 and self.position.updates == 3:
            signal.raise_signal(signal.SIGTERM)
        after(self, batch)

    assert errors.run(train.main, [*argv, "--out", f"{out}/whole"]) == 0
    Training._after_update = stopping
    code = errors.run(train.main, [*argv, "--out", f"{out}/cut"])
    Training._after_update = after
    step = checkpoint.newest(Path(out) / "cut" / "checkpoints")["step"]
    again = errors.run(train.main, ["--out", f"{out}/cut", "--resume"])
    return [code, step, again]


def mean_statistics(rank):
    model = torch.nn.BatchNorm1d(1)
    model.running_mean.fill_(rank + 1.0)
    ranks.World(rank, 2, rank).mean_buffers_(model)
    return [float(model.running_mean), int(model.num_batches_tracked)]


class TestOrder:
    @pytest.mark.parametrize("n", [64, 65, 67, 127, 7])
    @pytest.mark.parametrize("size", [2, 3])
    def test_evaluation_sees_each_example_once_in_as_many_batches_on_each_rank(self, n, size):
        orders = [list(Order(n, 8, loading=Loading(world=ranks.World(rank, size)))) for rank in range(size)]
        assert len({len(batches) for batches in orders}) == 1
        assert sorted(i for batches in orders for batch in batches for i in batch) == list(range(n))
        assert all(0 < len(batch) <= 8 for batches in orders for batch in batches)

    def test_training_batches_are_those_of_one_process(self):
        whole = list(Order(70, 12, shuffle=True, drop_last=True, loading=Loading(3)))
        worlds = [ranks.World(rank, 3, rank) for rank in range(3)]
        parts = [list(Order(70, 4, shuffle=True, drop_last=True, loading=Loading(3, world=world))) for world in worlds]
        assert [[i for b in batches for i in b] for batches in zip(*parts, strict=True)] == whole

    def test_augmentation_too(self):
        pixels = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        split = Examples(Split("arrays", None, torch.arange(40), pixels), "RGB")
        shown = Preprocessing((3, 16, 16), (0.5,) * 3, (0.2,) * 3)
        options = {"train": True, "augment": Augment()}
        whole = list(batches(split, 10, shown, **options, loading=Loading(1)))
        worlds = [ranks.World(rank, 2, rank) for rank in range(2)]
        parts = [list(batches(split, 5, shown, **options, loading=Loading(1, world=world))) for world in worlds]
        for (x, y), (a, b), (c, d) in zip(whole, *parts, strict=True):
            assert torch.equal(x, torch.cat([a, c]))
            assert torch.equal(y, torch.cat([b, d]))


@pytest.mark.parametrize(
    ("n", "size", "message"),
    [
        (102, 2, "102 examples make one of 51 in a process: set --batch-size 50"),
        (100, 3, "make one of 33 in a process: set --batch-size 32"),  # 33, 33 and 34
        (3, 2, "make one of 1 in a process: leave --mixup and --cutmix out"),
        (104, 2, None),
        (128, 2, None),
        (129, 2, None),  # the last one is left out
    ],
)
def test_mixup_needs_an_even_share_of_the_batch_on_each_rank(n, size, message):
    """All of them say so, for one that went on would wait for the others; what is advised goes well."""
    argv = ["--device", "cpu", "--batch-size", "64", "--mixup", "0.2", "--train-examples", str(n)]
    for rank in range(size):
        world, good = ranks.World(rank, size, rank), argv
        if message:
            with pytest.raises(InputError, match=message):
                unwrapped(argv, world)
            advised = re.search("(--batch-size) ([0-9]+)", message)
            if advised is None:
                continue
            good = [*argv, *advised.groups()]
        assert all(len(y) % 2 == 0 for _, y in unwrapped(good, world).train_batches)


def unwrapped(argv, world):
    """Of one of several processes that are not there."""
    chosen = options.parse(argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "_network", lambda self: setattr(self, "ddp", False) or self.model)
        return Training(chosen, data.load(chosen), torch.device("cpu"), world=world)


CASES = {
    "sgd": (),
    "adamw, accumulated, clipped": ("--opt", "adamw", "--lr", "0.01", "--accumulate", "2", "--clip-grad", "0.5"),
    "one perturbation for all": ("--sam-rho", "0.1", "--sync-ascent", "--model-ema", "0.9"),
}
SHARDED = tuple(CASES)[:2]
NORMALISED = {"normalized": (), "normalized fsdp": ("--fsdp",)}


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """(folder of the runs, what each process returned)."""
    root = tmp_path_factory.mktemp("runs")
    two = [*BASE, "--batch-size", "32"]
    cases = [[*two, *more, "--out", root / f"two {name}"] for name, more in CASES.items()]
    cases += [[*two, *CASES[name], "--fsdp", "--out", root / f"fsdp {name}"] for name in SHARDED]
    cases.append([*two, "--sam-rho", "0.1", "--model-ema", "0.9", "--fsdp", "--out", root / "fsdp sam"])
    cases.append([*two, "--sam-rho", "0.1", "--out", root / "own"])
    for name, more in NORMALISED.items():
        cases.append([*two, "--model", "cnn5", "--model-ema", "0.5", "--epochs", "4", *more, "--out", root / name])
    results = spawn(everything, cases, str(root))
    for name, more in CASES.items():
        argv = [str(o) for o in (*BASE, "--batch-size", "64", *more, "--out", root / f"one {name}")]
        assert errors.run(train.main, argv) == 0
    return root, results


@pytest.fixture(scope="module")
def runs(together) -> Path:
    root, results = together
    assert all(code == 0 for result in results for code in result["codes"])
    return root


class TestTwoProcesses:
    @pytest.mark.parametrize("name", CASES)
    def test_the_run_is_that_of_one_process_with_their_batches_together(self, runs, name):
        one, two = metrics(runs / f"one {name}"), metrics(runs / f"two {name}")
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert two[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
        self.same_weights(runs / f"one {name}", runs / f"two {name}")

    @pytest.mark.parametrize("name", SHARDED)
    def test_sharded_too(self, runs, name):
        self.same_weights(runs / f"one {name}", runs / f"fsdp {name}")

    def test_sharded_sam_has_one_perturbation_for_all(self, runs):
        self.same_weights(runs / "one one perturbation for all", runs / "fsdp sam")
        state = checkpoint.newest(runs / "fsdp sam" / "checkpoints")
        reference = checkpoint.newest(runs / "one one perturbation for all" / "checkpoints")
        for key, value in reference["ema"].items():
            torch.testing.assert_close(state["ema"][key], value, **ROUNDING)

    @pytest.mark.parametrize("name", NORMALISED)
    @pytest.mark.parametrize("prefix", ["", "ema_"])
    def test_what_is_saved_is_what_was_evaluated(self, runs, name, prefix):
        """Each rank evaluates a share of the test set: all with the statistics that the checkpoint holds."""
        run = trained.load(options.of_run(runs / name), ema=bool(prefix))
        result = engine.evaluate(run.model, run.batches(run.splits.test, 256), torch.nn.CrossEntropyLoss())
        rounding = {"rel": 1e-5}  # of two sums over 899 examples
        for key, value in result.items():
            assert metrics(runs / name)[f"{prefix}test_{key}"] == pytest.approx(value, **rounding)

    def test_each_with_its_own_perturbation_is_another_run(self, runs):
        """m-sharpness: the mean of the losses at w + e of each rank, which is not that at one e for both."""
        own, together = (metrics(runs / name) for name in ("own", "two one perturbation for all"))
        assert own["train_sharpness"] > 1.02 * together["train_sharpness"] > 0

    def same_weights(self, a: Path, b: Path) -> None:
        result, expected = (checkpoint.newest(path / "checkpoints")["model"] for path in (b, a))
        assert result.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(result[key], value, **ROUNDING)

    def test_one_process_writes(self, runs):
        facts = files.read_json(runs / "own" / "config.json")
        assert facts["num_processes"] == 2
        assert len(command.read_jsonl(runs / "own" / "metrics.jsonl")) == 1


def test_a_signal_to_one_process_stops_both_after_the_same_update_and_the_run_goes_on(together):
    root, results = together
    assert results[0]["stopped"] == results[1]["stopped"]
    code, step, again = results[0]["stopped"]
    assert (code, again) == (143, 0)
    assert 4 <= step <= 6
    whole, cut = (checkpoint.newest(root / name / "checkpoints") for name in ("whole", "cut"))
    for key, value in whole["model"].items():
        assert torch.equal(cut["model"][key], value)
    assert metrics(root / "cut") == metrics(root / "whole")


def test_alone_a_signal_is_raised_at_once():
    with Signals() as signals:
        agreed = ranks.Agreed(signals, ranks.ALONE)
        agreed.check()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            agreed.check()


def test_batch_norm_statistics_are_the_mean_over_ranks(together):
    assert [result["statistics"] for result in together[1]] == [[1.5, 0], [1.5, 0]]


class TestOptions:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--fsdp"], "start them with torchrun"),
            (["--fsdp", "--amp", "fp16"], "use --amp bf16"),
            (["--sync-ascent"], "needs a radius"),
            (["--sched", "plateau", "--warmup-epochs", "1"], "has no warm-up"),
            (["--sched", "plateau", "--decay-rate", "1"], "must be < 1"),
            (["--grad-checkpointing"], "cannot checkpoint its gradients"),
            (["--initial-checkpoint", "x"], "--initial-checkpoint x is not a file"),
        ],
    )
    def test_what_does_not_go_together(self, tmp_path, capsys, argv, message):
        assert errors.run(train.main, [*argv, "--out", str(tmp_path / "x")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "x").exists()

    def test_initial_weights_must_fit(self, tmp_path, capsys):
        torch.save({"state_dict": {"w": torch.zeros(2)}}, tmp_path / "w.pt")
        assert (
            errors.run(train.main, ["--initial-checkpoint", str(tmp_path / "w.pt"), "--out", str(tmp_path / "x")]) == 2
        )
        assert "does not fit cnn3" in capsys.readouterr().err


class TestPlateau:
    ARGV = (
        "--device",
        "cpu",
        "--sched",
        "plateau",
        "--patience-epochs",
        "1",
        "--decay-rate",
        "0.5",
        "--measures",
        "none",
        "--epochs",
        "6",
    )

    def test_rates_fall_where_the_loss_has_not(self, tmp_path, monkeypatch):
        """Losses as given here, against the rule written out."""
        losses = iter([2.0, 1.5, 1.6, 1.55, 1.7, 1.8])
        train_epoch = engine.train_epoch
        monkeypatch.setattr(engine, "train_epoch", lambda *a, **k: train_epoch(*a, **k) | {"loss": next(losses)})
        assert errors.run(train.main, [*self.ARGV, "--lr", "0.04", "--out", str(tmp_path)]) == 0
        rates = [r["lr"] for r in command.read_jsonl(tmp_path / "metrics.jsonl")]
        assert rates == pytest.approx([0.04, 0.04, 0.04, 0.04, 0.02, 0.02])

    def test_epochs_that_do_not_evaluate_the_validation_split_do_not_count(self, tmp_path, monkeypatch):
        """It follows 1.0, 0.9, 0.95, 0.96; the training loss, which is lower and rises, is another one."""
        training, validation = itertools.count(), iter([1.0, 0.9, 0.95, 0.96])
        train_epoch, evaluate_ = engine.train_epoch, Training.evaluate
        monkeypatch.setattr(engine, "train_epoch", lambda *a, **k: train_epoch(*a, **k) | {"loss": next(training) / 10})
        monkeypatch.setattr(
            Training, "evaluate", lambda t, *splits: evaluate_(t, *splits) | {"validation_loss": next(validation)}
        )
        argv = [*self.ARGV, "--epochs", "8", "--eval-every", "2", "--validation-fraction", "0.2", "--lr", "0.04"]
        assert errors.run(train.main, [*argv, "--patience-epochs", "0", "--out", str(tmp_path)]) == 0
        rates = [r["lr"] for r in command.read_jsonl(tmp_path / "metrics.jsonl")]
        assert rates == pytest.approx([0.04] * 6 + [0.02] * 2)  # of the third evaluation, that of epoch 6

    def test_a_resumed_run_is_the_whole_one(self, tmp_path, monkeypatch):
        """Losses as given here: a rate falls before the cut and another one after it, on what was counted before it."""
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        argv = [*self.ARGV, "--lr", "0.04", "--epochs", "8"]
        given = [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7]
        epochs, train_epoch, epoch = [], engine.train_epoch, Training._epoch

        def entering(self):
            epochs.append(self.position.epoch)
            epoch(self)

        monkeypatch.setattr(Training, "_epoch", entering)
        monkeypatch.setattr(engine, "train_epoch", lambda *a, **k: train_epoch(*a, **k) | {"loss": given[epochs[-1]]})
        assert errors.run(train.main, [*argv, "--out", str(whole)]) == 0

        def stopping(self):
            if self.position.epoch == 4:
                raise Interrupted(signal.SIGTERM)
            entering(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Training, "_epoch", stopping)
            assert errors.run(train.main, [*argv, "--out", str(cut)]) == 143
        assert errors.run(train.main, ["--out", str(cut), "--resume"]) == 0
        a, b = ([r["lr"] for r in command.read_jsonl(path / "metrics.jsonl")] for path in (whole, cut))
        assert a == b
        assert len(set(a)) == 4
        assert metrics(whole) == metrics(cut)


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    tree = picture_tree(tmp_path / "data", n=8)
    argv = ["--data", "folder", "--data-dir", str(tree), "--model", "test_vit", "--batch-size", "8", "--epochs", "1"]
    argv += ["--measures", "none", "--sam-rho", "0.1", "--device", "cpu"]
    states = []
    for more in ([], ["--grad-checkpointing"]):
        out = tmp_path / f"run{len(more)}"
        assert errors.run(train.main, [*argv, *more, "--out", str(out)]) == 0
        states.append(checkpoint.newest(out / "checkpoints")["model"])
    for key, value in states[0].items():
        assert torch.equal(states[1][key], value), key


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_processes_meet_over_gloo_where_torch_sees_no_cuda(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in where.items():
        monkeypatch.setenv(name, str(value))
    with ranks.joined(device) as world:
        assert torch.distributed.get_backend() == "gloo"
        assert recipe.device(options.parse(["--device", device]), world) == torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_torchrun(tmp_path, fsdp):
    """The real launcher; SIGTERM to it, as a scheduler sends it; the same command again goes on."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command_ = [*argv, "-m", "benchmarks.train", "--device", "cpu", "--resume", "--out", str(tmp_path / "run")]
    first = [*command_, "--epochs", "300", "--sam-rho", "0.1", "--measures", "worst", *fsdp]
    environment = os.environ | ONE_THREAD
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(first, text=True, env=environment, **pipes) as process:
        for line in process.stdout:
            if line.startswith("epoch   3"):
                process.send_signal(signal.SIGTERM)
                break
        process.wait(PATIENCE)
    state = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert state["step"] > 20
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["options"]["epochs"] = state["position"]["epoch"] + 2
    path.write_text(json.dumps(config))
    again = subprocess.run(command_, env=environment, timeout=PATIENCE, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"going on in {tmp_path / 'run'} after {state['step']} updates" in again.stdout
    assert (tmp_path / "run" / "measures.json").exists()


def test_an_option_of_the_run_is_kept_by_name():
    assert {"fsdp", "sync_ascent", "grad_checkpointing"} <= set(options.parse([]).recorded())
