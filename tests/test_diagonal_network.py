"""The example's closed forms, and what it shows."""

import json

import pytest
import torch

from benchmarks.examples.diagonal_network import (
    FEATURES,
    TARGETS,
    correlations,
    data,
    half_squared_error,
    main,
    minimum,
    runs,
)
from sam_optim import Ball, Loss, hessian_trace


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", [0.05, 0.5, 5.0])
def test_the_minimum_is_that_of_gradient_flow(target, scale):
    x, y, _ = data(target, 0)
    model = minimum(x, y, scale)
    u, v = model.u.detach(), model.v.detach()
    assert float((x @ (u * v) - y).abs().max()) < 1e-10
    torch.testing.assert_close(u**2 - v**2, torch.full_like(u, scale**2), rtol=1e-9, atol=1e-9)  # the flow's invariant
    s = torch.asinh(v / scale)
    projected = x.T @ torch.linalg.lstsq(x.T, s[:, None]).solution
    torch.testing.assert_close(projected[:, 0], s, rtol=1e-8, atol=1e-9)  # s is in the row space of the data


def test_weights_that_start_apart_keep_what_the_flow_keeps():
    x, y, _ = data("dense", 1)
    start = torch.linspace(0.1, 2.0, FEATURES, dtype=torch.float64)
    model = minimum(x, y, start)
    u, v = model.u.detach(), model.v.detach()
    assert float((x @ (u * v) - y).abs().max()) < 1e-10
    torch.testing.assert_close(u**2 - v**2, start**2, rtol=1e-9, atol=1e-9)
    s = torch.asinh(v / start)
    projected = x.T @ torch.linalg.lstsq(x.T, s[:, None]).solution
    torch.testing.assert_close(projected[:, 0], s, rtol=1e-8, atol=1e-9)


def test_gradient_descent_ends_there():
    x, y, _ = data("sparse", 1)
    expected = minimum(x, y, 0.5)
    u, v = torch.full((FEATURES,), 0.5, dtype=torch.float64), torch.zeros(FEATURES, dtype=torch.float64)
    for _ in range(20000):
        g = x.T @ (x @ (u * v) - y) / len(x)
        u, v = u - 0.002 * g * v, v - 0.002 * g * u
    torch.testing.assert_close(u * v, (expected.u * expected.v).detach(), rtol=0, atol=2e-3)


def test_the_traces_are_those_of_the_formulas():
    x, y, _ = data("dense", 0)
    model = minimum(x, y, 0.4)
    loss = Loss(model, half_squared_error, [(x, y)])
    b, squares = (model.u * model.v).detach(), x.square().mean(dim=0)
    plain = float((squares * (0.4**4 + 4 * b**2).sqrt()).sum())
    adaptive = float((squares * 2 * b**2).sum())
    found = hessian_trace(loss, num_probes=400)
    assert found.value == pytest.approx(plain, abs=4 * found.stderr)
    found = hessian_trace(loss, ball=Ball(1.0, adaptive=True, eta=0.0), num_probes=400)
    assert found.value == pytest.approx(adaptive, abs=4 * found.stderr)


@pytest.mark.slow
def test_the_measure_that_tells_depends_on_the_data():
    rows = runs(num_sets=4, scales=(0.05, 0.2, 0.8))
    assert max(row["loss"] for row in rows) < 1e-18
    found = correlations(rows)
    for measure, taus in found.items():
        sign = 1 if "T = 1" in measure else -1
        assert sign * taus["equal, sparse"][0] > 0.4
        assert sign * taus["equal, dense"][0] < -0.2


def test_the_command_prints_a_table_and_draws(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("benchmarks.examples.diagonal_network.SCALES", (0.1, 1.0))
    monkeypatch.setattr("benchmarks.examples.diagonal_network.runs", lambda n: runs(n, scales=(0.1, 1.0)))
    assert main(["--num-sets", "1", "--out", str(tmp_path / "picture.png"), "--json", str(tmp_path / "taus.json")]) == 0
    out = capsys.readouterr().out
    assert "equal, sparse" in out
    assert "worst case, T = \\|w\\|" in out
    taus = json.loads((tmp_path / "taus.json").read_text())["taus"]
    assert set(taus["trace, T = 1"]) == {"equal, sparse", "equal, dense", "random, sparse", "random, dense"}
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
