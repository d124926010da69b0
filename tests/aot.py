"""Compile Triton launches ahead of time for an architecture, with no GPU, and count what the machine code holds."""

from __future__ import annotations

import re
import subprocess
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


def attention_launches(dtype: torch.dtype, D: int, mask: str) -> list[attention.Launch]:
    """The three launches of a request, on tensors that hold no data worth computing with."""
    B, H, L = 2, 2, 128
    q, k, v, out, dout, dq, dk, dv = (torch.zeros(B, L, H, D, dtype=dtype).transpose(1, 2) for _ in range(8))
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
        count(r"TF32"),
    )  # fmt: skip
