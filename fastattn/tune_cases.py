"""What `python -m fastattn tune` times: requests of encoders, candidates for their tiles, and both as launches.

A class is what one row of a table holds for: a kernel, the row's fields, the most keys or tiles. It has cases, the requests that
are timed for it, and candidates, of which one becomes the row's config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn import masks
from fastattn.kernels.triton import attention, ffn, norm, tuned
from fastattn.kernels.triton.launch import GPU, Launch, run
from fastattn.lowering import LoweredMask

CANDIDATES = Path(__file__).parent / "data" / "candidates.json"
LENGTHS = (50, 77, 128, 197, 257, 384, 512, 1024)
LONGEST = (64, 128, 256, 512, None)  # classes of lengths
ONE_TILE = 256  # the most keys that candidates of the one backward kernel serve
TILES = (127, 1023, None)  # classes of products, by 128 x 128 tiles of the result
# rows, inputs, outputs: of one sequence, small batches, MiniLM, CLIP and BERT, a large batch
PRODUCTS = ((128, 768, 3072), (512, 768, 3072), (4096, 384, 1536), (2464, 512, 2048), (4096, 768, 3072), (16384, 768, 3072))
WIDTHS, NORM_ROWS = (384, 512, 768, 1024), 4096
SHARED_KB = {80: 163, 90: 227, 100: 227, 103: 227}  # that one block may take; 99 elsewhere, at least
KERNELS = (  # in this order: what two backward kernels take is an alternative to the one
    *("attention_forward", "attention_dq", "attention_dkdv", "attention_backward"),
    *("linear_forward", "linear_dgrad", "norm_forward", "norm_backward"),
)


class Class(NamedTuple):
    """Of sizes beyond `above`, where the class before ends, up to `most`."""

    kernel: str
    fields: tuple[tuple[str, Any], ...]
    above: int | None
    most: int | None

    def __str__(self) -> str:
        bounded = tuned.KERNELS[self.kernel].bounded
        words = [f"{name}={value}" for name, value in self.fields if value is not None and value is not False]
        return " ".join([self.kernel, *words, *([] if bounded is None else [f"{bounded}<={self.most}" if self.most else "more"])])

    def row(self, config: Any) -> dict[str, Any]:
        """As a row of a table, without its origin."""
        bounded = tuned.KERNELS[self.kernel].bounded
        values = None if config is None else config if isinstance(config, str) else list(config)
        bounds = {"above": self.above, bounded: self.most} if bounded else {}
        return {"kernel": self.kernel, **dict(self.fields), **bounds, "config": values}


class Case(NamedTuple):
    """sizes: batch, heads, length, head dimension; or rows, inputs, outputs; or rows, width."""

    sizes: tuple[int, ...]
    dtype: torch.dtype
    mask: str = "none"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.sizes))} {str(self.dtype).removeprefix('torch.')} {self.mask}"


class Prepared(NamedTuple):
    """A candidate on one set of inputs: what runs it, and then its results; the launch, where it is a kernel of ours."""

    call: Callable[[], object]
    results: Callable[[], dict[str, Tensor]]
    launch: Launch | None


Choice = Any  # a config, or tuned.LIBRARY, tuned.EPILOGUE, or None for two backward kernels


def classes(quick: bool, kernels: Iterable[str], gpu: GPU) -> dict[Class, list[Case]]:
    """Every class with a choice, and its cases.

    quick: bf16; attention of 64 columns and four lengths, without a mask and with padding; one activation, and the one that
    PyTorch's product can have behind it; two products; two widths.
    """
    found: dict[Class, list[Case]] = {}
    dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16)
    for kernel in KERNELS:
        if kernel not in kernels:
            continue
        make = _attention_classes if kernel.startswith("attention") else _norm_classes if "norm" in kernel else _product_classes
        for group, case in make(kernel, quick, dtypes):
            found.setdefault(group, []).append(case)
    return {group: cases for group, cases in found.items() if len(candidates(group, gpu)) > 1}


def _attention_classes(kernel: str, quick: bool, dtypes) -> Iterable[tuple[Class, Case]]:
    lengths, heads = ((50, 128, 197, 512) if quick else LENGTHS), 768
    for D, L in product((64,) if quick else (32, 64, 128), lengths):
        above, most = _bounds(LONGEST, L)
        if kernel == tuned.ONE_KERNEL and (most is None or most > ONE_TILE):
            continue
        group = Class(kernel, (("block_d", D), ("dtype", "half"), ("listed", False)), above, most)
        sizes = max(4, min(32, 16384 // L)), heads // D, L, D
        for dtype, mask in product(dtypes, ("none", "padding") if quick else ("none", "padding", "causal")):
            yield group, Case(sizes, dtype, mask)


def _product_classes(kernel: str, quick: bool, dtypes) -> Iterable[tuple[Class, Case]]:
    forward = kernel == "linear_forward"
    kinds: Iterable[tuple] = product(ffn.ACTIVATIONS, (False, True)) if forward else ((None, None),)
    if quick and forward:
        kinds = (("gelu", False), ("gelu", True), ("gelu_tanh", False))
    for (activation, z), sizes, dtype in product(kinds, PRODUCTS[1::3] if quick else PRODUCTS, dtypes):
        bounds = _bounds(TILES, ffn.squares(sizes[0], sizes[2]))
        more = (("activation", activation), ("z", z)) if forward else ()
        yield Class(kernel, (("dtype", "half"), ("odd", False), *more), *bounds), Case(sizes, dtype)


def _norm_classes(kernel: str, quick: bool, dtypes) -> Iterable[tuple[Class, Case]]:
    for width, dtype in product((384, 768) if quick else WIDTHS, dtypes):
        yield Class(kernel, (("block_n", norm.block_n(width)), ("dtype", "half")), None, None), Case((NORM_ROWS, width), dtype)


def _bounds(classes: tuple[int | None, ...], size: int) -> tuple[int | None, int | None]:
    """Between which two a size is."""
    place = next(place for place, bound in enumerate(classes) if bound is None or bound >= size)
    return (classes[place - 1] if place else None), classes[place]


def candidates(group: Class, gpu: GPU) -> list[Choice]:
    """What may win a class, the shipped choice first."""
    fields = dict(group.fields)
    size = (group.above or 0) + 1 if group.most is None else group.most
    shipped = tuned.shipped(gpu).row(group.kernel, size, library=group.kernel == "linear_forward", **fields).config
    found = [shipped, *(config for config in _candidates(group, gpu) if config != shipped and fits(group, config, gpu.sm))]
    if group.kernel == "linear_forward":
        names = (tuned.LIBRARY, *((tuned.EPILOGUE,) if not fields["z"] else ()))
        found += [name for name in names if fields["activation"] in tuned.ACTIVATIONS[name] and name != shipped]
    if group.kernel == tuned.ONE_KERNEL and shipped is not None:
        found.append(None)
    return found


def _candidates(group: Class, gpu: GPU) -> list[Choice]:
    fields, kernel = dict(group.fields), tuned.KERNELS[group.kernel]
    if group.kernel.startswith("norm"):
        block = fields["block_n"]
        shapes = product((1, 2, 4, 8), (2, 4, 8))
        return [tuned.Config(rows, block, warps, 1) for rows, warps in shapes if 4 <= rows * block // (32 * warps) <= 16]
    listed = _data()[tuned.architecture(gpu.sm).stem][group.kernel]
    tiles = [kernel.config(*values) for values in (listed[str(fields["block_d"])] if isinstance(listed, dict) else listed)]
    if group.kernel == tuned.ONE_KERNEL:
        return [config for config in tiles if group.most == config.BLOCK_N]
    return tiles


@cache
def _data() -> dict[str, Any]:
    return json.loads(CANDIDATES.read_text())


def fits(group: Class, config: Choice, sm: int) -> bool:
    """Whether the operands of the tiles in flight fit a block's shared memory."""
    if group.kernel.startswith("norm"):
        return True
    if group.kernel.startswith("linear"):
        elements = config.num_stages * (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K
    else:
        over_keys = group.kernel in ("attention_forward", "attention_dq")
        outer, inner = (config.BLOCK_M, config.BLOCK_N) if over_keys else (config.BLOCK_N, config.BLOCK_M)
        resident = outer if group.kernel == "attention_forward" else 2 * outer
        elements = (resident + config.num_stages * 2 * inner) * dict(group.fields)["block_d"]
    return 2 * elements <= SHARED_KB.get(sm, 99) * 1024


def prepare(group: Class, case: Case, device: torch.device, gpu: GPU) -> Callable[[Choice], Prepared]:
    """Inputs of a case on the device, and the function that makes a candidate ready on them. On meta: for compiling."""
    make = _attention if group.kernel.startswith("attention") else _norm if "norm" in group.kernel else _product
    return make(group, case, device, gpu)


def launches(group: Class, case: Case, choices: tuple[Choice, ...], gpu: GPU) -> list[Launch]:
    """A job of compiling ahead: the launches of these candidates."""
    ready = prepare(group, case, torch.device("meta"), gpu)
    return [launch for launch in (ready(choice).launch for choice in choices) if launch is not None]


def input_bytes(group: Class, case: Case) -> int:
    """Of one set, about: what has to be rotated so that none is in the L2 cache."""
    if group.kernel.startswith("attention"):
        B, H, L, D = case.sizes
        return 2 * B * H * L * D * (4 if group.kernel == "attention_forward" else 7)
    M, K, N = case.sizes if len(case.sizes) == 3 else (*case.sizes, case.sizes[1])
    return 2 * (M * K + N * K + 2 * M * N)


def _random(device: torch.device, dtype: torch.dtype, *size: int) -> Tensor:
    return (
        torch.empty(size, dtype=dtype, device=device) if device.type == "meta" else torch.randn(size, dtype=dtype, device=device)
    )


def _mask(case: Case, device: torch.device) -> LoweredMask:
    """padding: lengths from an eighth of the longest to all of it, half on average, in keys and queries."""
    B, _, L, _ = case.sizes
    device = torch.device("cpu") if device.type == "meta" else device
    lengths = torch.linspace(L / 8, L, B, device=device).round().int()
    mask = {"none": masks.full, "padding": lambda: masks.padding(lengths, lengths), "causal": masks.causal}[case.mask]()
    return mask.lower(L, L, device)


def _attention(group: Class, case: Case, device: torch.device, gpu: GPU) -> Callable[[Choice], Prepared]:
    B, H, L, D = case.sizes
    q, k, v, dout, out, dq, dk, dv = (_random(device, case.dtype, B, L, H, D).transpose(1, 2) for _ in range(8))
    lse, delta = (torch.empty(B, H, L, device=device) for _ in range(2))
    mask, scale, tiles = _mask(case, device), D**-0.5, tuned.shipped(gpu)

    def config(kernel: str) -> tuned.Config:
        return tiles.row(kernel, L, **dict(group.fields)).config

    if device.type != "meta" and group.kernel != "attention_forward":
        run(attention.forward_with(config("attention_forward"), q, k, v, out, lse, mask, scale))
        run(attention.dq_with(config("attention_dq"), dout, None, q, k, v, out, lse, delta, dq, mask, scale))

    def ready(choice: Choice) -> Prepared:
        if group.kernel == "attention_forward":
            launch = attention.forward_with(choice, q, k, v, out, lse, mask, scale)
            results = {"out": out, "lse": lse}
        elif group.kernel == "attention_dq":
            launch = attention.dq_with(choice, dout, None, q, k, v, out, lse, delta, dq, mask, scale)
            results = {"dq": dq, "delta": delta}
        elif group.kernel == "attention_dkdv":
            launch = attention.dkdv_with(choice, dout, q, k, v, lse, delta, dk, dv, mask, scale)
            results = {"dk": dk, "dv": dv}
        elif choice is not None:
            launch = attention.single_with(choice, dout, None, q, k, v, out, lse, dq, dk, dv, mask, scale)
            results = {"dq": dq, "dk": dk, "dv": dv}
        else:  # of two kernels: what one is compared with; timed they are in their own classes
            two = (
                attention.dq_with(config("attention_dq"), dout, None, q, k, v, out, lse, delta, dq, mask, scale),
                (attention.dkdv_with(config("attention_dkdv"), dout, q, k, v, lse, delta, dk, dv, mask, scale)),
            )
            return Prepared(lambda: [run(launch) for launch in two], lambda: {"dq": dq, "dk": dk, "dv": dv}, None)
        return Prepared(lambda: run(launch), lambda: results, launch)

    return ready


def _product(group: Class, case: Case, device: torch.device, gpu: GPU) -> Callable[[Choice], Prepared]:
    M, K, N = case.sizes
    fields = dict(group.fields)
    x, hidden, y, z = (_random(device, case.dtype, M, width) for width in (K, N, N, N))
    bias, weight = _random(device, case.dtype, N), _random(device, case.dtype, N, K) * K**-0.5
    second = weight.t().contiguous()

    def ready(choice: Choice) -> Prepared:
        if group.kernel == "linear_dgrad":
            sums = torch.empty(-(-M // choice.BLOCK_M), N, device=device)
            launch = ffn.dgrad_with(choice, x, second, hidden, y, sums, "gelu")
            return Prepared(lambda: run(launch), lambda: {"dz": y, "sum": sums.sum(0)}, launch)
        if isinstance(choice, str):
            found: list[Any] = []

            def call() -> None:
                found[:] = ffn.library_linear(choice, x, weight, bias, fields["activation"], fields["z"])

            return Prepared(call, lambda: {"y": found[0], **({"z": found[1]} if fields["z"] else {})}, None)
        kept = z if fields["z"] else None
        launch = ffn.forward_with(choice, x, weight, bias, None, y, kept, fields["activation"])
        return Prepared(lambda: run(launch), lambda: {"y": y, **({"z": z} if fields["z"] else {})}, launch)

    return ready


def _norm(group: Class, case: Case, device: torch.device, gpu: GPU) -> Callable[[Choice], Prepared]:
    M, N = case.sizes
    x, residual, y, total = (_random(device, case.dtype, M, N) for _ in range(4))
    weight, bias = (_random(device, case.dtype, N) for _ in range(2))
    mean, rstd = (_random(device, torch.float32, M) for _ in range(2))

    def ready(choice: Choice) -> Prepared:
        if group.kernel == "norm_forward":
            launch = norm.forward_with(choice, x, residual, weight, bias, y, total, mean, rstd, 1e-12, mean is None)
            return Prepared(lambda: run(launch), lambda: {"y": y, "total": total}, launch)
        programs = norm.parts_with(choice, M, True)[0]
        sums = [torch.empty(programs, N, device=device) for _ in range(2)]
        launch = norm.backward_with(choice, x, None, residual, mean, rstd, weight, y, *sums)
        return Prepared(lambda: run(launch), lambda: {"dsum": y, "dweight": sums[0].sum(0), "dbias": sums[1].sum(0)}, launch)

    return ready
