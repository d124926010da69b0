"""The variants of the Triton kernels, compiled ahead of time with no GPU.

A module of programs that compile (gates.py, and this one, which counts the variants that 30 lengths lead to and prints them as
JSON), because kernels that were imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sass
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastattn import Packing, masks
from fastattn.kernels.triton import attention, ffn, norm
from fastattn.kernels.triton.launch import Launch

POINTERS = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.bool: "*i1"}


def attention_launches(
    dtype: torch.dtype, D: int, mask: str, L: int = 640, inside: bool = True, sm: int = 90, Dv: int | None = None, group: int = 1,
    packed: bool = False,
) -> list[Launch]:  # fmt: skip
    """The launches of a request, on tensors that hold no data worth computing with. `inside`: (B, L, H, D) memory; `packed`:
    sequences of up to L tokens end to end, (T, H, D)."""
    lengths = [L, L // 2, L // 3] if packed else [L, L]
    packing = Packing.from_lengths(lengths, L)
    B, rows, H = (1, packing.total, 2) if packed else (2, L, 2)

    def empty(heads: int, width: int) -> Tensor:
        shape = (B, rows, heads, width) if inside else (B, heads, rows, width)
        x = torch.zeros(shape, dtype=dtype)
        return x.transpose(1, 2) if inside else x

    Dv = D if Dv is None else Dv
    q, dq, out, dout = empty(H * group, D), empty(H * group, D), empty(H * group, Dv), empty(H * group, Dv)
    k, dk, v, dv = empty(H, D), empty(H, D), empty(H, Dv), empty(H, Dv)
    lse = torch.zeros(B, H * group, rows)
    made = _mask(mask, len(lengths), H * group, L, packing if packed else None)
    lowered = made.lower_packed(packing, packing, H * group) if packed else made.lower(L, L)
    forward = attention.forward_launch(q, k, v, out, lse, lowered, D**-0.5, sm)
    return [forward, *attention.backward_launches(dout, None, q, k, v, out, lse, dq, dk, dv, lowered, D**-0.5, sm)]


def _mask(name: str, B: int, H: int, L: int, packing: Packing | None) -> masks.Mask:
    lengths = torch.zeros(B, dtype=torch.int32)
    ids = torch.zeros((B, L) if packing is None else (packing.total,), dtype=torch.int32)
    return {
        "none": masks.full,
        "causal": masks.causal,
        "padding": lambda: masks.padding(lengths),
        "causal_padding": lambda: masks.causal() & masks.padding(lengths),
        "prefix": lambda: masks.prefix_lm(lengths),
        "keys": lambda: masks.key_padding(torch.ones(B, L, dtype=torch.bool)),
        "documents": lambda: masks.documents(ids),
        "bits": lambda: masks.dense(torch.ones(B, H, L, L, dtype=torch.bool)),
    }[name]()


def linear_launches(dtype: torch.dtype, activation: str, M: int, K: int, N: int) -> list[Launch]:
    """Forward with bias, residual and z; dz with its sums; dz in the epilogue of the product with the second weight."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, bias, hidden = empty(M, K), empty(N, K), empty(N), empty(M, N)
    sums = empty(ffn.dz_parts(hidden), N, dtype=torch.float32)
    dy, second = empty(M, K), empty(K, N)
    second_sums = empty(ffn.dgrad_parts(dy, second), N, dtype=torch.float32)
    return [
        ffn.forward_launch(x, weight, bias, hidden, hidden, hidden, activation),
        ffn.dz_launch(hidden, hidden, hidden, sums, activation),
        ffn.dgrad_launch(dy, second, hidden, hidden, second_sums, activation),
    ]


def norm_launches(dtype: torch.dtype, N: int, rms: bool, M: int = 128) -> list[Launch]:
    """Forward and backward with everything that a request can have; an RMSNorm has neither mean nor bias."""
    x, weight, rstd = (torch.empty(s, device="meta", dtype=d) for s, d in (((M, N), dtype), (N, dtype), (M, torch.float32)))
    mean, bias = (None, None) if rms else (rstd, weight)
    dweight = torch.empty(norm.parts(x, True)[0], N, device="meta")
    return [
        norm.forward_launch(x, x, weight, bias, x, x, mean, rstd, 1e-6),
        norm.backward_launch(x, x, x, mean, rstd, weight, x, dweight, None if rms else dweight),
    ]


def compile_launch(launch: Launch, capability: int):
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


def held(kernel) -> dict[str, int]:
    """Registers, stack and instruction counts of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        (found,) = sass.functions(cubin).values()
    return found


# dtype, head dimension, mask, and options: length (longer than the one backward kernel takes by default), Dv, heads of a group,
# whether sequences are packed
ATTENTION = [
    (torch.float16, 64, "none", {}),
    (torch.bfloat16, 64, "causal_padding", {}),
    (torch.float16, 128, "keys", {}),
    (torch.bfloat16, 32, "padding", {"L": 128}),
    (torch.float16, 80, "causal_padding", {}),
    (torch.float16, 64, "documents", {}),
    (torch.float32, 64, "causal_padding", {}),
    (torch.float16, 64, "none", {"packed": True}),
    (torch.bfloat16, 64, "causal_padding", {"packed": True}),
    (torch.float16, 64, "documents", {"packed": True}),
    (torch.float16, 64, "none", {"L": 128, "packed": True}),
]
MORE_ATTENTION = [  # with the above, every row of the config tables
    (torch.float16, 16, "causal_padding", {}),
    (torch.float16, 32, "causal_padding", {}),
    (torch.float16, 64, "padding", {}),
    (torch.float16, 64, "keys", {}),
    (torch.float16, 64, "prefix", {}),
    (torch.float16, 64, "causal", {"group": 4}),
    (torch.float16, 128, "none", {"group": 4}),
    (torch.float16, 64, "causal_padding", {"Dv": 128}),
    *itertools.product([torch.float16], [32, 64], ["none", "causal_padding", "keys"], [{"L": 64}, {"L": 128}]),
    *itertools.product([torch.float16], [128], ["none", "causal_padding", "keys"], [{"L": 64}]),
    *itertools.product([torch.float16], [16, 32, 64, 80, 128], ["bits"], [{}]),
    *itertools.product([torch.float16], [32, 128], ["documents"], [{}]),
    *itertools.product([torch.float32], [16, 32, 80, 128], ["causal_padding"], [{}]),
    *itertools.product([torch.float32], [16, 32, 64, 128], ["bits"], [{}]),
    *itertools.product([torch.float16], [32, 80, 128], ["none", "causal_padding", "bits"], [{"packed": True}]),
    *itertools.product([torch.float16], [64], ["keys", "bits"], [{"packed": True}]),
    *itertools.product([torch.float32], [64], ["none", "causal_padding", "bits", "documents"], [{"packed": True}]),
    *itertools.product([torch.float16], [32, 64], ["none", "keys"], [{"L": 64, "packed": True}]),
    *itertools.product([torch.float16], [32, 64], ["keys"], [{"L": 128, "packed": True}]),
    *itertools.product([torch.float16], [128], ["causal_padding", "keys"], [{"L": 64, "packed": True}]),
]
# dtype, activation, (rows, inputs, outputs): three kernels each. The sizes lead to large tiles, to small ones, to those of rows
# that are no multiple of 16 bytes
SIZES = {"large": (4096, 768, 3072), "small": (64, 768, 768), "odd": (64, 769, 769)}
LINEAR = [(torch.bfloat16, "gelu", "large"), (torch.float16, "quick_gelu", "small"), (torch.float32, "gelu_tanh", "small")]
MORE_LINEAR = [
    *itertools.product([torch.bfloat16], ["gelu_tanh", "quick_gelu", "relu", "silu"], ["large"]),
    *itertools.product([torch.float16], ["gelu"], ["large", "small", "odd"]),
    *itertools.product([torch.float32], ["gelu"], ["large", "odd"]),
]
# dtype, width, is it an RMSNorm: two kernels each
NORM = [(torch.bfloat16, 768, False), (torch.float16, 512, True), (torch.float32, 8192, False)]
MORE_NORM = [
    *itertools.product([torch.bfloat16], [33, 64, 1024, 2048, 4096, 8192], [False]),
    *itertools.product([torch.float32], [33, 768, 4096], [False]),
    *itertools.product([torch.bfloat16, torch.float32], [768, 8192], [True]),
]
CAPABILITIES = (80, 89, 90)


class Variant(NamedTuple):
    """One row of the table: a kernel as it is launched for a case, compiled for sm_<capability>."""

    kernel: str
    dtype: str
    case: str
    sm: int
    launch: Launch

    @property
    def multiplies(self) -> bool:
        """Whether the kernel holds a matrix product."""
        return "PRECISION" in self.launch.arguments


def launches(more: bool, sm: int) -> Iterator[tuple[torch.dtype, str, Launch]]:
    """(dtype, case, launch) of attention, linear and norms: what CI compiles, or with `more` everything that is shipped."""
    for dtype, D, mask, options in ATTENTION + MORE_ATTENTION * more:
        case = " ".join([f"D={D}", mask, *(f"{name}={value}" for name, value in options.items())])
        yield from ((dtype, case, launch) for launch in attention_launches(dtype, D, mask, sm=sm, **options))
    for dtype, activation, size in LINEAR + MORE_LINEAR * more:
        yield from ((dtype, f"{activation} {size}", launch) for launch in linear_launches(dtype, activation, *SIZES[size]))
    for dtype, width, rms in NORM + MORE_NORM * more:
        case = f"width={width} {'rms' if rms else 'layer'}{' odd' if width % 8 else ''}"
        yield from ((dtype, case, launch) for launch in norm_launches(dtype, width, rms))


def shipped() -> Iterator[Variant]:
    """Every variant of the config tables, for every architecture."""
    for sm in CAPABILITIES:
        yield from (_variant(dtype, case, sm, launch) for dtype, case, launch in launches(True, sm))


def sampled() -> Iterator[Variant]:
    """Some of them, for CI: each case for one architecture in turn."""
    for place, sm in enumerate(CAPABILITIES):
        for index, (dtype, case, launch) in enumerate(launches(False, sm)):
            if index % len(CAPABILITIES) == place:
                yield _variant(dtype, case, sm, launch)


def _variant(dtype: torch.dtype, case: str, sm: int, launch: Launch) -> Variant:
    return Variant(launch.kernel.__name__.strip("_"), str(dtype).removeprefix("torch."), case, sm, launch)


class _NoDriver:
    """Enough of a driver for the launcher to compile for sm_90 without launching."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def lengths(packed: bool) -> dict[str, int]:
    """How many variants of each kernel 30 lengths compile, of attention in the two memory layouts that models use; or, of
    attention alone, 30 batches of packed sequences."""
    triton.runtime.driver.set_active(_NoDriver())
    kernels = {}
    for L in range(50, 650, 20):
        rows = L + L % 7
        case = torch.float16, 64, "causal_padding", rows
        requests = [attention_launches(*case, inside, packed=packed) for inside in (True, False)]
        if not packed:
            requests.append(linear_launches(torch.float16, "gelu", 8 * rows, 768, 3072))
            requests.append(norm_launches(torch.float16, 768, False, 8 * rows))
        for launch in itertools.chain(*requests):
            launch.kernel.warmup(grid=(1,), **launch.arguments, **launch.config._asdict())
            kernels[launch.kernel.__name__.strip("_")] = launch.kernel
    return {name: len(kernel.device_caches[0][0]) for name, kernel in kernels.items()}


if __name__ == "__main__":
    print(json.dumps(lengths("packed" in sys.argv[1:])))
