"""`sam-optim measure`: its numbers are those of the library, and it goes on where it stopped."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import entries, images, network, run, small, study
from limits import ONE_THREAD, PATIENCE
from ranks import spawn
from torch import nn

import sam_optim
from sam_optim import Ball, Loss, average_sharpness, hessian_eigenvalues, hessian_trace, worst_case_sharpness
from sam_optim.cli import options
from sam_optim.measures import registry
from sam_optim.sweep import progress, store
from sam_optim.sweep.processes import started

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--num-steps", "2", "--num-probes", "2", "--quiet"]  # for worst and trace


class TestNumbers:
    def test_every_number_is_that_of_the_library(self, here):
        path, x, y = images(here / "d.npz")
        model = network(0)
        torch.save({"state_dict": model.state_dict(), "epoch": 3}, "c.pt")
        code, out, _ = run(
            "measure", "c.pt", "--model", "cnn3", "--data", path, "--batch-size", 10, "--examples", 22, "--adaptive",
            "--eta", "0.1", "--rho", "0.05,0.2", "--matrix", "hessian,ggn", "--seed", 7, "--json", "o.json",
            "--num-steps", 3, "--restarts", 2, "--num-samples", 4, "--num-probes", 3,
        )  # fmt: skip
        loss = Loss(model, nn.CrossEntropyLoss(), [(x[i:j], y[i:j]) for i, j in ((0, 10), (10, 20), (20, 22))])
        measured = {column: e["result"] for (_, column), e in entries(here / "o.json").items()}
        expected = {}
        for rho in (0.05, 0.2):
            ball = Ball(rho, adaptive=True, eta=0.1)
            worst = worst_case_sharpness(loss, ball, num_steps=3, num_restarts=2, seed=7)
            expected[f"worst adaptive rho={rho}"] = worst
            expected[f"average adaptive sigma={rho}"] = average_sharpness(loss, ball, num_samples=4, seed=7)
        for matrix, suffix in (("hessian", " adaptive"), ("ggn", " ggn adaptive")):
            unit = Ball(1.0, adaptive=True, eta=0.1)
            expected[f"eigenvalue{suffix}"] = hessian_eigenvalues(loss, num=1, ball=unit, matrix=matrix, seed=7)
            expected[f"trace{suffix}"] = hessian_trace(loss, num_probes=3, ball=unit, matrix=matrix, seed=7)
        assert code == 0
        assert measured == {name: result.to_dict() for name, result in expected.items()}
        assert all(column in out for column in measured)

    @pytest.mark.parametrize(
        ("flags", "kwargs"),
        [
            (["--normalize-logits"], {"normalize_logits": True}),
            (["--batch-statistics"], {"batch_statistics": True}),
            (["--dtype", "float64"], {}),
        ],
    )
    def test_the_settings_of_the_loss_reach_it(self, here, flags, kwargs):
        path, x, y = images(here / "d.npz")
        model = network(0)
        torch.save(model.state_dict(), "c.pt")
        measures = ["--measures", "gradient_regret", "--batch-size", "12", "--json", "o.json"]
        assert run("measure", "c.pt", "--model", "cnn3", "--data", path, *measures, *flags)[0] == 0
        dtype = torch.float64 if "float64" in flags else torch.float32
        batches = [(x[i : i + 12].to(dtype), y[i : i + 12]) for i in (0, 12)]
        expected = sam_optim.gradient_regret(Loss(model.to(dtype), nn.CrossEntropyLoss(), batches, **kwargs))
        assert entries(here / "o.json")["c.pt", "gradient_regret"]["result"] == expected.to_dict()

    @pytest.mark.parametrize("function", ["problem", "loading", "ready"])
    def test_a_function_of_the_users(self, here, function):
        names = study(here)
        code, *_ = run("measure", *names, "--target", f"study_problem:{function}", "--num-probes", 2,
                       "--json", "o.json", "--measures", "trace")  # fmt: skip
        import study_problem

        assert code == 0
        for seed, name in enumerate(names):
            loss = Loss(small(seed), nn.CrossEntropyLoss(), study_problem.data())
            expected = hessian_trace(loss, num_probes=2).to_dict()
            assert entries(here / "o.json")[name, "trace"]["result"] == expected

    def test_an_error_in_it_says_what_and_where(self, here):
        (here / "study_broken.py").write_text("def problem():\n    return {}['here']\n")
        code, _, err = run("measure", "--target", "study_broken:problem", "--measures", "trace")
        assert code == 1
        assert re.search(r"study_broken:problem raised KeyError: 'here' \(.*study_broken\.py, line 2\)", err)

    def test_a_function_without_checkpoints(self, here):
        study(here, count=0)
        code, out, _ = run("measure", "--target", "study_problem:problem", *QUICK, "--measures", "trace,worst")
        assert code == 0
        assert "study_problem:problem" in out

    def test_own_radii_for_the_noise_and_any_other_option(self, here):
        study(here, count=1)
        code, *_ = run("measure", "c0.pt", "--target", "study_problem:problem", "--rho", "0.1", "--num-samples", 2,
                       "--measures", "worst,average,eigenvalue", "--noise-rho", "0.01,0.02", "--norm", "inf",
                       "--set", "eigenvalue.which=smallest", "--json", "o.json")  # fmt: skip
        result = {column: e["result"] for (_, column), e in entries(here / "o.json").items()}
        assert code == 0
        assert list(result) == ["worst rho=0.1", "average sigma=0.01", "average sigma=0.02", "eigenvalue"]
        assert result["worst rho=0.1"]["settings"]["ball"]["norm"] == "inf"
        assert result["eigenvalue"]["settings"]["which"] == "smallest"
        assert result["eigenvalue"]["eigenvalues"][0] < 0

    def test_the_table_and_the_file_for_a_spreadsheet_hold_all_checkpoints(self, here):
        names = study(here)
        common = ["--target", "study_problem:problem", "--measures", "trace,eigenvalues", "--num-probes", "2"]
        code, out, _ = run("measure", *names, *common, "--csv", "t.csv", "--json", "o.json")
        rows = [line.split(",") for line in (here / "t.csv").read_text().splitlines()]
        result = entries(here / "o.json")
        assert code == 0
        measured = ["trace", "trace error", "eigenvalues", "eigenvalues error"]
        assert rows[0] == ["checkpoint", "loss", "accuracy", *measured]
        for row in rows[1:]:
            trace, spectrum = (result[row[0], column]["result"] for column in ("trace", "eigenvalues"))
            expected = [trace["value"], trace["stderr"], spectrum["eigenvalues"][0], spectrum["errors"][0]]
            assert [float(x) for x in row[3:]] == expected
            assert float(row[1]) > 0
            assert 0 <= float(row[2]) <= 1
        assert [line.split()[0] for line in out.splitlines()[2:]] == names


class TestResuming:
    common = ("--target", "study_problem:problem", "--measures", "trace,worst", *QUICK)

    def measure(self, *argv):
        return run("measure", *argv, *self.common)

    @pytest.fixture
    def calls(self, monkeypatch):
        """The measures that were really made."""
        made = []
        call = registry.call

        def counting(name, *args):
            made.append(name)
            return call(name, *args)

        monkeypatch.setattr(registry, "call", counting)
        return made

    def test_what_is_done_is_not_done_again_and_the_command_says_so(self, here, calls):
        names = study(here)
        first = self.measure(*names, "--json", "o.json")
        before = (here / "o.json").read_bytes()
        assert len(calls) == 6
        second = run("measure", *names, *self.common[:-1], "--json", "o.json")  # without --quiet
        assert len(calls) == 6
        assert first[:2] == second[:2]
        assert "6 of 6 numbers were there already" in second[2]
        assert (here / "o.json").read_bytes() == before

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(["--seed", "1"], id="seed"),
            pytest.param(["--rho", "0.07"], id="rho"),
            pytest.param(["--set", "trace.num_probes=3", "--set", "worst.num_restarts=2"], id="options"),
            pytest.param(["--dtype", "float64"], id="dtype"),
            pytest.param(["--normalize-logits"], id="loss"),
        ],
    )
    def test_other_settings_are_other_entries(self, here, calls, change):
        study(here)
        self.measure("c0.pt", "--json", "o.json")
        old = store.read(here / "o.json")
        self.measure("c0.pt", "--json", "o.json", *change)
        new = store.read(here / "o.json")
        changed = 1 if change[0] == "--rho" else 2
        assert len(calls) == 2 + changed
        assert new[:2] == old
        assert len(new) == 2 + changed

    def test_other_content_data_or_code_is_measured_anew(self, here, calls):
        study(here)
        self.measure("c0.pt", "--json", "o.json")
        torch.save(small(9).state_dict(), "c0.pt")
        self.measure("c0.pt", "--json", "o.json")
        assert len(calls) == 4
        sys.modules.pop("study_problem")
        text = (
            (here / "study_problem.py")
            .read_text()
            .replace("manual_seed(0)\n    return [", "manual_seed(1)\n    return [")
        )
        (here / "study_problem.py").write_text(text)
        self.measure("c0.pt", "--json", "o.json")
        assert len(calls) == 6
        assert len({e["key"] for e in store.read(here / "o.json")}) == 6

    def test_a_copy_of_a_checkpoint_has_its_numbers(self, here, calls):
        study(here)
        self.measure("c0.pt", "--json", "o.json")
        (here / "copy.pt").write_bytes((here / "c0.pt").read_bytes())
        assert self.measure("copy.pt", "--json", "o.json")[0] == 0
        assert len(calls) == 2
        result = entries(here / "o.json")
        assert result["copy.pt", "trace"]["result"] == result["c0.pt", "trace"]["result"]

    def test_ctrl_c_loses_at_most_the_measure_in_progress(self, here, monkeypatch):
        names = study(here)
        self.measure(*names, "--json", "whole.json")
        call, count = registry.call, []

        def stopping(*args):
            count.append(1)
            if len(count) == 4:
                raise KeyboardInterrupt
            return call(*args)

        with monkeypatch.context() as patch:
            patch.setattr(registry, "call", stopping)
            code, _, err = self.measure(*names, "--json", "o.json")
        assert code == 130
        assert "3 of 6 numbers are done; the same command continues" in err
        assert len(store.read(here / "o.json")) == 3
        assert self.measure(*names, "--json", "o.json")[0] == 0
        assert (here / "o.json").read_bytes() == (here / "whole.json").read_bytes()

    def test_a_study_of_100_checkpoints_that_is_killed_twice_is_that_of_one_run(self, here):
        study(here, count=100)
        argv = ["measure", ".", *self.common, "--json", "o.json"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), **ONE_THREAD}
        for least in (30, 90):
            process = subprocess.Popen(
                [sys.executable, "-m", "sam_optim", *argv], env=environment, stdout=subprocess.DEVNULL
            )
            limit = time.monotonic() + PATIENCE
            while not (here / "o.json").exists() or (here / "o.json").read_bytes().count(b"\n") < least:
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < limit
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            assert least - 10 < len(store.read(here / "o.json")) < 200  # whole at every moment
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            code, out, _ = run(*argv)
            again = run("measure", ".", *self.common, "--json", "whole.json")
        finally:
            torch.set_num_threads(threads)
        assert code == 0
        assert again[1] == out
        assert (here / "o.json").read_bytes() == (here / "whole.json").read_bytes()
        assert len(store.read(here / "o.json")) == 200

    def test_another_file_is_never_overwritten(self, here):
        study(here)
        for content in ('{"mine": 1}', "[1, 2]", "not json", '{"format": "sam_optim measures 1", "entries": [{}]}'):
            (here / "o.json").write_text(content)
            code, _, err = self.measure("c0.pt", "--json", "o.json")
            assert code == 2
            assert err.startswith("error: o.json")
            assert (here / "o.json").read_text() == content

    def test_a_second_command_on_one_file_says_who_writes_it_and_nothing_is_lost(self, here):
        study(here)
        before = None
        with started("cpu") as alone, store.opened(here / "o.json", alone) as first:
            first.put({"checkpoint": "a", "key": "1", "result": {}})
            before = (here / "o.json").read_bytes()
            code, _, err = self.measure("c0.pt", "--json", "o.json")
            assert (code, err) == (
                2, f"error: o.json is being written by process {os.getpid()}; wait for it, or choose another --json\n"
            )  # fmt: skip
            assert (here / "o.json").read_bytes() == before
        assert self.measure("c0.pt", "--json", "o.json")[0] == 0
        assert len(store.read(here / "o.json")) == 3
        assert not list(here.glob(".*lock"))


class TestFailures:
    def test_a_checkpoint_that_fails_is_recorded_and_the_others_go_on(self, here):
        names = study(here)
        (here / "c1.pt").write_bytes(b"no checkpoint")
        state = small(2).state_dict()
        state["0.weight"][0, 0] = float("nan")
        torch.save(state, "c2.pt")
        names.append("c3.pt")
        torch.save(small(3).state_dict(), "c3.pt")
        code, out, err = run("measure", *names, *TestResuming.common, "--json", "o.json")
        result = entries(here / "o.json")
        assert code == 1
        assert "is damaged or no checkpoint" in result["c1.pt", None]["error"]
        assert "0.weight has values that are not finite" in result["c2.pt", None]["error"]
        assert "0.weight has values that are not finite" in err
        assert {"trace", "worst rho=0.05"} == {column for name, column in result if name == "c3.pt"}
        assert out.count("failed") == 4

    def test_it_is_tried_again_and_forgotten_when_it_works(self, here):
        study(here)
        good = (here / "c1.pt").read_bytes()
        (here / "c1.pt").write_bytes(good[:100])
        assert run("measure", "c0.pt", "c1.pt", *TestResuming.common, "--json", "o.json")[0] == 1
        (here / "c1.pt").write_bytes(good)
        assert run("measure", "c0.pt", "c1.pt", *TestResuming.common, "--json", "o.json")[0] == 0
        assert ("c1.pt", None) not in entries(here / "o.json")

    def test_a_number_that_is_not_finite_is_exit_code_1(self, here):
        study(here)
        steep = "lambda outputs, target: nn.functional.cross_entropy(outputs**5, target)"
        text = (here / "study_problem.py").read_text().replace("nn.CrossEntropyLoss()", steep)
        (here / "study_problem.py").write_text(text)
        torch.save({k: v * 1e9 for k, v in small(0).state_dict().items()}, "c0.pt")
        code, out, err = run("measure", "c0.pt", "c1.pt", *TestResuming.common, "--json", "o.json")
        assert code == 1
        assert "no number" in out
        assert "at the weights" in err
        assert json.loads((here / "o.json").read_text())["entries"][1]["result"]["value"] is None
        assert run("measure", "c0.pt", "c1.pt", *TestResuming.common, "--json", "o.json")[0] == 1

    def test_a_measure_that_a_loss_cannot_have_leaves_the_others(self, here):
        path, *_ = images(here / "d.npz")
        torch.save(network(0).state_dict(), "c.pt")
        code, out, err = run("measure", "c.pt", "--model", "cnn3", "--data", path, "--num-probes", 2,
                             "--measures", "gradient_regret,trace", "--json", "o.json")  # fmt: skip
        result = entries(here / "o.json")
        assert code == 1
        assert "one: split it into several" in result["c.pt", "gradient_regret"]["error"]
        assert result["c.pt", "trace"]["result"]["value"] is not None
        assert "failed" in out
        assert "split it into several" in err

    def test_a_full_disk_stops_the_study(self, here, monkeypatch):
        names = study(here)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("sam_optim.core.files.os.replace", full)
        code, _, err = run("measure", *names, *TestResuming.common, "--json", "o.json")
        assert code == 2
        assert "No space left on device" in err
        assert not list(here.glob(".*tmp"))


BAD = [
    ([], "the following arguments are required: COMMAND"),
    (["measure"], "say what the loss is over"),
    (["measure", "--data", "d.npz"], "no CHECKPOINT is given"),
    (["measure", "c0.pt", "--data", "d.npz"], "say which model the checkpoints are of"),
    (["measure", "c0.pt", "--data", "d.npz", "--model", "resnet19"], "unknown model 'resnet19'"),
    (["measure", "c0.pt", "--data", "nowhere", "--model", "cnn3"], "--data nowhere does not exist"),
    (["measure", "c9.pt", "--data", "d.npz", "--model", "cnn3"], "c9.pt does not exist"),
    (["measure", "x*.pt", "--data", "d.npz", "--model", "cnn3"], "x*.pt matches none"),
    (["measure", "empty", "--data", "d.npz", "--model", "cnn3"], "empty has no checkpoint in it"),
    (["measure", "c0.pt", "--data", "d.npz", "--model", "cnn3", "--measures", "flat"], "unknown measure 'flat'"),
    (["measure", "c0.pt", "--data", "d.npz", "--model", "cnn3", "--measures", "none"], "names none"),
    (["measure", "c0.pt", "--data", "d.npz", "--model", "cnn3", "--rho", "0"], "must be > 0, got 0"),
    (["measure", "c0.pt", "--data", "d.npz", "--model", "cnn3", "--rho", "0.1,x"], "must be float, got 'x'"),
    (["measure", "c0.pt", "--data", "d.npz", "--model", "cnn3", "--device", "cuda:99"], "cannot be used here"),
    (["measure", "c0.pt", "--data", "d.npz", "--model", "cnn3", "--matrix", "jacobian"], "unknown matrix 'jacobian'"),
    (["measure", "c0.pt", "--target", "study_problem:problem", "--set", "worst.no=1"], "worst has no option 'no'"),
    (["measure", "c0.pt", "--target", "study_problem:problem", "--set", "nothing=1"], "MEASURE.OPTION=VALUE"),
    (
        ["measure", "c0.pt", "--target", "study_problem:problem", "--measures", "trace", "--num-steps", "3"],
        "--num-steps does nothing for trace",
    ),
    (["measure", "c0.pt", "--target", "study_problem:nope"], "unknown function of study_problem 'nope'"),
    (["measure", "c0.pt", "--target", "no_such_module:f"], "cannot import no_such_module"),
    (["measure", "c0.pt", "--target", "study_problem"], "--target must be MODULE:FUNCTION"),
    (["measure", "--target", "study_problem:problem", "--data", "d.npz"], "leave --model and --data out"),
    (["landscape", "c0.pt", "--target", "study_problem:problem", "--out", "x.gif"], "--out must end in"),
    (["landscape", "c0.pt", "c1.pt", "--target", "study_problem:problem", "--out", "x.json"], "one CHECKPOINT"),
    (["report", "d.npz", "-o", "x.html"], "d.npz is not valid JSON"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=lambda v: " ".join(v)[-50:] if isinstance(v, list) else "")
def test_a_wrong_command_is_one_line_and_exit_code_2(here, argv, message):
    study(here, count=2)
    images(here / "d.npz")
    (here / "empty").mkdir()
    code, out, err = run(*argv)
    assert code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert message in err


class TestOptions:
    def test_adaptive_does_not_swallow_the_checkpoint(self):
        args = options.parse(["measure", "--adaptive", "c.pt", "--target", "a:b"])
        assert (args.adaptive, args.checkpoints) == ("elementwise", ["c.pt"])
        args = options.parse(["measure", "--adaptive", "filter", "c.pt", "--target", "a:b"])
        assert (args.adaptive, args.checkpoints) == ("filter", ["c.pt"])

    def test_every_measure_of_the_registry_exists_and_is_explained(self):
        for name, row in registry.MEASURES.items():
            assert getattr(sam_optim, row.function.__name__) is row.function
            assert set(row.defaults) <= set(registry.options_of(name))
            assert name in options.MEASURE
            assert row.about in options.MEASURE

    def test_every_measure_of_the_registry_can_be_called_with_its_defaults(self, here):
        study(here, count=1)
        args = options.parse(["measure", "c0.pt", "--target", "a:b", "--measures", ",".join(registry.MEASURES)])
        measured = options.measures(args).columns()
        assert [c.measure for c in measured] == list(registry.MEASURES)
        torch.manual_seed(0)
        batches = [(torch.randn(4, 4), torch.randint(3, (4,))) for _ in range(3)]
        loss = Loss(small(0), nn.CrossEntropyLoss(), batches)
        for column in measured:
            result = registry.call(column.measure, loss, column.options).to_dict()
            assert result["type"] in ("Estimate", "Spectrum"), column.measure

    def test_options_that_a_measure_hands_on_are_those_of_the_measure_before_its_loss(self, monkeypatch):
        def contrast(measure, loss, **kwargs):
            return measure(loss, **kwargs)

        row = registry.Row(contrast, "of the eigenvalue", {"num": 2}, of=hessian_eigenvalues)
        monkeypatch.setitem(registry.MEASURES, "contrast", row)
        result = registry.arguments("contrast", {"seed": 3, "num": 9, "num_steps": 7}, {"tol": 0.5})
        assert (result["seed"], result["num"], result["tol"]) == (3, 2, 0.5)
        assert "num_steps" not in result
        loss = Loss(small(0), nn.CrossEntropyLoss(), [(torch.ones(2, 4), torch.tensor([0, 1]))])
        expected = hessian_eigenvalues(loss, num=2, seed=3, tol=0.5)
        assert registry.call("contrast", loss, result).to_dict() == expected.to_dict()


def _on_a_rank(rank, folder):
    os.chdir(folder)
    code, out, err = run(
        "measure", "c0.pt", "c1.pt", "--target", "study_problem:problem", "--measures", "trace,eigenvalue",
        "--num-probes", "3", "--dtype", "float64", "--json", "two.json",
    )  # fmt: skip
    return [code, out, err]


def test_two_processes_give_the_numbers_of_one_and_only_the_first_speaks_and_writes(here):
    study(here, count=2)
    (code, out, err), *others = spawn(_on_a_rank, str(here))
    assert code == 0
    assert "trace" in out
    assert "[4/4]" in err
    assert others == [[0, "", ""]]
    command = ["measure", "c0.pt", "c1.pt", "--target", "study_problem:problem", "--measures", "trace,eigenvalue"]
    run(*command, "--num-probes", "3", "--dtype", "float64", "--json", "one.json")
    one, two = entries(here / "one.json"), entries(here / "two.json")
    assert one.keys() == two.keys()
    for name, entry in one.items():
        assert entry["identity"] == two[name]["identity"]
        numbers = [e["result"].get("eigenvalues") or [e["result"]["value"]] for e in (entry, two[name])]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-12)


@pytest.mark.slow
def test_torchrun(here):
    study(here, count=2)
    options = ["--target", "study_problem:problem", "--measures", "trace", "--num-probes", "3", "--json", "two.json"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sam_optim"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), **ONE_THREAD}
    done = subprocess.run(
        [*launch, "measure", "c0.pt", "c1.pt", *options], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint") == 1
    assert len(store.read(here / "two.json")) == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestProgress:
    def test_bars_on_a_terminal_lines_without_tqdm_and_nothing_if_quiet(self, monkeypatch):
        def shown(**kwargs):
            monkeypatch.setattr(sys, "stderr", terminal := Terminal())
            bar = progress.Progress(2, **kwargs)
            step = bar.start("a trace")
            if step is not None:
                step(1, 4)
                step(4, 4)
            bar.done("a trace: 3")
            bar.skip(1)
            bar.close()
            return terminal.getvalue()

        pytest.importorskip("tqdm")
        bars = shown(shown=True)
        assert "a trace:   0%" in bars or "a trace: 0it" in bars
        assert "2/2" in bars
        assert "[1/2] a trace: 3" in bars
        assert shown(shown=False) == ""
        monkeypatch.setitem(sys.modules, "tqdm", None)
        assert re.fullmatch(r"\[1/2\] a trace: 3 \(\d+\.\d s\)\n", shown(shown=True))

    def test_without_a_terminal_a_line_says_now_and_then_that_a_long_measure_is_alive(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", out := io.StringIO())
        bar = progress.Progress(3, shown=True)
        step = bar.start("a.pt trace")
        step(1, 4)
        monkeypatch.setattr(progress, "SILENCE", 0.0)
        step(2, 4)
        bar.done("a.pt  trace: 3")
        first, last = out.getvalue().splitlines()
        assert first == "[0/3] a.pt trace: 2 of at most 4 steps, 0 s"
        assert last.startswith("[1/3] a.pt  trace: 3")


def test_what_is_said_of_many_checkpoints_is_said_once(here):
    path, *_ = images(here / "d.npz")
    for i in range(3):
        torch.save(network(i).state_dict(), f"{i}.pt")
    common = ["measure", "0.pt", "1.pt", "2.pt", "--model", "cnn3", "--data", path, "--measures", "worst", "--quiet"]
    _, _, err = run(*common, "--num-steps", 1, "--examples", 20, "--batch-size", 10)
    assert err.splitlines() == ["0.pt and 2 more, worst rho=0.05: few samples: the standard error is over 2"]
    _, _, err = run(*common, "--num-steps", 1, "--examples", 20, "--batch-size", 5)
    assert err == ""
