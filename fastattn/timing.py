"""Times of calls: rivals take turns (A B C A B C), and what is reported is medians over the rounds.

`interleaved` times calls as Python makes them. `kernels` times what they do on a GPU, without the host: a CUDA graph of them is
replayed, or, where there can be none, they are queued behind a kernel that sleeps until the host is through. On a CPU both
are wall time.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from fastattn.gpu_clock import Call, Gpu

ROTATED_BYTES = 200 * 2**20  # input sets together, several times the 50 MB of L2 that an H100 has
GRAPH, EVENTS, WALL = "graph replay", "events behind a sleep", "wall clock"
TRIES = 3  # sleeps, each three times as long as the one before, until the host is through in time
LONGEST_SLEEP_MS = 500.0


class Samples(NamedTuple):
    """Milliseconds per call, one entry per round: none where a GPU's time could not be told from the host's.

    `host_us` is the time that Python takes to queue a call on a GPU. `reason` says why there is no graph, or no time.
    """

    ms: list[float]
    host_us: float | None = None
    method: str = WALL
    reason: str | None = None

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


# As called


def interleaved(
    calls: dict[str, Call], device: torch.device, *, seconds: float, least: int = 5, most: int = 40
) -> dict[str, Samples]:
    """Time every call in turn, round after round, for about `seconds` in all but at least `least` and at most `most` rounds."""
    repeats = {name: _repeats(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    hosts: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    for index in range(most):
        if index >= least and time.perf_counter() > deadline:
            break
        for name, call in calls.items():
            ms, host_us = _sample(call, device, repeats[name])
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


def _repeats(call: Call, device: torch.device) -> int:
    """Warm up, then the number of calls of one sample: about 2 ms of them, which is one for a whole model."""
    ready = synchronised(call, device)
    elapsed_ms, spent_ms, calls = 0.0, 0.0, 0
    while calls < 3 and spent_ms < 100:
        start = time.perf_counter()
        ready()
        elapsed_ms = (time.perf_counter() - start) * 1e3
        spent_ms, calls = spent_ms + elapsed_ms, calls + 1
    return max(1, min(100, int(2 / max(elapsed_ms, 1e-3))))


def _sample(call: Call, device: torch.device, repeat: int) -> tuple[float, float]:
    """Milliseconds per call, and the microseconds that the host took to issue one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        call()
    issued = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3 / repeat, (issued - start) * 1e6 / repeat


# What a GPU does, without the host


def kernels(
    calls: dict[str, Sequence[Call]], device: torch.device, *, seconds: float, least: int = 5, most: int = 40,
    graphs_alone: bool = False, uncapturable: Mapping[str, str] | None = None,
) -> dict[str, Samples]:  # fmt: skip
    """Time providers in turn, each by its calls, the same work on inputs that take turns. `graphs_alone`: a graph or nothing.
    `uncapturable`: why no graph of these may even be tried.

    On a GPU a backward pass is served where its forward pass ran inside `capturing(device)`.
    """
    if device.type != "cuda":
        return interleaved(
            {name: rotate(turns) for name, turns in calls.items()}, device, seconds=seconds, least=least, most=most
        )
    return _device_times(Gpu(device), calls, seconds, least, most, graphs_alone, uncapturable or {})


def replay_us(calls: Sequence[Call], device: torch.device, replays: int = 15) -> list[float]:
    """Microseconds per call of a CUDA graph of all calls in order, for each of its replays. Raises what the capture raises."""
    gpu = Gpu(device)
    with gpu.active():
        return _replay_us(gpu, calls, replays)


def capturing(device: torch.device) -> AbstractContextManager[None]:
    """Where the forward pass has to run of a backward pass that will be captured."""
    return Gpu(device).active() if device.type == "cuda" else contextlib.nullcontext()


def rotate(calls: Sequence[Call]) -> Call:
    """A call that makes the next of them each time."""
    position = 0

    def run() -> object:
        nonlocal position
        call = calls[position]
        position = (position + 1) % len(calls)
        return call()

    return run


def copies(input_bytes: int, device: torch.device) -> int:
    """How many sets of inputs must take turns so that none is still in a GPU's L2; on a CPU one, warm as inside a model."""
    return 1 if device.type != "cuda" else max(1, min(64, -(-ROTATED_BYTES // max(1, input_bytes))))


class _Queue(NamedTuple):
    """What a sample queues: so many calls, in `queue_ms` of the host. Nothing where only a graph would do and there is none."""

    run: Call | None
    calls: int
    queue_ms: float
    host_us: float
    method: str
    reason: str | None = None


def _device_times(
    gpu: Gpu, calls: dict[str, Sequence[Call]], seconds: float, least: int, most: int, graphs_alone: bool,
    uncapturable: Mapping[str, str],
) -> dict[str, Samples]:  # fmt: skip
    with gpu.active():
        queues = {name: _named_queue(name, gpu, turns, graphs_alone, uncapturable.get(name)) for name, turns in calls.items()}
        times: dict[str, list[float]] = {name: [] for name, queue in queues.items() if queue.run is not None}
        leaked: dict[str, str] = {}
        deadline = gpu.now() + seconds
        for index in range(most):
            if index >= least and gpu.now() > deadline:
                break
            for name in [name for name in times if name not in leaked]:
                ms = _behind_a_sleep(gpu, queues[name])
                if ms is None:
                    leaked[name] = "; ".join(filter(None, (queues[name].reason, _leak(queues[name]))))
                else:
                    times[name].append(ms / queues[name].calls)
    found = {name: [] if name in leaked else times.get(name, []) for name in calls}
    return {name: Samples(found[name], q.host_us, q.method, leaked.get(name, q.reason)) for name, q in queues.items()}


def _named_queue(name: str, gpu: Gpu, turns: Sequence[Call], graph_alone: bool, uncapturable: str | None) -> _Queue:
    """A fault of the device is nobody's answer and ends the run: it says in whose call it came."""
    try:
        return _queue(gpu, turns, graph_alone, uncapturable)
    except RuntimeError as error:
        raise RuntimeError(f"in a call of {name}: {error}") from error


def _replay_us(gpu: Gpu, calls: Sequence[Call], replays: int) -> list[float]:
    for call in calls:
        call()
    replay = gpu.capture(calls)
    queue = _Queue(replay, len(calls), _issuing_ms(gpu, replay, 1), 0.0, GRAPH)
    found = [_behind_a_sleep(gpu, queue) for _ in range(replays)]
    if None in found:
        raise RuntimeError(_leak(queue))
    return [ms * 1e3 / len(calls) for ms in found if ms is not None]


def _queue(gpu: Gpu, turns: Sequence[Call], graph_alone: bool, uncapturable: str | None) -> _Queue:
    for call in turns:  # what compiles, plans or takes memory for itself does so before the capture, on the same stream
        call()
    call = rotate(turns)
    host_ms = _issuing_ms(gpu, call, 1 if graph_alone else 4)
    replay, reason = None, f"not captured: {uncapturable}"
    if uncapturable is None:
        try:
            replay = gpu.capture(turns)
        except Exception as error:  # noqa: BLE001  (whatever a provider raises inside a capture is its answer)
            reason = f"not captured: {_words(error)}"
    if replay is None:
        if graph_alone:
            return _Queue(None, 0, 0.0, host_ms * 1e3, GRAPH, reason)
        repeat = max(1, min(16, int(10 / max(host_ms, 1e-3))))  # a queue holds about a thousand kernels
        return _Queue(lambda: [call() for _ in range(repeat)], repeat, host_ms * repeat, host_ms * 1e3, EVENTS, reason)
    return _Queue(replay, len(turns), _issuing_ms(gpu, replay, 1), host_ms * 1e3, GRAPH)


def _issuing_ms(gpu: Gpu, call: Call, repeat: int) -> float:
    """What the host needs to queue a call on an idle device: the median of a few."""
    times = []
    for _ in range(5):
        gpu.wait()
        before = gpu.now()
        for _ in range(repeat):
            call()
        times.append((gpu.now() - before) * 1e3 / repeat)
    return statistics.median(times)


def _behind_a_sleep(gpu: Gpu, queue: _Queue) -> float | None:
    """Milliseconds of what is queued; None where the device began before the host was through, however long it slept.

    The start is asked for when all is queued: if it was reached by then, the device may have waited for the host in between.
    """
    assert queue.run is not None
    sleep = 1.5 * queue.queue_ms + 0.2
    for _ in range(TRIES):
        gpu.wait()
        gpu.sleep(min(sleep, LONGEST_SLEEP_MS))
        start = gpu.mark()
        queue.run()
        end = gpu.mark()
        hidden = not gpu.reached(start)
        gpu.wait()
        if hidden:
            return gpu.between(start, end)
        sleep *= 3
    return None


def _leak(queue: _Queue) -> str:
    return f"the host's time, {queue.queue_ms:.2f} ms for {queue.calls} calls, could not be kept out of the device's"


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"


# The most that a device does


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
    g = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, device=device, generator=g).to(dtype) for _ in range(2))
    source = torch.empty(2**30 if gpu else 2**28, device=device, dtype=torch.uint8).fill_(1)
    target = torch.empty_like(source)
    calls: dict[str, Sequence[Call]] = {"gemm": [lambda: a @ b], "copy": [lambda: target.copy_(source)]}
    best = {name: min(found.ms) for name, found in kernels(calls, device, seconds=0.3 if gpu else 1.0).items()}
    return Ceilings(2 * size**3 / best["gemm"] * 1e3, 2 * source.numel() / best["copy"] * 1e3)
