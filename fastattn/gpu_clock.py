"""What timing asks of a CUDA device, and no more: a test puts a device of its own in the place of `Gpu`.

All of it happens on one side stream. A graph cannot be captured on the default stream, and a backward pass runs on the stream of
its forward pass: whoever wants to capture one makes the forward pass inside `active`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from fastattn.graphs import abandon

Call = Callable[[], object]
CYCLES_PER_MS = 2_000_000  # a clock of 2 GHz; at another one the sleep is longer or shorter, which the caller looks for


@functools.cache
def _side_stream(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)


class Gpu:
    def __init__(self, device: torch.device) -> None:
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.stream = _side_stream(self.index)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, work goes to the side stream. The device is idle before and after, so that no stream overtakes another."""
        self.wait()
        with torch.cuda.stream(self.stream):
            try:
                yield
            finally:
                self.wait()

    def now(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        torch.cuda.synchronize(self.index)

    def sleep(self, ms: float) -> None:
        """Queue a kernel that does nothing for so long."""
        torch.cuda._sleep(int(CYCLES_PER_MS * ms))

    def mark(self) -> torch.cuda.Event:
        """A point in the queue."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def reached(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Milliseconds."""
        return start.elapsed_time(end)

    def capture(self, calls: Sequence[Call]) -> Call:
        """The replay of one graph of all calls, which have run before. Raises what they or CUDA raise."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        cause = None
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                try:
                    for call in calls:
                        call()  # its result is dropped, so that the next call may write to the same memory
                except Exception as error:
                    cause = error  # the end of a capture that has failed raises as well, and says less
                    raise
        except Exception as error:
            self._abandon(pool)
            raise (cause or error) from None
        return graph.replay

    def _abandon(self, pool: tuple[int, int]) -> None:
        abandon(self.index, pool)
