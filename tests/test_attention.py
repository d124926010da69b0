"""Every backend of attention against the fp64 specification: values, gradients, hidden NaN, strides, sizes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from backends import BACKENDS, CUDA, TRITON, device_of, dtype_of, head_dim_of
from graphs import assert_replay_follows
from guarded import assert_no_read_beyond_the_end

import fastattn
from fastattn import masks
from fastattn.lowering import LoweredMask
from fastattn.testing import COLD, HOT, MASKS, assert_accurate, attention_inputs, attention_yardstick, run_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [(1, 1), (17, 17), (63, 63), (64, 64), (65, 65), (77, 77), (129, 129), (197, 197), (5, 66), (66, 5)]
LENGTHS += [(77, 78), (130, 128)]  # diagonals 1 and -2: one key beyond, and one pair short of, a tile of 64
HEAD_DIMS = [64, 32, 40, 16, 80, 128]
INF = float("inf")

# around the 16 queries of a warp and the 128 and 288 keys that CUDA blocks hold
CUDA_LENGTHS = [(L, L) for L in (1, 16, 17, 50, 77, 128, 129, 197, 257)] + LENGTHS[-4:]


def cases(lengths, head_dims, dtypes):
    """Every mask with every second length; head dimension, dtype, size of the scores and the gradient of lse take turns."""
    found = []
    for i, mask in enumerate(MASKS):
        for n, (M, N) in enumerate(lengths[i % 2 :: 2]):
            D, dtype = head_dims[(i + n) % len(head_dims)], dtypes[(i + n + n // 3) % len(dtypes)]
            found.append((mask, M, N, D, dtype, 4 if (i + n) % 4 == 0 else 1, n % 2 == 0))
    return found


TRITON_CASES = [(mask, M, N, D if M < 100 else 32, *rest) for mask, M, N, D, *rest in cases(LENGTHS, HEAD_DIMS, DTYPES)]
CUDA_CASES = cases(CUDA_LENGTHS, (64, 32, 128), DTYPES[1:])


def check(backend, B, H, M, N, D, dtype, mask, amplitude=1, dlse=False):
    x = attention_inputs(B, H, M, N, D, dtype, device_of(backend), mask=mask, amplitude=amplitude, dlse=dlse)
    c = HOT if amplitude > 1 else COLD
    assert_accurate(run_attention(x, backend), attention_yardstick(x), c=c, cpu_half_gradients=backend == "cpu")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_matches_specification(backend, mask, dtype):
    for i, (M, N) in enumerate(LENGTHS):
        check(backend, 2, 2, M, N, HEAD_DIMS[i % 6], dtype, mask, 4 if i % 3 == 0 else 1, dlse=i % 2 == 0)


@pytest.mark.usefixtures("poisoned", "alone")
@pytest.mark.parametrize(("mask", "M", "N", "D", "dtype", "amplitude", "dlse"), TRITON_CASES)
@pytest.mark.parametrize("backend", [TRITON])
def test_triton_matches_specification(backend, mask, M, N, D, dtype, amplitude, dlse):
    check(backend, 2, 1, M, N, D, dtype, mask, amplitude, dlse)


@pytest.mark.usefixtures("poisoned", "alone")
@pytest.mark.parametrize(("mask", "M", "N", "D", "dtype", "amplitude", "dlse"), CUDA_CASES)
@pytest.mark.parametrize("backend", [CUDA])
def test_cuda_matches_specification(backend, mask, M, N, D, dtype, amplitude, dlse):
    check(backend, 2, 1, M, N, D, dtype, mask, amplitude, dlse)


@pytest.mark.usefixtures("poisoned", "alone")
@pytest.mark.parametrize("mask", ["none", "causal_left", "holes"])
@pytest.mark.parametrize("backend", [CUDA])
def test_cuda_at_every_length_to_64(backend, mask):
    for L in range(1, 65):
        check(backend, 1, 1, L, L, (32, 64, 128)[L % 3], DTYPES[1 + L // 3 % 2], mask)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mask", ["none", "causal_padding", "window_prefix", "documents", "columns_padding", "dense"])
@pytest.mark.parametrize(("B", "H", "Hkv"), [(1, 4, 2), (2, 3, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads(backend, B, H, Hkv, mask):
    D = head_dim_of(backend)
    for M, N in ((33, 70), (70, 33)):
        x = attention_inputs(B, H, M, N, D, dtype_of(backend), device_of(backend), Hkv=Hkv, mask=mask, dlse=M > N)
        results = run_attention(x, backend)
        assert_accurate(results, attention_yardstick(x), cpu_half_gradients=backend == "cpu")
        for name in ("out", "dq", "dk", "dv"):
            assert results[name].transpose(1, 2).is_contiguous(), f"{name} lives in (B, L, H, D) memory"


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("D", "Dv"), [(40, 40), (72, 72), (80, 80), (88, 88), (96, 96), (24, 64), (64, 16), (128, 1)])
@pytest.mark.parametrize("backend", ["eager", "cpu", TRITON])
def test_head_dimensions(backend, D, Dv):
    for dtype, mask in ((torch.float32, "causal_padding"), (torch.bfloat16, "window")):
        x = attention_inputs(1, 2, 37, 41, D, dtype, device_of(backend), Hkv=1, Dv=Dv, mask=mask)
        assert_accurate(run_attention(x, backend), attention_yardstick(x), cpu_half_gradients=backend == "cpu")


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "holes", "causal_left", "window_prefix", "documents", "dense"])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_gradcheck(backend, mask):
    x = attention_inputs(2, 4, 5, 7, 4, torch.float64, mask=mask, Hkv=2, Dv=3)

    def function(q, k, v):
        out, lse = fastattn.attention(q, k, v, x.mask, return_lse=True, backend=backend)
        return out, torch.where(lse == -INF, 0, lse)

    assert torch.autograd.gradcheck(function, tuple(t.contiguous().requires_grad_() for t in (x.q, x.k, x.v)))


def hide(x, mask_name):
    """The same inputs with NaN and Inf wherever the mask promises that they reach nothing."""
    B, H, M, N = *x.q.shape[:3], x.k.shape[2]
    visible = x.lowered().visible(B, H, M, N, x.q.device)
    if mask_name.startswith("causal"):  # only keys that padding hides are promised, and rows that see nothing
        visible_keys = x.lowered()._replace(low=None, high=None).visible(B, H, M, N, x.q.device).any(-2)
    else:
        visible_keys = visible.any(-2)
    dead_rows, dead_keys = ~visible.any(-1)[..., None], ~visible_keys[..., None]
    q, dout = (torch.where(dead_rows, float("nan"), t) for t in (x.q, x.dout))
    k, v = (torch.where(dead_keys, value, t) for t, value in ((x.k, INF), (x.v, float("nan"))))
    return type(x)(q, k, v, dout, x.dlse, x.mask, x.scale)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("mask", ["padding", "padding_queries", "left", "holes", "causal", "causal_padding", "causal_left"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_nan_changes_no_bit(backend, mask):
    for dtype in (dtype_of(backend), torch.bfloat16):
        x = attention_inputs(3, 1, 70, 66, head_dim_of(backend), dtype, device_of(backend), mask=mask, seed=1)
        clean, dirty = run_attention(x, backend), run_attention(hide(x, mask), backend)
        for name, tensor in clean.items():
            assert torch.equal(tensor, dirty[name]), name


@pytest.mark.parametrize("fields", ["key_begin", "key_end", "query_end", "key_begin key_end", "key_begin query_end"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_range_alone(backend, causal, fields):
    """No constructor makes every combination, `&` does: each bound must hold by itself."""
    device = device_of(backend)
    x = attention_inputs(2, 1, 70, 133, head_dim_of(backend), dtype_of(backend), device, dlse=True)
    ends = {"key_begin": [5, 66], "key_end": [130, 71], "query_end": [70, 3]}
    ranges = {name: torch.tensor(ends[name], dtype=torch.int32, device=device) for name in fields.split()}
    x = replace(x, mask=masks.Mask(high_bottom_right=0 if causal else None, **ranges))
    assert_accurate(run_attention(x, backend), attention_yardstick(x), cpu_half_gradients=backend == "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_keys(backend):
    device = device_of(backend)
    x = attention_inputs(2, 1, 5, 4, head_dim_of(backend), dtype_of(backend), device)
    mask = masks.padding(torch.tensor([0, 4], device=device)) & masks.causal()
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    out, lse = fastattn.attention(q, k, v, mask, return_lse=True, backend=backend)
    assert (out[0] == 0).all() and (lse[0] == -INF).all()
    assert (out[1, :, 0] == 0).all() and (lse[1, :, 0] == -INF).all() and torch.isfinite(lse[1, :, 1:]).all()
    for grad in torch.autograd.grad(out.sum() + torch.where(lse == -INF, 0, lse).sum(), [q, k, v]):
        assert (grad[0] == 0).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_visible_key_per_sequence_is_copied_exactly(backend, dtype):
    device = device_of(backend)
    q, k, v = torch.randn(3, 70, 2, 70, 32).to(device, dtype)
    keep = torch.eye(70, dtype=torch.bool, device=device).roll(3, 0)
    out = fastattn.attention(q, k, v, masks.key_padding(keep), backend=backend)
    only = (torch.arange(70, device=device) - 3) % 70
    expected = v[torch.arange(70, device=device), :, only]
    assert torch.equal(out, expected[:, :, None].expand_as(out))


@pytest.mark.parametrize("backend", ["eager", "cpu", TRITON])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_one_visible_key_is_copied_exactly(backend, dtype):
    device = device_of(backend)
    v = torch.randn(1, 1, 9, 16).to(device, dtype)
    q, k = torch.randn(2, 1, 1, 9, 16).to(device, dtype)
    visible = torch.eye(9, dtype=torch.bool, device=device).roll(3, 0)[None, None]
    out = fastattn.attention(q, k, v, visible, backend=backend)
    assert torch.equal(out, v.roll(3, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_integers_are_exact(backend):
    device = device_of(backend)
    D, dtype = head_dim_of(backend), dtype_of(backend)
    q = torch.zeros(1, 1, 8, D, device=device, dtype=dtype)  # equal scores: each row is the mean of 4 small integers
    v = torch.randint(-2, 3, (1, 1, 4, D)).to(device, dtype) * 4
    out, lse = fastattn.attention(q, torch.randn_like(v), v, return_lse=True, backend=backend)
    assert torch.equal(out, v.mean(2, keepdim=True).expand_as(out))
    assert torch.allclose(lse, torch.full_like(lse, 4.0).log())


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (1, 1, 0, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend, shape):
    B, H, M, N = shape
    device = device_of(backend)
    D, options = head_dim_of(backend), {"device": device, "dtype": dtype_of(backend), "requires_grad": True}
    q = torch.randn(B, H, M, D, **options)
    k, v = (torch.randn(B, H, N, D, **options) for _ in range(2))
    for mask in (None, masks.causal(), masks.padding(torch.full((B,), N, device=device))):
        out, lse = fastattn.attention(q, k, v, mask, return_lse=True, backend=backend)
        assert out.shape == (B, H, M, D) and (out == 0).all() and (lse == -INF).all()
        for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), [q, k, v]), strict=True):
            assert grad.shape == x.shape and (grad == 0).all()


def strided(kind, D, options):
    """q, k, v (2, 2, 33, D) in the memory layouts that models hand over."""
    base = torch.randn(2, 33, 3, 2, D, **options)
    if kind == "packed":
        return [base[:, :, i].transpose(1, 2) for i in range(3)]
    if kind == "heads outside":
        return [x.transpose(1, 2).contiguous() for x in base.unbind(2)]
    if kind == "sequence first":
        return [x.transpose(0, 1).contiguous().permute(1, 2, 0, 3) for x in base.unbind(2)]
    if kind == "stride 0":
        return [x[:1].expand(2, -1, -1, -1).transpose(1, 2) for x in base.unbind(2)]
    if kind == "odd address":
        flat = torch.randn(3 * 2 * 2 * 33 * (D + 1) + 1, **options)[1:].view(3, 2, 2, 33, D + 1)
        return list(flat[..., :D])
    if kind == "last stride 2":
        return [x.transpose(1, 2) for x in torch.randn(3, 2, 33, 2, 2 * D, **options)[..., ::2]]
    raise ValueError(kind)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("kind", ["packed", "heads outside", "sequence first", "stride 0", "odd address", "last stride 2"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend, kind):
    device = device_of(backend)
    D, dtype = head_dim_of(backend), dtype_of(backend)
    q, k, v = strided(kind, D, {"device": device, "dtype": dtype})
    mask = masks.causal() & masks.padding(torch.tensor([20, 33], device=device))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    dense = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k, v)]
    results = []
    for args in (leaves, dense):
        out, lse = fastattn.attention(*args, mask, return_lse=True, backend=backend)
        for x in (out, *torch.autograd.grad(out.sum(), args, retain_graph=True)):  # stride-0 dout
            assert x.transpose(1, 2).is_contiguous(), "outputs and gradients live in (B, L, H, D) memory"
            results.append(x)
        dout = torch.randn(2, 2, D, 33, generator=torch.Generator(device).manual_seed(3), device=device).to(dtype).mT
        results += [out, lse, *torch.autograd.grad(out, args, dout)]  # transposed dout
    half = len(results) // 2
    for strided_result, dense_result in zip(results[:half], results[half:], strict=True):
        torch.testing.assert_close(strided_result, dense_result, rtol=0, atol=2e-6 if dtype == torch.float32 else 0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_the_stride_of_one_element(backend):
    """A head dimension of 1 may have any last stride, which says nothing of where results lie."""
    q = torch.randn(8).as_strided((1, 2, 1, 1), (2, 1, 2, 2)).requires_grad_()
    k, v = torch.randn(1, 2, 3, 2)[..., :1].requires_grad_(), torch.randn(1, 2, 3, 5)[..., 1:4].requires_grad_()
    out = fastattn.attention(q, k, v, backend=backend)
    expected = torch.softmax(q @ k.mT, -1) @ v
    torch.testing.assert_close(out, expected)
    grads, expected_grads = (torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (out, expected))
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.7, 3.0])
def test_any_finite_scale(backend, scale):
    x = attention_inputs(1, 2, 20, 20, head_dim_of(backend), dtype_of(backend), device_of(backend), mask="causal_padding")
    x = type(x)(x.q, x.k, x.v, x.dout, x.dlse, x.mask, scale)
    assert_accurate(run_attention(x, backend), attention_yardstick(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bounds_far_beyond_any_length(backend):
    x = attention_inputs(1, 1, 20, 20, head_dim_of(backend), dtype_of(backend), device_of(backend), dlse=True)
    for mask in (masks.window(2**40, 0), masks.window(0, 2**40) & masks.prefix_lm(torch.tensor([5], device=x.q.device))):
        y = replace(x, mask=mask)
        assert_accurate(run_attention(y, backend), attention_yardstick(y))
    y = replace(x, mask=masks.window(-(2**40), None))  # nothing is visible
    assert not run_attention(y, backend)["out"].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeat_runs_are_bit_equal(backend):
    x = attention_inputs(2, 1, 70, 70, 32, dtype_of(backend), device_of(backend), mask="causal_padding")
    first, second = run_attention(x, backend), run_attention(x, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_is_bit_equal(backend):
    x = attention_inputs(2, 1, 33, 70, head_dim_of(backend), dtype_of(backend), device_of(backend), mask="window_prefix")
    leaves = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
    out = fastattn.attention(*leaves, x.mask, backend=backend)
    first, second = (torch.autograd.grad(out, leaves, x.dout, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="races show on a GPU, in many runs of many blocks")
@pytest.mark.parametrize("mask", ["none", "causal_padding", "documents"])
@pytest.mark.parametrize("N", [197, 300])
@pytest.mark.parametrize("backend", [TRITON, CUDA])
def test_250_runs_are_bit_equal(backend, N, mask):
    x = attention_inputs(60, 4, N, N, 64, torch.float16, "cuda", mask=mask)
    first = run_attention(x, backend)
    for _ in range(250):
        assert all(torch.equal(first[name], tensor) for name, tensor in run_attention(x, backend).items())


@pytest.mark.parametrize("mask", ["none", "causal_padding", "dense"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_log_sum_exp_far_below_zero(backend, mask):
    """Every score near -100: exp(0 - lse) of a key beyond the end would be infinite."""
    D = head_dim_of(backend)
    x = attention_inputs(1, 1, 70, 70, D, dtype_of(backend), device_of(backend), mask=mask)
    q, k = x.q.clone(), x.k.clone()
    q[..., 0], k[..., 0] = 10 * D**0.5, -10
    x = replace(x, q=q, k=k)
    assert_accurate(run_attention(x, backend), attention_yardstick(x), c=HOT, cpu_half_gradients=backend == "cpu")


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_first_calls_from_many_threads(backend):
    x = attention_inputs(1, 2, 33, 33, 16, torch.float32)
    mask = masks.rows(4, 8, 1) & masks.causal()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: run_attention(replace(x, mask=mask), backend), range(32)))
    for name, tensor in results[0].items():
        assert all(torch.equal(tensor, result[name]) for result in results)


@pytest.mark.parametrize("value", [1e4, -1e4, 6e4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_scores_stay_finite(backend, value):
    device = device_of(backend)
    D, options = head_dim_of(backend), {"device": device, "dtype": dtype_of(backend)}
    q = torch.full((1, 1, 40, D), value, **options, requires_grad=True)
    k = torch.randn(1, 1, 70, D, **options)
    out, lse = fastattn.attention(q, k, k, masks.padding(torch.tensor([69], device=device)), return_lse=True, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert torch.isfinite(out).all() and torch.isfinite(lse).all() and torch.isfinite(grad).all()


@pytest.mark.parametrize("backend", [TRITON])
def test_grid_beyond_65535_programs(backend):
    from fastattn.kernels.triton import attention
    from fastattn.kernels.triton.launch import GPU

    q, lse = torch.empty(70_000, 1, 1, 16, device="meta"), torch.empty(70_000, 1, 1, device="meta")
    launch = attention.forward_launch(q, q, q, q, lse, LoweredMask(), 1.0, GPU(90))
    assert launch.programs == 70_000  # on the first axis of the grid, which ends at 2^31 - 1


def test_only_query_gets_a_gradient():
    q, k, v = torch.randn(3, 1, 2, 6, 16)
    q.requires_grad_()
    fastattn.attention(q, k, v).sum().backward()
    assert q.grad is not None and k.grad is None


@pytest.mark.parametrize("op", ["attention", "packed"])
@pytest.mark.parametrize("backend", [TRITON])
def test_no_read_beyond_the_end(backend, op):
    assert_no_read_beyond_the_end(op)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", [TRITON, CUDA])
def test_cuda_graph_captures_forward_and_backward(backend):
    x = attention_inputs(2, 2, 70, 70, 64, torch.float16, "cuda", mask="causal_padding")
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))

    def step():
        out = fastattn.attention(q, k, v, x.mask, backend=backend)
        return out, *torch.autograd.grad(out, [q, k, v], x.dout)

    assert_replay_follows(step, q)
