"""`sdpa_override` changes nothing that code can see: handlers, modes, tracers and layouts are as with torch's own function."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.integrations.torch_sdpa import sdpa_override

TORCH = F.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def compile_afresh():
    torch._dynamo.reset()


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


def heads(M: int = 5, N: int = 5, D: int = 8) -> list[torch.Tensor]:
    return [torch.randn(2, 4, length, D) for length in (M, N, N)]


# __torch_function__: of arguments, of modes


class Tagged(torch.Tensor):
    """A subclass whose handler meets torch's function in each of the ways that handlers look for it."""

    calls: list[tuple] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if {TORCH: True}.get(func):
            cls.calls.append((func is F.scaled_dot_product_attention, len(args), sorted(kwargs)))
            if not args:
                raise KeyError("this handler finds its tensors by position")
            plain = [x.as_subclass(torch.Tensor) if isinstance(x, Tagged) else x for x in args]
            return F.scaled_dot_product_attention(*plain, **kwargs) + 1
        return super().__torch_function__(func, types, args, kwargs)


class AddOne(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out + 1 if func is F.scaled_dot_product_attention else out


BIASES = [(causal_upper_left, 3, 5), (causal_upper_left, 5, 3), (causal_lower_right, 3, 5)]


@pytest.mark.parametrize(("variant", "M", "N"), BIASES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_causal_bias(variant, M, N, compiled):
    q, k, v = heads(M, N)
    function = torch.compile(_attend, backend="aot_eager", fullgraph=True) if compiled else _attend
    leaves = [[x.clone().requires_grad_() for x in (q, k, v)] for _ in range(2)]
    expected = TORCH(*leaves[0], attn_mask=variant(M, N))
    with sdpa_override() as record:
        out = function(*leaves[1], variant(M, N))
        assert F.scaled_dot_product_attention is not TORCH
    close(out, expected)
    assert type(out) is type(expected) is torch.Tensor
    theirs, ours = (torch.autograd.grad(x.square().sum(), of) for x, of in zip((expected, out), leaves, strict=True))
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    assert record.calls == 0 and (compiled or list(record.fallbacks.values()) == [1])
    with sdpa_override(strict=True), pytest.raises(NotImplementedError, match="CausalBias"):
        F.scaled_dot_product_attention(q, k, v, variant(M, N))


def _attend(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, mask)


@pytest.mark.parametrize("position", range(4))
def test_handlers_of_arguments_meet_torchs_function(position):
    arguments = [*heads(), torch.ones(5, 5).tril().bool()]
    expected = TORCH(*arguments, scale=0.3) + 1
    arguments[position] = arguments[position].as_subclass(Tagged)
    Tagged.calls.clear()
    with sdpa_override() as record:
        out = F.scaled_dot_product_attention(*arguments, scale=0.3)
        by_name = dict(zip(("query", "key", "value", "attn_mask"), arguments, strict=True))
        with pytest.raises(KeyError, match="by position"):
            F.scaled_dot_product_attention(**by_name)
        F.scaled_dot_product_attention(*heads())  # the attribute is ours again, after an exception too
    close(out, expected)
    assert Tagged.calls == [(True, 4, ["scale"]), (True, 0, sorted(by_name))]  # the arguments as the caller wrote them
    [(reason, count)] = record.fallbacks.items()
    assert "Tagged" in reason and (record.calls, count) == (1, 2)
    assert F.scaled_dot_product_attention is TORCH


def test_parameters_have_no_handler():
    q, k, v = map(nn.Parameter, heads())
    with sdpa_override(strict=True) as record:
        close(F.scaled_dot_product_attention(q, k, v), TORCH(q, k, v))
    assert record.calls == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_function_modes_see_torchs_function(compiled):
    q, k, v = heads()
    function = torch.compile(_attend, backend="aot_eager", fullgraph=True) if compiled else _attend
    with sdpa_override() as record, AddOne(), torch.device("cpu"):
        out = function(q, k, v)
    close(out, TORCH(q, k, v) + 1)
    assert record.calls == 0 and (compiled or "AddOne" in next(iter(record.fallbacks)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_changes_nothing(device):
    q, k, v = heads()
    keep = torch.rand(5, 5) > 0.3
    with sdpa_override(strict=True) as record, torch.device(device):
        outs = [F.scaled_dot_product_attention(q, k, v, keep), F.scaled_dot_product_attention(q, k, v, is_causal=True)]
    assert record.calls == 2
    for out, expected in zip(outs, (TORCH(q, k, v, keep), TORCH(q, k, v, is_causal=True)), strict=True):
        close(out, expected)
    with sdpa_override() as record, torch.device(device):
        _attend(q.as_subclass(Tagged), k, v)
    assert record.calls == 0 and list(record.fallbacks.values()) == [1]


def test_other_threads_while_a_handler_runs():
    q, k, v = heads()
    inside, leave = threading.Event(), threading.Event()

    class Waits(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                inside.set()
                assert leave.wait(10)
                assert func is F.scaled_dot_product_attention
            return func(*args, **(kwargs or {}))

    def run() -> None:
        with Waits():
            outs.append(F.scaled_dot_product_attention(q, k, v))

    outs: list[torch.Tensor] = []
    with sdpa_override() as outer:
        thread = threading.Thread(target=run)
        thread.start()
        assert inside.wait(10)
        with sdpa_override() as inner:  # a block that opens and ends meanwhile, and a handler that does
            outs.append(F.scaled_dot_product_attention(q, k, v))
            F.scaled_dot_product_attention(q.as_subclass(Tagged), k, v)
        assert F.scaled_dot_product_attention is TORCH and inner.calls == 0
        leave.set()
        thread.join()
        outs.append(F.scaled_dot_product_attention(q, k, v))
        assert outer.calls == 1
    assert F.scaled_dot_product_attention is TORCH
    assert len(outs) == 3
    for out in outs:
        close(out, TORCH(q, k, v))


def test_torchs_tables_keep_torchs_function():
    """They are made once, at first use, which may be inside a block."""
    torch.overrides.get_testing_overrides.cache_clear()
    torch.overrides._get_overridable_functions.cache_clear()
    with sdpa_override():
        torch.overrides.get_overridable_functions()
    assert TORCH in torch.overrides.get_overridable_functions()[F]
    assert TORCH in torch.overrides.get_testing_overrides()
    assert torch.overrides.resolve_name(TORCH) == "torch.nn.functional.scaled_dot_product_attention"


# __torch_dispatch__


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_torchs_ops():
    q, k, v = heads()
    with Ops() as expected:
        F.scaled_dot_product_attention(q, k, v)
    with sdpa_override() as record, Ops() as mode:
        out = F.scaled_dot_product_attention(q, k, v)
    assert mode.seen == expected.seen != []
    assert record.calls == 0 and list(record.fallbacks.values()) == [1]
    close(out, TORCH(q, k, v))


def test_dispatching_arguments_are_left_to_torch():
    q, k, v = heads()
    pair = TwoTensor(q, 2 * q)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
    with sdpa_override() as record:
        out = F.scaled_dot_product_attention(pair, k, v)
        shadow = F.scaled_dot_product_attention(fake, fake, fake)
        with FakeTensorMode():
            F.scaled_dot_product_attention(*heads())
    close(out.a, TORCH(q, k, v))
    close(out.b, TORCH(2 * q, k, v))
    assert type(shadow) is type(fake) and shadow.stride() == TORCH(q, q, q).stride()
    assert record.calls == 0 and sum(record.fallbacks.values()) == 3
    assert any("TwoTensor" in reason for reason in record.fallbacks)


# what turns calls into programs


class Attend(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_and_traced_programs_hold_torchs_op():
    q, k, v = heads()
    layer = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x = torch.randn(2, 6, 32)
    with sdpa_override() as record:
        scripted = torch.jit.script(Attend())
        scripted_layer = torch.jit.script(layer)
        assert (record.calls, record.fallbacks) == (0, {})
        traced = torch.jit.trace(Attend(), heads(), check_trace=False)
        inside = scripted(q, k, v), traced(q, k, v), scripted_layer(x, x, x, need_weights=False)[0]
    assert record.calls == 0 and list(record.fallbacks.values()) == [1]
    outside = scripted(q, k, v), traced(q, k, v), scripted_layer(x, x, x, need_weights=False)[0]
    expected = TORCH(q, k, v, is_causal=True)
    for program, outs in ((scripted, (inside[0], outside[0])), (traced, (inside[1], outside[1]))):
        graph = str(program.inlined_graph)
        assert "aten::scaled_dot_product_attention" in graph and "fastattn::" not in graph
        for out in outs:
            close(out, expected)
    for out in (inside[2], outside[2]):
        close(out, layer(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_hold_torchs_op(strict):
    q, k, v = heads()
    with sdpa_override() as record:
        program = torch.export.export(Attend(), (q, k, v), strict=strict)
    assert "aten.scaled_dot_product_attention" in str(program.graph) and "fastattn" not in str(program.graph)
    assert record.calls == 0 and (strict or list(record.fallbacks.values()) == [1])
    close(program.module()(q, k, v), TORCH(q, k, v, is_causal=True))


def test_symbolic_traces_hold_torchs_function():
    q, k, v = heads()
    with sdpa_override() as record:
        program = torch.fx.symbolic_trace(Attend())
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [TORCH]
    assert record.calls == 0 and list(record.fallbacks.values()) == [1]
    close(program(q, k, v), TORCH(q, k, v, is_causal=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_fused_path_for_inference():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    encoder = nn.TransformerEncoder(layer, 2).eval()
    attention = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x, hidden = torch.randn(2, 6, 32), torch.arange(6) >= torch.tensor([[6], [4]])
    calls = [
        lambda: layer(x),
        lambda: layer(x, src_key_padding_mask=hidden),
        lambda: encoder(x, src_key_padding_mask=hidden),
        lambda: attention(x, x, x, need_weights=False)[0],
        lambda: attention(x, x, x, key_padding_mask=hidden)[0],
    ]
    with torch.no_grad():
        expected = [call() for call in calls]
        with sdpa_override() as record:
            for call, result in zip(calls, expected, strict=True):
                assert torch.equal(call(), result)
    assert (record.calls, record.fallbacks) == (0, {})  # as documented: these never call the function


# layouts of results

ORDERS = {  # of the memory of a query (B, H, M, D)
    "BHMD": lambda B, H, M, D: torch.randn(B, H, M, D),
    "BMHD": lambda B, H, M, D: torch.randn(B, M, H, D).transpose(1, 2),
    "packed": lambda B, H, M, D: torch.randn(B, M, 3, H, D).permute(2, 0, 3, 1, 4)[0],
    "packed by head": lambda B, H, M, D: torch.randn(B, H, M, 3 * D)[..., :D],
    "MBHD": lambda B, H, M, D: torch.randn(M, B, H, D).permute(1, 2, 0, 3),
    "HBMD": lambda B, H, M, D: torch.randn(H, B, M, D).transpose(0, 1),
    "MHBD": lambda B, H, M, D: torch.randn(M, H, B, D).permute(2, 1, 0, 3),
    "BHDM": lambda B, H, M, D: torch.randn(B, H, D, M).transpose(2, 3),
    "one sequence": lambda B, H, M, D: torch.randn(1, M, H, D).transpose(1, 2).expand(B, H, M, D),
    "one head": lambda B, H, M, D: torch.randn(B, 1, M, D).expand(B, H, M, D),
    "one query": lambda B, H, M, D: torch.randn(B, H, 1, D).expand(B, H, M, D),
}
OTHERS = {  # key, value and keywords for a query of length M
    "self": lambda M: (torch.randn(2, 4, M, 8), torch.randn(2, 4, M, 8), {}),
    "causal": lambda M: (torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8), {"is_causal": True}),
    "mask": lambda M: (torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8), {"attn_mask": torch.rand(M, 7) > 0.3}),
    "mask per head": lambda M: (torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8), {"attn_mask": torch.rand(4, M, 7) > 0.3}),
    "grouped": lambda M: (torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8), {"enable_gqa": True}),
    "Dv": lambda M: (torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6), {}),
    "key BHDM": lambda M: (torch.randn(2, 4, 8, 7).transpose(2, 3), torch.randn(2, 4, 7, 8), {}),
    "no keys": lambda M: (torch.randn(2, 4, 0, 8), torch.randn(2, 4, 0, 8), {}),
}


def layout(x: torch.Tensor) -> list[int]:
    """All that a `.view` depends on."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("order", ORDERS)
def test_results_are_laid_out_as_torchs(order, other):
    for M in (5, 1):
        q = ORDERS[order](2, 4, M, 8)
        k, v, kwargs = OTHERS[other](M)
        expected = TORCH(q, k, v, **kwargs)
        for leaf in (q, q.detach().requires_grad_()):
            with sdpa_override(strict=True):
                out = F.scaled_dot_product_attention(leaf, k, v, **kwargs)
            assert layout(out) == layout(expected)
            torch.testing.assert_close(out, expected)
            assert layout(fastattn.scaled_dot_product_attention(leaf, k, v, **kwargs)) == layout(expected)


SHAPES = [(5, 8), (4, 5, 8), (3, 2, 4, 5, 8), (2, 4, 1, 8), (2, 1, 5, 8), (1, 4, 5, 8), (2, 4, 5, 1), (2, 4, 0, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_layouts_of_other_shapes(shape):
    dims = (-1, -2) if len(shape) == 2 else (-3, -2)  # swapped in memory
    for q in (torch.randn(shape), torch.randn(shape).transpose(*dims).contiguous().transpose(*dims)):
        expected = TORCH(q, q, q)
        with sdpa_override(strict=True):
            out = F.scaled_dot_product_attention(q, q, q)
        assert layout(out) == layout(expected)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("order", ["BHMD", "BMHD", "packed", "MBHD", "BHDM", "one head"])
def test_compiled_layouts_and_gradients(order, dynamic):
    q = ORDERS[order](2, 4, 5, 8)
    _, k, v = heads()
    weight = torch.randn(2, 4, 5, 8)
    leaves = [q.detach().requires_grad_() for _ in range(2)]
    expected = TORCH(leaves[0], k, v)
    (expected * weight).sum().backward()
    with sdpa_override(strict=True):
        out = torch.compile(_attend, backend="aot_eager", fullgraph=True, dynamic=dynamic)(leaves[1], k, v)
    assert layout(out) == layout(expected)
    (out * weight).sum().backward()
    close(leaves[1].grad, leaves[0].grad)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        assert layout(fastattn.scaled_dot_product_attention(*fakes)) == layout(expected)


def test_only_one_mapped_argument_under_vmap():
    q, k, v = ORDERS["MBHD"](2, 4, 5, 8), torch.randn(3, 2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    out = torch.vmap(fastattn.scaled_dot_product_attention, (None, 0, None))(q, k, v)
    for i in range(3):
        torch.testing.assert_close(out[i], TORCH(q, k[i], v))
