"""The two sides of the comparison with timm's loop do the same work."""

from __future__ import annotations

import pytest

from benchmarks.speed import throughput
from benchmarks.train import options
from sam_optim.core import errors, files
from sam_optim.core import random as rng

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm leaves its images open


def arguments(tmp_path, n: int):
    throughput.picture_tree(tmp_path / "d", n, 32)
    argv = ["--data", "folder", "--data-dir", str(tmp_path / "d"), "--img-size", "32", "--model", "test_vit"]
    return options.parse([*argv, "--batch-size", str(n), "--no-aug", "--epochs", "1000"])


@pytest.mark.parametrize("prefetcher", [True, False])
def test_losses_of_three_updates_are_equal(tmp_path, prefetcher):
    """One batch holds all images, so that the order in which each side draws them does not matter."""
    args = arguments(tmp_path, 20)
    with rng.preserved():
        ours, theirs = throughput.our_epoch(args), throughput.timm_epoch(args, prefetcher=prefetcher)
        result = [(ours(), theirs()) for _ in range(3)]
    for own, control in result:
        assert own == pytest.approx(control, rel=1e-4)
    assert result[2][0] < result[0][0]


def test_the_command(tmp_path, capsys):
    argv = ["--model", "test_vit", "--images", "20", "--batch-size", "10", "--rounds", "2"]
    assert errors.run(throughput.main, [*argv, "--json", str(tmp_path / "t.json")]) == 0
    report = files.read_json(tmp_path / "t.json")
    assert report["models"]["test_vit"]["timm, prefetcher"]["ratio"]["n"] == 2
    assert "CPU time ours / timm" in capsys.readouterr().out
    assert errors.run(throughput.main, [*argv[:-1], "1"]) == 2
