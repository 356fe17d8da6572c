"""The edge of stability of SAM: the closed form, and training that settles at it."""

import pytest

from benchmarks.examples.edge import LR, edge_of_sam, main, over_edge, train
from sam_optim import SAM


def test_the_edge_is_the_root_of_its_equation():
    for norm, rho in ((0.5, 0.1), (1e-3, 0.02), (20.0, 1.0)):
        c = edge_of_sam(norm, rho)
        assert LR * c * (1 + rho * c / norm) == pytest.approx(2, rel=1e-12)
    assert edge_of_sam(1.0, 0.0) == 2 / LR == pytest.approx(edge_of_sam(1.0, 1e-9), rel=1e-6)


@pytest.mark.parametrize(("rho", "steps"), [(0.02, 1500), (0.1, 3000)])
def test_the_largest_eigenvalue_settles_at_sams_edge(rho, steps):
    points = [p for p in train(SAM, rho, steps) if p.step > steps * 2 / 3]
    assert over_edge(points) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_the_command_draws_and_writes(tmp_path, capsys):
    assert main(["--steps", "1000", "--out", str(tmp_path / "edge.png"), "--json", str(tmp_path / "edge.json")]) == 0
    assert "MSAM, rho 0.1" in capsys.readouterr().out
    assert (tmp_path / "edge.png").stat().st_size > 10_000
