"""The one timing function of the suite: rivals take turns (A B C A B C), and what is reported is medians over the rounds.

On a GPU a sample is the time between two events around `repeat` calls that were queued behind a sleeping kernel, so that the
host is ahead and launch gaps do not count; with `run_ahead=False`, as for whole models, it is the time as called from Python.
On a CPU it is wall time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], object]
SLEEP_CYCLES_PER_MS = 2_000_000  # a clock of 2 GHz: at a slower one the sleep is longer, which does no harm
ROTATED_BYTES = 200 * 2**20  # input sets together, several times the 50 MB of L2 that an H100 has


class Samples(NamedTuple):
    """Milliseconds per call, one entry per round; `host_us` is the median time that Python takes to queue a call on a GPU."""

    ms: list[float]
    host_us: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    def quantile(self, fraction: float) -> float:
        """By linear interpolation between the two nearest samples."""
        ordered = sorted(self.ms)
        position = fraction * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def speedup(samples: Samples, baseline: Samples) -> float:
    """How many times faster than the baseline: the median of baseline / samples over rounds, each pair measured side by side."""
    return statistics.median(b / a for a, b in zip(samples.ms, baseline.ms, strict=True))


def interleaved(
    calls: dict[str, Call], device: torch.device, *, seconds: float, least: int = 5, most: int = 40, run_ahead: bool = True
) -> dict[str, Samples]:
    """Time every call in turn, round after round, for about `seconds` in all but at least `least` and at most `most` rounds."""
    repeats = {name: _repeats(call, device, run_ahead) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    hosts: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    for index in range(most):
        if index >= least and time.perf_counter() > deadline:
            break
        for name, call in calls.items():
            ms, host_us = _sample(call, device, repeats[name], run_ahead)
            times[name].append(ms)
            hosts[name].append(host_us)
    gpu = device.type == "cuda"
    return {name: Samples(times[name], statistics.median(hosts[name]) if gpu else None) for name in calls}


def synchronised(call: Call, device: torch.device) -> Call:
    """The call followed by a wait for the device, for a clock that knows nothing of queues."""
    if device.type != "cuda":
        return call

    def run() -> object:
        result = call()
        torch.cuda.synchronize(device)
        return result

    return run


def rotate(function: Callable[..., object], inputs: Sequence[tuple]) -> Call:
    """A call that runs `function` on the next set of inputs each time."""
    position = 0

    def run() -> object:
        nonlocal position
        args = inputs[position]
        position = (position + 1) % len(inputs)
        return function(*args)

    return run


def copies(input_bytes: int, device: torch.device) -> int:
    """How many sets of inputs `rotate` needs so that none is still in a GPU's L2; on a CPU one, warm as inside a model."""
    return 1 if device.type != "cuda" else max(1, min(64, -(-ROTATED_BYTES // max(1, input_bytes))))


def _repeats(call: Call, device: torch.device, run_ahead: bool) -> int:
    """Warm up, then the number of calls of one sample: about 2 ms of them, which is one for a whole model."""
    ready = synchronised(call, device)
    elapsed_ms, spent_ms, calls = 0.0, 0.0, 0
    while calls < 3 and spent_ms < 100:
        start = time.perf_counter()
        ready()
        elapsed_ms = (time.perf_counter() - start) * 1e3
        spent_ms, calls = spent_ms + elapsed_ms, calls + 1
    most = 32 if device.type == "cuda" and run_ahead else 100  # the launch queue of a GPU must not fill up
    return max(1, min(most, int(2 / max(elapsed_ms, 1e-3))))


def _sample(call: Call, device: torch.device, repeat: int, run_ahead: bool) -> tuple[float, float]:
    """Milliseconds per call, and the microseconds that the host took to issue one."""
    if device.type == "cuda" and run_ahead:
        return _gpu_sample(call, repeat)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    issued = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3 / repeat, (issued - start) * 1e6 / repeat


def _gpu_sample(call: Call, repeat: int) -> tuple[float, float]:
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(SLEEP_CYCLES_PER_MS * (0.5 + 0.2 * repeat)))  # covers 200 us of host time per call
    start.record()
    before = time.perf_counter()
    for _ in range(repeat):
        call()
    host_us = (time.perf_counter() - before) * 1e6 / repeat
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeat, host_us


class Ceilings(NamedTuple):
    """What this device reaches at best, measured in the run that uses it."""

    flops: float  # per second, of a large matrix product in the dtype
    bandwidth: float  # bytes per second, read and written, of a large copy

    def floor_ms(self, flops: float, moved: float) -> float:
        return max(flops / self.flops, moved / self.bandwidth) * 1e3

    def better(self, other: Ceilings) -> Ceilings:
        return Ceilings(max(self.flops, other.flops), max(self.bandwidth, other.bandwidth))


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    gpu = device.type == "cuda"
    size = 8192 if gpu else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**30 if gpu else 2**28, device=device, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"gemm": lambda: a @ b, "copy": lambda: target.copy_(source)}
    best = {name: min(samples.ms) for name, samples in interleaved(calls, device, seconds=1.0).items()}
    return Ceilings(2 * size**3 / best["gemm"] * 1e3, 2 * source.numel() / best["copy"] * 1e3)
