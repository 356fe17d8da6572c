"""Triton's kernels without a device: interpreted, counted on fake CUDA tensors, compiled to what a device would run.

`tests/triton_interpreted.py` holds what is interpreted: Triton decides between compiler and interpreter when it is
imported, so that it needs a process of its own. What runs on a device is in `tests/gpu`.
"""

import contextlib
import functools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import ONE_THREAD
from test_device import Watched
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sam_optim import ASAM, SAM, Perturbation
from sam_optim.optim import kernels

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("triton")
from sam_optim.optim.kernels import triton as body  # noqa: E402


@pytest.mark.parametrize(
    ("tests", "which"),
    [
        ("tests/triton_interpreted.py", "not slow"),
        ("tests/gpu", "not slow"),
        pytest.param("tests/triton_interpreted.py", "slow", marks=pytest.mark.slow),
    ],
)
def test_interpreted(tests, which):
    """What is in tests/gpu, too, as far as it can be: so that it does not run for the first time on a device."""
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-m", which, tests],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", **ONE_THREAD},
    )
    assert out.returncode == 0, out.stdout[-4000:] + out.stderr[-1000:]


# fake CUDA tensors

SHAPES = [(64, 32), (64,), (32, 64), (10, 8, 3, 3), (1,), ()]


class Launches(list):
    """(kernel, programs, arguments, constants) of every launch."""

    def __call__(self, kernel, programs, *args, **constants):
        if programs:
            self.append((kernel, programs, args, constants))

    @property
    def names(self):
        return [kernel.fn.__name__ for kernel, *_ in self]


@pytest.fixture
def launches(monkeypatch):
    """What would be launched, on fake CUDA tensors that have addresses."""
    recorded = Launches()
    addresses = {}
    with FakeTensorMode():
        try:
            torch.zeros(1).to("cuda", non_blocking=True)
        except RuntimeError:
            pytest.skip("this torch asks the driver for a device before it copies to a fake one")

    def address(x):
        return addresses.setdefault(id(x), (x, (len(addresses) + 1) << 40))[1]  # with x, so that no id is used again

    monkeypatch.setattr(body, "launch", recorded)
    monkeypatch.setattr(body, "addresses", lambda tensors: [address(x) for x in tensors])
    monkeypatch.setattr(body, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(body, "is_capturing", lambda device: False)
    monkeypatch.setattr(body, "PLAIN", {*body.PLAIN, FakeTensor})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # so that no generator is asked
    with FakeTensorMode():
        yield recorded


def parameters(shapes, dtype=torch.float32, grad_dtype=None):
    params = [torch.nn.Parameter(torch.empty(s, dtype=dtype, device="cuda")) for s in shapes]
    for p in params:
        if grad_dtype is not None:
            p.grad_dtype = None
        p.grad = torch.empty_like(p, dtype=grad_dtype or dtype)
    return params


VARIANTS = {
    "SAM": functools.partial(Perturbation, rho=0.05),
    "ASAM": functools.partial(Perturbation, rho=0.5, adaptive=True),
    "filter": functools.partial(Perturbation, rho=0.5, adaptive="filter"),
    "inf": functools.partial(Perturbation, rho=0.01, norm=math.inf),
    "ASAM, inf": functools.partial(Perturbation, rho=0.01, adaptive=True, norm=math.inf),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_three_launches_whatever_the_model(variant, launches):
    for shapes in (SHAPES, SHAPES * 50):
        params = parameters(shapes)
        sam = VARIANTS[variant](params, fused=True)
        for _ in range(2):
            grads = [p.grad for p in params]
            launches.clear()
            sam.enter()
            assert launches.names == ["norm_partials", "finalize", "perturb"]
            chunks = sum(-(-p.numel() // body.CHUNK.value) for p in params)  # every entry is in one program
            assert [programs for _, programs, _, _ in launches] == [chunks, 1, chunks]
            sam.exit(failed=True)  # no backward runs here
            for p, g in zip(params, grads, strict=True):
                p.grad = g


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_steady_state_leaves_nothing_to_torch_but_one_copy_back(variant, launches):
    """Nothing is allocated, uploaded or read: views alone, and the copy that restores."""
    params = parameters(SHAPES)
    grads = [p.grad for p in params]
    sam = VARIANTS[variant](params, fused=True)
    for step in range(3):
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        with Watched() if step == 2 else contextlib.nullcontext() as watched:
            sam.enter()
            sam.exit(failed=True)  # no backward runs here
    views = r"prim\.device|profiler\.|aten\.(detach|alias|view|slice|select|unbind)\."
    operations = [name for name in watched.names if not re.match(views, name)]
    if variant == "filter":  # T is computed anew
        operations = [name for name in operations if "foreach" in name]
    assert operations == ["aten._foreach_copy_.default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_a_model_over_two_devices_has_one_norm(flags, variant, dtype, launches):
    """Nothing meets a tensor of another device, which fake tensors refuse as real ones do. Nothing is fused there."""
    params = [torch.nn.Parameter(torch.empty(s, dtype=dtype, device=f"cuda:{i % 2}")) for i, s in enumerate(SHAPES)]
    sam = VARIANTS[variant](params, **flags)
    sam._has_warned = True  # the first step reads what the rounding of low precision left, to warn of it
    optimizer = SAM.wrap(torch.optim.SGD(params, lr=0.1, foreach=True), rho=0.05, **flags)
    optimizer.perturbation._has_warned = True
    for _ in range(2):
        for step in (sam.enter, sam.exit, optimizer.first_step, optimizer.second_step):
            for p in params:
                p.grad = torch.empty_like(p)
            step()
    assert sam.last_step is not None
    assert not launches


# compiled


class Given:
    """An argument as Triton's launcher looks at it: where it begins, and of what type it is."""

    def __init__(self, x):
        self.dtype, self._address = x.dtype, body.addresses([x])[0]

    def data_ptr(self):
        return self._address

    def ptr_range(self):
        return 2**40


class Driver:
    """What Triton asks of a device before it compiles for it."""

    def __init__(self, capability):
        self._capability = capability

    def get_current_device(self):
        return self._capability  # compiled kernels are kept for each device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


@contextlib.contextmanager
def driver(capability):
    from triton.runtime.driver import driver

    before = driver._active if hasattr(driver, "_active") else driver.active  # before 3.5
    driver.set_active(Driver(capability))
    try:
        yield
    finally:
        driver.set_active(before)


def compiled(launch, capability):
    """The machine code of a launch, as text, and what it needs: what a device would make of these very arguments."""
    import triton

    kernel, programs, args, constants = launch
    given = [Given(x) if isinstance(x, torch.Tensor) else x for x in args]
    with driver(capability):
        options = {"num_warps": body.WARPS, "enable_fp_fusion": False}
        cubin = kernel.warmup(*given, grid=(programs,), **options, **constants).asm["cubin"]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"sam_optim-{os.getpid()}.cubin"
    path.write_bytes(cubin)
    try:
        command = [tools / "cuobjdump", "-sass", "-res-usage", path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    finally:
        path.unlink()


def check_machine_code(launch, capability, *, wide, most=128, spilled=0):
    """Registers of a thread. spilled: bytes of a thread for which there may be no register."""
    text = compiled(launch, capability)
    name = launch[0].fn.__name__
    assert spilled or not re.search(r"\b(LDL|STL)\b|\b(LDL|STL)\.", text), name
    assert int(re.search(r"STACK:(\d+)", text)[1]) <= spilled, name
    assert int(re.search(r"REG:(\d+)", text)[1]) <= most, name
    if wide:
        assert "LDG.E.128" in text, name
        assert "STG.E.128" in text or name != "perturb", name
    return int(re.search(r"REG:(\d+)", text)[1])


def launched(launches, variant, **types):
    params = parameters(SHAPES, **types)
    launches.clear()
    sam = VARIANTS[variant](params, fused=True)
    sam._has_warned = True  # the first step reads what the rounding of low precision left, to warn of it
    sam.enter()
    return list(launches)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", ["SAM", "ASAM"])
def test_compiled_kernels_read_and_write_16_bytes_at_a_time_and_spill_nothing(variant, capability, launches):
    for launch in launched(launches, variant):
        check_machine_code(launch, capability, wide=launch[0].fn.__name__ != "finalize")


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_all_kernels_compile_and_spill_nothing(dtype, variant, capability, launches):
    import triton

    # the compiler of Triton 3.6 gives these 64 registers, to run more threads at once, and spills 8 to 16 bytes for it
    is_older = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
    spilled = 16 if is_older and variant == "filter" and dtype in (torch.bfloat16, torch.float16) else 0
    for launch in launched(launches, variant, dtype=dtype):
        most = 255 if dtype == torch.float64 else 128  # in float64 nobody trains fast
        of_this = spilled if launch[0].fn.__name__ == "perturb" else 0
        check_machine_code(launch, capability, wide=launch[0].fn.__name__ != "finalize", most=most, spilled=of_this)


# what is asked for


def test_fused_is_refused_where_it_cannot_be():
    params = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=r"needs parameters on CUDA, got \['cpu'\]"):
        Perturbation(params, fused=True)
    with pytest.raises(ValueError, match="two ways of moving the weights"):
        Perturbation(params, fused=True, foreach=True)
    with pytest.raises(ValueError, match=r"needs parameters on CUDA, got \['cpu'\]"):
        SAM.wrap(torch.optim.SGD(params, lr=0.1), fused=True)


def test_without_triton_the_error_names_it(monkeypatch, launches):
    monkeypatch.setitem(sys.modules, "sam_optim.optim.kernels.triton", None)
    monkeypatch.delattr(kernels, "triton", raising=False)
    with pytest.raises(ImportError, match="install triton, or pass fused=None"):
        Perturbation(parameters(SHAPES), fused=True)
    Perturbation(parameters(SHAPES)).enter()


def test_on_the_cpu_fused_is_for_the_base_alone():
    params = [torch.nn.Parameter(torch.ones(3))]
    sam = ASAM(params, torch.optim.AdamW, lr=0.1, fused=True)
    assert sam.param_groups[0]["fused"]
    assert sam.perturbation.fused is None


def test_none_is_not_fused_until_it_has_been_measured(launches):
    params = parameters(SHAPES)
    sam = SAM(params, torch.optim.SGD, lr=0.1)
    sam.first_step()
    assert not launches
