"""What this installation can do, and why not what it cannot: the data behind `python -m fastattn info`."""

from __future__ import annotations

import importlib.util
import os
import platform
from typing import Any

import torch

import fastattn
from fastattn.kernels.cpu import dropout
from fastattn.kernels.cuda import library


def info() -> dict[str, Any]:
    """Versions, devices, and for each backend whether it is available here and the reason where it is not."""
    return {
        "fastattn": fastattn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "devices": _devices(),
        "backends": {name: {"available": reason is None, "reason": reason} for name, reason in _reasons().items()},
        "cuda_build": _cuda_build(),
        "cpu_build": _cpu_build(),
        "tiles": _tiles(),
    }


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _reasons() -> dict[str, str | None]:
    return {"triton": _triton_reason(), "cuda": _cuda_reason(), "cpu": None, "eager": None}


def _triton_version() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return triton.__version__


def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'fastattn[triton]'"
    from fastattn.kernels.triton.attention import unsupported
    from fastattn.ops.attention_plans import AttentionProblem

    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = AttentionProblem(device, torch.float16, B=1, H=1, M=1, N=1, D=64, Hkv=1, Dv=64)
    reasons = unsupported(problem)
    if device == "cpu" and reasons:
        return "no CUDA device, and TRITON_INTERPRET=1 is not set"
    return "; ".join(reasons) or None


def _cuda_reason() -> str | None:
    """Of the CUDA kernels: for the GPU where there is one, else for the emulator."""
    reasons = library.problems("cuda" if torch.cuda.is_available() else "cpu")
    if reasons and not torch.cuda.is_available():
        return "no CUDA device, and FASTATTN_EMULATE=1 is not set" if os.environ.get("FASTATTN_EMULATE") != "1" else reasons[0]
    return "; ".join(reasons) or None


def _cuda_build() -> dict[str, Any] | None:
    """What the build decided, with the kernels in it where it made any; None where the package was never built."""
    record = library.build_record()
    if record is None or "cuda" not in record:
        return None
    record = {name: value for name, value in record.items() if not name.startswith("cpu")}
    if not record["cuda"]:
        return record
    return {**record, "kernels": sorted(library.module().kernels)}


def _cpu_build() -> dict[str, Any]:
    """Whether the C++ for CPUs was built, and if not, why; PyTorch does then what it would do."""
    record = library.build_record() or {}
    built = dropout.compiled is not None
    reason = record.get("cpu_reason") or "the package was not installed by pip, or its library does not load"
    return {"cpu": built, "reason": None if built else reason}


def _tiles() -> dict[str, list[str]]:
    """For each kind of GPU the tables of tiles that the Triton kernels look into, in order, or what is wrong with one."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from fastattn.kernels.triton import launch, tuned

    found = {}
    for gpu in dict.fromkeys(launch.gpu_of(torch.device("cuda", i)) for i in range(torch.cuda.device_count())):
        try:
            tables = [table.name for table in tuned.tiles_of(gpu).tables]
        except ValueError as error:
            tables = [str(error)]
        found[str(gpu.name)] = tables
    return found


def _devices() -> list[str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [*gpus, f"{cpu_name()} ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"]
