"""Inputs, masks and the one accuracy rule, used by the tests, the benchmarks and `python -m fastattn verify`.

The rule, per tensor, with T the result, R the fp64 result on the same rounded inputs, T_m the specification in the same dtype
(fp32 accumulation, rounded where a fused kernel rounds) and A the fp64 formula with absolute values inside every sum:

1. max|T - R| <= 2 max|T_m - R| + c 2^-24 max A
2. ||T - R|| <= 1.25 ||T_m - R|| + c 2^-24 ||A||   (Frobenius)
3. half precision: max|T - R| <= max|T_e - R| + 2 ulp + c 2^-24 max A, with T_e eager PyTorch in that dtype
4. lse: |T - R| <= 1e-5 max(1, |R|)

c is 32, or 256 for scores up to |s| = 60. Gradients of the cpu backend in half precision get 4 and 2 in place of 2 and 1.25:
PyTorch's kernel accumulates them in the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import fastattn
from fastattn import biases, masks, reference
from fastattn.biases import Bias
from fastattn.dropout import kept_bits, rescale
from fastattn.lowering import NO_EXTRAS, Extras, LoweredMask
from fastattn.masks import Mask
from fastattn.packing import Packing
from fastattn.reference import Drop

UNIT = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-53}
HALF = (torch.float16, torch.bfloat16)
DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}  # by their short names
GRADIENTS = ("dq", "dk", "dv", "dx", "dw", "db", "dw1", "db1", "dw2", "db2", "dresidual", "dweight", "dbias")
COLD, HOT = 32, 256


@dataclass(frozen=True)
class Yardstick:
    """What the rule needs, each a dict from tensor name to tensor; `eager` is filled for half precision."""

    exact: dict[str, Tensor]
    model: dict[str, Tensor]
    magnitude: dict[str, Tensor]
    eager: dict[str, Tensor] = field(default_factory=dict)


def assert_accurate(
    actual: dict[str, Tensor], yardstick: Yardstick, *, c: int = COLD, cpu_half_gradients: bool = False
) -> dict[str, float]:
    """Raise AssertionError, naming tensor and rule, unless every tensor of `actual` meets the rule.

    Returns the relative Frobenius error of each tensor, in units of its dtype's roundoff (2^-8 for bf16, 2^-11 for fp16).
    """
    errors = {}
    for name, tensor in actual.items():
        exact = yardstick.exact[name]
        assert tensor.shape == exact.shape, f"{name}: shape {tuple(tensor.shape)} instead of {tuple(exact.shape)}"
        if tensor.numel() == 0:
            continue
        if name == "lse":
            _assert_lse(tensor.double(), exact)
            continue
        assert torch.isfinite(tensor).all(), f"{name}: NaN or Inf"
        wide = cpu_half_gradients and name in GRADIENTS and tensor.dtype in HALF
        error, model_error = tensor.double() - exact, yardstick.model[name].double() - exact
        magnitude = c * 2.0**-24 * yardstick.magnitude[name]
        most, bound = error.abs().max(), (4 if wide else 2) * model_error.abs().max() + magnitude.max()
        assert most <= bound, f"{name}: max error {most:.3e} over {bound:.3e} (rule 1)"
        norm, bound = error.norm(), (2 if wide else 1.25) * model_error.norm() + magnitude.norm()
        assert norm <= bound, f"{name}: error norm {norm:.3e} over {bound:.3e} (rule 2)"
        if name in yardstick.eager:
            ulp = 2 * UNIT[tensor.dtype] * exact.abs().max()
            bound = (yardstick.eager[name].double() - exact).abs().max() + 2 * ulp + magnitude.max()
            assert most <= bound, f"{name}: max error {most:.3e} over eager's {bound:.3e} (rule 3)"
        errors[name] = float(norm / exact.norm().clamp_min(1e-300)) / UNIT[tensor.dtype]
    return errors


def _assert_lse(lse: Tensor, exact: Tensor) -> None:
    dead = exact == float("-inf")
    assert torch.equal(lse == float("-inf"), dead), "lse: -inf at other rows than those that see no key"
    error = torch.where(dead, 0, lse - exact).abs() / torch.where(dead, 1, exact.abs().clamp_min(1))
    assert error.max() <= 1e-5, f"lse: relative error {error.max():.3e} over 1e-5 (rule 4)"


# Attention


@dataclass(frozen=True)
class AttentionInputs:
    """q, k, v and the gradients of out and lse, all (B, H, L, D) in (B, L, H, D) memory; k and v may have fewer heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    mask: Mask | None
    scale: float
    bias: Tensor | Bias | None = None
    dropout: float = 0.0
    seed: int = 0

    def lowered(self) -> LoweredMask:
        return LoweredMask() if self.mask is None else self.mask.lower(self.q.shape[2], self.k.shape[2], self.q.device)

    @property
    def learned(self) -> Tensor | None:
        """What of the bias gets a gradient."""
        return self.bias.table if isinstance(self.bias, Bias) else self.bias

    def bias_of(self, learned: Tensor | None) -> Tensor | Bias | None:
        """The bias with another tensor in that one's place."""
        return replace(self.bias, table=learned) if isinstance(self.bias, Bias) else learned

    def extras(self, double: bool = False) -> Extras:
        """What kernels receive of padded sequences; a bias with four dimensions, in fp64 if asked for."""
        extras = NO_EXTRAS
        if isinstance(self.bias, Bias):
            extras = self.bias.extras()
        elif self.bias is not None:
            extras = Extras(self.bias.reshape((1,) * (4 - self.bias.dim()) + tuple(self.bias.shape)))
        if double:
            wide = {name: x.double() for name in ("bias", "table", "slopes") if (x := getattr(extras, name)) is not None}
            extras = extras._replace(**wide) if wide else extras
        if self.dropout:
            seed = torch.tensor([self.seed], device=self.q.device)
            B, H, M, _ = self.q.shape
            kept = kept_bits(seed, B, H, M, self.k.shape[2], self.dropout)
            extras = extras._replace(kept=kept, dropout=self.dropout)
        return extras


def attention_inputs(
    B: int, H: int, M: int, N: int, D: int, dtype: torch.dtype, device: str = "cpu", *,
    Hkv: int | None = None, Dv: int | None = None,
    mask: str = "none", bias: str = "none", dropout: float = 0.0, seed: int = 0, amplitude: float = 1.0, dlse: bool = False,
) -> AttentionInputs:  # fmt: skip
    """Seeded normal inputs with a mask from MASKS or REQUESTS and a bias from BIASES; amplitude multiplies q and k (4 gives hot
    scores)."""
    g = torch.Generator().manual_seed(seed)

    def normal(length: int, heads: int, width: int, factor: float = 1.0) -> Tensor:
        return (torch.randn(B, length, heads, width, generator=g) * factor).to(device, dtype).transpose(1, 2)

    Hkv, Dv = H if Hkv is None else Hkv, D if Dv is None else Dv
    q, k = normal(M, H, D, amplitude), normal(N, Hkv, D, amplitude)
    v, dout = normal(N, Hkv, Dv), normal(M, H, Dv)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    lse_grad = torch.randn(B, H, M, generator=g).to(device, lse_dtype) if dlse else None
    made = (REQUESTS | MASKS)[mask](B, H, M, N, g, device)
    added = BIASES[bias](B, H, M, N, dtype, g, device)
    return AttentionInputs(q, k, v, dout, lse_grad, made, D**-0.5, added, dropout, seed)


def run_attention(x: AttentionInputs, backend: str) -> dict[str, Tensor]:
    """out, lse and every gradient of the public function."""
    leaves = _leaves({"dq": x.q, "dk": x.k, "dv": x.v, "dbias": x.learned})
    q, k, v, options = leaves["dq"], leaves["dk"], leaves["dv"], _options(x, leaves, backend)
    out, lse = fastattn.attention(q, k, v, x.mask, return_lse=True, **options)
    if x.dlse is None:  # the common call, which some backends serve by another path
        out = fastattn.attention(q, k, v, x.mask, **options)
        grads = _gradients([out], [x.dout], leaves)
    else:
        grads = _gradients([out, lse], [x.dout, x.dlse], leaves)
    return {"out": out.detach(), "lse": lse.detach(), **grads}


def _options(x: AttentionInputs, leaves: dict[str, Tensor], backend: str) -> dict[str, Any]:
    seed = x.seed if x.dropout else None
    return {
        "bias": x.bias_of(leaves.get("dbias")), "scale": x.scale, "dropout": x.dropout, "seed": seed, "backend": backend,
    }  # fmt: skip


def run_varlen_attention(x: AttentionInputs, lengths: Tensor, backend: str) -> dict[str, Tensor]:
    """out, lse and every gradient of the packed function for the first lengths[b] queries and keys, as padded tensors.

    Their yardstick is that of the padded inputs under `padding(lengths, lengths)` and the same mask.
    """
    packing = Packing.from_lengths(lengths, x.q.shape[2])
    packed = {name: packing.pack(t.transpose(1, 2)) for name, t in (("dq", x.q), ("dk", x.k), ("dv", x.v))}
    leaves = _leaves({**packed, "dbias": x.learned})
    q, k, v, options = leaves["dq"], leaves["dk"], leaves["dv"], _options(x, leaves, backend)
    out, lse = fastattn.varlen_attention(q, k, v, packing, x.mask, return_lse=True, **options)
    dlse = torch.zeros_like(lse) if x.dlse is None else packing.pack(x.dlse.mT).mT
    found = {"out": out.detach(), **_gradients([out, lse], [packing.pack(x.dout.transpose(1, 2)), dlse], leaves)}
    rest = {"dbias": found.pop("dbias")} if "dbias" in found else {}
    dead = torch.arange(x.q.shape[2], device=lse.device) >= packing.lengths[:, None]
    padded = {name: packing.unpack(t).transpose(1, 2) for name, t in found.items()}
    return {**padded, "lse": packing.unpack(lse.detach().mT).mT.masked_fill(dead[:, None], float("-inf")), **rest}


def attention_yardstick(x: AttentionInputs) -> Yardstick:
    mask = x.lowered()
    tensors = (x.dout, x.dlse, x.q, x.k, x.v)
    exact = _attention(mask, x.scale, x.extras(double=True), *(None if t is None else t.double() for t in tensors))
    model = _attention(mask, x.scale, x.extras(), *tensors)
    if x.learned is not None:
        for found in (exact, model):
            found["dbias"] = found["dbias"].reshape(x.learned.shape)
    eager = _eager_attention(x, mask) if x.q.dtype in HALF and x.q.numel() and x.k.numel() else {}
    return Yardstick(exact, model, _attention_magnitude(x, mask), eager)


def _attention(mask: LoweredMask, scale: float, extras: Extras, dout, dlse, q, k, v) -> dict[str, Tensor]:
    out, lse = reference.attention(q, k, v, mask, scale, extras)
    dq, dk, dv, dbias = reference.attention_backward(dout, dlse, q, k, v, out, lse, mask, scale, extras)
    found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return found if dbias is None else {**found, "dbias": dbias}


def _attention_magnitude(x: AttentionInputs, mask: LoweredMask) -> dict[str, Tensor]:
    extras = x.extras(double=True)
    s, visible = reference.scores(x.q.double(), x.k.double(), mask, x.scale, extras)
    p = torch.nan_to_num(torch.softmax(s, -1), 0.0)
    keep = 1.0 if extras.kept is None else reference.kept_pairs(extras.kept, s.shape[-1]) * rescale(extras.dropout)
    rows, columns = visible.any(-1)[..., None], visible.any(-2)[..., None]
    q, do = (torch.where(rows, t, 0).double().abs() for t in (x.q, x.dout))
    k, v = (torch.where(columns, reference.query_heads(t, x.q), 0).double().abs() for t in (x.k, x.v))
    out = (p * keep) @ v
    delta = (do * out).sum(-1, keepdim=True)
    if x.dlse is not None:
        delta = delta + x.dlse.double().abs()[..., None]
    ds = p * (keep * (do @ v.mT) + delta)
    scaled = ds * abs(x.scale)
    dk, dv = ((y.mT @ z).unflatten(1, (x.k.shape[1], -1)).sum(2) for y, z in ((scaled, q), (p * keep, do)))
    found = {"out": out, "dq": scaled @ k, "dk": dk, "dv": dv}
    dbias = reference.bias_gradient(ds, extras, None)
    return found if dbias is None or x.learned is None else {**found, "dbias": dbias.reshape(x.learned.shape)}


def _eager_attention(x: AttentionInputs, mask: LoweredMask) -> dict[str, Tensor]:
    """What a user gets from matmul, softmax and matmul in the dtype."""
    given = {name: torch.nan_to_num(t, 0.0) for name, t in (("dq", x.q), ("dk", x.k), ("dv", x.v))}
    leaves = _leaves({**given, "dbias": x.learned})
    q, k, v = leaves["dq"], leaves["dk"], leaves["dv"]
    M, N, bias = q.shape[2], k.shape[2], x.bias_of(leaves.get("dbias"))
    visible = mask.visible(q.shape[0], q.shape[1], M, N, q.device)
    s = q @ reference.query_heads(k, q).mT * x.scale
    if bias is not None:
        s = s + (bias.dense(M, N) if isinstance(bias, Bias) else bias).to(s.dtype)
        visible = visible & (s.detach() > float("-inf"))
    p = torch.softmax(s.masked_fill(~visible, float("-inf")), -1).masked_fill(~visible.any(-1, keepdim=True), 0)
    if x.dropout:
        kept = x.extras().kept
        assert kept is not None
        p = p * reference.kept_pairs(kept, N) * rescale(x.dropout)
    out = p @ reference.query_heads(v, q)
    if x.dlse is not None or not bool(visible.any(-1).all()):
        return {"out": out.detach()}  # dead rows and the gradient of lse are not eager PyTorch's to answer
    return {"out": out.detach(), **_gradients([out], [torch.nan_to_num(x.dout, 0.0)], leaves)}


def _lengths(B: int, N: int, g: torch.Generator, device: str) -> Tensor:
    """Lengths in [0, N], the last sequence full."""
    lengths = torch.randint(0, N + 1, (B,), generator=g)
    lengths[-1:] = N
    return lengths.to(device)


def _keep(B: int, N: int, g: torch.Generator, device: str, kind: str) -> Tensor:
    j = torch.arange(N)
    lengths = _lengths(B, N, g, "cpu")[:, None]
    keep = {"right": j < lengths, "left": j >= N - lengths, "holes": torch.rand(B, N, generator=g) < 0.6}[kind]
    return keep.to(device)


def _documents(B: int, L: int, g: torch.Generator, device: str) -> Tensor:
    """Ids of some documents, each in one piece, with tokens of none at the end of all sequences but the last."""
    ids = torch.randint(0, 4, (B, L), generator=g).cumsum(1) // 40
    return torch.where(torch.arange(L) < _lengths(B, L, g, "cpu")[:, None], ids, -1).to(device)


def _grid(N: int, kind: Callable[..., Mask], *kernel: int) -> Mask:
    """An image of eight columns behind a prefix of 5 tokens, with room for N keys."""
    return kind(max(-(-(N - 5) // 8), 1), 8, *kernel, prefix=5)


# name -> mask for (B, H, M, N, generator, device): every mask of the algebra that a backend must agree on
MASKS: dict[str, Callable[[int, int, int, int, torch.Generator, str], Mask | None]] = {
    "none": lambda B, H, M, N, g, device: None,
    "causal": lambda B, H, M, N, g, device: masks.causal(),
    "causal_top_left": lambda B, H, M, N, g, device: masks.causal("top_left"),
    "padding": lambda B, H, M, N, g, device: masks.padding(_lengths(B, N, g, device)),
    "padding_queries": lambda B, H, M, N, g, device: masks.padding(_lengths(B, N, g, device), _lengths(B, M, g, device)),
    "right": lambda B, H, M, N, g, device: masks.key_padding(_keep(B, N, g, device, "right")),
    "left": lambda B, H, M, N, g, device: masks.key_padding(_keep(B, N, g, device, "left")),
    "holes": lambda B, H, M, N, g, device: masks.key_padding(_keep(B, N, g, device, "holes")),
    "causal_padding": lambda B, H, M, N, g, device: masks.causal() & masks.padding(_lengths(B, N, g, device)),
    "causal_left": lambda B, H, M, N, g, device: masks.causal("top_left") & masks.key_padding(_keep(B, N, g, device, "left")),
    "window": lambda B, H, M, N, g, device: masks.window(9, 4),
    "window_right": lambda B, H, M, N, g, device: masks.window(-2, 70, "top_left"),
    "prefix_lm": lambda B, H, M, N, g, device: masks.prefix_lm(_lengths(B, N, g, device)),
    "window_prefix": lambda B, H, M, N, g, device: (
        masks.window(20, None) & masks.prefix_lm(_lengths(B, N, g, device), "top_left") & masks.padding(_lengths(B, N, g, device))
    ),
    "documents": lambda B, H, M, N, g, device: masks.documents(_documents(B, M, g, device), _documents(B, N, g, device)),
    "documents_causal": lambda B, H, M, N, g, device: (
        masks.documents(_documents(B, M, g, device), _documents(B, N, g, device)) & masks.causal()
    ),
    "rows": lambda B, H, M, N, g, device: _grid(N, masks.rows),
    "columns_padding": lambda B, H, M, N, g, device: _grid(N, masks.columns) & masks.padding(_lengths(B, N, g, device)),
    "conv": lambda B, H, M, N, g, device: _grid(N, masks.conv, 3),
    "either": lambda B, H, M, N, g, device: masks.window(3, 3) | masks.padding(_lengths(B, N // 2, g, device)),
    "dense": lambda B, H, M, N, g, device: masks.dense((torch.rand(B, H, M, N, generator=g) < 0.7).to(device)),
    "dense_rows": lambda B, H, M, N, g, device: masks.dense((torch.rand(M, 1, generator=g) < 0.7).to(device)),
}  # fmt: skip

# the functions of `fastattn.masks` that MASKS has under another name, or only in combination; the rest it has under their own
REQUESTS: dict[str, Callable[[int, int, int, int, torch.Generator, str], Mask | None]] = {
    "full": MASKS["none"],
    "key_padding": MASKS["holes"],
    "columns": lambda B, H, M, N, g, device: _grid(N, masks.columns),
}


# name -> bias for (B, H, M, N, dtype, generator, device): what is broadcast, what depends on distance alone, what hides
BIASES: dict[str, Callable[[int, int, int, int, torch.dtype, torch.Generator, str], Tensor | Bias | None]] = {
    "none": lambda B, H, M, N, dtype, g, device: None,
    "full": lambda B, H, M, N, dtype, g, device: torch.randn(B, H, M, N, generator=g).to(device, dtype),
    "heads": lambda B, H, M, N, dtype, g, device: torch.randn(H, M, N, generator=g).to(device, dtype),
    "batch": lambda B, H, M, N, dtype, g, device: torch.randn(B, 1, M, N, generator=g).to(device, dtype),
    "pairs": lambda B, H, M, N, dtype, g, device: torch.randn(M, N, generator=g).to(device),  # fp32 beside any dtype
    "keys": lambda B, H, M, N, dtype, g, device: torch.randn(B, 1, 1, N, generator=g).to(device, dtype),
    "keys_heads": lambda B, H, M, N, dtype, g, device: torch.randn(H, 1, N, generator=g).to(device),
    "queries": lambda B, H, M, N, dtype, g, device: torch.randn(B, H, M, 1, generator=g).to(device, dtype),
    "hiding": lambda B, H, M, N, dtype, g, device: torch.where(
        torch.rand(H, M, N, generator=g) < 0.3, float("-inf"), torch.randn(H, M, N, generator=g)
    ).to(device, dtype),
    "relative": lambda B, H, M, N, dtype, g, device: biases.relative(
        torch.randn(32, H, generator=g).to(device, dtype), max_distance=48
    ),
    "relative_causal": lambda B, H, M, N, dtype, g, device: biases.relative(
        torch.randn(10, H, generator=g).to(device), bidirectional=False, num_buckets=10, max_distance=30, align="bottom_right"
    ),
    "alibi": lambda B, H, M, N, dtype, g, device: biases.alibi(torch.rand(H, generator=g).to(device) / 8),
    "alibi_batch": lambda B, H, M, N, dtype, g, device: biases.alibi(torch.rand(B, H, generator=g).to(device) / 8, "top_left"),
}  # fmt: skip


# Linear, FFN and norms


def linear_yardstick(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, dy: Tensor, activation: str | None
) -> Yardstick:
    """For `linear`: y, dx, dw, db, dresidual."""

    def run(x, weight, bias, residual, dy):
        y, z = reference.linear(x, weight, bias, activation, residual)
        dx, dw, db, _ = reference.linear_backward(dy.to(x.dtype), x, weight, z, activation)
        return {"y": y, "dx": dx, "dw": dw, "db": db, "dresidual": dy}

    tensors = (x, weight, bias, residual, dy)
    wide = _wide(tensors)
    x, weight, bias, residual, dy = _sizes(wide)
    return Yardstick(run(*wide), run(*tensors), linear_magnitude(x, weight, bias, residual, dy, activation))


def linear_magnitude(x, weight, bias, residual, dy, activation: str | None) -> dict[str, Tensor]:
    """The A of the rule, from the absolute values of x, weight, bias, residual and dy, in fp64.

    |act(z)| and |act'(z)| are at most 1.2 |z| and 1.2 for every activation; an error in z moves act'(z) by at most 1.2 times it.
    """
    z = torch.nn.functional.linear(x, weight, bias)
    dz = dy if activation is None else 1.2 * dy * (1 + z)
    rows = reference.matrix(dz)
    return {
        "y": z if residual is None else z + residual,
        "dx": dz @ weight,
        "dw": rows.mT @ reference.matrix(x),
        "db": rows.sum(0),
        "dresidual": dy,
    }


def run_linear(x, weight, bias, residual, dy, activation: str | None, backend: str) -> dict[str, Tensor]:
    """y and every gradient of the public function."""
    leaves = _leaves({"dx": x, "dw": weight, "db": bias, "dresidual": residual})
    args = (leaves["dx"], leaves["dw"], leaves.get("db"))
    y = fastattn.linear(*args, activation=activation, residual=leaves.get("dresidual"), backend=backend)
    return {"y": y.detach(), **_gradients([y], [dy], leaves)}


def ffn_yardstick(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, dy: Tensor, activation: str, drop: Drop | None = None
) -> Yardstick:
    """For `ffn`: y, dx, dw1, db1, dw2, db2; `drop` is of the hidden layer."""

    def run(x, w1, b1, w2, b2, dy):
        hidden, z = reference.linear(x, w1, b1, activation, None, drop)
        y, _ = reference.linear(hidden, w2, b2, None, None)
        dz, dw2, db2, db1 = reference.linear_backward(dy, hidden, w2, None, None, before=(z, activation), drop=drop)
        dx, dw1, _, _ = reference.linear_backward(dz, x, w1, None, None)
        return {"y": y, "dx": dx, "dw1": dw1, "db1": db1, "dw2": dw2, "db2": db2}

    tensors = (x, w1, b1, w2, b2, dy)
    wide = _wide(tensors)
    x, w1, b1, w2, b2, dy = _sizes(wide)
    hidden = 1.2 * torch.nn.functional.linear(x, w1, b1)
    second = linear_magnitude(hidden if drop is None else reference.dropped(hidden, drop), w2, b2, None, dy, None)
    dhidden = second["dx"] if drop is None else reference.dropped(second["dx"], drop)
    first = linear_magnitude(x, w1, b1, None, dhidden, activation)
    magnitude = {name: second[name] for name in ("y", "dw", "db")} | {"dx": first["dx"], "dw1": first["dw"], "db1": first["db"]}
    magnitude["dw2"], magnitude["db2"] = magnitude.pop("dw"), magnitude.pop("db")
    return Yardstick(run(*wide), run(*tensors), magnitude)


def run_ffn(x, w1, b1, w2, b2, dy, activation: str, backend: str, **options: Any) -> dict[str, Tensor]:
    """y and every gradient of the public function; `options` are its dropout, seed and recompute."""
    leaves = _leaves({"dx": x, "dw1": w1, "db1": b1, "dw2": w2, "db2": b2})
    first, second = (leaves["dw1"], leaves.get("db1")), (leaves["dw2"], leaves.get("db2"))
    y = fastattn.ffn(leaves["dx"], *first, *second, activation=activation, backend=backend, **options)
    return {"y": y.detach(), **_gradients([y], [dy], leaves)}


def norm_yardstick(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, dy: Tensor, dsum: Tensor | None,
    eps: float, *, rms: bool = False, drop: Drop | None = None,
) -> Yardstick:  # fmt: skip
    """For `add_layer_norm` and `add_rms_norm`: y, sum, dx, dresidual, dweight, dbias; dsum is the gradient of the sum, `drop` is
    x's."""

    def run(x, residual, weight, bias, dy, dsum):
        y, total, mean, rstd = reference.norm(x, residual, weight, bias, eps, rms, drop)
        grad, dweight, dbias, *dx = reference.norm_backward(dy, dsum, total, mean, rstd, weight, drop=drop)
        grad_of_x = dx[0] if dx else grad
        given = {"dx": (grad_of_x, x), "dresidual": (grad, residual), "dweight": (dweight, weight), "dbias": (dbias, bias)}
        return {"y": y, "sum": total, **{name: g if t is None else g.to(t.dtype) for name, (g, t) in given.items()}}

    tensors = (x, residual, weight, bias, dy, dsum)
    wide = _wide(tensors)
    exact = run(*wide)
    rstd = reference.norm(wide[0], wide[1], None, None, eps, rms, drop)[3]
    x, residual, weight, bias, dy, dsum = _sizes(wide)
    total = reference.residual_sum(x, residual, drop)
    normal = rstd * (total if rms else total + total.mean(-1, keepdim=True))
    g = dy if weight is None else dy * weight
    grad = g + normal * (g * normal).mean(-1, keepdim=True)
    grad = rstd * (grad if rms else grad + g.mean(-1, keepdim=True)) + (0 if dsum is None else dsum)
    y = (normal if weight is None else normal * weight) + (0 if bias is None else bias)
    rows = tuple(range(dy.dim() - 1))
    sums = {"dweight": (dy * normal).sum(rows), "dbias": dy.sum(rows)}
    dx = grad if drop is None else reference.dropped(grad, drop)
    return Yardstick(exact, run(*tensors), {"y": y, "sum": total, "dx": dx, "dresidual": grad, **sums})


def run_norm(
    x, residual, weight, bias, dy, dsum, eps: float, backend: str, *, rms: bool = False, **options: Any
) -> dict[str, Tensor]:
    """y, the sum and every gradient of the public function; an RMSNorm takes no bias. `options` are its dropout and seed."""
    leaves = _leaves({"dx": x, "dresidual": residual, "dweight": weight, "dbias": bias})
    args = (leaves["dx"], leaves.get("dresidual"), leaves.get("dweight"))
    if rms:
        y, total = fastattn.add_rms_norm(*args, eps=eps, return_sum=True, backend=backend, **options)
    else:
        y, total = fastattn.add_layer_norm(*args, leaves.get("dbias"), eps=eps, return_sum=True, backend=backend, **options)
    outputs = ([y], [dy]) if dsum is None else ([y, total], [dy, dsum])
    return {"y": y.detach(), "sum": total.detach(), **_gradients(*outputs, leaves)}


def _wide(tensors) -> list[Any]:
    return [None if t is None else t.double() for t in tensors]


def _sizes(tensors) -> Any:
    return [None if t is None else t.abs() for t in tensors]


def _leaves(tensors: dict[str, Tensor | None]) -> dict[str, Any]:
    return {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for name, t in tensors.items()
        if t is not None
    }


def _gradients(outputs: list[Tensor], cotangents: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), cotangents), strict=True))
