"""The demo in miniature, end to end: what it writes, what it reuses, and that what it says follows from its numbers."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import PATIENCE

from benchmarks.demo import __main__ as demo
from benchmarks.demo.findings import (
    best_control,
    correlations,
    differences,
    headline,
    interpolation_note,
    sign,
    training_note,
)
from benchmarks.demo.page import YOUR_MODEL
from benchmarks.demo.plan import (
    DATA,
    MEASURES,
    METHODS,
    QUICK,
    Plan,
    balls,
    final_jobs,
    fingerprint,
    tuning_jobs,
)
from benchmarks.demo.runs import as_ball, execute, initialized, optimizer_for
from benchmarks.paired import difference
from benchmarks.train.data import load
from benchmarks.train.options import Options
from sam_optim.core import errors


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    assert demo.main(["--quick", "--workers", "0", "--out", str(out)]) == 0
    return out


def strict(path):
    return json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{c} in {path.name}"))


def test_the_demo_writes_one_page_with_everything(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    results = strict(finished / "results.json")
    assert results["headline"] in page
    assert not re.findall(r"https?://|<script(?! type=\"application/json\")|url\((?!#)", page)
    for method in METHODS.values():
        assert method.name in page
    for identifier in (
        "accuracy",
        "training",
        "sharpness",
        "correlation",
        "landscapes",
        "caveats",
        "settings",
        "your-model",
    ):
        assert f'id="{identifier}"' in page
    assert "its numbers mean nothing" in page
    planes = page.count("second direction, in filter norms")
    assert planes == 2 * len(METHODS)
    assert page.count("<svg") > planes
    assert "nan" not in re.sub(r"<script.*</script>", "", page, flags=re.S).lower().replace("provenance", "")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    assert len(data["runs"]) == len(METHODS) * QUICK.num_seeds


def test_every_run_measures_everything_on_all_data(finished):
    runs = [strict(p) for p in (finished / "runs").glob("*.json") if not p.name.startswith("tune")]
    assert len(runs) == len(METHODS) * QUICK.num_seeds
    for run in runs:
        assert set(run["measures"]) == set(DATA)
        for result in run["measures"].values():
            assert set(result) == set(MEASURES)
            assert all(math.isfinite(number["value"]) for number in result.values())
        assert set(run["slices"]) == set(DATA)
        epochs = QUICK.epochs * METHODS[run["job"]["method"]].epochs_factor
        assert {len(curve) for curve in run["curves"].values()} == {epochs}
        assert ("sharpness" in run) == run["job"]["plane"]
        assert all(row["lambda_max"] > 0 and row["edge"] > 0 for row in run.get("sharpness", []))
        assert len(run.get("sharpness", [])) == epochs * run["job"]["plane"]


def test_finished_runs_are_reused_and_a_missing_one_is_made_again(finished, capsys):
    files = sorted((finished / "runs").iterdir())
    before = {p: p.stat().st_mtime_ns for p in files}
    files[0].unlink()
    assert demo.main(["--quick", "--workers", "0", "--out", str(finished)]) == 0
    printed = capsys.readouterr().out
    assert "are reused" in printed
    assert (finished / "report.html").resolve().as_uri() in printed
    after = {p: p.stat().st_mtime_ns for p in sorted((finished / "runs").iterdir())}
    assert set(after) == set(before)
    assert {p for p in before if after[p] != before[p]} == {files[0]}


def test_a_run_is_the_same_whenever_and_wherever_it_is_made():
    job = final_jobs(QUICK, {"sgd_decay": 0.01, "sam": 0.1, "asam": 1.0})["sam-seed0"]
    first = execute(job)
    torch.randn(7)
    second = execute(job)
    first.pop("cpu_s"), second.pop("cpu_s")
    assert first == second


def test_an_interruption_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    real, done = execute, []

    def interrupted(job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job)
        return real(job)

    monkeypatch.setattr("benchmarks.demo.runs.execute", interrupted)
    assert demo.main(["--quick", "--workers", "0", "--out", str(tmp_path)]) == 130
    assert "kept" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").glob("*.json"))) == 2
    assert not (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_two_worker_processes_give_the_same_numbers(finished, tmp_path):
    """The command itself, which starts processes of its own; the other runs are there already."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    paths = [f"{name}-{fingerprint(job)}.json" for name, job in list(tuning_jobs(QUICK).items())[:2]]
    for path in paths:
        (tmp_path / "runs" / path).unlink()
    argv = [sys.executable, "-m", "benchmarks.demo", "--quick", "--workers", "2", "--out", str(tmp_path)]
    subprocess.run(argv, check=True, capture_output=True, cwd=Path(__file__).resolve().parents[1], timeout=PATIENCE)
    for path in paths:
        assert strict(tmp_path / "runs" / path)["curves"] == strict(finished / "runs" / path)["curves"]


def test_training_that_diverges_is_a_result_not_a_crash(tmp_path):
    job = final_jobs(QUICK, {"sgd_decay": 0.01, "sam": 0.1, "asam": 1.0})["sgd-seed0"] | {"lr": 1e30}
    result = execute(job)
    assert "diverged in epoch 1" in result["failed"]
    assert result["last"]["test_accuracy"] is None
    json.dumps(result, allow_nan=False)


def test_methods_start_from_the_same_weights_and_the_measured_balls_are_those_of_the_optimizers():
    chosen = {"sgd_decay": 0.01, "sam": 0.1, "asam": 1.0}
    jobs, splits = final_jobs(QUICK, chosen), load(Options(label_noise=0.4, validation_fraction=0.2))
    models = {m: initialized(splits, 0) for m in METHODS}
    for a, b in zip(models["sgd"].parameters(), models["asam"].parameters(), strict=True):
        assert torch.equal(a, b)
    for name in ("sam", "asam"):
        optimizer = optimizer_for(models[name], jobs[f"{name}-seed0"])
        assert optimizer.ball == balls(chosen)[f"{name}_ball"]
        assert as_ball(jobs["sgd-seed0"]["measuring"]["balls"][f"{name}_ball"]) == optimizer.ball


def test_tuned_methods_have_one_budget_and_seeds_of_their_own():
    plan = Plan()
    assert len({len(grid) for grid in plan.grids.values()}) == 1
    assert not set(plan.seeds) & set(plan.tuning_seeds)
    assert {m for m, method in METHODS.items() if method.tuned} == set(plan.grids)


def test_the_setting_with_the_best_validation_accuracy_is_chosen():
    plan = Plan(grids={"sam": (0.1, 0.2, 0.3)})
    scores = {0.1: (0.5, 0.6, 0.7), 0.2: (0.7, 0.7, None), 0.3: (0.6, 0.65, 0.6)}
    tuning = {
        f"{rho}-{i}": {"job": {"method": "sam", "rho": rho}, "last": {"validation_accuracy": v}}
        for rho, result in scores.items()
        for i, v in enumerate(result)
    }
    assert demo.choose(plan, tuning) == {"sam": 0.3}  # a run that diverged counts as 0


def test_a_difference_is_the_mean_of_pairs_with_its_t_interval():
    result = difference([3.0, 5.0, math.nan, 7.0], [1.0, 2.0, 5.0, 3.0])  # 2, 3, 4: mean 3, std 1, t(2) = 4.303
    assert (result.mean, result.wins, result.n) == (3.0, 3, 3)
    assert result.low == pytest.approx(3 - 4.302653 / 3**0.5)
    assert result.high == pytest.approx(3 + 4.302653 / 3**0.5)
    t = 3 * 3**0.5  # with two degrees of freedom p = 1 - t / (t^2 + 2)^(1/2)
    assert result.p == pytest.approx(1 - t / (t**2 + 2) ** 0.5)
    assert sign(result) == 1
    assert sign(difference([1.0, 2.0], [2.0, 1.0])) == 0
    assert math.isnan(difference([math.nan], [1.0]).mean)


def accuracies(sam, sgd, decay):
    table = {m: {"last": sgd, "best": sgd} for m in METHODS}
    return table | {"sam": {"last": sam, "best": sam}, "sgd_decay": {"last": decay, "best": decay}}


@pytest.mark.parametrize(
    ("sam", "decay", "expected"),
    [
        (90, 80, "20.0 percentage points more accurate than SGD on clean test digits, and SAM beats the best control"),
        (
            90,
            95,
            "than SGD on clean test digits, but the best control, SGD with tuned weight decay, beats SAM by 5.0",
        ),
        (60, 80, "10.0 percentage points less accurate than SGD on clean test digits, and the best control"),
        (
            90,
            90,
            "but no difference is seen between SAM and the best control, SGD with tuned weight decay (95 % interval",
        ),
        (
            70,
            60,
            "No difference is seen between SAM and SGD on clean test digits (95 % interval",
        ),
    ],
)
def test_the_headline_follows_from_the_numbers(sam, decay, expected):
    jitter = [-0.5, -0.1, 0.0, 0.2, 0.4]
    other = [0.1, -0.2, 0.0, -0.3, 0.4]
    sgd = [70.0 + j for j in jitter]
    result = headline(accuracies([sam + j for j in other], sgd, [decay + j for j in jitter]))
    assert expected in result


def test_the_best_control_may_be_one_that_stops_early_and_sam_then_does_too():
    noise = [-0.4, 0.1, 0.0, 0.2, 0.1]
    table = {m: {"last": [70.0] * 5, "best": [86.0] * 5} for m in METHODS}
    table["sam"] = {"last": [90.0 + e for e in noise], "best": [92.0 + e for e in noise]}
    result = headline(table)
    assert "more accurate than SGD" in result
    assert "and with early stopping for both, SAM beats the best control, plain SGD, by 6.0 points" in result
    table["sgd_decay"]["best"] = [92.0 - e for e in noise]
    assert (
        "but with early stopping for both, no difference is seen between SAM and the best control, SGD with tuned"
        in headline(table)
    )
    assert best_control(table) == ("sgd_decay", "best")
    rows = {d["name"]: d["mean"] for d in differences(table)}
    assert rows["SAM minus SGD with tuned weight decay, both stopped early"] == pytest.approx(0)


def fake_runs(curvature, accuracy, spread=0.0):
    """One number for each method; with a spread the differences of two methods change their sign between seeds."""
    runs = {}
    for seed in range(5):
        for i, method in enumerate(METHODS):
            noise = spread * (-1) ** seed * (i % 2)
            numbers = {m: {"value": curvature[i] + 0.01 * seed + noise} for m in MEASURES}
            runs[f"{method}-{seed}"] = {
                "job": {"method": method, "seed": seed},
                "last": {"test_accuracy": (accuracy[i] + 0.1 * seed + noise) / 100},
                "measures": dict.fromkeys(DATA, numbers),
            }
    return runs


@pytest.mark.parametrize(
    ("curvature", "accuracy", "spread", "said"),
    [
        ([40, 3], [80, 67], 0.0, "is flatter on its own labels, wrong ones included, but less accurate."),
        ([40, 60], [80, 67], 0.0, "move together as flatness would predict"),
        ([40, 3], [80, 90], 0.0, "move together as flatness would predict"),
        ([40, 60], [80, 90], 0.0, "is sharper, but more accurate."),
        ([40, 3], [80, 80], 4.0, "included, with no clear difference in accuracy."),
        ([40, 60], [80, 80], 4.0, "is sharper, with no clear difference in accuracy."),
        (
            [40, 39],
            [80, 67],
            4.0,
            "These seeds do not show whether the longer training is flatter by that eigenvalue.",
        ),
        (
            [40, 41],
            [80, 67],
            4.0,
            "These seeds do not show whether the longer training is flatter by that eigenvalue.",
        ),
    ],
)
def test_the_note_on_interpolation_says_what_the_numbers_say(curvature, accuracy, spread, said):
    note = interpolation_note(fake_runs([*curvature, 20, 5, 5], [*accuracy, 90, 94, 94], spread))
    assert said in note
    assert note.count("accurate.") + note.count("in accuracy.") + note.count("predict.") + note.count("flatter by") == 1


def test_the_note_on_training_finds_the_peak():
    def runs(test, train=(0.2, 0.6, 0.95)):
        curves = {"test_accuracy": test, "train_accuracy": train}
        return {str(seed): {"job": {"method": "sgd_long", "seed": seed}, "curves": curves} for seed in range(2)}

    assert "peaks at 87.0 % after 2 epochs and is 64.0 % after 3" in training_note(runs([0.5, 0.87, 0.64]))
    assert training_note(runs([0.5, 0.87, 0.64])).endswith("is the noise.")
    assert training_note(runs([0.5, 0.87, 0.64], train=[0.2, 0.6, 0.5])).endswith("to 50 %.")
    assert training_note(runs([0.5, 0.87, None])).endswith("95 %.")
    assert training_note(runs([0.5, 0.8, 0.9])).endswith("95 %.")


def test_tau_points_the_way_of_the_runs_and_survives_missing_ones():
    flat_is_better = fake_runs([5, 4, 3, 2, 1], [50, 60, 70, 80, 90])
    assert all(c["tau"] > 0.5 for c in correlations(flat_is_better))
    flat_is_worse = fake_runs([1, 2, 3, 4, 5], [50, 60, 70, 80, 90])
    assert all(c["tau"] < -0.5 for c in correlations(flat_is_worse))
    flat_is_better["sam-0"]["measures"] = {}
    assert {(c["n"], c["num_dropped"]) for c in correlations(flat_is_better)} == {(24, 1)}


@pytest.mark.parametrize(
    "argv", [["--out", "/dev/null/here"], ["--out", "a\0b"], ["--out", "x" * 300]], ids=["a file", "NUL", "too long"]
)
def test_an_output_folder_that_cannot_be_is_one_line(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert errors.run(demo.main, ["--quick", *argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot create")
    assert error.count("\n") == 1


def test_a_page_of_somebody_else_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "report.html").write_text("mine")
    assert errors.run(demo.main, ["--quick", "--out", str(tmp_path)]) == 2
    assert "not from this demo" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "mine"


def test_a_damaged_run_is_named(finished, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    kept = next((finished / "runs").glob("tune-*.json"))
    (tmp_path / "runs" / kept.name).write_text(kept.read_text()[:100])
    assert errors.run(demo.main, ["--quick", "--workers", "0", "--out", str(tmp_path)]) == 2
    assert kept.name in capsys.readouterr().err


def test_the_code_on_the_page_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batches = [(torch.randn(8, 4), torch.randint(0, 3, (8,))) for _ in range(3)]
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    before = [w.clone() for w in model.parameters()]
    names = {"model": model, "criterion": torch.nn.CrossEntropyLoss(), "loader": batches, "batches": batches}
    exec(YOUR_MODEL, names)
    assert not any(torch.equal(w, b) for w, b in zip(model.parameters(), before, strict=True))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("my optimizer", "largest eigenvalue", "gradient regret", "landscape"))


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    """The finding of the field that is robust here: SAM memorizes less of the noise than SGD, in every seed."""
    assert demo.main(["--out", str(tmp_path)]) == 0
    runs = [strict(p) for p in (tmp_path / "runs").glob("s*.json")]
    learned = {(r["job"]["method"], r["job"]["seed"]): r["memorized"] for r in runs}
    assert all(learned["sam", seed] < learned["sgd", seed] for seed in Plan().seeds)
    assert strict(tmp_path / "results.json")["cpu_s"] < 2 * 900  # a quarter of an hour on two idle cores
