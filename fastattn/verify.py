"""`python -m fastattn verify`: the accuracy rule for every op, backend, dtype and kind of request on this device."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from fastattn import masks, testing
from fastattn.activations import ACTIVATIONS
from fastattn.info import info
from fastattn.ops import attention, ffn, norm

ATTENTION_SHAPES = [(2, 2, 64, 64, 64), (2, 2, 77, 77, 64), (2, 2, 129, 129, 32), (2, 2, 197, 197, 80), (2, 2, 65, 130, 128)]
PACKED_MASKS, PACKED_LENGTHS = ("none", "causal", "window", "dense"), (77, 0, 40, 1)
EPS = 1e-5


@dataclass
class Row:
    """One request. `errors` are relative Frobenius errors in units of the dtype's roundoff, the worst over shapes."""

    device: str
    op: str
    backend: str
    dtype: str
    kind: str  # the mask, or the activation
    errors: dict[str, float] = field(default_factory=dict)
    failure: str | None = None  # the rule that was broken
    refusal: str | None = None  # why the backend does not take this request

    def __str__(self) -> str:
        figures = " ".join(f"{name} {error:5.2f}" for name, error in self.errors.items())
        answer = self.failure or (f"--  {self.refusal}" if self.refusal else f"ok  {figures}")
        return f"{self.op:16} {self.backend:7} {self.dtype} {self.kind:16} {answer}"


def main(as_json: bool) -> int:
    """Print a line per request as it is done, or all as JSON; 1 if any failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for row, cases in requests(device):
        _run(row, cases)
        rows.append(row)
        if not as_json:
            print(row, flush=True)
    failed, refused = sum(row.failure is not None for row in rows), sum(row.refusal is not None for row in rows)
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(f"{len(rows) - failed - refused} passed, {failed} failed, {refused} not served, on {info()['devices'][0]}")
    return 1 if failed or refused == len(rows) else 0


Case = Callable[[], dict[str, float]]  # raises AssertionError where the rule is broken, NotImplementedError where refused


def requests(device: str) -> Iterator[tuple[Row, list[Case]]]:
    """Every row with its cases, one per shape."""
    for backend, dtype in itertools.product(_backends(attention.BACKENDS, device), testing.DTYPES):
        for mask in testing.MASKS:
            slow = backend in ("triton", "cuda") and device == "cpu"  # interpreted or emulated
            shapes = ATTENTION_SHAPES[:2] if slow else ATTENTION_SHAPES
            yield Row(device, "attention", backend, dtype, mask), [_attention(backend, dtype, mask, device, s) for s in shapes]
        for mask in PACKED_MASKS:
            yield Row(device, "varlen_attention", backend, dtype, mask), [_packed(backend, dtype, mask, device)]
    for backend, dtype in itertools.product(_backends(ffn.BACKENDS, device), testing.DTYPES):
        for op, activation in itertools.product(("linear", "ffn"), ACTIVATIONS):
            make = _linear if op == "linear" else _ffn
            yield Row(device, op, backend, dtype, activation), [make(backend, dtype, activation, device)]
    for backend, dtype in itertools.product(_backends(norm.BACKENDS, device), testing.DTYPES):
        for op in ("add_layer_norm", "add_rms_norm"):
            yield Row(device, op, backend, dtype, "with the sum"), [_norm(backend, dtype, op == "add_rms_norm", device)]


def _backends(names: tuple[str, ...], device: str) -> list[str]:
    states = info()["backends"]
    return [name for name in names if states[name]["available"] and (name != "cpu" or device == "cpu")]


def _run(row: Row, cases: list[Case]) -> None:
    refusals = []
    for case in cases:
        try:
            for name, error in case().items():
                row.errors[name] = max(error, row.errors.get(name, 0.0))
        except AssertionError as error:
            row.failure = str(error)
            return
        except NotImplementedError as error:
            refusals.append(str(error).splitlines()[-1].strip())
    if len(refusals) == len(cases):
        row.refusal = refusals[0]


def _attention(backend: str, dtype: str, mask: str, device: str, shape: tuple[int, int, int, int, int]) -> Case:
    def case() -> dict[str, float]:
        x = testing.attention_inputs(*shape, testing.DTYPES[dtype], device, mask=mask)
        result, yardstick = testing.run_attention(x, backend), testing.attention_yardstick(x)
        return testing.assert_accurate(result, yardstick, cpu_half_gradients=backend == "cpu")

    return case


def _packed(backend: str, dtype: str, mask: str, device: str) -> Case:
    def case() -> dict[str, float]:
        lengths, longest = torch.tensor(PACKED_LENGTHS, device=device), max(PACKED_LENGTHS)
        x = testing.attention_inputs(len(lengths), 2, longest, longest, 64, testing.DTYPES[dtype], device, mask=mask)
        result = testing.run_varlen_attention(x, lengths, backend)
        padding = masks.padding(lengths, lengths)
        x = replace(x, mask=padding if x.mask is None else padding & x.mask)
        return testing.assert_accurate(result, testing.attention_yardstick(x), cpu_half_gradients=backend == "cpu")

    return case


def _linear(backend: str, dtype: str, activation: str, device: str) -> Case:
    def case() -> dict[str, float]:
        x, weight, bias, residual, dy = _tensors(
            testing.DTYPES[dtype], device, (2, 33, 65), (96, 65), (96,), (2, 33, 96), (2, 33, 96)
        )
        result = testing.run_linear(x, weight, bias, residual, dy, activation, backend)
        return testing.assert_accurate(result, testing.linear_yardstick(x, weight, bias, residual, dy, activation))

    return case


def _ffn(backend: str, dtype: str, activation: str, device: str) -> Case:
    def case() -> dict[str, float]:
        x, w1, b1, w2, b2, dy = _tensors(
            testing.DTYPES[dtype], device, (2, 33, 65), (96, 65), (96,), (40, 96), (40,), (2, 33, 40)
        )
        result = testing.run_ffn(x, w1, b1, w2, b2, dy, activation, backend)
        return testing.assert_accurate(result, testing.ffn_yardstick(x, w1, b1, w2, b2, dy, activation))

    return case


def _norm(backend: str, dtype: str, rms: bool, device: str) -> Case:
    def case() -> dict[str, float]:
        x, residual, weight, bias, dy, dsum = _tensors(
            testing.DTYPES[dtype], device, (2, 33, 96), (2, 33, 96), (96,), (96,), *[(2, 33, 96)] * 2
        )
        given = (x, residual, weight, None if rms else bias, dy, dsum)
        return testing.assert_accurate(
            testing.run_norm(*given, EPS, backend, rms=rms), testing.norm_yardstick(*given, EPS, rms=rms)
        )

    return case


def _tensors(dtype: torch.dtype, device: str, *sizes: tuple[int, ...]) -> list[Tensor]:
    """Seeded normal tensors; a matrix is scaled so that its products keep their size."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=g).div(size[-1] ** 0.5 if len(size) == 2 else 1).to(device, dtype) for size in sizes]
