"""Comparisons of methods: what is run, chosen and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.frontier import __main__ as frontier
from benchmarks.frontier import plan as plans
from benchmarks.frontier import report, runs
from benchmarks.study.trial import Here
from benchmarks.train import checkpoint, data, recipe, trained
from benchmarks.train.__main__ import _start, train
from benchmarks.train.options import parse
from benchmarks.train.run import Training
from sam_optim import GSAM, SAM
from sam_optim.core.errors import InputError
from sam_optim.core.files import read_json

STUDIES = Path(__file__).resolve().parents[1] / "benchmarks" / "studies"
PLAN = """
name = "small"
task = "digits"
program = "train"
baseline = "SGD"
control = "SGD, decay"
seeds = [0, 1]
tuning_seeds = [1000]
seconds = 1.0
[fixed]
data = "digits"
epochs = 1
train_examples = 100
validation_fraction = 0.1
[conditions."clean"]
[methods."SGD"]
[methods."SGD, decay"]
tune = { weight_decay = [1e-3, 1e-2] }
[methods."SAM"]
tune = { sam_rho = [0.05, 0.1], lr = [0.05] }
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(PLAN)
    return path


def options(*words):
    return parse(["--epochs", "2", "--train-examples", "128", "--measures", "none", "--device", "cpu", *words])


@pytest.mark.parametrize("path", sorted(STUDIES.glob("frontier_*.toml")), ids=lambda p: p.stem)
def test_the_plans_give_every_tuned_method_the_same_budget(path):
    plan = plans.load(path)
    budgets = {len(plan.tuning_runs(m, c)) for m in plan.methods for c in plan.conditions} - {0}
    assert len(budgets) == 1
    assert len(plan.seeds) == 5
    for method in plan.methods:
        for condition in plan.conditions:
            names = [run.name for run in plan.tuning_runs(method, condition)]
            assert len(set(names)) == len(names)


def test_a_comparison_runs_once_and_goes_on(small, tmp_path, capsys):
    """Stopped after three trainings and begun again, every record is that of one go, and nothing is trained twice."""
    assert frontier.main(["run", str(small), "--out", str(tmp_path / "a"), "--limit", "3"]) == 0
    assert len(list((tmp_path / "a" / "small" / "records").iterdir())) == 3
    assert frontier.main(["run", str(small), "--out", str(tmp_path / "a")]) == 0
    assert frontier.main(["run", str(small), "--out", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    assert frontier.main(["run", str(small), "--out", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.count("small: 10 of 10 runs done") == 2

    def records(name):
        read = [json.loads(f.read_text()) for f in sorted((tmp_path / name / "small" / "records").iterdir())]
        return [{k: v for k, v in record.items() if k not in ("cpu_seconds", "provenance")} for record in read]

    first, second = records("a"), records("b")
    assert first == second
    assert len(first) == 10
    sam = [r for r in first if r["method"] == "SAM"]
    tuning = {r["candidate"]["sam_rho"]: r["validation_accuracy"] for r in sam if r["tuning"]}
    best = 0.05 if tuning[0.05] >= tuning[0.1] else 0.1
    assert {r["candidate"]["sam_rho"] for r in sam if not r["tuning"]} == {best}
    assert {r["passes"] for r in sam} == {2.0}
    assert {r["passes"] for r in first if r["method"] != "SAM"} == {1.0}


def test_a_comparison_goes_on_from_its_committed_runs(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    (tmp_path / "results").mkdir()
    with pytest.raises(FileNotFoundError, match=r"small\.json"):
        frontier.main(["run", str(small), "--out", str(tmp_path / "new"), "--committed"])
    assert frontier.main(["run", str(small), "--out", str(tmp_path / "old"), "--limit", "6"]) == 0
    assert frontier.main(["collect", str(small), "--out", str(tmp_path / "old")]) == 0
    before = read_json(tmp_path / "results" / "small.json")
    capsys.readouterr()
    assert frontier.main(["run", str(small), "--out", str(tmp_path / "new"), "--committed"]) == 0
    printed = capsys.readouterr().out
    assert "small: 6 of 10 runs done" in printed
    assert printed.count("s of CPU") == 4
    assert frontier.main(["collect", str(small), "--out", str(tmp_path / "new")]) == 0
    after = read_json(tmp_path / "results" / "small.json")
    assert all(run in after["runs"] for run in before["runs"])
    assert len(after["runs"]) == 10
    assert after["facts"] == before["facts"]
    small.write_text(PLAN.replace("epochs = 1", "epochs = 2"))
    with pytest.raises(InputError, match="another plan"):
        frontier.main(["run", str(small), "--out", str(tmp_path / "other"), "--committed"])
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").rglob("*.json"))


def test_the_best_held_out_accuracy_is_chosen_and_the_first_of_equals(small):
    plan = plans.load(small)
    records = [
        {"tuning": True, "candidate": {"weight_decay": d}, "validation_accuracy": a}
        for d, a in ((1e-3, 80.0), (1e-2, 90.0), (1e-3, 80.0), (1e-2, 70.0))
    ]
    assert runs.chosen(plan, "SGD, decay", records) == {"weight_decay": 1e-3}
    records[0]["validation_accuracy"] = 79.0
    assert runs.chosen(plan, "SGD, decay", records) == {"weight_decay": 1e-2}


def test_the_images_that_tune_are_not_those_that_report():
    splits = data.load(options())
    held_out, test = runs.split_test(splits, {"held_out": 300, "test": 200})
    assert (len(held_out), len(test)) == (300, 200)
    assert not set(held_out.rows.tolist()) & set(test.rows.tolist())
    assert torch.equal(test.labels, splits.test.labels[torch.isin(splits.test.rows, test.rows)])


def test_wrong_plans_are_refused(small, tmp_path):
    for old, new, words in (
        ('baseline = "SGD"', 'baseline = "Sgd"', "Sgd"),
        ("tuning_seeds = [1000]", "tuning_seeds = [1]", "must differ"),
        ("[methods.", "[method.", "methods"),
        ("seeds = [0, 1]", "seeds = [0, 1", "cannot be read"),
        *((f"\n{name} = ", f"\n{name} = {{ a = 1 }} #", f"{name} must be") for name in ("name", "task", "baseline")),
        ('"train"', '"trian"', "program must be 'train'.*'trian'"),
        ("seeds = [0, 1]", 'seeds = "01"', "seeds must be a list of integers, got '01'"),
        ("seeds = [0, 1]", "seeds = [[0]]", "seeds must be"),
        ("seconds = 1.0", "seconds = -1", "seconds must be.*-1"),
        ("seconds = 1.0", "seconds = nan", "seconds must be"),
        ("seconds = 1.0", "seconds = 1.0\nsecond = 2", "second"),
        ("[fixed]", "fixed = 3\n[fixe]", "fixed must be a table"),
        ("[fixed]", "[evaluate]\ntest = true\n[fixed]", "evaluate must be"),
        ('[conditions."clean"]', '[conditions]\nclean = "x"', "conditions must be"),
        ('[methods."SGD"]', '[methods]\nSGD = [["a", 1]]', "methods must be"),
        ("tune = { weight_decay = [1e-3, 1e-2] }", "tune = { weight_decay = 1e-3 }", "methods must be"),
    ):
        path = tmp_path / "wrong.toml"
        assert old in PLAN
        path.write_text(PLAN.replace(old, new, 1))
        with pytest.raises(InputError, match=words):
            plans.load(path)


def test_variants_and_groups_of_the_options():
    splits = data.load(options())
    words = ["--model", "test_resnet", "--sam-rho", "0.1"]
    network = recipe.model(options(*words), splits)
    plain = recipe.optimizer(options(*words), network)
    assert type(plain) is SAM
    gsam = recipe.optimizer(options(*words, "--sam-variant", "gsam", "--sam-kwargs", "alpha=0.2"), network)
    assert type(gsam) is GSAM
    assert gsam.alpha == 0.2
    norm_only = recipe.optimizer(options(*words, "--sam-norm-only"), network)
    perturbed = {id(p) for g in norm_only.param_groups if g["rho"] for p in g["params"]}
    norms = {id(p) for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
    assert perturbed == norms
    assert sum(len(g["params"]) for g in norm_only.param_groups) == len(list(network.parameters()))
    for wrong in (["--sam-variant", "gsam"], ["--sam-norm-only"], ["--sam-schedule", "late_phase:0.7"]):
        with pytest.raises(InputError, match="needs a radius"):
            options(*wrong)
    with pytest.raises(InputError, match="schedule of --sam-schedule"):
        recipe.optimizer(options(*words, "--sam-schedule", "never"), network)
    with pytest.raises(InputError, match="alfa"):
        recipe.optimizer(options(*words, "--sam-variant", "gsam", "--sam-kwargs", "alfa=1"), network)


def test_passes_are_counted_and_evaluation_can_be_left_out(tmp_path):
    for rho, passes in (("0", 1.0), ("0.1", 2.0)):
        out = tmp_path / rho
        assert train(options("--sam-rho", rho, "--eval-every", "0", "--out", str(out))) == 0
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert [line["train_passes"] for line in lines] == [passes] * 2
        assert not any("test_accuracy" in line for line in lines)


def test_a_model_of_ours_starts_from_given_weights(tmp_path):
    torch.manual_seed(0)
    from sam_optim.vision.cifar_resnet import ResNet

    there = ResNet(1, 10, 1)
    torch.save({"state_dict": {f"module.{k}": v for k, v in there.state_dict().items()}}, tmp_path / "w.th")
    words = ["--model", "cifar_resnet8", "--initial-checkpoint", str(tmp_path / "w.th")]
    splits = data.load(options())
    network = recipe.model(options(*words), splits, initial=True)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), there.parameters(), strict=True))
    with pytest.raises(InputError, match="does not fit cifar_resnet14"):
        recipe.model(options("--model", "cifar_resnet14", *words[2:]), splits, initial=True)
    with pytest.raises(InputError, match="6 n"):
        recipe.model(options("--model", "cifar_resnet9"), splits)


def test_text_files_are_looked_for_beside_the_model(small):
    plan = plans.load(small)
    with pytest.raises(InputError, match="--data-dir"):
        runs.located({"train": "a", "validation": "b", "test": ["c"], "model": "m"}, Here(plan.name))
    run = plans.Run("SAM", "clean", {}, 0, False, {"train": "a", "epoch": 3})
    with pytest.raises(InputError, match=r"'epoch'.*epochs"):
        runs.text_run(plan, run, small.parent / "out", Here(plan.name))
    assert not (small.parent / "out").exists()


@pytest.mark.parametrize(
    ("words", "passes"),
    [
        (["--sam-schedule", "late_phase:0.5"], [1.0, 2.0]),
        (["--sam-schedule", "periodic:2"], [1.5, 1.5]),
        (["--sam-schedule", "warmup:2"], [2.0, 2.0]),
        (["--sam-schedule", "proportional_to_lr:0.01:0.1"], [2.0, 2.0]),
        (["--sam-variant", "msam"], [1.0, 1.0]),
        (["--sam-variant", "msam", "--sam-schedule", "late_phase:0.5"], [1.0, 1.0]),
        (["--sam-variant", "stale"], [1.0, 1.0]),
        (["--sam-variant", "looksam", "--sam-kwargs", "every=2"], [1.5, 1.5]),
        (["--sam-variant", "vasso"], [2.0, 2.0]),
    ],
    ids=str,
)
def test_every_variant_and_schedule_trains_at_its_price_and_resumes(words, passes, tmp_path):
    """Two batches of 64 in each of two epochs; stopped after the first one, training goes on bit for bit."""
    words = ["--sam-rho", "0.1", "--model", "cnn5", "--eval-every", "0", *words]
    assert train(options(*words, "--out", str(tmp_path / "whole"))) == 0
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train_passes"] for line in lines] == passes
    settings = options(*words, "--out", str(tmp_path / "parts"))
    training = Training(settings, data.load(settings), torch.device("cpu"))
    _start(training, None)
    training._epoch()
    assert train(parse(["--out", str(tmp_path / "parts"), "--resume"])) == 0
    whole, parts = (checkpoint.newest(tmp_path / name / "checkpoints")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_statistics_of_batch_norm_are_those_at_the_weights_after_one_pass_training(tmp_path):
    settings = options("--sam-rho", "0.5", "--model", "cnn5", "--sam-variant", "msam", "--out", str(tmp_path / "run"))
    assert train(settings) == 0
    run = trained.load(settings)
    means = []
    run.model.train()[0].register_forward_hook(lambda module, inputs, output: means.append(output.mean((0, 2, 3))))
    for x, _ in run.batches(run.splits.train, 64):
        run.model(x)
    running_mean = checkpoint.newest(tmp_path / "run" / "checkpoints")["model"]["1.running_mean"]
    torch.testing.assert_close(running_mean, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)


def test_names_in_results_are_text_on_the_page_and_what_cannot_be_drawn_leaves_it(tmp_path, monkeypatch):
    content = read_json(report.RESULTS / "digits.json")
    name = "costs $\\frac{$, " + report.END + " \x1b[2J"
    content["plan"] |= {"task": name, "conditions": dict(list(content["plan"]["conditions"].items())[:1])}
    (tmp_path / "r.json").write_text(json.dumps(content))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(before := f"head {report.END}\n{report.BEGIN}\nold\n{report.END}\ntail {report.BEGIN}\n")
    page.with_suffix(".png").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        report.write(page)
    assert page.read_text() == before
    page.with_suffix(".png").rmdir()
    for _ in range(2):
        tables = report.write(page)
        assert page.read_text() == before.replace("\nold\n", f"\n\n{tables}\n\n")
    assert "\x1b" not in tables


@pytest.mark.parametrize("diverged", ["nothing but SAM", "the control", "everything"])
def test_what_diverged_is_said_and_not_drawn(diverged, tmp_path, monkeypatch):
    content = read_json(report.RESULTS / "digits.json")
    survive = {"nothing but SAM": lambda m: m == "SAM", "the control": lambda m: m != "SGD, tuned decay"}
    for r in content["runs"]:
        if not survive.get(diverged, lambda m: False)(r["method"]):
            r |= {"failed": "the loss is nan", "test_accuracy": None}
    (tmp_path / "r.json").write_text(json.dumps(content))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    (tmp_path / "page.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    tables = report.write(tmp_path / "page.md")
    num_methods = len(content["plan"]["methods"])
    expected = {"nothing but SAM": num_methods - 1, "the control": 1, "everything": num_methods}[diverged]
    assert tables.count("| diverged |") == expected
    assert "nan" not in tables
    axes = report.picture(report.committed()).axes[0]
    names = {text.get_text() for text in axes.texts}
    assert len(names) == num_methods - expected or names == {"all runs diverged"}
    assert ("SAM" in names) == (diverged != "everything")
    assert "SGD, tuned decay" not in names
