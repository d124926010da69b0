"""The variants of the Triton kernels, compiled ahead of time with no GPU.

A module of programs that compile (gates.py, and this one, which counts the variants that 30 lengths lead to and prints them as
JSON), because kernels that were imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import sass
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastattn.kernels.triton.ahead import compile_only
from fastattn.kernels.triton.launch import GPU, Launch
from fastattn.launches import (
    attention_launches,
    bits_launches,
    gated_launches,
    linear_launches,
    norm_launches,
    rotary_launches,
)

POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.bool: "*i1",
}  # fmt: skip


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
# whether sequences are packed, whether it is inference, what there is of bias and dropout, whether there is a bias of q, k and v
ATTENTION = [
    (torch.float16, 64, "none", {}),
    (torch.bfloat16, 64, "causal_padding", {}),
    (torch.float16, 128, "keys", {}),
    (torch.bfloat16, 32, "padding", {"L": 128}),
    (torch.float16, 80, "causal_padding", {}),
    (torch.float32, 64, "causal_padding", {}),
    (torch.float16, 64, "none", {"packed": True}),
    (torch.bfloat16, 64, "causal_padding", {"packed": True}),
    (torch.float16, 64, "documents", {"packed": True}),
    (torch.float16, 64, "none", {"L": 128, "packed": True}),
    (torch.bfloat16, 64, "padding", {"extras": "pairs+dropout"}),
    (torch.bfloat16, 64, "padding", {"L": 128, "extras": "dropout"}),
    (torch.bfloat16, 64, "padding", {"qkv_bias": True, "inference": True}),
]
MORE_ATTENTION = [  # with the above, every row of the config tables
    (torch.bfloat16, 64, "none", {"extras": "relative"}),
    (torch.float16, 16, "causal_padding", {}),
    (torch.float16, 32, "causal_padding", {}),
    (torch.float16, 64, "padding", {}),
    (torch.float16, 64, "keys", {}),
    (torch.float16, 64, "prefix", {}),
    *itertools.product([torch.float16], [32, 64], ["prefix"], [{"L": 64}, {"L": 128}]),
    *itertools.product([torch.float16, torch.float32], [32, 64, 80, 128], ["padding"], [{"qkv_bias": True}]),
    (torch.bfloat16, 64, "padding", {"qkv_bias": True}),
    *itertools.product([torch.bfloat16], [64, 128], ["none"], [{"qkv_bias": True, "inference": True}]),
    (torch.float16, 64, "none", {"inference": True}),
    (torch.float16, 64, "none", {"qkv_bias": True, "packed": True}),
    (torch.float16, 64, "causal", {"group": 4}),
    (torch.float16, 128, "none", {"group": 4}),
    (torch.float16, 64, "causal_padding", {"Dv": 128}),
    *itertools.product([torch.float16], [32, 64], ["none", "causal_padding", "keys"], [{"L": 64}, {"L": 128}, {"L": 256}]),
    *itertools.product([torch.float16], [128], ["none", "causal_padding", "keys"], [{"L": 64}, {"L": 128}]),
    *itertools.product([torch.bfloat16], [64, 128], ["causal_padding"], [{"inference": True}]),
    *itertools.product([torch.float16], [16, 32, 64, 80, 128], ["bits"], [{}]),
    *itertools.product([torch.float16], [32, 64, 128], ["documents"], [{}]),
    *itertools.product([torch.float32], [16, 32, 80, 128], ["causal_padding"], [{}]),
    *itertools.product([torch.float32], [16, 32, 64, 128], ["bits"], [{}]),
    *itertools.product([torch.float16], [32, 80, 128], ["none", "causal_padding", "bits"], [{"packed": True}]),
    *itertools.product([torch.float16], [64], ["keys", "bits"], [{"packed": True}]),
    *itertools.product([torch.float32], [64], ["none", "causal_padding", "bits", "documents"], [{"packed": True}]),
    *itertools.product([torch.float16], [32, 64], ["none", "keys"], [{"L": 64, "packed": True}]),
    *itertools.product([torch.float16], [32, 64], ["keys"], [{"L": 128, "packed": True}, {"L": 256, "packed": True}]),
    *itertools.product(
        [torch.float16], [128], ["causal_padding", "keys"], [{"L": 64, "packed": True}, {"L": 128, "packed": True}]
    ),
    *itertools.product(
        [torch.float16], [64], ["padding"], [{"extras": x} for x in ("dropout", "pairs", "relative+dropout", "alibi")]
    ),
    *itertools.product([torch.float16], [32, 128], ["padding"], [{"extras": x} for x in ("dropout", "pairs+dropout")]),
    *itertools.product([torch.float32], [32, 64, 128], ["padding"], [{"extras": x} for x in ("pairs+dropout", "relative")]),
    *itertools.product([torch.float16], [64], ["padding"], [{"L": 128, "extras": x} for x in ("row+dropout", "alibi+dropout")]),
    *itertools.product(
        [torch.float16], [64], ["padding"], [{"packed": True, "extras": x} for x in ("dropout", "relative+dropout")]
    ),
]
# dtype, activation, (rows, inputs, outputs), options: three kernels each, with dropout two. The sizes lead to large tiles, to
# small ones, to those of rows that are no multiple of 16 bytes
SIZES = {"large": (4096, 768, 3072), "small": (64, 768, 768), "odd": (64, 769, 769)}
LINEAR = [
    (torch.bfloat16, "gelu", "large", {}), (torch.float16, "quick_gelu", "small", {}), (torch.float32, "gelu_tanh", "small", {}),
    (torch.bfloat16, "gelu", "large", {"dropout": 0.1}),
]  # fmt: skip
MORE_LINEAR = [
    *itertools.product([torch.bfloat16], ["gelu_tanh", "quick_gelu", "relu", "silu"], ["large"], [{}]),
    *itertools.product([torch.float16], ["gelu"], ["large", "small", "odd"], [{}]),
    *itertools.product([torch.float32], ["gelu"], ["large", "odd"], [{}]),
    *itertools.product([torch.float16], ["gelu"], ["small", "odd"], [{"dropout": 0.1}]),
    *itertools.product([torch.float32], ["gelu"], ["large", "small", "odd"], [{"dropout": 0.1}]),
]
# dtype, width, is it an RMSNorm: two kernels each
NORM = [
    (torch.bfloat16, 768, False, {}), (torch.float16, 512, True, {}), (torch.float32, 8192, False, {}),
    (torch.bfloat16, 768, False, {"inference": True}), (torch.bfloat16, 768, False, {"dropout": 0.1}),
]  # fmt: skip
MORE_NORM = [
    *itertools.product([torch.bfloat16], [16, 32, 33, 64, 128, 256, 1024, 2048, 4096, 8192], [False], [{}]),
    *itertools.product([torch.float32], [33, 768, 4096], [False], [{}]),
    *itertools.product([torch.bfloat16, torch.float32], [768, 8192], [True], [{}]),
    *itertools.product([torch.bfloat16], [16, 33, 1024, 4096, 8192], [False], [{"dropout": 0.1}]),
    *itertools.product([torch.float32], [768, 8192], [False], [{"dropout": 0.1}]),
]
# mask, whether sequences are packed: dropout's bits, one kernel
BITS = [("none", False), ("causal_padding", True)]
MORE_BITS = [("padding", False), ("causal", False), ("causal_padding", False), ("prefix", False), ("none", True)]
# dtype, activation, columns of the hidden layer, options: two kernels each
GATED = [(torch.bfloat16, "geglu", 1152, {"dropout": 0.1})]
MORE_GATED = [
    (torch.bfloat16, "geglu", 1152, {}),
    *itertools.product([torch.bfloat16], ["geglu_tanh", "swiglu"], [1152], [{}]),
    *itertools.product([torch.float16, torch.float32], ["geglu"], [1152], [{}]),
    (torch.float16, "geglu", 1153, {}),
    (torch.bfloat16, "geglu_tanh", 1152, {"dropout": 0.1}),
    (torch.float32, "swiglu", 1152, {"dropout": 0.1}),
]
# dtype, head dimension, whether neighbours are pairs, options: one kernel
ROTARY = [(torch.bfloat16, 64, False, {})]
MORE_ROTARY = [
    (torch.float16, 64, True, {}),
    (torch.float32, 128, False, {}),
    *itertools.product([torch.bfloat16], [32, 80, 128], [False], [{}]),
    *itertools.product([torch.bfloat16], [128], [True], [{}]),
    *itertools.product([torch.float32], [64], [False, True], [{}]),
    (torch.bfloat16, 64, False, {"turned": 16}),
    *itertools.product([torch.float16], [20], [False, True], [{}]),
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
    """(dtype, case, launch) of all kernels: what CI compiles, or with `more` everything that is shipped."""
    gpu = GPU(sm)
    for dtype, D, mask, options in ATTENTION + MORE_ATTENTION * more:
        case = " ".join([f"D={D}", mask, *(f"{name}={value}" for name, value in options.items())])
        yield from ((dtype, case, launch) for launch in attention_launches(dtype, D, mask, gpu=gpu, **options))
    for dtype, activation, size, options in LINEAR + MORE_LINEAR * more:
        case = " ".join([activation, size, *options])
        made = linear_launches(dtype, activation, *SIZES[size], gpu, **options)
        yield from ((dtype, case, launch) for launch in made)
    for dtype, width, rms, options in NORM + MORE_NORM * more:
        case = " ".join([f"width={width} {'rms' if rms else 'layer'}{' odd' if width % 8 else ''}", *options])
        yield from ((dtype, case, launch) for launch in norm_launches(dtype, width, rms, gpu=gpu, **options))
    for dtype, activation, columns, options in GATED + MORE_GATED * more:
        case = " ".join([f"{activation} columns={columns}{' odd' if columns % 8 else ''}", *options])
        yield from ((dtype, case, launch) for launch in gated_launches(dtype, activation, columns, **options))
    for dtype, D, interleaved, options in ROTARY + MORE_ROTARY * more:
        case = f"D={D} {'neighbours' if interleaved else 'halves'}{' odd' if D % 8 else ''}"
        case = " ".join([case, *(f"{name}={value}" for name, value in options.items())])
        yield from ((dtype, case, launch) for launch in rotary_launches(dtype, D, interleaved, **options))
    for mask, packed in BITS + MORE_BITS * more:
        yield from ((torch.int32, mask + " packed" * packed, launch) for launch in bits_launches(mask, packed=packed))


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


def lengths(packed: bool) -> dict[str, int]:
    """How many variants of each kernel and choice of tiles 30 lengths compile at most, of attention in the two memory layouts
    that models use; or, of attention alone, 30 batches of packed sequences."""
    compile_only(90)
    variants: dict[str, Counter] = {}
    for L in range(50, 650, 20):
        rows = L + L % 7
        case = torch.float16, 64, "causal_padding", rows
        requests = [attention_launches(*case, inside, packed=packed) for inside in (True, False)]
        requests.append(bits_launches(case[2], rows, packed))
        requests.append(rotary_launches(torch.float16, 64, False, rows, packed))
        if not packed:
            requests.append(linear_launches(torch.float16, "gelu", 8 * rows, 768, 3072))
            requests.append(norm_launches(torch.float16, 768, False, 8 * rows))
            requests.append(gated_launches(torch.float16, "geglu", 1152, 8 * rows))
        for launch in itertools.chain(*requests):
            before = len(launch.kernel.device_caches[0][0])
            launch.kernel.warmup(grid=(1,), **launch.arguments, **launch.config._asdict())
            found = variants.setdefault(launch.kernel.__name__.strip("_"), Counter())
            found[launch.config] += len(launch.kernel.device_caches[0][0]) - before
    return {name: max(found.values()) for name, found in variants.items()}


if __name__ == "__main__":
    print(json.dumps(lengths("packed" in sys.argv[1:])))
