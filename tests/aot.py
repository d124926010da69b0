"""Compile Triton launches ahead of time, with no GPU, and print as JSON what the machine code holds.

A program of its own, because kernels that were imported for the interpreter cannot be compiled: `python tests/aot.py gates`
compiles the table of variants, `python tests/aot.py lengths` counts the variants that 30 lengths lead to.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastattn.kernels.triton import attention
from fastattn.masks import LoweredMask

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.bool: "*i1"}


class Resources(NamedTuple):
    """What one compiled kernel takes: registers per thread, shared and stack bytes, and instruction counts."""

    registers: int
    shared: int
    stack: int
    local: int  # LDL and STL: spills
    hmma: int
    hgmma: int
    tf32: int
    narrow: int  # loads of 2 bytes from global memory: rows that were not seen to be aligned


def attention_launches(dtype: torch.dtype, D: int, mask: str, L: int = 128, inside: bool = True) -> list[attention.Launch]:
    """The three launches of a request, on tensors that hold no data worth computing with. `inside`: (B, L, H, D) memory."""
    B, H = 2, 2
    shape = (B, L, H, D) if inside else (B, H, L, D)
    tensors = (torch.zeros(shape, dtype=dtype) for _ in range(8))
    q, k, v, out, dout, dq, dk, dv = (x.transpose(1, 2) if inside else x for x in tensors)
    lse, delta = torch.zeros(B, H, L), torch.zeros(B, H, L)
    lengths = torch.zeros(B, dtype=torch.int32)
    lowered = {
        "none": LoweredMask(),
        "padding": LoweredMask(key_end=lengths),
        "causal_padding": LoweredMask(diagonal=0, key_end=lengths),
        "keys": LoweredMask(key_begin=lengths, key_end=lengths, keys=torch.ones(B, L, dtype=torch.bool)),
        "dense": LoweredMask(pairs=torch.ones(B, H, L, L, dtype=torch.bool)),
    }[mask]
    forward = attention.forward_launch(q, k, v, out, lse, lowered, D**-0.5)
    return [forward, *attention.backward_launches(dout, None, q, k, v, out, lse, delta, dq, dk, dv, lowered, D**-0.5)]


def compile_launch(launch: attention.Launch, capability: int):
    """The compiled kernel for sm_<capability>, specialised as the launcher would: aligned pointers, integers at run time."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = getattr(launch.config, name) if name in launch.config._fields else launch.arguments[name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
        sass = subprocess.run([TOOLS / "nvdisasm", cubin], capture_output=True, text=True, check=True).stdout

    def used(field: str) -> int:
        return int(re.search(rf"{field}:(\d+)", usage.stdout).group(1))

    def count(pattern: str) -> int:
        return len(re.findall(pattern, sass))

    return Resources(
        used("REG"), kernel.metadata.shared, used("STACK"), count(r"\b(?:LDL|STL)\b"), count(r"\bHMMA\b"), count(r"\bHGMMA\b"),
        count(r"TF32"), count(r"\bLDG\.E\.U16\b"),
    )  # fmt: skip


# dtype, head dimension, mask; each is three kernels for three architectures
CASES = [
    (torch.float16, 64, "none"),
    (torch.bfloat16, 64, "causal_padding"),
    (torch.float16, 128, "keys"),
    (torch.bfloat16, 32, "padding"),
    (torch.float16, 80, "causal_padding"),
    (torch.float32, 64, "causal_padding"),
]
MORE_CASES = [  # with the above, every row of the config table
    (torch.float16, 16, "causal_padding"),
    *itertools.product([torch.float16], [16, 32, 64, 80, 128], ["dense"]),
    *itertools.product([torch.float32], [16, 32, 80, 128], ["causal_padding"]),
    *itertools.product([torch.float32], [16, 32, 64, 128], ["dense"]),
]


def gates(cases) -> list[dict]:
    rows = []
    for dtype, D, mask in cases:
        for launch in attention_launches(dtype, D, mask):
            for capability in (80, 89, 90):
                found = resources(compile_launch(launch, capability))
                name = launch.kernel.__name__.strip("_")
                variant = {"kernel": name, "dtype": str(dtype).removeprefix("torch."), "D": D, "mask": mask, "sm": capability}
                rows.append({**variant, "block_m": launch.config.BLOCK_M, **found._asdict()})
    return rows


class _NoDriver:
    """Enough of a driver for the launcher to compile for sm_90 without launching."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def lengths() -> dict[str, int]:
    """How many variants of each kernel 30 lengths compile, in the two memory layouts that models use."""
    triton.runtime.driver.set_active(_NoDriver())
    kernels = {}
    for L in range(50, 650, 20):
        for inside in (True, False):
            for launch in attention_launches(torch.float16, 64, "causal_padding", L + L % 7, inside):
                arguments = {**launch.arguments, **launch.config._asdict()}
                launch.kernel.warmup(grid=(1,), **arguments)
                kernels[launch.kernel.__name__.strip("_")] = launch.kernel
    return {name: len(kernel.device_caches[0][0]) for name, kernel in kernels.items()}


if __name__ == "__main__":
    modes = {"gates": lambda: gates(CASES), "all-gates": lambda: gates(CASES + MORE_CASES), "lengths": lengths}
    print(json.dumps(modes[sys.argv[1]]()))
