"""The calls whose host time `benchmarks.overhead` takes: public functions, PyTorch's beside them, BERT's layers, parts of a call.

Every op twice, without gradients and as forward + backward; of BERT two models, one with more layers, whose difference is layers
alone: embeddings and what happens once a call drop out.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import masks
from fastattn.packing import Packing

PYTORCH, HUGGING_FACE = ", PyTorch", ", Hugging Face"  # behind the name of a figure that is not ours
FEW, MANY = 2, 10  # layers
DROPOUT = 0.1


class Setting(NamedTuple):
    """Where and how large: B sequences of L tokens, H heads of D, F hidden features of the FFN."""

    device: str
    dtype: torch.dtype
    B: int
    L: int
    H: int
    D: int
    F: int

    @property
    def hidden(self) -> int:
        return self.H * self.D

    def tensor(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=self.dtype, device=self.device)


# So small that the arithmetic of PyTorch's own kernels does not count on a CPU, and in fp32, in which their host time is least.
DRY = Setting("cpu", torch.float32, B=1, L=4, H=2, D=16, F=32)
# BERT-base on one sequence: a kernel is over before the host has issued the next one.
REAL = Setting("cuda", torch.bfloat16, B=1, L=128, H=12, D=64, F=3072)


class Case(NamedTuple):
    """A call to be timed, inside of a context that is entered before the clock starts."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager] = torch.no_grad
    launches: bool = False  # whether it must launch kernels of ours


@functools.cache
def cases(setting: Setting) -> dict[str, Case]:
    """All of them by name. Those of BERT are named after their figure and the number of layers, see `layered`."""
    found: dict[str, Case] = {}
    for name, op in ops(setting).items():
        for function, suffix in ((op.ours, ""), (op.theirs, PYTORCH)):
            if function is not None:
                ours = function is op.ours
                found[name + suffix] = Case(functools.partial(function, *op.inputs), launches=ours)
                found[f"{name} forward + backward{suffix}"] = Case(step(function, op.inputs), torch.enable_grad, ours)
    return {**found, **layers(setting), **parts(setting)}


def layered(figure: str, layers: int) -> str:
    return f"{figure}, {layers} layers"


# Ops


class Op(NamedTuple):
    """A public function, what PyTorch has for it, and the tensors that both are called with."""

    ours: Callable[..., Any]
    theirs: Callable[..., Any] | None
    inputs: tuple[Tensor, ...]


def ops(setting: Setting) -> dict[str, Op]:
    B, L, H, D, hidden, tensor = setting.B, setting.L, setting.H, setting.D, setting.hidden, setting.tensor
    heads = tuple(tensor(B, L, H, D).transpose(1, 2) for _ in range(3))
    lengths = torch.full((B,), L // 2, device=setting.device)
    keep = torch.arange(L, device=setting.device) < lengths[:, None, None, None]
    packing = Packing.from_lengths(lengths, L)
    packed = tuple(tensor(packing.total, H, D) for _ in range(3))
    x, w1, b1 = tensor(B, L, hidden), tensor(setting.F, hidden), tensor(setting.F)
    w2, b2, weight = tensor(hidden, setting.F), tensor(hidden), tensor(hidden)
    sdpa = F.scaled_dot_product_attention
    padded = functools.partial(fastattn.attention, mask=masks.padding(lengths))
    return {
        "attention": Op(fastattn.attention, sdpa, heads),
        "attention with padding": Op(padded, functools.partial(sdpa, attn_mask=keep), heads),
        "attention with dropout": Op(
            functools.partial(padded, dropout=DROPOUT), functools.partial(sdpa, attn_mask=keep, dropout_p=DROPOUT), heads
        ),
        "varlen_attention": Op(functools.partial(fastattn.varlen_attention, packing=packing), None, packed),
        "linear gelu": Op(functools.partial(fastattn.linear, activation="gelu"), linear_gelu, (x, w1, b1)),
        "add_layer_norm": Op(fastattn.add_layer_norm, add_layer_norm, (x, tensor(B, L, hidden), weight, b2)),
        "ffn": Op(fastattn.ffn, ffn, (x, w1, b1, w2, b2)),
    }


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(residual + x, weight.shape, weight, bias, 1e-12)


def ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)


def step(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Forward and backward, with the gradients of all inputs."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    upstream: list[Tensor] = []

    def run() -> object:
        out = function(*leaves)
        if not upstream:
            upstream.append(torch.ones_like(out))
        return torch.autograd.grad(out, leaves, upstream[0])

    return run


# Layers


def layers(setting: Setting) -> dict[str, Case]:
    """transformers' BERT, accelerated and as it comes, with FEW and with MANY layers."""
    return {
        layered(figure, count): model(setting, figure, count, ours)
        for figure, ours in figures_of_layers()
        for count in (FEW, MANY)
    }


def figures_of_layers() -> list[tuple[str, bool]]:
    """Name, and whether it is ours."""
    kinds = ("BERT layer", "BERT layer, padded", "BERT layer training", "BERT layer training with dropout")
    return [(kind if ours else kind + HUGGING_FACE, ours) for kind in kinds for ours in (True, False)]


def model(setting: Setting, figure: str, layers: int, ours: bool) -> Case:
    import transformers

    dropout = DROPOUT if "dropout" in figure else 0.0
    settings: dict[str, Any] = {
        "hidden_size": setting.hidden, "num_hidden_layers": layers, "num_attention_heads": setting.H, "vocab_size": 64,
        "intermediate_size": setting.F, "max_position_embeddings": setting.L, "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout, "attn_implementation": "sdpa",
    }  # fmt: skip
    training = "training" in figure
    with torch.device(setting.device):
        bert: Any = transformers.BertModel(transformers.BertConfig(**settings), add_pooling_layer=False)
    bert.to(setting.dtype).train(training)
    if ours:
        fastattn.accelerate(bert, strict=True, prove=False)  # there is nothing to compare in results that hold nothing
    ids = torch.ones(setting.B, setting.L, dtype=torch.long, device=setting.device)
    real = setting.L // 2 if "padded" in figure else setting.L
    forward = functools.partial(bert, ids, attention_mask=(torch.arange(setting.L, device=setting.device) < real).long() * ids)
    if not training:
        return Case(lambda: forward().last_hidden_state, functools.partial(inference, setting), ours)
    parameters = tuple(bert.parameters())
    upstream = setting.tensor(setting.B, setting.L, setting.hidden)
    return Case(lambda: torch.autograd.grad(forward().last_hidden_state, parameters, upstream), torch.enable_grad, ours)


@contextlib.contextmanager
def inference(setting: Setting) -> Iterator[None]:
    """On a GPU the weights of query, key and value are joined in each call; on a CPU a joined copy is kept and compared."""
    joined = mock.patch("fastattn.integrations.accelerate_layers.kept", lambda weights, *_: torch.cat(weights))
    with torch.no_grad(), joined if setting.device == "cpu" else contextlib.nullcontext():
        yield


# Parts


def parts(setting: Setting) -> dict[str, Case]:
    """Where the time of `attention` goes, each part alone: a regression names itself.

    key: the plan of a call's metadata, recalled. allocation: memory of out. launch: addresses to the launch. boundary:
    from the public function to a plan, whose key and answer are ready. autograd: the Function around a plan whose answer is.
    registered op: PyTorch's dispatcher to a plan whose answer is, where something watches.
    """
    from fastattn import planned
    from fastattn.kernels.triton import attention as kernels
    from fastattn.kernels.triton import launch
    from fastattn.lowering import NO_EXTRAS
    from fastattn.ops import attention as op

    q, k, v = ops(setting)["attention"].inputs
    none, scale = op.NO_MASK, setting.D**-0.5
    make_out = kernels.result(q, setting.D, none)
    out, lse = make_out(q), kernels.statistics(q, none, 0.0)(q)
    name = "attention", none.key, None, "auto", False, False
    kernel = kernels.forward_launch(q, k, v, out, None, none.fields, scale, launch.gpu_of(q.device))
    bound: dict[int, Any] = {}  # to what a launch is where this runs: recorded for compiling, dry, or real

    def started() -> None:
        where = id(launch._paper)
        if where not in bound:
            bound[where] = kernels.launcher(kernel, "q", kernels.KEY_TILES)
        go, handle = bound[where]
        go((handle(q), handle(k), handle(v), handle(out), None, None), none)

    trained = q.detach().requires_grad_()
    return {
        "part: key": Case(lambda: planned.recall(name, (), (q, k, v))),
        "part: allocation": Case(lambda: make_out(q)),
        "part: launch": Case(started, launches=True),
        "part: boundary": Case(lambda: fastattn.attention(q, k, v), lambda: at_hand(op, (out, lse))),
        "part: autograd": Case(
            lambda: op._record(
                trained, k, v, none, scale, "auto", False, lambda *_: (out.detach(), lse.detach()), NO_EXTRAS, None
            ),
            torch.enable_grad,
        ),
        "part: registered op": Case(
            lambda: op.forward_autograd(q, k, v, *none.fields, *NO_EXTRAS, scale, "auto", False),
            lambda: at_hand(op, (out, lse)),
        ),
    }


@contextlib.contextmanager
def at_hand(op: Any, answer: tuple) -> Iterator[None]:
    """Inside, without gradients, every call is remembered, and its plan has the answer."""

    def plan(*_: Any) -> tuple:
        return answer

    def recall(*_: Any) -> tuple:
        return plan, False

    with torch.no_grad(), mock.patch.object(op, "recall", recall), mock.patch.object(op, "forward_by_plan", plan):
        yield
