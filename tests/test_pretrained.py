"""`benchmarks.pretrained`: every measure at ResNets that others have trained, as a table."""

import csv
from pathlib import Path

import pytest
import torch
from test_data import cifar_files

from benchmarks import pretrained
from benchmarks.examples import cifar_resnet
from sam_optim import Ball, Loss, worst_case_sharpness
from sam_optim.core.errors import InputError
from sam_optim.core.text import cell
from sam_optim.measures import registry
from sam_optim.sweep import store
from sam_optim.vision.data import open_split

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "pretrained_cifar10"


@pytest.fixture
def problem(tmp_path, monkeypatch):
    """(directory of small CIFAR-10 files, checkpoint of 8 layers in the form of the published ones)"""
    monkeypatch.setenv("SAM_OPTIM_CIFAR10", "")
    monkeypatch.setenv("SAM_OPTIM_IMAGES", "")
    cifar_files(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = cifar_resnet.ResNet(1)
    path = tmp_path / "resnet8-12345678.th"
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    return tmp_path, path, model.eval()


def run(directory, path, *options):
    return pretrained.main([str(path), "--data-dir", str(directory), "--out", str(directory / "out"), *options])


@pytest.mark.slow
def test_it_measures_in_both_geometries_counts_errors_and_writes_everything(problem, capsys):
    directory, path, model = problem
    assert run(directory, path, "--images", "16", "--measures", "worst,average,eigenvalue,density") == 0
    out = directory / "out"
    result = pretrained.results(store.read(out / "measures.json"))
    assert {key[1:] for key in result} == {
        *(("worst", False), ("worst", True), ("average", False), ("average", True)),
        *(("eigenvalue", False), ("eigenvalue", True), ("density", False)),
    }
    assert result[str(path), "worst", True]["settings"]["n"] == 16

    test = open_split("cifar10", directory, "test")
    x, y = test.x, test.labels
    with torch.no_grad():
        scores = model(
            (x / 255 - torch.tensor(cifar_resnet.MEAN)[:, None, None]) / torch.tensor(cifar_resnet.STD)[:, None, None]
        )
    wrong = 100 * float((scores.argmax(1) != y).float().mean())
    with open(out / "errors.csv", newline="") as file:
        lines = [(line["checkpoint"], float(line["test_error"])) for line in csv.DictReader(file)]
    assert lines == [(str(path), pytest.approx(wrong))]

    text = (out / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1].removesuffix(" |") for line in text.splitlines()
    }
    assert rows[""] == "resnet8"
    assert rows["test error, %"] == f"{wrong:.2f}"
    assert rows["largest eigenvalue of H"] == cell(result[str(path), "eigenvalue", False])
    assert rows["largest eigenvalue of T H T"] == cell(result[str(path), "eigenvalue", True])
    assert "trace of H" not in rows
    assert "test_error" in (out / "report.html").read_text()
    assert (out / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_measured_again(problem, monkeypatch, capsys):
    directory, path, _ = problem
    options = ("--images", "16", "--measures", "fisher_rao")
    assert run(directory, path, *options) == 0
    before = (directory / "out" / "measures.json").read_bytes()
    shown = capsys.readouterr().out
    monkeypatch.setattr(registry, "call", None)
    monkeypatch.setattr(pretrained, "test_error", None)
    assert run(directory, path, *options) == 0
    assert (directory / "out" / "measures.json").read_bytes() == before
    assert capsys.readouterr().out == shown


def test_the_table_has_the_numbers_of_these_images_and_weights_alone(problem, capsys):
    directory, path, model = problem

    def shown(images):
        assert run(directory, path, "--images", images, "--measures", "eigenvalue,fisher_rao") == 0
        return capsys.readouterr().out.partition("| parameters")[2]

    few, more = shown("16"), shown("24")
    assert few != more
    assert shown("16") == few
    with torch.no_grad():
        model.linear.bias[3] += 100
    torch.save({"state_dict": model.state_dict()}, path)
    other = shown("16")
    assert other.partition("largest")[0] != few.partition("largest")[0]
    labels = open_split("cifar10", directory, "test").labels
    assert f"| test error, % | {100 * float((labels != 3).float().mean()):.2f} |" in other


def test_the_loss_is_the_mean_over_images_in_batches_of_two_sizes():
    batches = [(torch.randn(n, 2), torch.randint(3, (n,))) for n in (5, 5, 2)]
    loss = Loss(torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss(), batches)
    result = worst_case_sharpness(loss, Ball(0.1), num_steps=1).to_dict()
    assert pretrained.base_loss(result) == pytest.approx(float(loss.value()))
    assert pretrained.base_loss(None) is None


def test_after_ctrl_c_nothing_more_is_begun(problem, monkeypatch):
    directory, path, _ = problem
    calls = []

    def stopped(*_):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "call", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(directory, path, "--images", "16")
    assert len(calls) == 1
    assert not (directory / "out" / "table.md").exists()


def test_files_that_are_no_such_networks_are_named(problem):
    directory, path, _ = problem
    with pytest.raises(InputError, match=r"absent\.th is not a file"):
        run(directory, directory / "absent.th")
    torch.save({"fc.weight": torch.zeros(2, 3)}, path)
    with pytest.raises(InputError, match=r"resnet8-12345678.th is not of a ResNet for CIFAR"):
        run(directory, path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"resnet8-12345678.th is not of a ResNet for CIFAR"):
        run(directory, path)
    assert not (directory / "out").exists()


def test_every_measure_of_the_command_has_a_row():
    assert {measure for measure, _, _ in pretrained.ROWS} == {*registry.MEASURES, pretrained.OF_BATCHES}
    assert {measure for measure, adaptive, _ in pretrained.ROWS if adaptive} == set(pretrained.IN_A_GEOMETRY)


def test_the_table_of_the_findings_is_that_of_the_results():
    errors = {line["checkpoint"]: float(line["test_error"]) for line in pretrained.read_errors(RESULTS / "errors.csv")}
    result = pretrained.results(store.read(RESULTS / "measures.json"))
    assert len(errors) == 4
    newer = {"average_in_ball", "critical"}  # than the run on record
    rows = {(measure, adaptive) for measure, adaptive, _ in pretrained.ROWS if measure not in newer}
    assert {(name, *row) for name in errors for row in rows} == set(result)
    assert pretrained.table(result, errors) in (ROOT / "docs" / "findings.md").read_text()
