"""How much a call does on the host, by counts, not times: calls of Python and of C, allocations, crossings of the dispatcher.

Launches are replaced by nothing. The calls are those that `benchmarks.overhead` times.
"""

# ruff: noqa: E402  (without triton nothing below can be imported)
import functools
import gc
import sys
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")
import fastattn
from benchmarks import overhead_calls
from benchmarks.overhead_calls import DRY
from fastattn.kernels.triton.launch import GPU, dry
from fastattn.ops import dispatch


class Counts(NamedTuple):
    """Of one call; python and c also count what PyTorch and Triton do in Python, and each step of a generator."""

    python: int
    c: int
    allocations: int
    crossings: int  # calls of ops of ours through PyTorch's dispatcher


# The most that each may take from its second call on. Python 3.11, torch 2.13, Triton 3.7.
LIMITS = {
    "attention": Counts(python=10, c=16, allocations=1, crossings=0),
    "attention forward + backward": Counts(python=59, c=87, allocations=6, crossings=0),
    "attention with padding": Counts(python=10, c=17, allocations=1, crossings=0),
    "attention with padding forward + backward": Counts(python=59, c=88, allocations=6, crossings=0),
    "attention with dropout": Counts(python=63, c=51, allocations=2, crossings=0),
    "attention with dropout forward + backward": Counts(python=139, c=131, allocations=7, crossings=0),
    "varlen_attention": Counts(python=12, c=20, allocations=1, crossings=0),
    "varlen_attention forward + backward": Counts(python=70, c=112, allocations=6, crossings=0),
    "linear gelu": Counts(python=10, c=19, allocations=1, crossings=0),
    "linear gelu forward + backward": Counts(python=61, c=86, allocations=4, crossings=0),
    "add_layer_norm": Counts(python=10, c=20, allocations=1, crossings=0),
    "add_layer_norm forward + backward": Counts(python=60, c=91, allocations=6, crossings=0),
    "ffn": Counts(python=12, c=22, allocations=1, crossings=0),
    "ffn forward + backward": Counts(python=80, c=105, allocations=4, crossings=0),
}
ALLOCATORS = {f"{new}{kind}" for new in ("", "new_") for kind in ("empty", "zeros", "ones", "full", "empty_strided")}
ALLOCATORS |= {f"{kind}_like" for kind in ("empty", "zeros", "ones", "full")} | {"clone"}


@functools.cache
def crossings() -> set[int]:
    """Ids of what calls an op of ours in C++, by its overload and by its name alone."""
    packets = [getattr(torch.ops.fastattn, name.split("::")[1]) for name in dispatch.LIBRARY._op_defs]
    return {id(op._op) for packet in packets for op in (packet, packet.default)}


def counted(call) -> Counts:
    """The least of three: what is finalised meanwhile may call Python too."""
    call()
    return min(_once(call) for _ in range(3))


def _once(call) -> Counts:
    events = []

    def note(frame, event, arg):
        if event in ("call", "c_call"):
            events.append((event, arg))

    gc.disable()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        gc.enable()
    in_c = [arg for event, arg in events if event == "c_call" and arg is not sys.setprofile]
    return Counts(
        sum(event == "call" for event, _ in events),
        len(in_c),
        sum(function.__name__ in ALLOCATORS for function in in_c),
        sum(id(function) in crossings() for function in in_c),
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
@pytest.mark.parametrize("name", overhead_calls.ops(DRY))
def test_calls_do_no_more_than_they_may(name, backward):
    op = overhead_calls.ops(DRY)[name]
    call = overhead_calls.step(op.ours, op.inputs) if backward else functools.partial(op.ours, *op.inputs)
    with dry(GPU(90)) as made, torch.set_grad_enabled(backward):
        found = counted(call)
        assert made.launches > 0
    limits = LIMITS[f"{name} forward + backward" if backward else name]
    over = {field: (got, most) for field, got, most in zip(Counts._fields, found, limits, strict=True) if got > most}
    assert not over, f"{over}, each as (counted, allowed)"


def test_the_counter_sees_each_kind():
    x = torch.zeros(2, 32)

    def one_of_each():
        len(())
        x.new_empty(2)

    def with_an_op():
        torch.ops.fastattn.add_norm_forward(x, None, None, None, 1e-6, False, False, "eager")

    assert counted(one_of_each) == (1, 2, 1, 0)
    assert counted(with_an_op).crossings == 2  # to the entry for autograd, and from there to the backend
    with dry(GPU(90)):
        before = counted(lambda: fastattn.add_layer_norm(x, x, None, None))
        after = counted(lambda: (len(()), fastattn.add_layer_norm(x, x, None, None)))
    assert after == before._replace(c=before.c + 1)


def test_dry_counts_launches_and_leaves_nothing_behind():
    q = torch.randn(1, 2, 8, 16)
    with torch.no_grad():
        expected = fastattn.attention(q, q, q, backend="cpu")
        with dry(GPU(90)) as made:
            fastattn.attention(q, q, q)
            fastattn.attention(q, q, q, backend="triton")
            assert made.launches == 2 and fastattn.explain(q, q, q).backend == "triton"
        assert torch.equal(fastattn.attention(q, q, q), expected) and made.launches == 2
        assert fastattn.explain(q, q, q).backend == "cpu"
