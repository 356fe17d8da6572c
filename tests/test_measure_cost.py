"""The benchmark of measures: every row runs on both sides and finds the same number; what it writes and refuses."""

import json
import math

import pytest
import torch
from torch import nn

from benchmarks.speed import curvature as cost_curvature
from benchmarks.speed import measures as measure_cost
from benchmarks.speed import sharpness as cost_sharpness
from benchmarks.speed.rows import Problem
from sam_optim.core.errors import InputError


@pytest.fixture(scope="module")
def problem():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x, y = torch.randn(24, 1, 6, 6), torch.arange(24) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return Problem(lambda: model, nn.CrossEntropyLoss(), [(x[:12], y[:12]), (x[12:], y[12:])])


def test_both_sides_of_every_row_find_the_same(problem):
    pytest.importorskip("pyhessian")
    before = [w.clone() for w in problem.make_model().parameters()]
    rows = cost_curvature.rows(problem) + cost_sharpness.rows(problem)
    assert len({row.name for row in rows}) == len(rows) == 8
    results = measure_cost.compare(rows, 1, "cpu")
    measured = {r["row"]: r["found"] for r in results}
    top, peer = measured["lambda_max"]["ours"], measured["lambda_max"]["peer"]
    assert top["values"][0] == pytest.approx(peer["values"][0], rel=5e-3)
    assert top["products"] > 0
    assert peer["products"] > 0
    ours, peer = measured["top 5"]["ours"]["values"], measured["top 5"]["peer"]["values"]
    assert ours[0] == pytest.approx(peer[0], rel=5e-3)  # the peer's others are of largest magnitude, and not converged
    assert len(ours) == len(peer) == 5
    a, b = measured["trace"]["ours"], measured["trace"]["peer"]
    assert abs(a["value"] - b["value"]) < 5 * math.hypot(a["stderr"], b["stderr"])
    assert measured["spectral density"]["peer"]["largest"] == pytest.approx(top["values"][0], rel=0.1)
    for w, kept in zip(problem.make_model().parameters(), before, strict=True):
        assert torch.equal(w, kept)
        assert w.grad is None
    for result in results:
        measure_cost.summarize(result)
        assert result["ours / peer"]["median"] > 0
    text = measure_cost.table(results)
    assert all(row.name[:28] in text for row in rows)
    assert "products at equal stderr" in text


def test_the_command_writes_what_it_found(problem, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure_cost, "problem_of", lambda args: problem)
    out = tmp_path / "sub" / "cost.json"
    assert measure_cost.main(["--quick", "--rows", "lambda_max", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert [r["row"] for r in written["results"]] == ["lambda_max"]
    assert written["facts"]["quick"] is True
    assert "lambda_max" in capsys.readouterr().out
    assert measure_cost.main(["--contender", "lambda_max", "ours"]) == 0
    assert json.loads(capsys.readouterr().out)["megabytes"] >= 0


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--rows", "lambda"], "lambda"), (["--rounds", "0"], "--rounds: must be >= 1, got 0")]
)
def test_what_it_refuses(arguments, message, problem, monkeypatch):
    monkeypatch.setattr(measure_cost, "problem_of", lambda args: problem)
    with pytest.raises(InputError, match=message):
        measure_cost.main(arguments)


def test_on_a_device_it_waits_for_it_and_asks_its_allocator(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    took, result = measure_cost.seconds(lambda: len(waits), "cuda")
    assert (result, len(waits)) == (1, 2)
    assert took >= 0
    assert measure_cost._peak("cuda") == 3


def test_a_model_of_timm_is_measured_on_noise():
    words = ["--quick", "--model", "test_resnet", "--images", "4", "--batch-size", "2", "--rows", "lambda_max"]
    pytest.importorskip("timm")
    assert measure_cost.main(words) == 0
