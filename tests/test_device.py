"""What a device would see, without one: what SAM's own part reads back, and what it launches."""

import contextlib
import copy
import functools
import math
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.shapes import shapes_of
from sam_optim import ASAM, SAM, GraphedStep

VARIANTS = {
    "SAM": functools.partial(SAM, rho=0.05),
    "ASAM": functools.partial(ASAM, rho=0.5),
    "inf": functools.partial(SAM, rho=0.01, norm=math.inf),
    "ASAM, inf": functools.partial(ASAM, rho=0.01, norm=math.inf),
    "maximize": functools.partial(SAM, rho=0.05, maximize=True),
}
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.nonzero.default}


class Watched(TorchDispatchMode):
    """Lists the operations that run, and which of them read a tensor back to the host."""

    def __init__(self):
        super().__init__()
        self.names = []
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        if func in READS:
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


def parameters(dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    sizes = [(64, 32), (64,), (32, 64), (10, 8, 3, 3), (1,), ()]
    params = [nn.Parameter(torch.randn(s, dtype=dtype, device=device)) for s in sizes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


@pytest.mark.parametrize("variant", VARIANTS)
def test_sams_own_part_reads_nothing_back_and_keeps_its_copies(variant):
    """The body for devices, run on the CPU: `foreach=True`. Only the first step makes room for the clean weights."""
    params = parameters()
    sam = VARIANTS[variant](params, torch.optim.SGD, lr=0.1, foreach=True)
    for i in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        with Watched() as watched:
            sam.first_step()
            sam.perturbation.exit()
        sam.zero_grad()
        assert any(name.startswith("aten.empty") for name in watched.names) == (i == 0)
        assert not watched.reads


def test_the_watch_sees_what_reads():
    with Watched() as watched:
        torch.ones(100).sum().item()
    assert watched.reads


@pytest.mark.skipif(torch.__version__ < "2.9", reason="operators on fake CUDA tensors ask for a driver")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("base", ["sgd", "adamw fused", "adamw capturable"])
def test_a_whole_step_reads_nothing_back_on_cuda_tensors(monkeypatch, variant, base):
    """On fake CUDA tensors, of which no value can be read: whatever would wait for the device raises."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    factory, options = {
        "sgd": (torch.optim.SGD, {"momentum": 0.9}),
        "adamw fused": (functools.partial(torch.optim.AdamW, fused=True), {}),
        "adamw capturable": (torch.optim.AdamW, {"capturable": True, "foreach": True}),
    }[base]
    with FakeTensorMode():
        params = parameters(device="cuda")
        sam = VARIANTS[variant](params, factory, lr=0.1, **options)

        def closure():
            sam.zero_grad()
            for p in params:  # by hand: autograd's threads want a real device
                p.grad = 2 * p.detach()
            return sum(p.detach().square().sum() for p in params)

        counts = []
        for _ in range(3):
            loss = sam.step(closure)
            counts.append(sam.num_skipped)
        with pytest.raises(Exception, match=r"_local_scalar_dense|[Dd]ata-dependent|DataDependent"):
            loss.item()  # the fake tensors do refuse
        assert sam.last_step.dual_norm.device.type == "cuda"
        if base == "adamw fused":  # counted in place: a graph repeats the addition, and never the Python around it
            assert counts[0].device.type == "cuda"
            assert counts[0] is counts[1] is counts[2]


@pytest.mark.parametrize(("variant", "most"), [("SAM", 24), ("ASAM", 41)])
@pytest.mark.parametrize("num_tensors", [3, 161])
def test_foreach_launches_as_much_for_a_resnet50_as_for_three_tensors(monkeypatch, num_tensors, variant, most):
    """Ascent and way back; views and questions to a tensor launch nothing."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    shapes = shapes_of("resnet50")[:num_tensors]
    with FakeTensorMode():
        params = [nn.Parameter(torch.empty(s, device="cuda")) for s in shapes]
        sam = VARIANTS[variant](params, torch.optim.SGD, lr=0.1).perturbation
        for _ in range(3):
            for p in params:
                p.grad = torch.empty_like(p)
            with Watched() as watched:
                sam.enter()
                sam.exit()
    assert len(params) == num_tensors
    launched = [name for name in watched.names if not re.match(r"prim\.device|aten\.(empty|detach)\.", name)]
    assert len(launched) <= most, launched


def test_a_graph_needs_a_device():
    sam = SAM([nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(ValueError, match=r"one CUDA device, and the parameters are on \['cpu'\]"):
        GraphedStep(sam, lambda x: x)


class NoStream:
    def wait_stream(self, other):
        pass


class NoGraph:
    def replay(self):
        pass


@pytest.fixture
def graphed(monkeypatch):
    """A GraphedStep on the CPU, and the kinds of its steps: nothing is captured, and nothing replayed."""
    entered = lambda *_, **__: contextlib.nullcontext()  # noqa: E731
    for name, fake in {"stream": entered, "graph": entered, "CUDAGraph": NoGraph}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: NoStream())
    monkeypatch.setattr("sam_optim.optim.cuda_graph._device_of", lambda optimizer: torch.device("cpu"))
    kinds = []
    for name in ("_eagerly", "_capture"):
        method = getattr(GraphedStep, name)

        def noted(self, inputs, method=method, name=name):
            kinds.append(name)
            return method(self, inputs)

        monkeypatch.setattr(GraphedStep, name, noted)

    def make(warmup):
        p = nn.Parameter(torch.ones(3))
        sam = SAM([p], torch.optim.AdamW, lr=0.1, capturable=False)
        return sam, GraphedStep(sam, lambda x: ((p - x) ** 2).sum(), warmup=warmup)

    monkeypatch.setattr("sam_optim.optim.cuda_graph._check", lambda optimizer: None)
    return make, kinds


def test_what_is_captured_has_run_as_it_is_before(graphed):
    """A capture may neither load kernels nor ask for pinned memory: also after a warmup of 1, whose step makes the
    state, after another weight decay, and after a state was loaded."""
    make, kinds = graphed
    sam, step = make(1)
    x = torch.zeros(3)
    for _ in range(3):
        step(x)
    assert kinds == ["_eagerly", "_eagerly", "_capture"]
    sam.param_groups[0]["weight_decay"] = 0.5
    for _ in range(3):
        step(x)
    assert kinds[3:] == ["_eagerly", "_capture"]
    sam.load_state_dict(copy.deepcopy(sam.state_dict()))
    for _ in range(3):
        step(x)
    assert kinds[5:] == ["_eagerly", "_capture"]
    sam.param_groups[0]["lr"] = 0.01  # what a graph reads
    step(x)
    assert len(kinds) == 7
    for i in range(3):  # what is another one at every step is not captured at all
        sam.param_groups[0]["weight_decay"] = 0.1 * i
        step(x)
    assert kinds[7:] == ["_eagerly"] * 3
