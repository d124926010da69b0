"""Times: statistics, turns, and that no kernel's time holds the host's, on a device and with a clock of the test's own."""

from __future__ import annotations

import contextlib
import functools
import time

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import gpu_clock, timing

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_quantiles_interpolate_and_the_median_is_one() -> None:
    samples = timing.Samples([4.0, 1.0, 3.0, 2.0, 5.0])
    assert samples.median == samples.quantile(0.5) == 3.0
    assert samples.quantile(0.2) == pytest.approx(1.8)
    assert (samples.quantile(0.0), samples.quantile(1.0)) == (1.0, 5.0)
    assert timing.Samples([7.0]).quantile(0.8) == 7.0


def test_speedup_pairs_rounds() -> None:
    """A machine that slows down halfway must not change the ratio: the ratio of medians here would be 1."""
    ours, baseline = timing.Samples([1.0, 1.0, 10.0]), timing.Samples([2.0, 2.0, 1.0])
    assert timing.speedup(ours, baseline) == 2.0


def test_rivals_take_turns_within_the_rounds_asked_for() -> None:
    order: list[str] = []
    calls = {name: functools.partial(order.append, name) for name in "AB"}
    taken = timing.interleaved(calls, CPU, seconds=0.0, least=4, most=9)
    assert [len(samples.ms) for samples in taken.values()] == [4, 4]
    switches = [name for n, name in enumerate(order) if n == 0 or order[n - 1] != name]
    assert "".join(switches) == "AB" * 5  # one turn of warming up, four rounds


def test_rotation_visits_every_set_of_inputs() -> None:
    seen: list[int] = []
    call = timing.rotate([functools.partial(seen.append, n) for n in range(3)])
    for _ in range(5):
        call()
    assert seen == [0, 1, 2, 0, 1]


# What a GPU does, without the host


class FakeGpu:
    """A device that works through a queue, and a host whose clock moves when it works or waits; in milliseconds."""

    def __init__(self) -> None:
        self.host = self.free = 0.0
        self.recording: list[float] | None = None
        self.slept: list[float] = []
        self.launched: list[float] = []

    def active(self):
        return contextlib.nullcontext()

    def now(self) -> float:
        return self.host * 1e-3

    def wait(self) -> None:
        self.host = max(self.host, self.free)

    def sleep(self, ms: float) -> None:
        self.slept.append(ms)
        self.launch(ms)

    def launch(self, ms: float) -> None:
        if self.recording is not None:
            self.recording.append(ms)
            return
        self.launched.append(ms)
        self.free = max(self.free, self.host) + ms

    def mark(self) -> float:
        return max(self.free, self.host)

    def reached(self, mark: float) -> bool:
        return mark <= self.host

    def between(self, start: float, end: float) -> float:
        return end - start

    def capture(self, calls):
        self.recording = kernels = []
        try:
            for call in calls:
                call()
        finally:
            self.recording = None

        def replay() -> None:
            self.host += 0.01
            for ms in kernels:
                self.launch(ms)

        return replay

    def call(self, python_ms: float, kernel_ms: float, refuses: bool = False, waits: bool = False):
        """Python's part, then a kernel."""

        def run() -> None:
            if self.recording is not None and refuses:
                raise RuntimeError("operation not permitted when stream is capturing\nand more")
            self.host += python_ms
            self.launch(kernel_ms)
            if waits:
                self.wait()

        return run


@pytest.fixture
def gpu(monkeypatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(timing, "Gpu", lambda device: fake)
    return fake


def kernels(calls, **options):
    return timing.kernels(calls, CUDA, seconds=0.0, **options)


@pytest.mark.parametrize("refuses", [False, True], ids=["graph", "events"])
@pytest.mark.parametrize("python_ms", [0.004, 0.4, 2.4])
def test_a_kernels_time_is_that_of_the_kernel(gpu: FakeGpu, python_ms: float, refuses: bool) -> None:
    """19 us, whatever Python takes; and what Python takes stands beside it."""
    taken = kernels({"A": [gpu.call(python_ms, 0.019, refuses)] * 3})["A"]
    assert taken.ms == pytest.approx([0.019] * 5)
    assert taken.host_us == pytest.approx(python_ms * 1e3)
    assert taken.method == (timing.EVENTS if refuses else timing.GRAPH)
    assert taken.reason == ("not captured: RuntimeError: operation not permitted when stream is capturing" if refuses else None)


def test_a_fixed_sleep_would_let_the_host_in(gpu: FakeGpu, monkeypatch) -> None:
    """The test above can fail: a sleep of 200 us a call, which nobody looks at again, reports what the host lacked."""

    def fixed(gpu: FakeGpu, queue) -> float:
        gpu.wait()
        gpu.sleep(0.5 + 0.2 * queue.calls)
        start = gpu.mark()
        queue.run()
        end = gpu.mark()
        gpu.wait()
        return gpu.between(start, end)

    monkeypatch.setattr(timing, "_behind_a_sleep", fixed)
    taken = kernels({"A": [gpu.call(0.4, 0.019, refuses=True)]})["A"]
    assert taken.median > 5 * 0.019


def test_a_host_that_became_slower_gets_a_longer_sleep(gpu: FakeGpu) -> None:
    calls = 0

    def slower() -> None:
        nonlocal calls
        calls += 1
        gpu.call(0.1 if calls < 30 else 0.4, 0.019, refuses=True)()

    taken = kernels({"A": [slower]})["A"]
    assert taken.ms == pytest.approx([0.019] * 5)
    assert max(gpu.slept) == pytest.approx(3 * min(gpu.slept))


def test_no_time_is_better_than_the_hosts(gpu: FakeGpu) -> None:
    """A call that waits for the device cannot be queued. Its rivals keep their rounds."""
    taken = kernels(
        {"A": [gpu.call(0.1, 0.02)], "waits": [gpu.call(0.1, 0.02, refuses=True, waits=True)], "B": [gpu.call(0.1, 0.04)]}
    )
    assert taken["waits"].ms == [] and "could not be kept out" in taken["waits"].reason
    assert taken["waits"].reason.startswith("not captured: RuntimeError: operation not permitted")
    assert len(gpu.slept) == 5 + timing.TRIES + 5  # it is not tried again in every round
    assert timing.speedup(taken["A"], taken["B"]) == pytest.approx(2.0)


def test_a_graph_or_nothing(gpu: FakeGpu) -> None:
    taken = kernels({"A": [gpu.call(0.1, 0.02)], "B": [gpu.call(0.1, 0.02, refuses=True)]}, graphs_alone=True)
    assert taken["A"].ms == pytest.approx([0.02] * 5) and taken["A"].reason is None
    assert taken["B"].ms == [] and "capturing" in taken["B"].reason


def test_what_must_not_be_captured_is_queued(gpu: FakeGpu) -> None:
    calls = {name: [gpu.call(0.1, 0.02)] for name in ("A", "B")}
    captured = []
    capture, gpu.capture = gpu.capture, lambda calls: captured.append(calls) or capture(calls)
    taken = kernels(calls, uncapturable={"B": "its seed is on the host"})
    assert captured == [calls["A"]] and taken["A"].method == timing.GRAPH
    assert taken["B"].method == timing.EVENTS and taken["B"].reason == "not captured: its seed is on the host"
    assert taken["A"].ms == pytest.approx([0.02] * 5) and taken["B"].ms == pytest.approx([0.02] * 5)
    refused = kernels(calls, uncapturable={"B": "its seed is on the host"}, graphs_alone=True)["B"]
    assert refused.ms == [] and refused.reason == "not captured: its seed is on the host"


def test_graphs_take_turns(gpu: FakeGpu) -> None:
    """A sample each in every round, of which each call is replayed once."""
    kernels({"A": [gpu.call(0.1, 1.0), gpu.call(0.1, 2.0)], "B": [gpu.call(0.1, 3.0)]}, least=3, most=9)
    rounds = [ms for ms in gpu.launched if ms >= 1.0][-9:]
    assert rounds == [1.0, 2.0, 3.0] * 3


def test_replays_give_microseconds_per_call(gpu: FakeGpu) -> None:
    found = timing.replay_us([gpu.call(0.5, 0.01), gpu.call(0.5, 0.03)], CUDA, replays=4)
    assert found == pytest.approx([20.0] * 4)
    with pytest.raises(RuntimeError, match="capturing"):
        timing.replay_us([gpu.call(0.5, 0.01, refuses=True)], CUDA)


def test_a_fault_of_the_device_names_the_call_it_came_in(gpu: FakeGpu) -> None:
    def fault() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="in a call of B: an illegal memory access"):
        kernels({"A": [gpu.call(0.1, 0.1)], "B": [fault]})


def test_a_failed_capture_says_what_failed_first(monkeypatch) -> None:
    """PyTorch raises again when it ends such a capture, in words that name no reason; what it leaves behind is undone."""

    @contextlib.contextmanager
    def graph(*_, **__):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    undone = []
    for name, stand_in in (("graph", graph), ("CUDAGraph", object), ("graph_pool_handle", lambda: (0, 7))):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(gpu_clock.Gpu, "_abandon", lambda self, pool: undone.append(pool))
    gpu = object.__new__(gpu_clock.Gpu)
    gpu.stream = None

    def waits() -> None:
        raise ValueError("cannot wait while capturing")

    with pytest.raises(ValueError, match="cannot wait"):
        gpu.capture([waits])
    with pytest.raises(RuntimeError, match="previous error"):  # an error that only the end reveals
        gpu.capture([lambda: None])
    assert undone == [(0, 7)] * 2


def test_on_a_cpu_all_is_wall_time() -> None:
    seen: list[int] = []
    taken = timing.kernels({"A": [functools.partial(seen.append, n) for n in range(2)]}, CPU, seconds=0.0)["A"]
    assert taken.method == timing.WALL and taken.host_us is None and len(taken.ms) == 5 and set(seen) == {0, 1}
    with timing.capturing(CPU):
        pass


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("refuses", [False, True], ids=["graph", "events"])
    def test_two_milliseconds_of_python_change_nothing(self, refuses: bool) -> None:
        x = torch.randn(2048, 2048, device=CUDA)

        def call(python_s: float) -> None:
            if refuses and torch.cuda.is_current_stream_capturing():
                raise NotImplementedError("no graphs")
            until = time.perf_counter() + python_s
            while time.perf_counter() < until:
                pass
            x.mul_(1.0)

        taken = timing.kernels({"quick": [lambda: call(0.0)], "slow": [lambda: call(2e-3)]}, CUDA, seconds=0.3)
        assert {found.method for found in taken.values()} == {timing.EVENTS if refuses else timing.GRAPH}
        assert taken["slow"].host_us > 2000 > 5 * taken["quick"].median * 1e3
        assert 0.7 < timing.speedup(taken["slow"], taken["quick"]) < 1.4

    @pytest.mark.parametrize("name", ["sdpa", "fastattn"])
    def test_a_backward_pass_is_captured_alone(self, name: str) -> None:
        function = {"sdpa": F.scaled_dot_product_attention, "fastattn": fastattn.attention}[name]
        leaves = [torch.randn(4, 4, 64, 64, device=CUDA, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        dout = torch.randn(4, 4, 64, 64, device=CUDA, dtype=torch.bfloat16)
        with timing.capturing(CUDA):
            out = function(*leaves)
        expected = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        found: list = []
        call = lambda: found.append(torch.autograd.grad(out, leaves, dout, retain_graph=True))  # noqa: E731
        taken = timing.kernels({name: [call]}, CUDA, seconds=0.0)[name]
        assert taken.method == timing.GRAPH and len(taken.ms) == 5
        for x, y in zip(found[-1], expected, strict=True):  # what the last replay wrote
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)

    def test_a_capture_that_fails_leaves_nothing_behind(self) -> None:
        x = torch.randn(16, device=CUDA)
        taken = timing.kernels({"waits": [lambda: x.sum().item()]}, CUDA, seconds=0.0)["waits"]
        assert taken.ms == [] and taken.reason
        torch.cuda.empty_cache()
        assert torch.randn(16, device=CUDA).isfinite().all() and torch.cuda.current_stream() == torch.cuda.default_stream()
        assert len(timing.replay_us([lambda: x + 1], CUDA, replays=3)) == 3
