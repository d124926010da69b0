"""`python -m benchmarks.ahead`: the Triton kernels of `verify --quick` and of the benchmarks, compiled in parallel.

Otherwise each is compiled for seconds when it is first called, one after the other. Needs the GPU that they are for; what is
compiled lies in Triton's cache afterwards.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

import torch

import fastattn
from benchmarks import attention_providers, mask_cases, shapes, training_cases
from fastattn import verify
from fastattn.packing import Packing

CPU = torch.device("cpu")
HALF = torch.bfloat16  # what the benchmarks take on a GPU
B = 2  # sequences: of how many there are a kernel is not compiled for
REAL = 32 * 64  # tokens of a packed batch of a model
Request = Callable[[], object]


def requests() -> list[Request]:
    """What the benchmarks ask of Triton, on tensors of the CPU that hold zeros."""
    found: list[Request] = []
    for shape in shapes.ATTENTION:
        found += [functools.partial(attention, shape, fill) for fill in shape.fills]
    found += [functools.partial(masked, index) for index in range(len(mask_cases.cases(mask_cases.TINY, B, CPU)))]
    found += [functools.partial(recipe, index) for index in range(len(training_cases.RECIPES))]
    for layer in shapes.FEED_FORWARD:
        found += [functools.partial(feed_forward, layer), functools.partial(norm, layer.d, layer.tokens)]
    towers = {tower: config["model_type"] for config in shapes.CONFIGS.values() for tower in shapes.towers(config)}
    found += [functools.partial(layer_of_a_model, tower, kind == "clip") for tower, kind in towers.items()]
    return found


def attention(shape: shapes.AttentionShape, fill: float) -> None:
    lengths = None if fill == 1.0 else shapes.ragged_lengths(B, shape.S, fill)
    _attend(attention_providers.Request(B, shape.H, shape.S, shape.D, shape.causal, lengths, CPU))


def masked(index: int) -> None:
    layout = mask_cases.FULL
    structure = mask_cases.cases(layout, B, CPU)[index]
    _attend(attention_providers.Request(B, 1, layout.S, 64, False, None, CPU, structure=structure))


def recipe(index: int) -> None:
    asked = training_cases.RECIPES[index]
    learned = asked.learned()
    _attend(asked.request(B, CPU), *(() if learned is None else (_zeros(*learned).requires_grad_(),)))


def _attend(request: attention_providers.Request, *learned: torch.Tensor) -> None:
    q, k, v = (_zeros(request.B, request.S, request.H, request.D).transpose(1, 2).requires_grad_() for _ in range(3))
    out = attention_providers.ours("triton", request)(q, k, v, *learned)
    torch.autograd.grad(out, (q, k, v, *learned), torch.zeros_like(out))


def feed_forward(shape: shapes.FeedForwardShape) -> None:
    d, hidden = shape.d, shape.F
    _feed_forward(_zeros(shape.tokens, d), hidden, shape.activation)


def _feed_forward(x: torch.Tensor, hidden: int, activation: str) -> None:
    """In inference too, which keeps less."""
    d = x.shape[1]
    leaves = [t.requires_grad_() for t in (x, _zeros(hidden, d), _zeros(hidden), _zeros(d, hidden), _zeros(d))]
    y = fastattn.ffn(*leaves, activation=activation, backend="triton")
    torch.autograd.grad(y, leaves, torch.zeros_like(y))
    with torch.no_grad():
        fastattn.ffn(*leaves, activation=activation, backend="triton")


def norm(d: int, tokens: int, of_one: bool = False, with_sum: bool = False) -> None:
    leaves = [t.requires_grad_() for t in (_zeros(tokens, d), _zeros(tokens, d), _zeros(d), _zeros(d))]
    x, residual, weight, bias = leaves
    given = x, None if of_one else residual, weight, bias
    result = fastattn.add_layer_norm(*given, return_sum=with_sum, backend="triton")
    outputs = result if isinstance(result, tuple) else (result,)
    torch.autograd.grad(outputs, [t for t in given if t is not None], [torch.zeros_like(y) for y in outputs])
    with torch.no_grad():
        fastattn.add_layer_norm(*given, return_sum=with_sum, backend="triton")


def layer_of_a_model(tower: shapes.Tower, clip: bool) -> None:
    """What `accelerate` makes of a layer, its tokens packed: queries, keys and values by one product in inference, by three in
    training."""
    D = tower.hidden // tower.heads
    longest = min(tower.positions, 128)
    packing = Packing.from_lengths([longest] * (REAL // longest), longest)
    mask = fastattn.masks.causal() if tower.causal else None
    with torch.no_grad():
        q, k, v = _zeros(packing.total, 3, tower.heads, D).unbind(1)
        fastattn.varlen_attention(q, k, v, packing, mask, backend="triton")
    q, k, v = (_zeros(packing.total, tower.heads, D).requires_grad_() for _ in range(3))
    out = fastattn.varlen_attention(q, k, v, packing, mask, backend="triton")
    torch.autograd.grad(out, (q, k, v), torch.zeros_like(out))
    _feed_forward(_zeros(packing.total, tower.hidden), tower.intermediate, "quick_gelu" if clip else "gelu")
    norm(tower.hidden, packing.total)
    if clip:
        norm(tower.hidden, packing.total, of_one=True)
        norm(tower.hidden, packing.total, with_sum=True)


def _zeros(*size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=HALF)


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser("python -m benchmarks.ahead", description=__doc__).parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device here, for which kernels could be compiled")
    from fastattn.kernels.triton import ahead
    from fastattn.kernels.triton.launch import gpu_here
    from fastattn.launches import launches_of

    gpu = gpu_here()
    quick = verify.jobs(list(verify.requests("cuda", verify.QUICK)), gpu)
    compiled = ahead.compile_ahead([*quick, *(functools.partial(launches_of, request, gpu) for request in requests())], gpu.sm)
    for failure in compiled.failures:
        print(f"{failure.job}: {failure.error}")
    print(f"{compiled.variants} kernels are compiled, {len(compiled.failures)} failed")
    return 1 if compiled.failures else 0


if __name__ == "__main__":
    sys.exit(main())
