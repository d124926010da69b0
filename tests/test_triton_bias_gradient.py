"""The Triton gradient of a bias that keeps queries and keys, or of a table by distance, against the fp64 specification."""

# ruff: noqa: E402  (without triton nothing below can be imported)
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton")
from backends import TRITON, device_of
from torch import Tensor

from fastattn import dropout, masks
from fastattn.kernels.eager import attention as eager
from fastattn.kernels.triton import attention, attention_bias
from fastattn.kernels.triton import extras as added
from fastattn.kernels.triton.launch import gpu_of, ready
from fastattn.lowering import Extras, LoweredMask, Prepared, batched
from fastattn.packing import Packing
from fastattn.testing import MASKS, Yardstick, assert_accurate

pytestmark = pytest.mark.usefixtures("poisoned")
H, M, N = 2, 37, 50
LENGTHS, KEY_LENGTHS = [37, 18], [41, 50]  # of packed sequences
SHAPES = {"heads": (1, H, M, N), "sequences": (2, 1, M, N), "one": (1, 1, M, N), "each": (2, H, M, N)}


@dataclass
class Request:
    """As a backend's module receives it: q (B, H, M, D), or packed (1, H, T, D)."""

    dout: Tensor
    dlse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    mask: LoweredMask
    extras: Extras
    scale: float = 0.25

    def specified(self, sign: float = 1.0) -> Tensor:
        """The specification's gradient. With sign -1, and nothing negative in dout, dlse and v, what is taken away is added."""
        out, lse = eager.forward(self.q, self.k, self.v, self.mask, self.scale, True, self.extras)
        dlse = None if self.dlse is None else sign * self.dlse
        given = self.dout, dlse, self.q, self.k, self.v, sign * out, lse, self.mask, self.scale, self.extras
        return eager.backward(*given, bias_grad=True)[3]

    def yardstick(self) -> Yardstick:
        bias, table = (None if x is None else x.double() for x in (self.extras.bias, self.extras.table))
        names = "dout", "dlse", "q", "k", "v"
        wide = {name: None if (x := getattr(self, name)) is None else x.double() for name in names}
        exact = replace(self, **wide, extras=self.extras._replace(bias=bias, table=table))
        dlse = None if exact.dlse is None else exact.dlse.abs()
        positive = replace(exact, dout=exact.dout.abs(), dlse=dlse, v=exact.v.abs())
        results = exact.specified(), self.specified(), positive.specified(-1.0)
        return Yardstick(*({"dbias": x} for x in results))

    def dbias(self) -> Tensor:
        """By the kernel alone."""
        out, lse = eager.forward(self.q, self.k, self.v, self.mask, self.scale, True, self.extras)
        delta = (self.dout.float() * out.float()).sum(-1) - (0 if self.dlse is None else self.dlse)
        delta = torch.where(lse == float("-inf"), 0, delta)
        given = self.dout, self.q, self.k, self.v, lse, delta, self.mask, self.scale, self.extras
        launch = attention.dbias_with(*given, gpu_of(self.q.device))
        handle, mask = ready(launch).handle, Prepared(self.mask)
        tensors = tuple(handle(x) for x in (self.q, self.k, self.v, self.dout, lse, delta))
        masked = attention._handles(mask, handle)[attention.KEY_TILES]
        totals = (self.q.shape[2], self.k.shape[2]) if mask.packed else ()
        go = attention_bias.bias_launcher(launch)
        return go(tensors, masked, added.handles(self.extras, handle), self.mask, self.extras, *totals)

    def given(self) -> tuple:
        """What a plan of the backward is called with."""
        out, lse = eager.forward(self.q, self.k, self.v, self.mask, self.scale, True, self.extras)
        return self.dout, self.dlse, self.q, self.k, self.v, out, lse, Prepared(self.mask)

    def check(self, dbias: Tensor | None = None) -> None:
        of = self.extras.table if self.extras.bias is None else self.extras.bias
        dbias = self.dbias() if dbias is None else dbias
        assert dbias.dtype == of.dtype and dbias.is_contiguous()
        assert_accurate({"dbias": dbias}, self.yardstick())


def request(
    device, dtype=torch.float32, *, shape=None, table=None, bias_dtype=torch.float32, mask="none", Hkv=H, D=16, Dv=24, p=0.0,
    dlse=False, bottom_right=False, packed=False, lengths=LENGTHS, key_lengths=KEY_LENGTHS, sizes=(2, M, N),
) -> Request:  # fmt: skip
    """shape: of a bias; or table: whether its buckets tell the direction. Dead queries and hidden keys hold NaN."""
    g = torch.Generator().manual_seed(1)
    B, M, N = (len(lengths), max(lengths), max(key_lengths)) if packed else sizes

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=g).to(device, dtype)

    q, dout, k, v = normal(B, H, M, D), normal(B, H, M, Dv), normal(B, Hkv, N, D), normal(B, Hkv, N, Dv)
    dlse = normal(B, H, M, dtype=torch.float32) if dlse else None
    made = MASKS[mask](B, H, M, N, g, device) or masks.full()
    seed = dropout.draw_seed(3, q.device)
    extras = Extras(
        bias=None if shape is None else normal(*shape, dtype=bias_dtype),
        table=None if table is None else normal(6, H, dtype=bias_dtype),
        buckets=None if table is None else buckets(table).to(device),
        bottom_right=bottom_right,
        kept=dropout.kept_bits(seed, B, H, M, N, p) if p else None,
        dropout=p,
    )
    if not packed:
        lowered = made.lower(M, N, q.device)
        visible = lowered.visible(B, H, M, N, q.device)
        q, dout = (x.masked_fill(~visible.any(3, keepdim=True), float("nan")) for x in (q, dout))
        hidden = ~visible.any(2).unflatten(1, (Hkv, -1)).any(2)[..., None]
        k, v = (x.masked_fill(hidden, float("nan")) for x in (k, v))
        return Request(dout, dlse, q, k, v, lowered, extras)
    packing, keys = (Packing.from_lengths(torch.tensor(x, device=device), L) for x, L in ((lengths, M), (key_lengths, N)))

    def pack(x: Tensor, packing: Packing) -> Tensor:
        """(B, H, L, D) as (1, H, T, D), with a row of no sequence behind."""
        rows = packing.pack(x.transpose(1, 2))
        beyond = rows.new_full((1, *rows.shape[1:]), float("nan") if rows.is_floating_point() else -1)
        return batched(torch.cat([rows, beyond]))

    if extras.kept is not None:
        extras = extras._replace(kept=pack(extras.kept, packing)[0].contiguous())
    if dlse is not None:
        dlse = pack(dlse[..., None], packing)[..., 0].contiguous()
    lowered = made.lower_packed(packing, keys, H)._replace(all_rows=False)
    return Request(pack(dout, packing), dlse, pack(q, packing), pack(k, keys), pack(v, keys), lowered, extras)


def buckets(bidirectional: bool) -> Tensor:
    """Six of up to 20 keys, as T5's grow: for each distance from -20 to 20."""
    distance = torch.arange(-20, 21)
    near = distance.abs() if bidirectional else (-distance).clamp(min=0)
    count = 3 if bidirectional else 6
    found = torch.where(near < 2, near, near.clamp(min=1).float().log2().long() + 1).clamp(max=count - 1)
    return (found + (distance > 0) * (6 - count)).to(torch.int32)


@pytest.mark.parametrize("options", [
    {"p": 0.1, "Hkv": 1},
    {"mask": "padding_queries", "dlse": True},
    {"packed": True, "p": 0.5, "Hkv": 1, "dlse": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    ("shape", "programs"), [("heads", 1), ("heads", 10**6), ("sequences", 10**6), ("one", 1), ("one", 10**6), ("each", 1)]
)
@pytest.mark.parametrize("backend", [TRITON])
def test_bias_of_every_shape(backend, shape, programs, options, monkeypatch):
    """In one split, and in splits of one pair."""
    monkeypatch.setattr(attention_bias, "PROGRAMS", programs)
    request(device_of(backend), shape=SHAPES[shape], **options).check()


@pytest.mark.parametrize(
    ("bidirectional", "bottom_right", "options"),
    [
        (False, False, {"mask": "causal_padding", "p": 0.1, "dlse": True}),
        (True, True, {"mask": "padding", "Hkv": 1}),
        (True, False, {"packed": True, "p": 0.1}),
        (False, True, {"packed": True, "Hkv": 1, "dlse": True}),
        (True, True, {"packed": True, "p": 0.1}),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", [TRITON])
def test_table(backend, bidirectional, bottom_right, options):
    request(device_of(backend), table=bidirectional, bottom_right=bottom_right, **options).check()


@pytest.mark.parametrize("mask", ["holes", "causal_left", "window_prefix", "documents", "columns_padding", "dense"])
@pytest.mark.parametrize("backend", [TRITON])
def test_masks(backend, mask):
    request(device_of(backend), shape=(1, 1, M, 66), sizes=(2, M, 66), mask=mask, p=0.1).check()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dtype", "bias_dtype"), [
    (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)
])  # fmt: skip
@pytest.mark.parametrize("backend", [TRITON])
def test_half_precision(backend, dtype, bias_dtype, packed, monkeypatch):
    """Where one program makes an element, which it then rounds itself, and where parts are added in fp32 before."""
    for programs in (1, 10**6):
        monkeypatch.setattr(attention_bias, "PROGRAMS", programs)
        options = {"bias_dtype": bias_dtype, "packed": packed, "p": 0.1}
        request(device_of(backend), dtype, table=True, **options).check()
        request(device_of(backend), dtype, shape=SHAPES["heads"], **options).check()


@pytest.mark.parametrize("backend", [TRITON])
def test_bias_that_hides(backend):
    """-inf in a bias hides: a row that is -inf for one sequence, for all, and single pairs have gradient 0."""
    x = request(device_of(backend), shape=SHAPES["sequences"], p=0.1, dlse=True)
    hidden = torch.rand(x.extras.bias.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    hidden[0, :, 5], hidden[:, :, 33] = True, True
    hidden = hidden.to(x.q.device)
    x.extras.bias.masked_fill_(hidden, float("-inf"))
    dbias = x.dbias()
    x.check(dbias)
    assert (dbias[hidden] == 0).all() and (dbias[~hidden] != 0).all()


@pytest.mark.parametrize("backend", [TRITON])
def test_last_split_is_shorter(backend, monkeypatch):
    monkeypatch.setattr(attention_bias, "PROGRAMS", 3)  # of three pairs two splits, for two heads
    request(device_of(backend), shape=(1, H, 20, 30), sizes=(3, 20, 30)).check()


@pytest.mark.parametrize("backend", [TRITON])
def test_bias_of_any_strides(backend):
    """The gradient is contiguous, whatever the bias is."""
    x = request(device_of(backend), shape=(1, H, N, M))
    x.extras = x.extras._replace(bias=x.extras.bias.mT)
    x.check()


@pytest.mark.parametrize("backend", [TRITON])
def test_repeats_are_bit_equal(backend):
    for options in ({"shape": (1, 1, 20, 40)}, {"table": True}):
        x = request(device_of(backend), p=0.1, sizes=(2, 20, 40), **options)
        assert torch.equal(x.dbias(), x.dbias())


@pytest.mark.parametrize("backend", [TRITON])
def test_plan(backend):
    """Of the whole backward, which makes delta, with dq, dk and dv side by side."""
    x = request(device_of(backend), table=True, mask="causal_left", Dv=16, p=0.1, sizes=(2, M, M), dlse=True)
    given = x.given()
    plan = attention.backward_plan(*given, x.scale, joined=True, extras=x.extras, bias_grad=True)
    x.check(plan(*given, extras=x.extras)[1])


@pytest.mark.parametrize("backend", [TRITON])
def test_plan_of_other_packed_sequences(backend, monkeypatch):
    """More of them, and longer: a compiled kernel is told addresses, so their types must stay what they were."""

    def checked(launch):
        compiled = ready(launch)

        def start(programs, values):
            for before, now in zip(compiled.values, values, strict=True):
                assert not isinstance(now, Tensor) or now.dtype == before.dtype
            compiled.start(programs, values)

        return compiled._replace(start=start)

    monkeypatch.setattr(attention_bias, "ready", checked)
    monkeypatch.setattr(attention_bias, "PROGRAMS", 2)
    options = {"packed": True, "bias_dtype": torch.float16, "table": True, "dtype": torch.float16}
    few = request(device_of(backend), lengths=[10], key_lengths=[20], **options)
    plan = attention.backward_plan(*few.given(), few.scale, extras=few.extras, bias_grad=True)
    few.check(plan(*few.given(), extras=few.extras)[3])
    more = request(device_of(backend), lengths=[65, 0, 34], key_lengths=[50, 12, 0], **options)
    more.check(plan(*more.given(), extras=more.extras)[3])


@pytest.mark.parametrize("sizes", [(0, M, N), (2, 0, N), (2, M, 0)])
@pytest.mark.parametrize("backend", [TRITON])
def test_nothing_to_sum(backend, sizes):
    _, rows, keys = sizes
    for options in ({"shape": (1, H, rows, keys)}, {"table": True}):
        x = request(device_of(backend), sizes=sizes, **options)
        dbias, of = x.dbias(), x.extras.bias if x.extras.table is None else x.extras.table
        assert dbias.shape == of.shape and (dbias == 0).all()
