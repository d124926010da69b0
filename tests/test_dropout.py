"""The draw of dropout: known answers, equal bits on every backend and layout, its rate and its independence, its seeds."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from backends import GPU, TRITON, device_of

import fastattn
from fastattn import dropout, masks
from fastattn.kernels.cpu import dropout as cpu
from fastattn.lowering import LoweredMask, Prepared, packed_rows
from fastattn.ops.dropout import BOUNDS, attention_bits
from fastattn.packing import Packing

BACKENDS = ["eager", "cpu", TRITON]
BUILT = pytest.mark.skipif(cpu.compiled is None, reason="nothing is built for CPUs")
COMPILED = pytest.param("cpu", marks=BUILT)
LENGTHS = [37, 0, 70, 1]


def draw(seed, s, h, i, j):
    """The 16 bits of one pair, by integers of Python."""
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    c = [(j >> 5) * 4 + (j >> 1 & 3), i, h, s]
    for _ in range(10):
        first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [second >> 32 ^ c[1] ^ key[0], second & 0xFFFFFFFF, first >> 32 ^ c[3] ^ key[1], first & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c[j >> 3 & 3] >> 16 * (j & 1) & 0xFFFF


def unpacked(bits, N):
    """Bits as bool (..., N)."""
    return ((bits[..., None] >> torch.arange(32, dtype=torch.int32, device=bits.device)) & 1).bool().flatten(-2)[..., :N]


def tensor(seed, device="cpu"):
    return dropout.draw_seed(seed, torch.device(device))


# Known answers


def test_philox_is_random123_s():
    """The known answers that come with Random123, of counters and keys of zeros and of ones."""
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    found = [int(x) for x in dropout.philox(zero, zero, zero, zero, zero)]
    assert found == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    found = [int(x) for x in dropout.philox(tensor(-1), ones, ones, ones, ones)]
    assert found == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize(
    ("seed", "s", "h", "i", "j", "bits"),
    [(0, 0, 0, 0, 0, 0xE8D5), (-3, 1, 2, 33, 45, 0x556A), (2**63 - 1, 5, 11, 511, 510, 0x9375)],
)
def test_known_draws(seed, s, h, i, j, bits):
    """A pair is kept at the rate below which its 16 bits are, and not at the next one."""
    assert draw(seed, s, h, i, j) == bits
    for least, kept in ((bits, True), (bits + 1, False)):
        counters = (torch.tensor(c) for c in (i, h, s))
        assert bool(dropout.kept(tensor(seed), *counters, j + 1, least / 65536)[j]) is kept


def test_bits_are_those_of_the_contract():
    """Every place of a word, in three words, and what the counters stand for."""
    found = fastattn.dropout_mask(77, 2, 2, 3, 70, 0.3)
    for s, h, i in ((0, 0, 0), (1, 0, 2), (1, 1, 1)):
        assert found[s, h, i].tolist() == [draw(77, s, h, i, j) >= math.floor(0.3 * 65536 + 0.5) for j in range(70)]


def test_two_dimensions_count_flat_rows_and_name_the_op():
    """Row r, column j of an op: r's low and high half are the second and third counter, the tag the fourth."""
    tag = 0x80000000 | dropout.FFN_HIDDEN
    found = dropout.kept_elements(tensor(9), 3, 40, 0.3, dropout.FFN_HIDDEN)
    for r in range(3):
        assert found[r].tolist() == [draw(9, tag, 0, r, j) >= 19661 for j in range(40)]
    row = torch.tensor([2**32 + 5])
    found = dropout.kept(tensor(9), row & 0xFFFFFFFF, row >> 32, torch.full_like(row, tag), 40, 0.3)
    assert found[0].tolist() == [draw(9, tag, 1, 5, j) >= 19661 for j in range(40)]


# Equal bits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [-(2**63), 1234567890123])
def test_backends_draw_the_same(backend, seed):
    device = device_of(backend)
    for B, H, M, N in ((2, 3, 9, 45), (1, 1, 5, 200), (1, 1, 70, 32), (2, 1, 1, 1)):
        bits = attention_bits(tensor(seed, device), M, B, H, M, N, 0.3, LoweredMask(), backend)
        assert bits.dtype == torch.int32 and bits.shape == (B, H, M, -(-N // 32)) and bits.is_contiguous()
        assert torch.equal(unpacked(bits.cpu(), N), fastattn.dropout_mask(seed, B, H, M, N, 0.3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_draw_what_padded_ones_do(backend):
    packing = Packing.from_lengths(torch.tensor(LENGTHS, device=device_of(backend)), 70)
    mask = masks.full().lower_packed(packing, packing, 2)
    bits = attention_bits(tensor(5, device_of(backend)), packing.total, 4, 2, 70, 70, 0.3, mask, backend)
    assert bits.shape == (2, packing.total, 3) and bits.dtype == torch.int32
    padded = fastattn.dropout_mask(5, 4, 2, 70, 70, 0.3)
    begin = 0
    for s, length in enumerate(LENGTHS):
        rows = unpacked(bits[:, begin : begin + length].cpu(), length)
        assert torch.equal(rows, padded[s, :, :length, :length])
        begin += length


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_that_lie_write_no_memory_of_others(backend, monkeypatch):
    """Offsets that nobody validated may name rows that are not there."""
    starts = torch.tensor([3, -7, 90, 12], dtype=torch.int32, device=device_of(backend))
    mask = LoweredMask(query_starts=starts, key_starts=starts, max_queries=40, max_keys=40, all_rows=False)
    memory = torch.full((3 * 2 * 20 * 2,), 7, dtype=torch.int32, device=device_of(backend))
    monkeypatch.setattr(torch.Tensor, "new_empty", given_memory(memory[80:160], torch.Tensor.new_empty))
    bits = attention_bits(tensor(5, device_of(backend)), 20, 3, 2, 40, 40, 0.3, mask, backend)
    assert bits.shape == (2, 20, 2)
    assert (memory[:80] == 7).all() and (memory[160:] == 7).all()


def given_memory(memory, new_empty):
    """`new_empty` that gives this memory to whom it fits."""

    def give(x, *size, **options):
        made = new_empty(x, *size, **options)
        fits = made.numel() == memory.numel() and made.device == memory.device and made.dtype == memory.dtype
        return memory.view(made.shape) if fits else made

    return give


MASKS = {
    "causal": lambda: masks.causal(),
    "window": lambda: masks.window(40, 3),
    "window of the future": lambda: masks.window(-35, None),
    "top left": lambda: masks.causal(align="top_left"),
    "padding": lambda: masks.padding(torch.tensor([70, 33])),
    "queries and keys": lambda: masks.padding(torch.tensor([64, 1]), torch.tensor([65, 0])),
    "causal padding": lambda: masks.causal() & masks.padding(torch.tensor([90, 33]), torch.tensor([60, 7])),
    "prefix": lambda: masks.prefix_lm(torch.tensor([50, 0])),
    "left padding": lambda: masks.key_padding(torch.arange(90) >= torch.tensor([[40], [0]])),
    "holes": lambda: masks.key_padding(torch.arange(90) % 40 > torch.tensor([[5], [7]])),
    "documents": lambda: masks.documents(torch.arange(75).expand(2, 75) // 30, torch.arange(90).expand(2, 90) // 30),
    "dense": lambda: masks.dense(torch.rand(2, 1, 75, 90) < 0.5),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MASKS)
def test_what_a_mask_shows_is_drawn(backend, name, monkeypatch):
    """Of a pair that it shows, the bit is the draw's, whatever memory held before."""
    device, (M, N) = device_of(backend), (75, 90)
    mask = MASKS[name]().lower(M, N, "cpu")
    mask = LoweredMask(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in mask))
    memory = torch.randint(-(2**31), 2**31, (2 * M * 3,), dtype=torch.int32, device=device)
    monkeypatch.setattr(torch.Tensor, "new_empty", given_memory(memory, torch.Tensor.new_empty))
    bits = attention_bits(tensor(-8, device), M, 2, 1, M, N, 0.3, Prepared(mask), backend)
    visible = mask.visible(2, 1, M, N, torch.device(device)).cpu()
    assert torch.equal(unpacked(bits.cpu(), N) & visible, fastattn.dropout_mask(-8, 2, 1, M, N, 0.3) & visible)


@pytest.mark.parametrize("backend", [COMPILED, TRITON])
def test_what_bounds_hide_is_not_drawn(backend, monkeypatch):
    """The draw costs what the bounds leave: half the queries and keys of a sequence are a quarter of its words."""
    device = device_of(backend)
    memory = torch.full((128 * 4,), 7, dtype=torch.int32, device=device)
    monkeypatch.setattr(torch.Tensor, "new_empty", given_memory(memory, torch.Tensor.new_empty))
    half = torch.tensor([64], dtype=torch.int32, device=device)
    bits = attention_bits(tensor(1, device), 128, 1, 1, 128, 128, 0.5, LoweredMask(key_end=half, query_end=half), backend)[0, 0]
    drawn = bits != 7
    assert drawn[:64, :2].all() and not drawn[64:].any() and not drawn[:, 2:].any()
    memory.fill_(7)
    drawn = attention_bits(tensor(1, device), 128, 1, 1, 128, 128, 0.5, LoweredMask(high=0), backend)[0, 0] != 7
    assert drawn.sum() <= 128 * 4 * 0.75 and drawn[torch.arange(128), torch.arange(128) // 32].all()


@BUILT
def test_compiled_and_plain_forms_agree(monkeypatch):
    packing = Packing.from_lengths(torch.tensor(LENGTHS), 70)
    packed = masks.full().lower_packed(packing, packing, 2)
    sizes = [(7, 31), (5, 33), (3, 1), (0, 5), (4, 0), (9, 1000), (300, 700)]
    calls = [partial(cpu.kept_elements, tensor(n - 3), *size, 0.1 * n, 2) for n, size in enumerate(sizes)]
    calls.append(lambda: unpacked(cpu.attention_bits(tensor(6), 9, 2, 3, 9, 77, 0.4, LoweredMask()), 77))
    own = packed_rows(packing.cu_seqlens, 70, packing.total)
    for call in calls:
        found = call()
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "compiled", None)
            plain = call()
        assert found.dtype == torch.bool and torch.equal(found, plain)
    bits = cpu.attention_bits(tensor(6), packing.total, 4, 2, 70, 70, 0.4, packed)
    monkeypatch.setattr(cpu, "compiled", None)
    plain = cpu.attention_bits(tensor(6), packing.total, 4, 2, 70, 70, 0.4, packed)
    for s, length in enumerate(LENGTHS):
        rows = own[s, :length]
        assert torch.equal(unpacked(bits[:, rows], length), unpacked(plain[:, rows], length))


# Rate and independence


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_rate_is_right_wherever_one_looks(p):
    """The dropped pairs of each row, column, head, sequence and of all, by chi-square. The seed is fixed, and so the answer."""
    B, H, M, N = 6, 5, 64, 96
    dropped = ~fastattn.dropout_mask(2024, B, H, M, N, p)
    rate = dropout.threshold(p) / 65536
    for kept_dims in ((0, 1), (0, 1, 2), (0, 1, 3), (3,), (2,)):
        found = dropped.sum([d for d in range(4) if d not in kept_dims]).double().flatten()
        each = dropped.numel() / found.numel()
        variance = ((found - each * rate) ** 2 / (each * rate * (1 - rate))).sum().item()
        assert abs(variance - found.numel()) <= 4 * (2 * found.numel()) ** 0.5, kept_dims
    assert abs(dropped.double().mean() - rate) <= 4 * (rate * (1 - rate) / dropped.numel()) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_neighbours_in_every_direction_are_independent(p):
    """Of two pairs beside each other, or of two seeds, as many are both kept, one, or none as chance has it."""
    kept = fastattn.dropout_mask(11, 6, 6, 64, 128, p)
    others = {f"dimension {d} by {step}": kept.roll(step, d) for d in range(4) for step in (1, 2, 3)}
    others |= {f"key by {step}": kept.roll(step, 3) for step in (8, 16, 32, 64)}
    others |= {f"seed {seed}": fastattn.dropout_mask(seed, 6, 6, 64, 128, p) for seed in (10, 12, 11 + 2**32, -11)}
    rate = 1 - dropout.threshold(p) / 65536
    chances = torch.tensor([(1 - rate) ** 2, (1 - rate) * rate, rate * (1 - rate), rate**2], dtype=torch.float64)
    for name, other in others.items():
        found = torch.bincount((2 * kept.long() + other.long()).flatten(), minlength=4).double()
        statistic = ((found - chances * kept.numel()) ** 2 / (chances * kept.numel())).sum().item()
        assert statistic <= 22, name  # 3 degrees of freedom: beyond it once in 15,000


def test_rates_of_none_and_of_all():
    assert dropout.threshold(0) == 0 and dropout.threshold(1) == 65536 and dropout.threshold(0.5) == 32768
    assert fastattn.dropout_mask(3, 2, 2, 9, 70, 0).all()
    assert not fastattn.dropout_mask(3, 2, 2, 9, 70, 1.0).any()
    assert dropout.rescale(1) == 0 and dropout.rescale(0) == 1 and dropout.rescale(0.2) == 1.25


@pytest.mark.parametrize("backend", BACKENDS)
def test_rates_of_none_and_of_all_by_backend(backend):
    device = device_of(backend)
    for p in (0.0, 1.0):
        bits = attention_bits(tensor(4, device), 5, 1, 2, 5, 64, p, LoweredMask(), backend)
        assert (bits == (-1 if p == 0 else 0)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_draw(backend):
    device = device_of(backend)
    for B, H, M, N in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        assert attention_bits(tensor(4, device), M, B, H, M, N, 0.5, LoweredMask(), backend).shape == (B, H, M, min(N, 1))
    assert fastattn.dropout_mask(1, 2, 2, 3, 0, 0.5).shape == (2, 2, 3, 0)


# Seeds


def test_seed_of_none_is_drawn_from_the_default_generator():
    cpu_device = torch.device("cpu")
    torch.manual_seed(7)
    first, second = dropout.draw_seed(None, cpu_device), dropout.draw_seed(None, cpu_device)
    torch.manual_seed(7)
    assert torch.equal(dropout.draw_seed(None, cpu_device), first) and not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (1,)
    seeds = torch.cat([dropout.draw_seed(None, cpu_device) for _ in range(200)])
    assert seeds.unique().numel() == 200 and (seeds >> 62).unique().numel() == 2  # all bits but the sign's


def test_seed_of_an_int_or_a_tensor_is_that():
    assert tensor(5).tolist() == [5] and tensor(-5).tolist() == [-5]
    assert tensor(2**64 - 1).tolist() == [-1] and tensor(2**63 - 1).tolist() == [2**63 - 1]
    given = torch.tensor([[9]])
    assert dropout.draw_seed(given, given.device).tolist() == [9]
    assert torch.equal(fastattn.dropout_mask(torch.tensor(9), 1, 1, 8, 64, 0.5), fastattn.dropout_mask(9, 1, 1, 8, 64, 0.5))
    assert not torch.equal(fastattn.dropout_mask(2**40 + 9, 1, 1, 8, 64, 0.5), fastattn.dropout_mask(9, 1, 1, 8, 64, 0.5))


@pytest.mark.parametrize(
    ("seed", "error", "words"),
    [
        ("1", TypeError, "seed must be None, an int or a one-element int64 tensor, got str"),
        (1.0, TypeError, "got float"),
        (True, TypeError, "got bool"),
        (2**64, ValueError, "seed must fit 64 bits"),
        (-(2**63) - 1, ValueError, "seed must fit 64 bits"),
        (torch.tensor([1, 2]), ValueError, r"seed must be .* got torch.int64 of shape \(2,\) on cpu"),
        (torch.tensor([1], dtype=torch.int32), ValueError, "got torch.int32"),
        (torch.tensor([1], device="meta"), ValueError, "on meta"),
    ],
)
def test_what_is_no_seed(seed, error, words):
    with pytest.raises(error, match=words):
        dropout.draw_seed(seed, torch.device("cpu"))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), "0.1", None, True])
def test_what_is_no_rate(p):
    with pytest.raises(ValueError, match="p must be a probability from 0 to 1"):
        fastattn.dropout_mask(1, 1, 1, 1, 1, p)
    with pytest.raises(ValueError, match="dropout must be a probability"):
        dropout.check_rate(p)


@pytest.mark.parametrize("backend", [TRITON])
def test_sizes_that_are_refused(backend):
    with pytest.raises(NotImplementedError, match="1073741824 queries are more than"):
        attention_bits(tensor(1, device_of(backend)), 2**30, 1, 1, 2**30, 1, 0.5, LoweredMask(), backend)


# Under PyTorch's compiler


def test_op_passes_opcheck():
    packing = Packing.from_lengths(torch.tensor(LENGTHS), 70)
    packed = masks.causal().lower_packed(packing, packing, 2)
    for sizes, mask in (((70, 4, 2, 70, 70), packed), ((9, 2, 3, 9, 40), masks.padding(torch.tensor([3, 40])).lower(9, 40))):
        bounds = [getattr(mask, name) for name in BOUNDS]
        args = (torch.tensor([3]), *((packing.total, *sizes[1:]) if mask is packed else sizes), 0.3, *bounds, "eager")
        torch.library.opcheck(torch.ops.fastattn.attention_bits.default, args)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_drawn_in_one_graph(compiler):
    def request(x, seed, lengths):
        mask = masks.padding(lengths).lower(x.shape[2], x.shape[3], x.device)
        seed = dropout.draw_seed(seed, x.device)
        bits = attention_bits(seed, x.shape[2], *x.shape, 0.3, mask, "cpu")
        return bits, x * x

    compiled = torch.compile(request, fullgraph=True, dynamic=True, backend=compiler)
    for B, M, N in ((2, 5, 70), (3, 8, 33)):
        x, lengths = torch.randn(B, 2, M, N, requires_grad=True), torch.arange(1, B + 1) * 9
        seed = torch.tensor([6])
        bits, square = compiled(x, seed, lengths)
        square.sum().backward()
        shown = torch.arange(N) < lengths[:, None, None, None]
        assert torch.equal(unpacked(bits, N) & shown, fastattn.dropout_mask(6, B, 2, M, N, 0.3) & shown)
    torch.manual_seed(1)
    drawn, _ = compiled(x, None, lengths)
    again, _ = compiled(x, None, lengths)
    torch.manual_seed(1)
    same, _ = compiled(x, None, lengths)
    assert torch.equal(unpacked(drawn, N) & shown, unpacked(same, N) & shown)
    assert not torch.equal(unpacked(drawn, N) & shown, unpacked(again, N) & shown)


def test_exported_program_draws():
    class Draws(torch.nn.Module):
        def forward(self, x, seed):
            return attention_bits(seed, x.shape[2], *x.shape, 0.3, LoweredMask(), "eager")

    length = torch.export.Dim("length", min=2, max=500)
    given, shapes = (torch.zeros(1, 2, 8, 40), torch.tensor([6])), {"x": {2: length}, "seed": None}
    program = torch.export.export(Draws(), given, dynamic_shapes=shapes)
    bits = program.module()(torch.zeros(1, 2, 77, 40), torch.tensor([7]))
    assert torch.equal(unpacked(bits, 40), fastattn.dropout_mask(7, 1, 2, 77, 40, 0.3))


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_replayed_graph_draws_other_bits():
    """A seed that is drawn inside a graph is another one at each replay, and the bits are that seed's."""
    device = torch.device("cuda", torch.cuda.current_device())

    def request():
        seed = dropout.draw_seed(None, device)
        return seed, attention_bits(seed, 64, 2, 2, 64, 96, 0.3, LoweredMask(), "triton")

    request()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        seed, bits = request()
    found = []
    for _ in range(3):
        graph.replay()
        found.append((seed.item(), unpacked(bits.cpu(), 96)))
    assert len({value for value, _ in found}) == 3
    for value, kept in found:
        assert torch.equal(kept, fastattn.dropout_mask(value, 2, 2, 64, 96, 0.3))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_seed_need_not_be_aligned_and_an_int_may_be_captured():
    device = torch.device("cuda", torch.cuda.current_device())
    seeds = torch.arange(8, device=device)
    for n in (0, 1, 3):
        bits = attention_bits(seeds[n : n + 1], 5, 1, 1, 5, 64, 0.3, LoweredMask(), "triton")
        assert torch.equal(unpacked(bits.cpu(), 64), fastattn.dropout_mask(n, 1, 1, 5, 64, 0.3))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bits = attention_bits(dropout.draw_seed(-9, device), 5, 1, 1, 5, 64, 0.3, LoweredMask(), "triton")
    graph.replay()
    assert torch.equal(unpacked(bits.cpu(), 64), fastattn.dropout_mask(-9, 1, 1, 5, 64, 0.3))
