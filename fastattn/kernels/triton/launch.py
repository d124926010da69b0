"""What the Triton backends share on the host: a launch as data, running it, and what no Triton kernel serves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy
import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from fastattn import planned
from fastattn.kernels.triton.primitives import INTERPRET

LONGEST_ROW = 2**23  # elements from one row of a matrix to the next: the addresses inside a tile of 128 rows take 32 bits


class Launch(NamedTuple):
    """One kernel launch, as data: tests compile it for other architectures without running it."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    config: Any  # a NamedTuple: tile sizes, num_warps, num_stages


def settle_keys(*modules: ModuleType) -> None:
    """Make the key of every device function of these modules, each before those that call it.

    Under its key a compiled kernel lies in Triton's cache. Triton puts the constants of a called function into it only if that
    function's own key was made earlier: which kernel came first in a process would decide whether another one is found.
    """
    for module in modules:
        for function in vars(module).values():
            if isinstance(function, JITFunction) and function.__module__ == module.__name__:
                _ = function.cache_key


class GPU(NamedTuple):
    """What a choice of tiles depends on: the compute capability, 90 for 9.0, and the name of the device, if it is there."""

    sm: int
    name: str | None = None


def refusals(problem) -> list[str]:
    """Why no Triton kernel serves a problem, whatever the op."""
    reasons = []
    on_paper = _paper is not None
    if problem.device != "cuda" and not INTERPRET.value and not on_paper:
        reasons.append(f"tensors are on {problem.device}")
    if problem.device == "cuda" and capability(torch.device("cuda", torch.cuda.current_device())) < 80:
        reasons.append("the GPU's compute capability is below 8.0")
    if INTERPRET.value and not on_paper and _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
        reasons.append(f"Triton {triton.__version__} cannot interpret with NumPy {numpy.__version__} (2.4 or later)")
    if problem.dtype == torch.float64:
        reasons.append("fp64 is served by eager and cpu")
    return reasons


def gpu_of(device: torch.device) -> GPU:
    """The GPU; the interpreter, which has none, runs what an sm_90 would."""
    return _gpu(device) if _paper is None else _paper.gpu


@cache
def _gpu(device: torch.device) -> GPU:
    if device.type != "cuda":
        return GPU(90)
    major, minor = torch.cuda.get_device_capability(device)
    return GPU(10 * major + minor, torch.cuda.get_device_name(device))


def gpu_here() -> GPU:
    """The current GPU, for explanations; where there is none, an H100's capability."""
    return gpu_of(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"))


def capability(device: torch.device) -> int:
    return gpu_of(device).sm


def _version(module: ModuleType) -> tuple[int, int]:
    major, minor, *_ = module.__version__.split(".")
    return int(major), int(minor)


def precision(dtype: torch.dtype) -> str:
    """The input precision of tl.dot: fp32 is IEEE unless PyTorch's own switch says TF32."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 else "ieee"


def matrix(x: Tensor) -> Tensor:
    """x as a matrix of its last dimension, with adjacent elements in a row: a view, or where there is none, a copy."""
    x = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    adjacent = (x.stride(1) == 1 or x.shape[1] == 1) and x.stride(0) < LONGEST_ROW
    return x if adjacent else x.contiguous()


def in_rows(*tensors: Tensor | None) -> bool:
    """Whether each is, without a copy, such a matrix, or a vector of adjacent elements."""
    return all(
        x is None or matrix(x).data_ptr() == x.data_ptr() if x is None or x.dim() > 1 else x.is_contiguous() for x in tensors
    )


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def vector(size: int, tensors: list[Tensor], integers: list[int]) -> int:
    """How many elements of `size` bytes make 16, if every tensor starts, and every stride and width ends, on such a unit; else 1.

    Strides and widths are passed to kernels in these units: multiplied by the constant inside, they let the compiler see
    16-byte loads, which a run-time integer alone would not.
    """
    unit = 16 // size
    aligned = all(x.data_ptr() % 16 == 0 for x in tensors) and not any(n % unit for n in integers)
    return unit if aligned else 1


def matrix_arguments(matrices: dict[str, Tensor | None], **widths: int) -> dict[str, Any]:
    """Matrices, each with the step from row to row as `<name>_m`, and widths; steps and widths in units of VECTOR elements."""
    present = [x for x in matrices.values() if x is not None]
    numbers = {**{f"{name}_m": 0 if x is None else x.stride(0) for name, x in matrices.items()}, **widths}
    unit = vector(min(x.element_size() for x in present), present, list(numbers.values()))
    return {**matrices, **{name: number // unit for name, number in numbers.items()}, "VECTOR": unit}


# Launching


class Ready(NamedTuple):
    """A kernel that is compiled for calls like the one whose launch it was made of."""

    start: Callable[[int, tuple], None]  # launch so many programs with values for the kernel's parameters, in their order
    handle: Callable[[Tensor], Any]  # what stands for a tensor among the values
    values: tuple  # those of the launch that it was made of, whose tensors stand for themselves


def ready(launch: Launch) -> Ready:
    """Compile the kernel, if it is not yet, and find the shortest way to launch it."""
    names = launch.kernel.arg_names
    given = {**launch.arguments, **launch.config._asdict()}
    values = tuple(given[name] for name in names)
    if _paper is not None:
        return Ready(_paper.start(launch, names), _paper.handle, values)
    options = {name: value for name, value in launch.config._asdict().items() if name not in names}
    if not INTERPRET.value:
        device = next(x.device for x in values if isinstance(x, Tensor))
        with _active(device):
            start = compiled_start(launch.kernel.warmup(*values, grid=(1,), **options), device.index)
        if start is not None:
            return Ready(start, Tensor.data_ptr, values)

    kernel = launch.kernel  # and none of the launch's tensors

    def start_by_jit(programs: int, values: tuple) -> None:
        with _active(next(x.device for x in values if isinstance(x, Tensor))):
            kernel[(programs,)](*values, **options)

    return Ready(start_by_jit, _itself, values)


def compiled_start(kernel: Any, device: int) -> Callable[[int, tuple], None] | None:
    """A launch of Triton's compiled kernel by values at hand: integers stand for addresses, nothing is bound or looked at again.

    All that is known here of Triton's inside is in this function, for 3.6 and 3.7; None where it is another version, or where the
    kernel needs memory of its own: then the JIT has to be called.
    """
    version, launcher = _version(triton), kernel.run
    if version not in ((3, 6), (3, 7)) or launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    run, function, metadata = launcher.launch, kernel.function, kernel.packed_metadata
    flags = launcher.launch_cooperative_grid, launcher.launch_pdl
    if version == (3, 6):
        before, after = (*flags, None, None, metadata, None, None, None), None
    else:
        before = *flags, metadata, None, None, None, None, None, launcher.arg_annotations, launcher.kernel_signature
        after = True
    hooks = triton.knobs.runtime
    current, stream_of = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream

    def start(programs: int, values: tuple) -> None:
        if current() != device:
            with torch.cuda.device(device):
                return start(programs, values)
        stream, enter, leave = stream_of(device), hooks.launch_enter_hook, hooks.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler wants to know; a chain may be replaced
            told = kernel.launch_metadata((programs, 1, 1), stream, *values)
            launcher(programs, 1, 1, stream, function, metadata, told, enter, leave, *values)
        elif after is None:
            run(programs, 1, 1, stream, function, *before, *values)
        else:
            run(programs, 1, 1, stream, function, *before, values)

    return start


def _itself(x: Tensor) -> Tensor:
    return x


def _active(device: torch.device) -> AbstractContextManager:
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if other else nullcontext()


def run(launch: Launch) -> None:
    """Once, by the JIT."""
    if launch.programs == 0:
        return
    with _active(next(x.device for x in launch.arguments.values() if isinstance(x, Tensor))):
        launch.kernel[(launch.programs,)](**launch.arguments, **launch.config._asdict())


# On paper


class Recording(NamedTuple):
    """Launches are kept as data."""

    gpu: GPU
    launches: list[Launch]
    handle: Callable[[Tensor], Any] = _itself

    def start(self, launch: Launch, names: list[str]) -> Callable[[int, tuple], None]:
        def record(programs: int, values: tuple) -> None:
            given = dict(zip(names, values, strict=True))
            self.launches.append(launch._replace(programs=programs, arguments={name: given[name] for name in launch.arguments}))

        return record


@dataclass
class Dry:
    """Launches are counted."""

    gpu: GPU
    launches: int = 0
    handle: Callable[[Tensor], Any] = Tensor.data_ptr

    def start(self, launch: Launch, names: list[str]) -> Callable[[int, tuple], None]:
        def count(programs: int, values: tuple) -> None:
            self.launches += 1

        return count


_paper: Recording | Dry | None = None


@contextmanager
def _on_paper(paper: Any) -> Iterator[None]:
    global _paper
    before, _paper = (_paper, planned.pretending), paper
    planned.pretending = planned.pretending or isinstance(paper, Dry)
    planned.PLANS.clear()  # they know how to launch
    try:
        yield
    finally:
        _paper, planned.pretending = before
        planned.PLANS.clear()


@contextmanager
def recorded(gpu: GPU) -> Iterator[list[Launch]]:
    """Inside, nothing is launched: what would be, on that GPU, is in the list. Tensors of the CPU are taken, results hold
    nothing. For a process of one thread, as those that compile ahead are."""
    recording = Recording(gpu, [])
    with _on_paper(recording):
        yield recording.launches


@contextmanager
def dry(gpu: GPU) -> Iterator[Dry]:
    """Inside, tensors of the CPU are served as those of that GPU would be, by backend "auto" too, and nothing is launched.

    What the host does for a call is all done, so that it can be timed; results hold nothing. For a process of one thread.
    """
    paper = Dry(gpu)
    with _on_paper(paper):
        yield paper
