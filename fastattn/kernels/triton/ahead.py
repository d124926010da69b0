"""Triton kernels compiled before they are called: in parallel processes, into Triton's own cache on disk.

A kernel's first call compiles it, for seconds, one kernel after the other. `compile_ahead` takes the launches of requests as
data, leaves one of each variant, and compiles those in processes that need no GPU; a later call of such a request, in any
process, finds its kernels in the cache. Triton before 3.7 also builds a launcher for each list of argument types: where there is
a GPU, that too is made here.

Nothing of Triton is imported with this module: a process that compiles first forgets TRITON_INTERPRET, which kernels read when
they are imported.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastattn.kernels.triton.launch import Launch

Job = Callable[[], Sequence["Launch"]]  # picklable; makes the launches of a request on tensors of the CPU, or on meta ones


class Failure(NamedTuple):
    """A job whose launches could not be made (`index` is None), or the launch of a job that did not compile."""

    job: Job
    index: int | None
    error: str


class Compiled(NamedTuple):
    """How many variants were compiled or already in the cache, and what failed."""

    variants: int
    failures: list[Failure]


def compile_ahead(jobs: Sequence[Job], sm: int, *, processes: int | None = None) -> Compiled:
    """Compile for sm_<sm> every kernel that the jobs launch, each variant once. On a terminal it says how far it is.

    `processes`: by default one for each core. What fails is returned, not raised, and keeps nothing else from compiling.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    tasks, failures = _variants(jobs)
    processes = min(processes or len(os.sched_getaffinity(0)), len(tasks))
    for done, ((job, index), error) in enumerate(_run(tasks, sm, processes), 1):
        if error is not None:
            failures.append(Failure(job, index, error))
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done} of {len(tasks)} kernels compiled" + "\n" * (done == len(tasks)))
            sys.stderr.flush()
    return Compiled(len(tasks) - sum(failure.index is not None for failure in failures), failures)


Task = tuple[Job, int]  # a job and which of its launches


def _variants(jobs: Sequence[Job]) -> tuple[list[Task], list[Failure]]:
    """The first launch of each variant, and the jobs that make none."""
    tasks: dict[Any, Task] = {}
    failures = []
    for job in jobs:
        try:
            launches = job()
        except Exception as error:
            failures.append(Failure(job, None, words(error)))
            continue
        for index, launch in enumerate(launches):
            tasks.setdefault(_variant(launch), (job, index))
    return list(tasks.values()), failures


def _variant(launch: Launch) -> tuple:
    """What a kernel is compiled for, as far as arguments tell: launches that agree in it share one compiled kernel."""
    parameters = {
        parameter.name: parameter for parameter in getattr(launch.kernel, "params", ())
    }  # an interpreted kernel has none
    arguments = {**launch.arguments, **launch.config._asdict()}
    described = [(name, _described(value, parameters.get(name))) for name, value in sorted(arguments.items())]
    return launch.kernel.__module__, launch.kernel.__name__, tuple(described)


def _described(value: Any, parameter: Any) -> tuple:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if parameter is None or parameter.is_constexpr or value is None:
        return type(value), value
    if isinstance(value, float):
        return (float,)
    return int, -(2**31) <= value < 2**31 if parameter.do_not_specialize else value


def _run(tasks: list[Task], sm: int, processes: int) -> Iterator[tuple[Task, str | None]]:
    """Each task with None, or with what went wrong, as they end.

    A compiler that dies takes all processes of a pool with it: what was left then runs again with a process for each task.
    """
    if not tasks:
        return
    left = []
    with _pool(sm, processes) as pool:
        for task, result in _ended({pool.submit(_compile, *task): task for task in tasks}):
            if isinstance(result, BrokenExecutor):
                left.append(task)
            else:
                yield task, result
    with ThreadPoolExecutor(processes) as threads:
        for task, result in _ended({threads.submit(_alone, task, sm): task for task in left}):
            yield task, words(result) if isinstance(result, BrokenExecutor) else result


def _ended(futures: dict[Future, Task]) -> Iterator[tuple[Task, str | BrokenExecutor | None]]:
    for future in as_completed(futures):
        error = future.exception()
        if error is not None and not isinstance(error, BrokenExecutor):
            yield futures[future], words(error)  # one that came up on the way, as from a job that cannot be pickled
        else:
            yield futures[future], error or future.result()


def _alone(task: Task, sm: int) -> str | None:
    with _pool(sm, 1) as pool:
        return pool.submit(_compile, *task).result()


def _pool(sm: int, processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, get_context("spawn"), _start, (sm, torch.cuda.is_available()))


_with_launchers = False


def _start(sm: int, with_launchers: bool) -> None:
    """In a new process, before any job is read there and imports Triton."""
    global _with_launchers
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    compile_only(sm)
    _with_launchers = with_launchers


def _compile(job: Job, index: int) -> str | None:
    """None, or what went wrong."""
    try:
        launch = job()[index]
        kernel = launch.kernel.warmup(grid=(1,), **launch.arguments, **launch.config._asdict())
        if _with_launchers:
            from triton.backends.nvidia import driver

            if hasattr(driver, "make_launcher"):
                driver.CudaLauncher(kernel.src, kernel.metadata)
    except Exception as error:
        return words(error)
    return None


def words(error: BaseException) -> str:
    """In one line; of a long one the ends: Triton quotes the kernel and then says what is wrong."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 500 else f"{text[:100]} ... {text[-400:]}"


def compile_only(sm: int) -> None:
    """From now on Triton in this process compiles for sm_<sm>, without a GPU; it can launch nothing any more."""
    import triton

    triton.runtime.driver.set_active(_CompileOnly(sm))


class _CompileOnly:
    """Enough of a driver for Triton's launcher to find or compile a kernel without launching it."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.sm, 32)
