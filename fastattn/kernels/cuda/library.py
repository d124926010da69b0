"""The compiled CUDA kernels: which library serves a device, why none does, and the one launch that all ops use.

For tensors on a GPU it is the module `fastattn._cuda` that `setup.py` built. With FASTATTN_EMULATE=1, tensors on a CPU go to the
same sources compiled with the emulator.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastattn.kernels.cuda import emulator

RECORD = Path(__file__).parent.parent.parent / "_build.json"


def problems(device: str) -> list[str]:
    """Why no library serves tensors on this kind of device; empty where one does."""
    if device == "cuda":
        return _gpu_problems()
    if device != "cpu":
        return [f"tensors are on {device}"]
    if os.environ.get("FASTATTN_EMULATE") != "1":
        return ["tensors are on cpu, and FASTATTN_EMULATE=1 is not set"]
    return emulator.problems()


def launch(
    kernel: str,
    arguments: dict[str, Any],
    reads: dict[str, Tensor | None],
    writes: dict[str, Tensor | None],
    whole: bool = True,
) -> None:
    """Launch a kernel on the current stream of its tensors' device.

    `reads` and `writes` are the tensors whose addresses stand in `arguments`: they stay alive until the launch has been made, and
    the emulator checks every access against them, and that each element of `writes` was written: all of them if `whole`.
    """
    device = next(tensor.device for tensor in writes.values() if tensor is not None)
    if device.type == "cpu":
        emulator.launch(kernel, arguments, reads, writes, whole)
        return
    other = device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else nullcontext():
        getattr(module(), kernel)(**arguments, stream=torch._C._cuda_getCurrentRawStream(device.index))


@functools.cache
def module() -> ModuleType:
    """The module that `setup.py` built. Raises ImportError where there is none."""
    return importlib.import_module("fastattn._cuda")


def host_module() -> ModuleType:
    """The same functions for what runs on the host: of the built module, or where there is none, of the emulator's."""
    return module() if importlib.util.find_spec("fastattn._cuda") else emulator.module()


def build_record() -> dict[str, Any] | None:
    """What the build decided: cuda, reason, nvcc, archs; None where the package was never built."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else None


def _gpu_problems() -> list[str]:
    if importlib.util.find_spec("fastattn._cuda") is None:
        record = build_record()
        return [f"the CUDA kernels are not built: {record['reason'] if record else 'the package was not installed by pip'}"]
    if not torch.cuda.is_available():
        return ["PyTorch sees no CUDA device"]
    if torch.cuda.get_device_capability() < (8, 0):
        return ["the GPU's compute capability is below 8.0"]
    return []


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def rows_aligned(*tensors: Tensor | None) -> bool:
    """Whether every row of every tensor starts at a multiple of 16 bytes."""
    for x in tensors:
        if x is not None and (x.data_ptr() % 16 or any(stride * x.element_size() % 16 for stride in x.stride()[:-1])):
            return False
    return True
