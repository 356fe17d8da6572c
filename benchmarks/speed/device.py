"""Measurements on one CUDA device: its time, the host's time, launches, the bandwidth of a copy.

Device time is taken with the queue filled beforehand, so that it holds no waiting for the host, and with a second-level
cache that other data has just been through.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import machine
from sam_optim.core.errors import InputError

DEVICE = "cuda"
WARM_UP = 3
COPIED = 2**30  # bytes
FLUSHED = 2**28  # bytes, more than any second-level cache has
CYCLES = 2_000_000_000  # of the device in a second, at most

Run = Callable[[], Any]


def check_device() -> None:
    if not torch.cuda.is_available():
        raise InputError("this needs a CUDA device, and torch sees none: run it on a machine with a GPU and its driver")


def wait() -> None:
    torch.cuda.synchronize()


def bandwidth(rounds: int) -> float:
    """Bytes a second, read and written, of a copy."""
    a = torch.empty(COPIED, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * COPIED / device_seconds(lambda: b.copy_(a), lambda: None, rounds, ahead=0.002)


def device_seconds(run: Run, prepare: Run, rounds: int, *, ahead: float) -> float:
    """Median. ahead: seconds for which the device is kept busy, while the host puts all of `run` into the queue."""
    flush = torch.empty(FLUSHED, dtype=torch.uint8, device=DEVICE)
    times = []
    for i in range(rounds + WARM_UP):
        prepare()
        flush.zero_()
        torch.cuda._sleep(int(CYCLES * ahead))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        wait()
        if i >= WARM_UP:
            times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def host_seconds(run: Run, prepare: Run, rounds: int) -> float:
    """Median time of the calls, over an empty queue."""
    return statistics.median(interleaved({"": run}, rounds, prepare, waiting=False)[""])


def whole_seconds(run: Run, prepare: Run, rounds: int) -> float:
    """Median time from an empty queue to an empty queue: of the device or of the host, whatever is slower."""
    return statistics.median(interleaved({"": run}, rounds, prepare)[""])


def interleaved(
    runs: dict[str, Run], rounds: int, prepare: Run = lambda: None, *, waiting: bool = True
) -> dict[str, list[float]]:
    """Seconds of the runs, one after another in every round: the clocks of a device change with its temperature.

    prepare: before each run, not timed. waiting: until the device is done.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + WARM_UP):
        for name, run in runs.items():
            prepare()
            wait()
            start = time.perf_counter()
            run()
            if waiting:
                wait()
            if i >= WARM_UP:
                times[name].append(time.perf_counter() - start)
    wait()
    return times


def num_launches(run: Run, prepare: Run) -> int | None:
    """Kernels and copies on the device, without what comes from the host. None where the profiler sees nothing."""
    prepare()
    wait()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            run()
            wait()
        events = prof.events() or []
    except (RuntimeError, AssertionError):  # counters that this user may not read, a torch without its profiler
        return None
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    names = [e.name for e in on_device if not getattr(e, "is_user_annotation", False)]
    return sum(not name.startswith(("Memcpy HtoD", "Memset")) for name in names) or None


def captured(run: Run) -> Run:
    """The run, captured as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def forget() -> None:
    """Frees the memory of what has been measured."""
    gc.collect()
    torch.cuda.empty_cache()


def facts(rounds: int) -> dict[str, Any]:
    """Hardware, versions, the commit."""
    properties = torch.cuda.get_device_properties(0)
    return machine.versions("triton", "timm") | {
        "device": torch.cuda.get_device_name(),
        "memory_GiB": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": machine.first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "commit": machine.commit(),
        "rounds": rounds,
    }
