"""The two ways of the CUDA backward, one kernel and two, each made to answer the same requests; and which of them is taken."""

from dataclasses import replace

import pytest
import test_varlen
import torch
from backends import CUDA, device_of, run_backward, run_forward

from fastattn import masks, planned
from fastattn.kernels.cuda import attention, emulator, library
from fastattn.lowering import LoweredMask
from fastattn.testing import MASKS, assert_accurate, attention_inputs, attention_yardstick, run_attention

KERNELS = {"one": "attention_backward_single", "two": "attention_backward"}
H100, ADA = 227 * 1024, 99 * 1024  # bytes of shared memory of a block
pytestmark = pytest.mark.parametrize("backend", [CUDA])
both = pytest.mark.parametrize("kernels", KERNELS)
LENGTHS = [(70, 125), (97, 50), (36, 77), (130, 20)]


@pytest.fixture
def launched(monkeypatch):
    """The names of the backward kernels that are launched."""
    names, launch = [], library.launch

    def recorded(kernel, *args):
        names.extend([kernel.name] * ("backward" in kernel.name))
        return launch(kernel, *args)

    monkeypatch.setattr(library, "launch", recorded)
    return names


@pytest.fixture
def run(monkeypatch, launched, backend):
    """The results of a request whose backward takes one kernel or two."""

    def run(x, kernels):
        monkeypatch.setattr(attention, "one_kernel", lambda *sizes: kernels == "one")
        planned.PLANS.clear()
        launched.clear()
        results = run_attention(x, backend)
        assert set(launched) == {KERNELS[kernels]}
        return results

    return run


def inputs(M, N, D=32, dtype=torch.float16, **options):
    return attention_inputs(2, 2, M, N, D, dtype, device_of("cuda"), **options)


@pytest.mark.parametrize(
    ("D", "M", "N", "kernels"),
    [
        *((64, L, L, "one") for L in (50, 77, 197, 256)),
        (128, 128, 128, "one"),
        (32, 256, 256, "one"),
        (64, 257, 257, "two"),
        (128, 16, 129, "two"),
        (32, 1025, 17, "two"),
    ],
)
def test_what_is_launched(backend, launched, D, M, N, kernels):
    x = attention_inputs(1, 1, M, N, D, torch.float16, device_of("cuda"), mask="causal")
    assert_accurate(run_attention(x, backend), attention_yardstick(x))
    assert set(launched) == {KERNELS[kernels]}


def test_one_kernel_where_a_block_fits(backend):
    assert all(attention.one_kernel(64, 1024, N, ADA) == (N <= 197) for N in (1, 50, 128, 192, 193, 197, 225, 256))
    assert all(attention.one_kernel(128, 64, N, ADA) == (N <= 96) for N in (1, 96, 97, 128))
    assert attention.one_kernel(32, 1, 256, ADA) and attention.one_kernel(64, 1, 256, H100)
    assert not attention.one_kernel(64, 1025, 256, H100) and not attention.one_kernel(64, 1, 257, H100)


def test_shared_memory_is_what_the_kernels_ask_for(backend):
    module = library.module() if torch.cuda.is_available() else emulator.module()
    for D, N in attention.MOST_KEYS.items():
        for dtype in ("Half", "Bfloat16"):
            assert module.kernels[f"attention_backward_single_kernel<{dtype}, {D}>"][1] == attention.single_bytes(D, N) <= H100
            for name in ("dq", "dkdv"):
                assert module.kernels[f"attention_{name}_kernel<{dtype}, {D}>"][1] <= ADA


@pytest.mark.usefixtures("poisoned", "alone")
@both
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_with_grouped_heads(backend, run, kernels, mask):
    turn = list(MASKS).index(mask)
    D, dtype = (32, 64, 128)[turn % 3], (torch.float16, torch.bfloat16)[turn // 3 % 2]
    x = inputs(*LENGTHS[turn % 4], D, dtype, mask=mask, Hkv=1 + turn % 2, dlse=True, seed=turn)
    assert_accurate(run(x, kernels), attention_yardstick(x))


@pytest.mark.usefixtures("poisoned", "alone")
@both
@pytest.mark.parametrize(
    ("M", "N", "D"),
    [(1, 1, 32), (16, 32, 64), (17, 15, 128), (31, 33, 32), (33, 128, 64), (65, 64, 32), (160, 49, 32), (48, 127, 128)],
)
def test_ends_of_tiles(backend, run, kernels, M, N, D):
    x = attention_inputs(1, 1, M, N, D, torch.float16, device_of("cuda"), dlse=True, seed=M)
    assert_accurate(run(x, kernels), attention_yardstick(x))


@both
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_any_scale(backend, run, kernels, scale):
    x = replace(inputs(40, 70, mask="causal_padding", Hkv=1, dlse=True), scale=scale)
    assert_accurate(run(x, kernels), attention_yardstick(x))


def live_keys(x):
    """Keys (B, N) that the padding of their sequence leaves, whatever the queries see."""
    mask, N = x.lowered(), x.k.shape[2]
    j, live = torch.arange(N, device=x.k.device), torch.ones(x.k.shape[0], N, dtype=torch.bool, device=x.k.device)
    for name, holds in (("key_begin", torch.le), ("key_end", torch.gt)):
        if getattr(mask, name) is not None:
            live &= holds(getattr(mask, name)[:, None], j)
    live &= True if mask.keys is None else mask.keys
    return live & (True if mask.key_ids is None else mask.key_ids >= 0)


@pytest.mark.usefixtures("poisoned")
@both
@pytest.mark.parametrize(
    "mask", ["padding_queries", "holes", "causal", "causal_left", "window_prefix", "documents_causal", "columns_padding"]
)
def test_hidden_nan_changes_no_bit(backend, run, kernels, mask):
    for D, dtype in ((32, torch.float16), (128, torch.bfloat16)):
        x = inputs(70, 66, D, dtype, mask=mask, Hkv=1, seed=1, dlse=True)
        dead_rows = ~x.lowered().visible(2, 2, 70, 66, x.q.device).any(-1)[..., None]
        dead_keys = ~live_keys(x)[:, None, :, None]
        q, dout = (torch.where(dead_rows, float("nan"), t) for t in (x.q, x.dout))
        k, v = torch.where(dead_keys, float("inf"), x.k), torch.where(dead_keys, float("nan"), x.v)
        clean, dirty = run(x, kernels), run(replace(x, q=q, k=k, v=v, dout=dout), kernels)
        assert all(torch.equal(clean[name], dirty[name]) for name in clean)


@both
@pytest.mark.parametrize("seeing", [[0, 2], [1], []])
def test_heads_of_a_group_that_see_nothing(backend, run, kernels, seeing):
    """Each head has a list of tiles of its own, which may be empty: the first, one between, the last, all."""
    keep = torch.zeros(1, 4, 70, 90, dtype=torch.bool)
    keep[:, seeing, 3:66, 20:70] = True
    x = attention_inputs(1, 4, 70, 90, 32, torch.float16, device_of("cuda"), Hkv=1)
    x = replace(x, mask=masks.dense(keep.to(x.q.device)))
    results = run(x, kernels)
    assert_accurate(results, attention_yardstick(x))
    hidden = [head for head in range(4) if head not in seeing]
    assert (
        (results["dq"][:, hidden] == 0).all() and (results["dk"][:, :, 70:] == 0).all() and (results["dv"][:, :, :20] == 0).all()
    )


@both
@pytest.mark.parametrize("listed", [False, True])
def test_keys_beyond_the_end_weigh_nothing(backend, run, kernels, listed):
    """They are read as 0, and exp(0 - lse) is beyond fp32 for scores of -128: what it is must not matter."""
    x = inputs(20, 20)
    q, k = (torch.full_like(t, value) + t / 64 for t, value in ((x.q, 2), (x.k, -2)))
    everything = masks.dense(torch.ones(2, 2, 20, 20, dtype=torch.bool, device=q.device))
    x = replace(x, q=q, k=k, scale=1.0, mask=everything if listed else None)
    assert_accurate(run(x, kernels), attention_yardstick(x), c=256)


@both
@pytest.mark.parametrize("shape", ["odd address", "transposed", "stride 0"])
def test_layouts_change_no_bit(backend, run, kernels, shape):
    x = inputs(70, 66, mask="causal_padding", Hkv=1, dlse=True)

    def laid(t):
        if shape == "transposed":
            return t.contiguous()
        if shape == "stride 0":
            return t[:, :1].expand(t.shape)
        wide = t.new_zeros(*t.shape[:3], t.shape[3] + 1)
        wide[..., 1:] = t
        return wide[..., 1:]

    strided = replace(x, **{name: laid(getattr(x, name)) for name in ("q", "k", "v", "dout")})
    dense = replace(
        strided, **{n: getattr(strided, n).transpose(1, 2).contiguous().transpose(1, 2) for n in ("q", "k", "v", "dout")}
    )
    first, second = run(strided, kernels), run(dense, kernels)
    assert all(torch.equal(first[name], second[name]) for name in first)


@both
def test_repeat_runs_are_bit_equal(backend, run, kernels):
    x = inputs(140, 130, mask="documents", Hkv=1)
    first, second = run(x, kernels), run(x, kernels)
    assert all(torch.equal(first[name], second[name]) for name in first)


@both
def test_sizes_of_zero(backend, kernels):
    for B, M, N in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        x = attention_inputs(B, 4, M, N, 32, torch.float16, device_of("cuda"), Hkv=2, dlse=True)
        for name, gradient in run_attention(x, backend).items():
            assert name in ("out", "lse") or (gradient == 0).all()


@pytest.mark.usefixtures("poisoned", "alone")
@pytest.mark.parametrize("mask", MASKS)
def test_packed_sequences_in_two_kernels(backend, launched, monkeypatch, mask):
    """`test_varlen` has them in one."""
    monkeypatch.setattr(attention, "one_kernel", lambda *sizes: False)
    turn = list(MASKS).index(mask)
    D, Hkv, extra = (32, 64, 128)[turn % 3], 1 + turn % 2, (None, 5)[turn // 2 % 2]
    test_varlen.check(backend, *test_varlen.CROSS, mask, torch.float16, Hkv=Hkv, D=D, extra=extra, dlse=turn % 3 == 0)
    assert set(launched) == {KERNELS["two"]}


@pytest.mark.usefixtures("poisoned", "alone")
@pytest.mark.parametrize(("kernels", "longest"), [("one", 8), ("two", 8), ("two", 300)])
def test_wrong_starts_stay_inside(backend, monkeypatch, kernels, longest):
    """Kernels clamp what they are given, whatever made it: five sequences of 0, 5, 4, 0 and 0 of the nine rows."""
    monkeypatch.setattr(attention, "one_kernel", lambda *sizes: kernels == "one")
    device, T, D = device_of("cuda"), 9, 32
    x = attention_inputs(1, 2, T, T, D, torch.float16, device, Hkv=1, dlse=True)

    def results(starts):
        starts = torch.tensor(starts, dtype=torch.int32, device=device)
        mask = LoweredMask(high=1, query_starts=starts, key_starts=starts, max_queries=longest, max_keys=longest, all_rows=False)
        out, lse = run_forward(attention, x.q, x.k, x.v, mask, x.scale)
        return out, lse, *run_backward(attention, x.dout, x.dlse, x.q, x.k, x.v, out, lse, mask, x.scale)

    wrong, right = results([9, -3, 5, 2**31 - 1, -(2**31), -1]), results([0, 0, 5, 9, 9, 9])
    assert all(torch.equal(a, b) and not a.isnan().any() for a, b in zip(wrong, right, strict=True))


def test_packed_sequences_of_nothing(backend):
    """No sequence, none with a query, none with a key: nothing is launched, or nothing is seen."""
    device = device_of("cuda")
    for T, starts, M, N in ((0, [0], 4, 4), (3, [0], 4, 4), (3, [0, 0, 0], 0, 4), (3, [0, 3], 3, 0), (0, [0, 0], 3, 3)):
        x = attention_inputs(1, 2, T, T, 32, torch.float16, device)
        rows = torch.tensor(starts, dtype=torch.int32, device=device)
        mask = LoweredMask(query_starts=rows, key_starts=rows, max_queries=M, max_keys=N, all_rows=False)
        out, lse = run_forward(attention, x.q, x.k, x.v, mask, x.scale)
        gradients = run_backward(attention, x.dout, None, x.q, x.k, x.v, out, lse, mask, x.scale)
        assert (lse == float("-inf")).all() and all((t == 0).all() for t in (out, *gradients))
