"""`python -m fastattn verify`: the accuracy rule for every op, backend, dtype and kind of request on this device.

On a GPU the Triton kernels of all requests are compiled first, in parallel processes; one after the other they take most of the
time.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastattn import masks, testing
from fastattn.activations import ACTIVATIONS
from fastattn.info import info
from fastattn.ops import attention, ffn, norm

if TYPE_CHECKING:
    from fastattn.kernels.triton.launch import GPU, Launch

ATTENTION_SHAPES = [(2, 2, 64, 64, 64), (2, 2, 77, 77, 64), (2, 2, 129, 129, 32), (2, 2, 197, 197, 80), (2, 2, 65, 130, 128)]
PACKED_MASKS, PACKED_LENGTHS = ("none", "causal", "window", "dense"), (77, 0, 40, 1)
EPS = 1e-5


class Table(NamedTuple):
    """What is asked of each op, in each dtype and of each backend."""

    dtypes: Sequence[str]
    shapes: Sequence[tuple[int, int, int, int, int]]  # (B, H, M, N, D) of attention
    masks: Sequence[str]
    packed_masks: Sequence[str]
    extras: Sequence[tuple[str, float]]  # biases with rates of dropout, under padding
    activations: Sequence[str]


# Made for a minute on a GPU, most of it for compiling: the dtypes, masks and activations of real models, and few and many keys,
# which take another backward.
QUICK = Table(
    ("fp16", "bf16"), [(2, 2, 77, 77, 64), (2, 2, 77, 300, 64)],
    ("none", "padding", "left", "holes", "causal", "causal_padding", "window"), ("none", "causal"),
    (("none", 0.1), ("heads", 0.0), ("relative", 0.1)),
    ("gelu", "gelu_tanh", "quick_gelu"),
)  # fmt: skip


@dataclass
class Row:
    """One request. `errors` are relative Frobenius errors in units of the dtype's roundoff, the worst over shapes."""

    device: str
    op: str
    backend: str
    dtype: str
    kind: str  # the mask with what comes to it, or the activation
    errors: dict[str, float] = field(default_factory=dict)
    failure: str | None = None  # the rule that was broken
    refusal: str | None = None  # why the backend does not take this request

    @property
    def cpu_half_gradients(self) -> bool:
        """Whether the rule's exception holds, which is for attention."""
        return self.backend == "cpu" and "attention" in self.op

    def __str__(self) -> str:
        figures = " ".join(f"{name} {error:5.2f}" for name, error in self.errors.items())
        answer = self.failure or (f"--  {self.refusal}" if self.refusal else f"ok  {figures}")
        return f"{self.op:16} {self.backend:7} {self.dtype} {self.kind:16} {answer}"


def main(as_json: bool, quick: bool = False) -> int:
    """Print a line per request as it is done, or all as JSON; 1 if any failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = list(requests(device, QUICK if quick else whole()))
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        compile_ahead(asked)
    rows = []
    for row, cases in asked:
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


def whole() -> Table:
    extras = tuple(itertools.product(testing.BIASES, (0.0, 0.1)))[1:]
    return Table(tuple(testing.DTYPES), ATTENTION_SHAPES, tuple(testing.MASKS), PACKED_MASKS, extras, tuple(ACTIVATIONS))


Answer = tuple[dict[str, Tensor], Callable[[], testing.Yardstick]]  # results, and what they are held to
Case = partial[Answer]  # of a function of this module, with its device as a keyword; raises NotImplementedError where refused


def requests(device: str, table: Table) -> Iterator[tuple[Row, list[Case]]]:
    """Every row with its cases, one per shape."""
    slow = ("triton", "cuda") if device == "cpu" else ()  # interpreted or emulated
    for backend, dtype in itertools.product(_backends(attention.BACKENDS, device), table.dtypes):
        given = backend, testing.DTYPES[dtype]
        shapes = table.shapes[: max(1, len(table.shapes) // 2)] if backend in slow else table.shapes
        for mask in table.masks:
            cases = [partial(_attention, *given, mask, shape, device=device) for shape in shapes]
            yield Row(device, "attention", backend, dtype, mask), cases
        for mask in table.packed_masks:
            yield Row(device, "varlen_attention", backend, dtype, mask), [partial(_packed, *given, mask, device=device)]
        for bias, dropout in table.extras:
            kind = " ".join(("padding", *([bias] if bias != "none" else []), *([f"dropout {dropout}"] if dropout else [])))
            options: Any = {"bias": bias, "dropout": dropout, "device": device}
            cases = [partial(_attention, *given, "padding", shape, **options) for shape in shapes[:2]]
            yield Row(device, "attention", backend, dtype, kind), [*cases, partial(_packed, *given, "none", **options)]
    for backend, dtype in itertools.product(_backends(ffn.BACKENDS, device), table.dtypes):
        for (op, answer), activation in itertools.product((("linear", _linear), ("ffn", _ffn)), table.activations):
            case = partial(answer, backend, testing.DTYPES[dtype], activation, device=device)
            yield Row(device, op, backend, dtype, activation), [case]
    for backend, dtype in itertools.product(_backends(norm.BACKENDS, device), table.dtypes):
        for op in ("add_layer_norm", "add_rms_norm"):
            case = partial(_norm, backend, testing.DTYPES[dtype], op == "add_rms_norm", device=device)
            yield Row(device, op, backend, dtype, "with the sum"), [case]


def compile_ahead(asked: list[tuple[Row, list[Case]]]) -> None:
    from fastattn.kernels.triton import ahead
    from fastattn.kernels.triton.launch import gpu_here

    gpu = gpu_here()
    failures = ahead.compile_ahead(jobs(asked, gpu), gpu.sm).failures
    for failure in failures:  # the row says the same when its turn comes
        print(f"not compiled: {failure.error}", file=sys.stderr)


def jobs(asked: list[tuple[Row, list[Case]]], gpu: GPU) -> list[Callable[[], list[Launch]]]:
    """For `ahead.compile_ahead`: what each case of a Triton row launches on that GPU, made from tensors of the CPU."""
    from fastattn.launches import launches_of

    cases = [case for row, cases in asked if row.backend == "triton" for case in cases]
    return [partial(launches_of, partial(case.func, *case.args, device="cpu"), gpu) for case in cases]


def _backends(names: tuple[str, ...], device: str) -> list[str]:
    states = info()["backends"]
    return [name for name in names if states[name]["available"] and (name != "cpu" or device == "cpu")]


def _run(row: Row, cases: list[Case]) -> None:
    refusals = []
    for case in cases:
        try:
            results, yardstick = case()
            found = testing.assert_accurate(results, yardstick(), cpu_half_gradients=row.cpu_half_gradients)
            row.errors = {name: max(value, row.errors.get(name, 0.0)) for name, value in found.items()}
        except NotImplementedError as error:
            refusals.append(str(error).splitlines()[-1].strip())
        except Exception as error:  # a broken rule, or a kernel that does not compile or launch: the other rows go on
            row.failure = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            return
    if len(refusals) == len(cases):
        row.refusal = refusals[0]


def _attention(
    backend: str, dtype: torch.dtype, mask: str, shape: tuple[int, int, int, int, int], *,
    bias: str = "none", dropout: float = 0.0, device: str,
) -> Answer:  # fmt: skip
    x = testing.attention_inputs(*shape, dtype, device, mask=mask, bias=bias, dropout=dropout)
    return testing.run_attention(x, backend), lambda: testing.attention_yardstick(x)


def _packed(backend: str, dtype: torch.dtype, mask: str, *, bias: str = "none", dropout: float = 0.0, device: str) -> Answer:
    lengths, longest = torch.tensor(PACKED_LENGTHS, device=device), max(PACKED_LENGTHS)
    sizes = len(lengths), 2, longest, longest, 64
    x = testing.attention_inputs(*sizes, dtype, device, mask=mask, bias=bias, dropout=dropout)
    padding = masks.padding(lengths, lengths)
    padded = replace(x, mask=padding if x.mask is None else padding & x.mask)
    return testing.run_varlen_attention(x, lengths, backend), lambda: testing.attention_yardstick(padded)


def _linear(backend: str, dtype: torch.dtype, activation: str, *, device: str) -> Answer:
    x, weight, bias, residual, dy = _tensors(dtype, device, (2, 33, 65), (96, 65), (96,), (2, 33, 96), (2, 33, 96))
    results = testing.run_linear(x, weight, bias, residual, dy, activation, backend)
    return results, lambda: testing.linear_yardstick(x, weight, bias, residual, dy, activation)


def _ffn(backend: str, dtype: torch.dtype, activation: str, *, device: str) -> Answer:
    x, w1, b1, w2, b2, dy = _tensors(dtype, device, (2, 33, 65), (96, 65), (96,), (40, 96), (40,), (2, 33, 40))
    results = testing.run_ffn(x, w1, b1, w2, b2, dy, activation, backend)
    return results, lambda: testing.ffn_yardstick(x, w1, b1, w2, b2, dy, activation)


def _norm(backend: str, dtype: torch.dtype, rms: bool, *, device: str) -> Answer:
    x, residual, weight, bias, dy, dsum = _tensors(dtype, device, (2, 33, 96), (2, 33, 96), (96,), (96,), *[(2, 33, 96)] * 2)
    given = x, residual, weight, None if rms else bias, dy, dsum
    return testing.run_norm(*given, EPS, backend, rms=rms), lambda: testing.norm_yardstick(*given, EPS, rms=rms)


def _tensors(dtype: torch.dtype, device: str, *sizes: tuple[int, ...]) -> list[Tensor]:
    """Seeded normal tensors; a matrix is scaled so that its products keep their size."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=g).div(size[-1] ** 0.5 if len(size) == 2 else 1).to(device, dtype) for size in sizes]
