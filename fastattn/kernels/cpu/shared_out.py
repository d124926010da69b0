"""Independent pieces of work, shared out over threads that each compute serially, with one wait at the end of all.

A parallel region of PyTorch ends when the last of its threads has had its turn; where other processes want the cores, that takes
milliseconds, for each region. Here a thread takes the next piece when it is ready, and whoever waits, waits for the pieces alone.
PyTorch lets go of the interpreter's lock inside its operations.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

_queues: dict[int, queue.SimpleQueue] = {}  # of so many threads, which live as long as the process
_lock = threading.Lock()


class Work(NamedTuple):
    function: Callable[[Any], None]
    left: Iterator[int]  # pieces, counted down as they end
    done: threading.Lock  # until none is left
    failures: list[BaseException]


def run(function: Callable[[Any], None], pieces: Sequence[Any]) -> None:
    """Calls the function with each piece, in threads for which gradients do not exist; raises what the first failure raised."""
    pending = _queue(torch.get_num_threads())
    work = Work(function, iter(range(len(pieces) - 1, -1, -1)), threading.Lock(), [])
    work.done.acquire()
    for piece in pieces:
        pending.put((work, piece))
    work.done.acquire()
    if work.failures:
        raise work.failures[0]


def _queue(threads: int) -> queue.SimpleQueue:
    with _lock:
        if threads not in _queues:
            pending: queue.SimpleQueue = queue.SimpleQueue()
            # PyTorch hands the number that was set last, in any thread, to threads that begin: the last one here sets it back
            before: list[int] = []
            _in_a_new_thread(lambda: before.append(torch.get_num_threads()))
            ready = threading.Barrier(threads + 1)
            for _ in range(threads):
                threading.Thread(target=_serve, args=(pending, ready), name="fastattn", daemon=True).start()
            ready.wait()
            _in_a_new_thread(lambda: torch.set_num_threads(before[0]))
            _queues[threads] = pending
        return _queues[threads]


def _in_a_new_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def _serve(pending: queue.SimpleQueue, ready: threading.Barrier) -> None:
    torch.get_num_threads()  # the first question in a thread sets its number to the one that was set last
    torch.set_num_threads(1)
    ready.wait()
    with torch.inference_mode():
        while True:
            work, piece = pending.get()
            try:
                work.function(piece)
            except BaseException as failure:
                work.failures.append(failure)
            if next(work.left) == 0:
                work.done.release()
            del work, piece  # tensors of a call that is over


def _forget() -> None:
    """In a process that was forked, where no other thread exists."""
    global _lock
    _lock = threading.Lock()
    _queues.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
