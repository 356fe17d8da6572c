"""A monitor in benchmarks.train, and the picture of its rows."""

import json
import math

import pytest
import torch


def test_the_picture_shows_measures_and_edges():
    pytest.importorskip("matplotlib")
    from sam_optim.report import sharpness_picture

    rows = [{"step": k, "lambda_max": 3.0 + k, "critical_sharpness": None if k == 1 else 2.0, "edge": 20.0,
             "sgd_edge": 38.0, "sam_edge": 9.0} for k in range(3)]  # fmt: skip
    axes = sharpness_picture(rows, title="here").axes[0]
    drawn = {line.get_label(): [float(y) for y in line.get_ydata()] for line in axes.get_lines()}
    assert drawn["lambda_max"] == [3.0, 4.0, 5.0]
    assert math.isnan(drawn["critical_sharpness"][1])
    assert drawn["edge, 2 / lr"] == [20.0] * 3
    assert drawn["edge of SGD with momentum"] == [38.0] * 3
    assert drawn["edge of SAM"] == [9.0] * 3
    assert {line.get_linestyle() for line in axes.get_lines()[:2]} == {"-"}
    without = [row | {"sgd_edge": 20.0} for row in rows]
    assert "edge of SGD with momentum" not in {x.get_label() for x in sharpness_picture(without).axes[0].get_lines()}
    with pytest.raises(ValueError, match="no row"):
        sharpness_picture([{"step": 1, "lambda_max": None}])


def test_benchmarks_train_watches_goes_on_and_trains_the_same(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    pytest.importorskip("sklearn")
    from benchmarks.train import __main__ as train_command
    from benchmarks.train import run as engine
    from benchmarks.train.checkpoint import newest

    monkeypatch.setattr(engine, "EVERY_PROBE", 2)
    monkeypatch.setattr(engine, "PROBES", 64)
    base = "--data digits --train-examples 128 --batch-size 32 --epochs 2 --sam-rho 0.05 --measures none --device cpu"

    def trained(name, *more):
        out = tmp_path / name
        assert train_command.main([*base.split(), "--out", str(out), *more]) == 0
        return newest(out / "checkpoints"), out / "sharpness.jsonl"

    plain, nothing = trained("plain")
    watched, path = trained("watched", "--monitor", "0.9")
    assert not nothing.exists()
    for name, value in plain["model"].items():
        assert torch.equal(value, watched["model"][name]), name
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["step"] == 2
    assert rows[0]["lambda_max"] > 0
    assert rows[0]["worst_case"] > 0
    assert watched["monitor"]["num_steps"] == 8
    assert [row["step"] for row in watched["monitor"]["history"]] == [row["step"] for row in rows]
