"""SharpnessMonitor: the numbers of the measures, no trace in the training, no more time than its budget."""

import copy
import csv
import gc
import json
import math
import os
import random
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch
from quadratic import Quadratic, symmetric, unshifted
from torch import nn

from sam_optim import ASAM, SAM, Loss, SharpnessMonitor, hessian_eigenvalues, hessian_trace, worst_case_sharpness
from sam_optim.monitor.edges import stability_edges

cross_entropy = nn.CrossEntropyLoss()
EVERYTHING = ("lambda_max", "critical_sharpness", "worst_case", partial(hessian_trace, num_probes=2))


class Network(nn.Module):
    """Buffers that a pass would change, draws that it would take, and a layer that is frozen in eval mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3))
        self.body[1].eval()

    def forward(self, x):
        return self.body(x)


def problem(seed=0):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = Network()
    data = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(6)]
    return model, data, Loss(model, cross_entropy, data[:2])


def optimizers(model):
    return {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=1e-2),
        "sam": lambda: SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, module=model),
        "asam": lambda: ASAM(model.parameters(), torch.optim.AdamW, rho=0.5, lr=1e-2, module=model),
    }


def closure_of(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def closure_step(model, optimizer, x, y, scaler):
    optimizer.step(closure_of(model, optimizer, x, y))


def two_phase(model, optimizer, x, y, scaler):
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=scaler is not None):
        loss = cross_entropy(model(x), y)
    scale = scaler.scale if scaler else lambda x: x
    scale(loss).backward()
    if isinstance(optimizer, SAM):
        with optimizer.perturbed(), torch.autocast("cpu", torch.bfloat16, enabled=scaler is not None):
            scale(cross_entropy(model(x), y)).backward()
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()


def everything(model, optimizer):
    """All that training goes on from, as bits."""
    found = {f"model {k}": v for k, v in model.state_dict().items()}
    found |= {f"grad {k}": p.grad for k, p in model.named_parameters()}
    for i, state in enumerate(optimizer.state.values()):
        found |= {f"state {i} {k}": v for k, v in state.items()}
    found["torch"] = torch.get_rng_state()
    modes = [(name, m.training) for name, m in model.named_modules()]
    return found, [random.getstate(), repr(np.random.get_state()), modes]


def same(a, b):
    tensors, rest = zip(a, b, strict=True)
    assert tensors[0].keys() == tensors[1].keys()
    for name in tensors[0]:
        x, y = tensors[0][name], tensors[1][name]
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name
    assert rest[0] == rest[1]


def train(kind, step, *, monitor=None, attach=False, num=12, scaled=False):
    """What 12 steps leave behind; `monitor`: from the loss to one."""
    model, data, loss = problem()
    optimizer = optimizers(model)[kind]()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if scaled else None
    watch = monitor(loss) if monitor else None
    if attach:
        watch.attach(optimizer, scaler=scaler)
    for i in range(num):
        step(model, optimizer, *data[i % len(data)], scaler)
        if watch and not attach:
            watch.step(optimizer, scaler=scaler)
    return everything(model, optimizer), watch


@pytest.mark.parametrize("attach", [False, True], ids=["step", "attach"])
@pytest.mark.parametrize("step", [closure_step, two_phase])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "sam", "asam"])
def test_training_does_not_notice(kind, step, attach):
    plain, _ = train(kind, step)
    watched, watch = train(
        kind,
        step,
        monitor=lambda loss: SharpnessMonitor(loss, every=2, budget=None, measures=EVERYTHING),
        attach=attach,
    )
    same(plain, watched)
    assert [row["step"] for row in watch.history] == [2, 4, 6, 8, 10, 12]
    assert all(math.isfinite(row[name]) for row in watch.history for name in ("lambda_max", "critical_sharpness"))
    assert all(row["hessian_trace"] is not None for row in watch.history)


@pytest.mark.parametrize("kind", ["sgd", "sam"])
def test_nor_does_training_with_a_scaler_under_autocast(kind):
    watcher = lambda loss: SharpnessMonitor(loss, every=3, budget=None)  # noqa: E731
    plain, _ = train(kind, two_phase, scaled=True)
    watched, watch = train(kind, two_phase, scaled=True, monitor=watcher)
    same(plain, watched)
    if kind == "sam":  # norms are in units of L
        _, unscaled = train(kind, two_phase, monitor=watcher)
        assert watch.history[0]["last_grad_norm"] == pytest.approx(unscaled.history[0]["last_grad_norm"], rel=0.05)


@pytest.mark.parametrize("fault", [ValueError("broken"), torch.OutOfMemoryError("no memory")])
def test_a_measure_that_fails_half_way_is_a_warning_and_leaves_no_trace(fault):
    def broken(loss):
        with loss.displaced([torch.ones_like(w) for w in loss.params]):
            loss.value()
            torch.rand(3)
            raise fault

    plain, _ = train("sam", closure_step)
    with pytest.warns(UserWarning, match="has no broken at step 4"):
        watched, watch = train(
            "sam",
            closure_step,
            monitor=lambda loss: SharpnessMonitor(loss, every=4, budget=None, measures=[broken, "lambda_max"]),
        )
    same(plain, watched)
    assert [row["broken"] for row in watch.history] == [None] * 3
    assert type(fault).__name__ in watch.history[-1]["reason"]
    assert all(row["lambda_max"] > 0 for row in watch.history)


def test_an_interrupt_inside_a_measure_leaves_no_trace():
    def interrupted(loss):
        with loss.displaced([torch.ones_like(w) for w in loss.params]):
            raise KeyboardInterrupt

    model, data, loss = problem()
    optimizer = optimizers(model)["sam"]()
    optimizer.step(closure_of(model, optimizer, *data[0]))
    before = everything(model, optimizer)
    before = ({k: None if v is None else v.clone() for k, v in before[0].items()}, before[1])
    with pytest.raises(KeyboardInterrupt):
        SharpnessMonitor(loss, every=1, measures=[interrupted]).step(optimizer)
    same(before, everything(model, optimizer))


def test_inside_a_perturbed_pass_it_refuses():
    model, data, loss = problem()
    optimizer, monitor = optimizers(model)["sam"](), SharpnessMonitor(loss, every=1)
    cross_entropy(model(data[0][0]), data[0][1]).backward()
    with optimizer.perturbed():
        cross_entropy(model(data[0][0]), data[0][1]).backward()
        with pytest.raises(RuntimeError, match=r"after optimizer\.step"):
            monitor.step(optimizer)
    assert monitor.num_steps == 0
    optimizer.step()
    assert monitor.step(optimizer) is not None


def test_the_numbers_are_those_of_the_measures():
    model, data, loss = problem()
    optimizer = optimizers(model)["sam"]()
    monitor = SharpnessMonitor(loss, every=2, budget=None)
    for i in range(6):
        before = copy.deepcopy(model).eval()
        optimizer.step(closure_of(model, optimizer, *data[i]))
        row = monitor.step(optimizer)
        assert (row is None) == bool((i + 1) % 2)
    assert row is monitor.history[-1]
    assert row["lambda_max"] == pytest.approx(float(hessian_eigenvalues(loss).eigenvalues[0]), rel=0.01)
    worst = worst_case_sharpness(loss, optimizer.neighborhood, num_steps=2, num_restarts=1)
    assert row["worst_case"] == worst.value
    assert row["last_loss"] == float(optimizer.last_step.loss)
    assert row["last_grad_norm"] == float(optimizer.last_step.grad_norm)
    # the critical step: at lr_c along the last update the probes' loss is what it was, before it lower, after it higher
    lr_c = 2 / row["critical_sharpness"]

    def rise(lr):
        moved = copy.deepcopy(before)
        with torch.no_grad():
            for p, w0, w1 in zip(moved.parameters(), before.parameters(), model.parameters(), strict=True):
                p.copy_(w0 + lr / 0.1 * (w1 - w0))
            at = [sum(float(cross_entropy(m.eval()(x), y)) for x, y in data[:2]) for m in (before, moved)]
        return at[1] - at[0]

    sign = 1 if rise(0.5 * lr_c) < 0 else -1
    assert rise(sign * 0.98 * lr_c) < 0 < rise(sign * 1.02 * lr_c)


def test_critical_sharpness_takes_at_most_eight_forward_passes():
    model, data, loss = problem()
    optimizer, monitor = (
        optimizers(model)["sgd"](),
        SharpnessMonitor(loss, every=2, budget=None, measures=["critical_sharpness"]),
    )
    calls = []
    num = loss.num_batches
    loss.value()  # the first call looks at the data
    for i in range(20):
        optimizer.step(closure_of(model, optimizer, *data[i % 6]))
        handle = model.register_forward_hook(lambda *_: calls.append(1))
        calls.clear()
        row = monitor.step(optimizer)
        handle.remove()
        assert len(calls) <= (8 * num if row else 0)
        if row:
            assert row["critical_sharpness"] is not None


def test_on_a_quadratic_critical_sharpness_is_the_curvature_along_the_update():
    w = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    a = symmetric([4.0, 1.0, 0.2])
    loss = unshifted(Quadratic(a, None, w))
    optimizer = torch.optim.SGD(loss.model.parameters(), lr=0.05)
    monitor = SharpnessMonitor(loss, every=3, budget=None)
    for _ in range(3):
        optimizer.zero_grad()
        g = a @ loss.model.w.detach()
        loss.model.parts[0].grad = g.clone()
        optimizer.step()
        row = monitor.step(optimizer)
    assert row["critical_sharpness"] == pytest.approx(float(g @ a @ g / (g @ g)), rel=0.01)
    assert row["lambda_max"] == pytest.approx(4.0, rel=0.01)
    assert row["edge"] == row["sgd_edge"] == pytest.approx(40.0)
    assert row["reason"] is None


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_the_edges_are_where_quadratics_begin_to_diverge(momentum, nesterov):
    """1 % below an edge SGD contracts, 1 % above it grows; SAM's descent gradient is linearized about ||g||."""
    if nesterov and not momentum:
        pytest.skip("Nesterov needs momentum")
    w = nn.Parameter(torch.ones(1, dtype=torch.float64))
    options = {"lr": 0.1, "momentum": momentum, "nesterov": nesterov}
    edges = stability_edges(SAM([w], torch.optim.SGD, rho=0.3, **options), 0.3, grad_norm=0.7)
    assert edges["edge"] == 20
    for name, curvature in (("sgd_edge", lambda x: x), ("sam_edge", lambda x: x * (1 + 0.3 * x / 0.7))):
        for factor in (0.99, 1.01):
            optimizer = torch.optim.SGD([w], **options)
            w.data.fill_(1.0)
            for _ in range(2000):
                w.grad = curvature(factor * edges[name]) * w.detach()
                optimizer.step()
            assert (abs(float(w.detach())) < 1) == (factor < 1), (name, factor)
    assert stability_edges(torch.optim.Adam([w], lr=0.1), 0.3, 0.7) == {"edge": 20}


@pytest.mark.parametrize(
    ("rho", "arguments", "has_edge"),
    [(0.1, {}, True), (0.1, {"adaptive": True}, False), (0.1, {"norm": math.inf}, False), (0.0, {}, False)],
)
def test_sam_s_edge_is_that_of_plain_sam(rho, arguments, has_edge):
    model, data, loss = problem()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=0.1, module=model, **arguments)
    optimizer.step(closure_of(model, optimizer, *data[0]))
    row = SharpnessMonitor(loss, every=1, measures=[]).step(optimizer)
    assert ("sam_edge" in row) == has_edge
    assert row["edge"] == 20


def test_a_budget_spaces_the_rows_and_says_what_they_took(monkeypatch):
    """Steps of 2 ms and a measure of 10 ms, by a clock of the test's own: with a budget of 10 % one row in 50 steps."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    model, _, loss = problem()
    optimizer = optimizers(model)["sgd"]()

    def slow(loss):
        clock[0] += 0.01
        return 1.0

    monitor = SharpnessMonitor(loss, every=2, budget=0.1, measures=[slow])
    for _ in range(500):
        clock[0] += 0.002
        monitor.step(optimizer)
    assert 0.07 < monitor.share < 0.12
    assert monitor.history[-1]["share"] == pytest.approx(monitor.share, rel=0.25)
    assert sum(row["seconds"] for row in monitor.history) == pytest.approx(monitor.spent, rel=0.1)
    assert f"{len(monitor.history)} rows in 500 steps" in str(monitor)
    assert "(budget 10.0%)" in str(monitor)


def test_a_slow_first_step_and_a_cold_first_row_do_not_break_the_budget(monkeypatch):
    """A first step of 1 s (compilation), others of 2 ms; rows of 40, 22, 20, 20, ... ms."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    model, _, loss = problem()
    optimizer = optimizers(model)["sgd"]()
    seconds = iter([0.04, 0.022])

    def slow(loss):
        clock[0] += next(seconds, 0.02)
        return 1.0

    monitor = SharpnessMonitor(loss, every=1, budget=0.05, measures=[slow])
    for i in range(4000):
        clock[0] += 1.0 if i == 1 else 0.002
        monitor.step(optimizer)
    shares = [row["share"] for row in monitor.history]
    assert all(share <= 0.06 for share in shares[1:])
    assert len(shares) > 15
    assert 0.04 < monitor.share <= 0.06


def numbers(history):
    return [{k: v for k, v in row.items() if k not in ("seconds", "share")} for row in history]


@pytest.mark.parametrize("stop", [3, 5, 6])
def test_it_resumes(stop, tmp_path):
    """Stopped right before a row, after it, and in between: the rows are those of a run that went through."""
    model, data, loss = problem()
    optimizer = optimizers(model)["sam"]()

    def go(model, optimizer, monitor, steps):
        for i in steps:
            optimizer.step(closure_of(model, optimizer, *data[i % 6]))
            monitor.step(optimizer)

    log = tmp_path / "log.jsonl"
    monitor = SharpnessMonitor(loss, every=3, budget=None, log=log)
    torch.manual_seed(1)
    go(model, optimizer, monitor, range(stop))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "monitor": monitor.state_dict(),
                "rng": torch.get_rng_state()}, tmp_path / "checkpoint.pt")  # fmt: skip
    go(model, optimizer, monitor, range(stop, 12))
    lines = log.read_text()

    again, _, loss = problem(seed=5)
    optimizer = optimizers(again)["sam"]()
    resumed = SharpnessMonitor(loss := Loss(again, cross_entropy, data[:2]), every=3, budget=None, log=log)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(state["model"])
    again.body[1].eval()
    optimizer.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["monitor"])
    torch.set_rng_state(state["rng"])
    go(again, optimizer, resumed, range(stop, 12))
    assert numbers(resumed.history) == numbers(monitor.history)
    assert numbers(map(json.loads, log.read_text().splitlines())) == numbers(map(json.loads, lines.splitlines()))


def test_files_and_functions_get_every_number(tmp_path):
    calls = []
    _, watch = train(
        "sam",
        closure_step,
        monitor=lambda loss: SharpnessMonitor(
            loss,
            every=4,
            budget=None,
            log=[tmp_path / "a.csv", str(tmp_path / "a.jsonl"), lambda *row: calls.append(row)],
        ),
    )
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == watch.history
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["lambda_max"]) for row in rows] == [row["lambda_max"] for row in watch.history]
    assert ("sharpness/lambda_max", watch.history[0]["lambda_max"], 4) in calls
    assert {step for _, _, step in calls} == {4, 8, 12}


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as board:
        _, watch = train(
            "sam", closure_step, monitor=lambda loss: SharpnessMonitor(loss, every=4, budget=None, log=board)
        )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    written = [(event.step, event.value) for event in events.Scalars("sharpness/lambda_max")]
    assert written == [(row["step"], pytest.approx(row["lambda_max"])) for row in watch.history]
    assert "sharpness/sam_edge" in events.Tags()["scalars"]


def test_wandb_gets_every_number_whatever_its_own_count_of_steps_is(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(mode="offline", dir=tmp_path, project="test") as run:
        for i in range(30):  # as a training loop that logs more often than it steps
            run.log({"loss": i})
        _, watch = train(
            "sam", closure_step, monitor=lambda loss: SharpnessMonitor(loss, every=4, budget=None, log=run)
        )
        assert run.summary["sharpness/lambda_max"] == pytest.approx(watch.history[-1]["lambda_max"])
        assert run.summary["sharpness/step"] == 12


def test_bad_arguments_are_named(tmp_path):
    _, _, loss = problem()
    for arguments, error, message in (
        ({"every": 0}, ValueError, "every"),
        ({"budget": 0.0}, ValueError, "budget"),
        ({"measures": ["lamda_max"]}, ValueError, "lambda_max"),
        ({"log": tmp_path / "a.txt"}, ValueError, "csv"),
        ({"log": 3}, TypeError, "log"),
    ):
        with pytest.raises(error, match=message):
            SharpnessMonitor(loss, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_file_is_written_by_the_monitors_of_one_process(tmp_path):
    log = tmp_path / "s.csv"
    program = """
import sys
import torch
from sam_optim import Loss, SharpnessMonitor
loss = Loss(torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss(), [(torch.zeros(4, 2), torch.zeros(4).long())])
SharpnessMonitor(loss, log=sys.argv[1])
"""

    def another_process():
        return subprocess.run([sys.executable, "-c", program, str(log)], capture_output=True, text=True)

    monitors = [SharpnessMonitor(problem()[2], log=log) for _ in range(2)]
    refused = another_process()
    assert f"s.csv is being written by process {os.getpid()}" in refused.stderr.splitlines()[-1]
    monitors.pop()
    assert another_process().returncode == 1
    del monitors
    gc.collect()
    assert another_process().returncode == 0
    assert not list(tmp_path.iterdir())


def test_what_is_no_state_is_refused_and_changes_nothing():
    monitor = SharpnessMonitor(problem()[2])
    state = monitor.state_dict()
    for wrong, missing in (
        ([], "num_steps, spent, .*"),
        (None, "num_steps, spent, .*"),
        ({k: 7 for k in state if k != "next"}, "next"),
    ):
        with pytest.raises(ValueError, match=f"the state has no {missing}: give what"):
            monitor.load_state_dict(wrong)
    assert monitor.state_dict() == state
