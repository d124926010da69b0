"""What reaches C when a Triton kernel is launched, seen without a GPU: by Triton's own JIT, and by plans of ours.

A program, because kernels that were imported for the interpreter cannot be compiled: it compiles a few and builds Triton's own
launchers around them, with stand-ins for what loads a binary and what launches it. `test_launch.py` reads what it prints.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.nvidia import driver as nvidia

import fastattn
from fastattn import masks, planned
from fastattn.kernels.triton import ahead, attention, launch, norm
from fastattn.lowering import Prepared
from fastattn.packing import Packing

STREAM = 1234
HEAD = 13  # grid, stream, function, flags, scratch, metadata, hooks; in another order from 3.7 on, with the types after them
HOOKS = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook


class Annotation(NamedTuple):
    """Of a parameter, for the C code of Triton 3.7."""

    nested_tuple: Any
    type: str


class Launcher(nvidia.CudaLauncher):
    """Triton's own; what it hands to C is noted, with the types that the kernel was compiled for."""

    def __init__(self, src: Any, metadata: Any) -> None:
        super().__init__(src, metadata)
        types = list(src.signature.values())
        self.launch = lambda *given: triton.runtime.driver.active.launched.append((types, given))


class Driver(ahead._CompileOnly):
    """Compiles for sm_90 and numbers the kernels that it is to load."""

    launcher_cls = Launcher

    def __init__(self) -> None:
        super().__init__(90)
        self.launched: list[tuple[list[str], tuple]] = []
        numbers = itertools.count(1)
        self.utils = SimpleNamespace(
            launch=None,
            build_signature_metadata=tuple,
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda *given: (object(), next(numbers), 0, 0, 1024),
        )

    def get_current_stream(self, device: int | None = None) -> int:
        return STREAM


@contextlib.contextmanager
def standing_in() -> Iterator[Driver]:
    """For C code that needs a GPU's library: Triton's, which before 3.7 has a launcher for each list of types, and PyTorch's."""
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    stand_ins = [
        (nvidia, "PyKernelArg", Annotation),
        (nvidia, "ARG_CONSTEXPR", "constexpr"),
        (nvidia, "ARG_KERNEL", "kernel"),
        (nvidia, "library_dirs", list),
        (nvidia, "compile_module_from_src", lambda **given: SimpleNamespace(launch=None)),
        (torch._C, "_cuda_getDevice", lambda: None),  # a CPU's tensors have no index
        (torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM),
    ]
    with contextlib.ExitStack() as patches:
        for owner, name, value in stand_ins:
            patches.enter_context(mock.patch.object(owner, name, value, create=True))
        yield driver


def reached(types: list[str], given: tuple) -> list:
    """What C makes of a launch: the head, and what the kernel gets. Addresses are numbered as they come."""
    values, places = given[HEAD:] if launch._version(triton) < (3, 7) else given[-1], {}

    def seen(value: Any, kind: str) -> Any:
        if kind[0] == "*":
            address = value.data_ptr() if isinstance(value, Tensor) else value
            return f"{kind} {places.setdefault(address, len(places))}"
        return f"{kind} {value}"

    parameters = [seen(value, kind) for value, kind in zip(values, types, strict=True) if kind != "constexpr"]
    head = [_plain(value) for value in given[:HEAD]]
    if launch._version(triton) < (3, 7):
        return [head, parameters]
    annotations, signature = given[HEAD:-1]
    kept = [kind for kind, annotation in zip(types, annotations, strict=True) if annotation.type == "kernel"]
    assert kept == list(signature), "C drops what is compiled in by the annotations"
    return [head, parameters]


def _plain(value: Any) -> Any:
    """Of the head: a hook as whether it does something, a launch's metadata as what a hook would read; without hooks neither is
    looked at."""
    if isinstance(value, type(HOOKS[0])):
        return len(value.calls) or None
    if hasattr(value, "get") and not isinstance(value, dict):
        return value.get() if HOOKS[0].calls else None
    return value if isinstance(value, (int, str, bool, type(None))) else repr(value)


@triton.jit(do_not_specialize=["n"])
def _tiny_kernel(x, y, absent, factor, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n) * factor, mask=i < n)


class TinyConfig(NamedTuple):
    BLOCK: int = 32
    num_warps: int = 2
    num_stages: int = 1


def tiny_calls() -> Iterator[Callable[[], object]]:
    x = torch.zeros(1000)
    arguments = {"x": x, "y": x.clone(), "absent": None, "factor": 0.5, "n": 3}
    start, handle, values = launch.ready(launch.Launch(_tiny_kernel, 1, arguments, TinyConfig()))
    for n in (3, 1, 16, 1000):
        yield lambda n=n: start(-(-n // 32), (handle(values[0]), handle(values[1]), None, 0.5, n, 32))


def norm_calls() -> Iterator[Callable[[], object]]:
    """Forward and backward of any number of rows."""

    def tensors(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.zeros(rows, 32, dtype=torch.float16), torch.zeros(32), torch.zeros(rows, 1)

    def back(rows: int) -> tuple:
        x, weight, rstd = tensors(rows)
        return x, None, x.clone(), rstd, rstd.clone(), weight

    def forth(rows: int) -> tuple:
        x, weight, _ = tensors(rows)
        return x, x.clone(), weight, weight.clone()

    forward, backward = norm.forward_plan(*forth(3), 1e-6, False, True, True), norm.backward_plan(*back(3), True, True)
    for rows in (1, 16, 3, 1000):
        yield lambda rows=rows: forward(*forth(rows))
        yield lambda rows=rows: backward(*back(rows))


def attention_calls() -> Iterator[Callable[[], object]]:
    """Packed sequences of several lengths under a causal mask by one plan, and a padded batch by another."""

    def packed(*lengths: int) -> tuple:
        packing = Packing.from_lengths(torch.tensor(lengths), max(lengths))
        x = torch.zeros(packing.total, 2, 16, dtype=torch.float16)
        return x, x.clone(), x.clone(), Prepared(masks.causal().lower_packed(packing, packing, 2))

    def padded(*lengths: int) -> tuple:
        x = torch.zeros(2, 2, 16, 16, dtype=torch.float16)
        return x, x.clone(), x.clone(), Prepared(masks.padding(torch.tensor(lengths)).lower(16, 16))

    plan = attention.forward_plan(*packed(5, 20), 0.25, False, True)
    for lengths in ((5, 20), (1, 1), (16,), (3, 30, 1)):
        yield lambda lengths=lengths: plan(*packed(*lengths))
    other = attention.forward_plan(*padded(1, 16), 0.25, False, False)
    for lengths in ((1, 16), (3, 2)):
        yield lambda lengths=lengths: other(*padded(*lengths))


def launches(driver: Driver) -> list:
    """Of all calls, each of which launches once."""
    found = []
    for call in itertools.chain(tiny_calls(), norm_calls(), attention_calls()):
        driver.launched.clear()
        call()
        (launched,) = driver.launched
        found.append(reached(*launched))
    return found


def by_jit(driver: Driver) -> list:
    with mock.patch.object(launch, "compiled_start", return_value=None):
        return launches(driver)


def by_plans(driver: Driver) -> list:
    """Nothing else launches."""
    with mock.patch.object(triton.runtime.JITFunction, "__getitem__", None):
        return launches(driver)


def ragged() -> dict[str, int]:
    """200 batches of lengths of their own through four ops, forward and backward, on paper: plans that were made, in all and by
    the 50 first, kernels with their tiles, and variants of these that would be compiled."""
    generator, made, tiled, variants, early = torch.Generator().manual_seed(0), planned.misses, set(), set(), 0
    weight, bias = (torch.zeros(size, dtype=torch.float16, requires_grad=True) for size in ((128, 128), (128,)))
    with launch.recorded(launch.GPU(90)) as launches:
        for batch in range(200):
            lengths = torch.randint(1, 200, (8,), generator=generator)
            packing = Packing.from_lengths(lengths, int(lengths.max()))
            q, k, v = torch.zeros(packing.total, 3, 2, 64, dtype=torch.float16, requires_grad=True).unbind(1)
            x = fastattn.varlen_attention(q, k, v, packing, backend="triton").flatten(1)
            y = fastattn.linear(x, weight, bias, activation="gelu", backend="triton")
            y = fastattn.add_layer_norm(y, x, bias, bias, backend="triton")
            y = fastattn.ffn(y, weight, bias, weight, bias, backend="triton")
            y.backward(torch.ones_like(y))
            tiled |= {(one.kernel.__name__, one.config) for one in launches}
            variants |= {ahead._variant(one) for one in launches}
            launches.clear()
            early = planned.misses - made if batch == 49 else early
    return {"plans": planned.misses - made, "early": early, "tiled": len(tiled), "variants": len(variants)}


def hook(metadata: Any) -> None:
    """A profiler's."""


def main() -> None:
    with standing_in() as driver:
        found = {"triton": triton.__version__, "ragged": ragged(), "jit": by_jit(driver)}
        found["plans"] = by_plans(driver)
        for each in HOOKS:
            each.add(hook)
        found["hooked jit"], found["hooked plans"] = by_jit(driver), by_plans(driver)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
