"""The machinery of the cost benchmarks: what is paired with what, and that each way of stepping is what it says."""

import gc
import json
import time

import pytest
import torch
from torch import nn

from benchmarks.speed import host, timing, whole_step
from benchmarks.speed import step as step_cost
from sam_optim.core import errors

# a clock that only the runs advance


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    return now


def advancing(clock, seconds, calls, name):
    def run():
        calls.append(name)
        clock[0] += seconds

    return run


def test_paired_runs_stand_beside_the_reference_in_both_orders(clock):
    calls = []
    runs = {name: advancing(clock, s, calls, name) for name, s in (("a", 2.0), ("b", 3.0))}
    times = timing.paired(advancing(clock, 1.0, calls, "reference"), runs, 10, "test")
    assert times == {"a": ([2.0] * 10, [1.0] * 10), "b": ([3.0] * 10, [1.0] * 10)}
    pairs = [tuple(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert len(pairs) == 2 * (10 + timing.WARM_UP)
    assert set(pairs) == {("a", "reference"), ("reference", "a"), ("b", "reference"), ("reference", "b")}
    assert gc.isenabled()


def test_interleaved_runs_are_prepared_off_the_clock_and_shuffled(clock):
    calls = []
    runs = {
        name: (advancing(clock, 100.0, [], ""), advancing(clock, s, calls, name))
        for name, s in (("a", 1.0), ("b", 2.0), ("c", 4.0))
    }
    times = timing.interleaved(runs, 6, "test")
    assert times == {"a": [1.0] * 6, "b": [2.0] * 6, "c": [4.0] * 6}
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert {frozenset(r) for r in rounds} == {frozenset("abc")}
    assert len(set(rounds)) > 1


def test_garbage_collection_comes_back_after_a_fault():
    def fails():
        assert not gc.isenabled()
        raise ZeroDivisionError

    for call in (
        lambda: timing.paired(fails, {"a": fails}, 2, "test"),
        lambda: timing.interleaved({"a": (lambda: None, fails)}, 2, "test"),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
        assert gc.isenabled()


def test_ratios_are_of_pairs():
    result = timing.ratio([2.0, 30.0, 400.0], [1.0, 10.0, 100.0])
    assert (result["q1"], result["median"], result["q3"], result["n"]) == (2.0, 3.0, 4.0, 3)


# the ways of stepping


class Watched(nn.Module):
    """Keeps what every pass was given, in which precision it computed, and which parameters wanted a gradient."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64**2, 4), nn.LayerNorm(4), nn.Linear(4, 10))

    def forward(self, x):
        y = self.inner(x)
        self.seen.append((len(x), y.dtype, sum(p.requires_grad for p in self.parameters()), self.inner[2].bias.clone()))
        return y


@pytest.mark.parametrize(
    ("way", "passes"),
    [
        ("base", [(16, torch.float32, 6)]),
        ("SAM", [(16, torch.float32, 6)] * 2),
        ("SAM, 50 % ascent", [(8, torch.float32, 6), (16, torch.float32, 6)]),
        ("SAM, 25 % ascent", [(4, torch.float32, 6), (16, torch.float32, 6)]),
        ("SAM, bf16 ascent", [(16, torch.bfloat16, 6), (16, torch.float32, 6)]),
        ("SAM, 25 % bf16 ascent", [(4, torch.bfloat16, 6), (16, torch.float32, 6)]),
        ("SAM-ON", [(16, torch.float32, 6)] * 2),
        ("SAM-ON, 25 % ascent", [(4, torch.float32, 6), (16, torch.float32, 6)]),
        ("SAM, 2 micro-batches", [(8, torch.float32, 6)] * 4),
        ("GSAM", [(16, torch.float32, 6)] * 2),
        ("FriendlySAM", [(16, torch.float32, 6)] * 2),
        ("VaSSO", [(16, torch.float32, 6)] * 2),
    ],
)
def test_every_way_runs_the_passes_that_it_names(way, passes, monkeypatch):
    model = Watched()
    monkeypatch.setattr(whole_step, "build", lambda name, size, classes: model)
    how = whole_step.WAYS.get(way)
    setting = whole_step.Setting("any", 16)
    step = whole_step.base_step(setting) if how is None else whole_step.sam_step(setting, **how)
    before = [p.detach().clone() for p in model.parameters()]
    step()
    assert [seen[:3] for seen in model.seen] == passes
    at = [seen[3] for seen in model.seen]
    assert all(torch.equal(b, before[3]) for b in at[::2])  # first passes, at w
    assert not any(torch.equal(b, before[3]) for b in at[1::2])  # second ones, at w + e
    assert all(not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("way", "passes"),
    [
        ("late phase, last 30 %", 13),
        ("SAM, every 5th", 6),
        ("LookSAM, every 5th", 6),
        ("MSAM", 1),
        ("StaleSAM", 1),
    ],
)
def test_cheap_ways_have_as_many_passes_as_they_say(way, passes, monkeypatch):
    model = Watched()
    monkeypatch.setattr(whole_step, "build", lambda name, size, classes: model)
    whole_step.several(whole_step.Setting("any", 16), **whole_step.WAYS[way])()
    assert len(model.seen) == passes


def test_every_row_has_a_test_and_every_target_a_row():
    tests = (test_every_way_runs_the_passes_that_it_names, test_cheap_ways_have_as_many_passes_as_they_say)
    rows = {row[0] for test in tests for mark in test.pytestmark for row in mark.args[1]}
    assert rows == {"base", *whole_step.WAYS}
    assert set(whole_step.TARGETS) <= set(whole_step.WAYS)


def test_the_command_writes_a_table_and_strict_json(tmp_path, capsys):
    file = tmp_path / "new" / "whole.json"
    threads = torch.get_num_threads()
    try:
        options = ["--models", "test_resnet", "--batch-size", "4", "--rounds", "2", "--json", str(file)]
        assert whole_step.main(options) == 0
    finally:
        torch.set_num_threads(threads)
    measured = json.loads(file.read_text(), parse_constant=pytest.fail)
    (result,) = measured["results"]
    assert (result["model"], result["batch"]) == ("test_resnet", 4)
    assert set(result["step / base step"]) == {"base, again", *whole_step.WAYS}
    for x in result["step / base step"].values():
        assert x["n"] == 2
        assert 0 < x["q1"] <= x["median"] <= x["q3"]
    assert measured["facts"]["torch"] == torch.__version__
    assert {"timm", "sam_optim", "processor", "rounds", "threads"} <= set(measured["facts"])
    out = capsys.readouterr().out
    assert all(way in out for way in whole_step.WAYS)
    assert "2.02" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rounds", "1"], "--rounds: must be >= 2"),
        (["--batch-size", "3"], "--batch-size: must be >= 4"),
        (["--models", "resnet18x", "--rounds", "2"], "unknown model 'resnet18x'; choose from"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(options, message, capsys):
    assert errors.run(whole_step.main, options) == errors.EXIT_BAD_INPUT
    assert message in capsys.readouterr().err


def test_the_cost_of_a_step_is_measured_on_small_shapes(monkeypatch):
    """The other benchmark on the same machinery."""
    monkeypatch.setattr(step_cost, "shapes_of", lambda model: [torch.Size((7, 5)), torch.Size((5000,))])
    result = step_cost.compare("any", 2)
    assert result["parameters"] == 5035
    assert set(result["peer / ours"]) == set(result["ours / floor"]) == {"SAM", "SAM, checked", "ASAM", "ASAM eta=0.01"}
    assert "SAM" in step_cost.table([result])


# the host time of a step


def one_step(make, num_tensors=3):
    """(weights before, at the second call of the closure, after the step) of a step whose base hardly moves."""
    problem = host.Problem(num_tensors)
    before, seen = [p.detach().clone() for p in problem.params], []
    backward = problem.backward

    def watched():
        seen.append([p.detach().clone() for p in problem.params])
        backward()

    problem.backward = watched
    make(problem)()
    assert len(seen) == 2
    assert all(torch.equal(a, b) for a, b in zip(seen[0], before, strict=True))
    return before, seen[1], [p.detach() for p in problem.params]


@pytest.mark.parametrize("row", host.ways())
def test_every_row_of_the_host_time_is_a_step_of_sam(row):
    """Against the formula in float64, on one vector: ours and foreach have T = |w| + eta, davda54 T = |w|."""
    adaptive, make = host.ways()[row]
    before, moved, after = one_step(make)
    w, g = (torch.cat(x).double() for x in (before, host.Problem(3).grads))
    t = (w.abs() + (0 if "davda54" in row else host.ETA)) if adaptive else torch.ones(())
    expected = w + host.RHO * t**2 * g / (t * g).norm()
    torch.testing.assert_close(torch.cat(moved).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat(after), torch.cat(before) - 1e-9 * torch.cat(host.Problem(3).grads))


def test_a_row_is_judged_by_both_programs():
    assert host.judged(0.19, 0.06, 0.2) == {"bar": pytest.approx(0.196), "meets_bar": True, "below_davda54": True}
    assert host.judged(0.2, 0.06, 0.2) == {"bar": pytest.approx(0.196), "meets_bar": False, "below_davda54": False}


@pytest.mark.parametrize("row", host.PLAIN)
def test_a_plain_step_is_one_of_the_base(row, monkeypatch):
    monkeypatch.setitem(host.BASE, "lr", 0.1)
    one, other = host.Problem(3), host.Problem(3)
    before = [p.detach().clone() for p in one.params]
    host.plain_step(one, module=host.PLAIN[row])()
    host.base_step(other, passes=1)()
    assert all(torch.equal(p, q) for p, q in zip(one.params, other.params, strict=True))
    assert not any(torch.equal(p, w) for p, w in zip(one.params, before, strict=True))


def test_the_host_time_is_that_of_a_step_without_the_base(clock, monkeypatch):
    """The closure costs 1 s, a step of the base 2, moving the weights 3 and 4: own time is 7 s."""

    class Clocked(host.Problem):
        def backward(self):
            clock[0] += 1
            super().backward()

        def base(self):
            base, advance = super().base(), lambda *_: clock.__setitem__(0, clock[0] + 2)
            base.register_step_post_hook(advance)
            return base

    def slow(problem):
        step = host.base_step(problem)

        def run():
            clock[0] += 7
            step()

        return run

    monkeypatch.setattr(host, "Problem", Clocked)
    names = ["foreach SAM", "davda54 SAM", "SAM, closure"]
    monkeypatch.setattr(host, "ways", lambda: dict.fromkeys(names, (False, slow)))
    result = host.measure(2, 4)
    assert result["base_ms"] == 4000
    assert [row["median"] for row in result["rows"].values()] == [7000.0] * 3 + [0.0] * len(host.PLAIN)
    assert result["rows"]["SAM, closure"]["meets_bar"]
    assert not result["rows"]["SAM, closure"]["below_davda54"]


def test_the_host_time_is_printed_and_written(tmp_path, capsys):
    file = tmp_path / "new" / "host.json"
    threads = torch.get_num_threads()
    try:
        assert host.main(["--tensors", "2", "3", "--rounds", "2", "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    measured = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert [result["tensors"] for result in measured["results"]] == [2, 3]
    for result in measured["results"]:
        assert set(result["rows"]) == {*host.ways(), *host.PLAIN}
        assert sum("bar" in row for row in result["rows"].values()) == 10
    out = capsys.readouterr().out
    assert all(row in out for row in host.ways())
