"""`benchmarks.pretrained`: every measure at ResNets that others have trained, as a table."""

import csv
from pathlib import Path

import pytest
import torch
from test_data import cifar_files

from benchmarks import cifar_resnet, data, pretrained
from benchmarks.command import InputError
from sam_optim.cli import registry
from sam_optim.report.study import cell

DOCS = Path(__file__).resolve().parents[1] / "docs"


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


def test_it_measures_in_both_geometries_counts_errors_and_writes_everything(problem, capsys):
    directory, path, model = problem
    assert run(directory, path, "--images", "16", "--measures", "worst,average,eigenvalue,density") == 0
    out = directory / "out"
    found = pretrained.results(out / "measures.json")
    assert {key[1:] for key in found} == {
        *(("worst", False), ("worst", True), ("average", False), ("average", True)),
        *(("eigenvalue", False), ("eigenvalue", True), ("density", False)),
    }
    assert found[str(path), "worst", True]["settings"]["n"] == 16

    x, y = data.load("cifar10", directory).test.tensors
    with torch.no_grad():
        scores = model(
            (x / 255 - torch.tensor(cifar_resnet.MEAN)[:, None, None]) / torch.tensor(cifar_resnet.STD)[:, None, None]
        )
    wrong = 100 * float((scores.argmax(1) != y).float().mean())
    with open(out / "errors.csv", newline="") as file:
        assert [(line["checkpoint"], float(line["test_error"])) for line in csv.DictReader(file)] == [
            (str(path), pytest.approx(wrong))
        ]

    text = (out / "table.md").read_text()
    assert text.strip() in capsys.readouterr().out
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")[1].removesuffix(" |") for line in text.splitlines()
    }
    assert rows[""] == "resnet8"
    assert rows["test error, %"] == f"{wrong:.2f}"
    assert rows["largest eigenvalue of H"] == cell(found[str(path), "eigenvalue", False])
    assert rows["largest eigenvalue of T H T"] == cell(found[str(path), "eigenvalue", True])
    assert "trace of H" not in rows
    assert "test_error" in (out / "report.html").read_text()
    assert (out / "spectra.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_done_is_not_measured_again(problem, monkeypatch, capsys):
    directory, path, _ = problem
    assert run(directory, path, "--images", "16", "--measures", "fisher_rao") == 0
    before = (directory / "out" / "measures.json").read_bytes()
    shown = capsys.readouterr().out
    monkeypatch.setattr(registry, "call", None)
    monkeypatch.setattr(pretrained, "test_error", None)
    assert run(directory, path, "--images", "16", "--measures", "fisher_rao") == 0
    assert (directory / "out" / "measures.json").read_bytes() == before
    assert capsys.readouterr().out == shown


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
    assert {measure for measure, _, _ in pretrained.ROWS} == set(registry.MEASURES)
    assert {measure for measure, adaptive, _ in pretrained.ROWS if adaptive} == set(pretrained.IN_A_GEOMETRY)
