"""`attention_qkv`: equal to `attention` of its parts to the bit, with one gradient; watched, packed, and refused."""

import pytest
import torch
from backends import TRITON, device_of
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn import biases, masks, planned

B, L, H, D = 3, 17, 2, 16
LENGTHS = [17, 5, 0]


def tensor(backend, packed=False, layout="whole"):
    shape = (sum(LENGTHS), 3, H, D) if packed else (B, L, 3, H, D)
    x = torch.randn(shape, device=device_of(backend))
    if layout == "sequences inside" and not packed:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "wide rows":
        x = torch.cat([x, x], -1)[..., :D]
    return x


def cases(device):
    lengths = torch.tensor(LENGTHS, device=device)
    table = torch.randn(32, H, device=device)
    return {
        "plain": {},
        "padding": {"mask": masks.padding(lengths, lengths)},
        "causal": {"mask": masks.causal()},
        "bool": {"mask": torch.rand(L, L, device=device) < 0.7},
        "scale": {"scale": 0.3},
        "table": {"bias": biases.relative(table.requires_grad_())},
        "tensor": {"bias": torch.randn(1, H, L, L, device=device, requires_grad=True)},
        "dropout": {"dropout": 0.3, "seed": 5},
    }


def learned(options):
    bias = options.get("bias")
    return getattr(bias, "table", bias)


def grid():
    """Every layout on CPUs; the interpreter takes one of padded and one of packed tensors."""
    for backend in ("eager", "cpu", "triton"):
        for packed in (False, True):
            for layout in ("whole", "sequences inside", "wide rows"):
                if packed and layout == "sequences inside":
                    continue
                if backend == "triton" and layout != ("sequences inside", "wide rows")[packed]:
                    continue
                for name in cases("cpu"):
                    if not (packed and name in ("padding", "bool")):  # which a packing says
                        marks = TRITON.marks if backend == "triton" else ()
                        yield pytest.param(backend, name, packed, layout, marks=marks)


@pytest.mark.parametrize(("backend", "name", "packed", "layout"), [*grid()])
def test_equals_attention(backend, name, packed, layout):
    """The first call of a kind, and one that is known, whose gradient is written as one."""
    device = device_of(backend)
    options, qkv = cases(device)[name], tensor(backend, packed, layout).requires_grad_()
    packing = fastattn.Packing.from_lengths(torch.tensor(LENGTHS, device=device), L) if packed else None
    more = {**options, "backend": backend, "return_lse": True}
    way, lse_way = torch.randn(*qkv.shape[:-3], H, D, device=device), None
    results = []
    for joined in (False, True, True):
        qkv.grad, leaf = None, learned(options)
        if leaf is not None:
            leaf.grad = None
        if joined:
            out, lse = fastattn.attention_qkv(qkv, packing=packing, **more)
        elif packed:
            out, lse = fastattn.varlen_attention(*qkv.unbind(1), packing, **more)
        else:
            out, lse = fastattn.attention(*(x.transpose(1, 2) for x in qkv.unbind(2)), **more)
            out = out.transpose(1, 2)
        lse_way = torch.randn_like(lse) if lse_way is None else lse_way
        lse = lse.masked_fill(lse == float("-inf"), 0)
        ((out * way).sum() + (lse * lse_way).sum()).backward()
        results.append((out, lse, qkv.grad, None if leaf is None else leaf.grad))
    for found in results[1:]:
        for x, y in zip(found, results[0], strict=True):
            assert x is None if y is None else torch.equal(x, y)
    assert results[1][0].is_contiguous()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["plain", "bool", "table", "dropout"])
def test_first_and_later_calls_are_recorded_alike(name, packed):
    """By a Function that saves qkv alone, so that what is checkpointed saves as much when it is computed again."""
    if packed and name == "bool":
        pytest.skip("a packing says it")
    qkv, options = tensor("cpu", packed).requires_grad_(), cases("cpu")[name]
    packing = fastattn.Packing.from_lengths(torch.tensor(LENGTHS), L) if packed else None
    for _ in range(2):
        out = fastattn.attention_qkv(qkv, packing=packing, **options)
        node = out.grad_fn if packed else out.grad_fn.next_functions[0][0]
        assert type(node).__name__ == "_JoinedBackward"
    planned.PLANS.clear()
    again = checkpoint(lambda x: fastattn.attention_qkv(x, packing=packing, **options), qkv, use_reentrant=False)
    (expected,) = torch.autograd.grad(out.sum(), qkv)
    (grad,) = torch.autograd.grad(again.sum(), qkv)
    assert torch.equal(grad, expected)


def test_inference_and_watched_calls():
    qkv, mask = tensor("cpu"), masks.causal()
    expected = fastattn.attention_qkv(qkv, mask)
    with torch.inference_mode():
        assert torch.equal(fastattn.attention_qkv(qkv, mask), expected)
    compiled = torch.compile(fastattn.attention_qkv, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(qkv, mask), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastattn.attention_qkv(qkv, mask).dtype == torch.bfloat16
    qkv = tensor("cpu").double().requires_grad_()
    torch.autograd.gradcheck(lambda x: fastattn.attention_qkv(x[:, :5], mask), (qkv[:, :5].detach().requires_grad_(),))
    for _ in range(2):
        (grad,) = torch.autograd.grad(fastattn.attention_qkv(qkv, mask).sum(), qkv, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            grad.sum().backward()


ON_LOAD = [(False, name) for name in ("plain", "causal", "scale", "padding", "bool")] + [(True, "plain"), (True, "causal")]


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize(("packed", "name"), ON_LOAD)
def test_bias_of_qkv_is_added_on_load(backend, packed, name):
    """By the kernel, which is given qkv as it is; that of k, however large, changes no weight, and has the gradient 0."""
    device = device_of(backend)
    options, qkv = cases(device)[name], tensor(backend, packed, "wide rows").requires_grad_()
    bias = torch.randn(3, H, D, device=device) * torch.tensor([1.0, 30.0, 1.0], device=device)[:, None, None]
    packing = fastattn.Packing.from_lengths(torch.tensor(LENGTHS, device=device), L) if packed else None
    bias, way = bias.requires_grad_(), torch.randn(*qkv.shape[:-3], H, D, device=device)
    exact = fastattn.attention_qkv(qkv.double() + bias.double(), packing=packing, **options, backend="eager")
    expected = torch.autograd.grad((exact * way).sum(), (qkv, bias))
    for _ in range(3):
        out = fastattn.attention_qkv(qkv, qkv_bias=bias, packing=packing, **options, backend=backend)
        node = out.grad_fn if packed else out.grad_fn.next_functions[0][0]
        assert type(node).__name__ == "_BiasedBackward"
        torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5)
        for grad, wanted in zip(torch.autograd.grad((out * way).sum(), (qkv, bias)), expected, strict=True):
            torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=5e-5)
        with torch.no_grad():
            again = fastattn.attention_qkv(qkv, qkv_bias=bias.flatten(), packing=packing, **options, backend=backend)
        assert torch.equal(again, out)
    if name == "padding":
        assert not out[2].any()  # of no key at all


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bias_on_load_is_no_less_exact_than_in_a_pass(backend, dtype):
    """Of q it is rounded as there, of v and k it is not."""
    device = device_of(backend)
    qkv, bias = (x.to(dtype).requires_grad_() for x in (tensor(backend), 3 * torch.randn(3, H, D, device=device)))
    way = torch.randn(B, L, H, D, device=device)

    def run(call, *leaves):
        out = call(*leaves)
        return [out, *torch.autograd.grad((out * way.to(out.dtype)).sum(), leaves)]

    exact = run(
        lambda x, b: fastattn.attention_qkv(x + b, backend="eager"), *(x.detach().double().requires_grad_() for x in (qkv, bias))
    )
    in_a_pass = run(lambda x, b: fastattn.attention_qkv(x + b, backend=backend), qkv, bias)
    on_load = run(lambda x, b: fastattn.attention_qkv(x, qkv_bias=b, backend=backend), qkv, bias)
    for right, theirs, ours in zip(exact, in_a_pass, on_load, strict=True):
        assert ours.dtype == dtype
        assert (ours - right).norm() <= 1.2 * (theirs - right).norm() + 2e-4 * right.norm()


@pytest.mark.parametrize("backend", [TRITON])
@pytest.mark.parametrize("more", [{"return_lse": True}, {"dropout": 0.3, "seed": 5}, {"bias": torch.ones(1, H, 1, L)}], ids=str)
def test_bias_of_qkv_in_a_pass(backend, more):
    """Where lse, dropout or a bias of scores asks for it: equal to the bit to a sum before."""
    more = {name: x.to(device_of(backend)) if isinstance(x, torch.Tensor) else x for name, x in more.items()}
    qkv, bias = tensor(backend), torch.randn(3, H, D, device=device_of(backend))
    found = fastattn.attention_qkv(qkv, qkv_bias=bias, **more, backend=backend)
    expected = fastattn.attention_qkv(qkv + bias, **more, backend=backend)
    for x, y in zip(*((z if isinstance(z, tuple) else (z,)) for z in (found, expected)), strict=True):
        assert torch.equal(x, y)


def test_bias_of_qkv():
    qkv, bias = tensor("cpu"), torch.randn(3, H, D, requires_grad=True)
    out = fastattn.attention_qkv(qkv, qkv_bias=bias)
    torch.testing.assert_close(out, fastattn.attention_qkv(qkv + bias))
    out.sum().backward()
    assert bias.grad is not None and bias.grad.shape == bias.shape
    assert torch.equal(fastattn.attention_qkv(qkv, qkv_bias=bias.flatten()), out)


def test_refusals():
    qkv = tensor("cpu")
    packing = fastattn.Packing.from_lengths(LENGTHS, L)
    for error, words, call in (
        (ValueError, "qkv must have the shape", lambda: fastattn.attention_qkv(qkv[0])),
        (ValueError, "qkv must have the shape", lambda: fastattn.attention_qkv(qkv[:, :, :2])),
        (ValueError, "of a packing", lambda: fastattn.attention_qkv(qkv, packing=packing)),
        (TypeError, "qkv must be a tensor", lambda: fastattn.attention_qkv(None)),
        (ValueError, "qkv_bias", lambda: fastattn.attention_qkv(qkv, qkv_bias=torch.zeros(5))),
        (TypeError, "qkv_bias", lambda: fastattn.attention_qkv(qkv, qkv_bias=torch.zeros(3, H, D).double())),
        (ValueError, "rows", lambda: fastattn.attention_qkv(tensor("cpu", packed=True)[1:], packing=packing)),
        (ValueError, "scale", lambda: fastattn.attention_qkv(qkv, scale=float("nan"))),
        (ValueError, "backend", lambda: fastattn.attention_qkv(qkv, backend="fast")),
    ):
        with pytest.raises(error, match=words):
            call()
