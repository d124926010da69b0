"""The cpu backend's calls: what they may allocate, which pairs they compute, and that a mask's parts are kept with it."""

import gc
import itertools
import threading
from dataclasses import replace

import pytest
import torch
from threads import number_of_threads
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastattn
from fastattn import masks
from fastattn.kernels.cpu import attention_atoms, attention_padded, attention_parts
from fastattn.ops.attention_plans import AttentionProblem
from fastattn.testing import MASKS, assert_accurate, attention_inputs, attention_yardstick, run_attention

BOUNDS = ["causal", "padding", "padding_queries", "holes", "causal_left", "window", "prefix_lm", "window_prefix"]


@pytest.fixture
def two_threads():
    with number_of_threads(2):
        yield


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes; a view, or a tensor of stride 0, counts as its memory."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def largest(mask, M, N, Hkv=4, dlse=True):
    """Of forward and backward below the public function: the mask is lowered, so its bits exist."""
    from fastattn.kernels.cpu import attention as cpu

    x = attention_inputs(2, 4, M, N, 8, torch.float32, mask=mask, Hkv=Hkv, dlse=dlse)
    lowered = x.lowered()
    with Largest() as seen, number_of_threads(1):  # it sees this thread alone
        out, lse = cpu.forward(x.q, x.k, x.v, lowered, x.scale, True)
        cpu.backward(x.dout, x.dlse, x.q, x.k, x.v, out, lse, lowered, x.scale)
    return seen.elements


@pytest.mark.parametrize("mask", MASKS)
def test_no_tensor_has_an_element_for_each_pair(mask):
    M = N = 600
    elements = largest(mask, M, N, Hkv=2)
    assert elements < (2 * 4 * M * N // 2 if mask == "dense" else M * N)


@pytest.mark.parametrize("mask", BOUNDS)
def test_memory_is_linear_in_the_length(mask):
    assert largest(mask, 1200, 1200) <= 2.1 * largest(mask, 600, 600)


@pytest.mark.parametrize(("Hkv", "Dv"), [(2, 16), (1, 24), (4, 8), (2, 40)])
@pytest.mark.parametrize("mask", ["none", "causal_padding", "window_prefix", "documents", "columns_padding", "dense"])
def test_grouped_heads_and_widths(mask, Hkv, Dv):
    for dtype, M, N, dlse in ((torch.float32, 130, 130, True), (torch.bfloat16, 70, 141, False)):
        x = attention_inputs(2, 4, M, N, 16, dtype, mask=mask, Hkv=Hkv, Dv=Dv, dlse=dlse)
        assert_accurate(run_attention(x, "cpu"), attention_yardstick(x), cpu_half_gradients=True)


@pytest.mark.parametrize("mask", ["window", "window_prefix", "documents", "columns_padding", "conv", "either", "dense"])
def test_blocks_agree_with_the_specification(mask):
    """Lengths at which a mask needs several blocks of queries, and several runs of keys."""
    x = attention_inputs(2, 2, 300, 330, 16, torch.float32, mask=mask, dlse=True)
    assert_accurate(run_attention(x, "cpu"), attention_yardstick(x))
    x = attention_inputs(2, 2, 5, 7, 4, torch.float64, mask=mask)
    function = lambda q, k, v: fastattn.attention(q, k, v, x.mask, backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(function, tuple(t.contiguous().requires_grad_() for t in (x.q, x.k, x.v)))


IMAGES = {"rows": masks.rows(8, 24, 128), "columns": masks.columns(8, 24, 128), "conv": masks.conv(8, 24, 5, 128)}


def parts_of(mask, shape):
    return attention_parts.parts(mask.lower(shape[2], shape[2]), torch.empty(shape), shape[2])


@pytest.mark.parametrize("B", [1, 12])  # a call for each sequence, and for each block
@pytest.mark.parametrize("name", IMAGES)
def test_blocks_that_repeat_and_results_that_are_merged(name, B):
    found = parts_of(IMAGES[name], (B, 8, 320, 64))
    assert any(part.merged for part in found) and max(block.count for part in found for block in part.blocks) > 4
    x = replace(attention_inputs(B, 8, 320, 320, 64, torch.float32), mask=IMAGES[name])
    assert_accurate(run_attention(x, "cpu"), attention_yardstick(x))
    x = replace(attention_inputs(1, 8, 320, 320, 64, torch.bfloat16), mask=IMAGES[name])
    assert_accurate(run_attention(x, "cpu"), attention_yardstick(x), cpu_half_gradients=True)


def times(mask, shape):
    """How often the calls compute each pair that they show, (B, 1, L, L)."""
    B, _, L, _ = shape
    found = torch.zeros(B, 1, L, L, dtype=torch.int32)
    for part in parts_of(mask, shape):
        for block in part.blocks:
            if block.words is None:
                shown = torch.ones(1, 1, 1, 1) if block.full else part.visible(block)
            else:
                shown = attention_parts.unpacked(block.words, block.keys, torch.float32) == 0
            for n in range(block.count):
                rows, *runs = (
                    attention_parts._positions(where, range(x.start + n * shift, x.stop + n * shift, x.step))
                    for where, x, shift in (
                        (part.queries, block.rows, block.row_shift),
                        *((part.keys, run, block.key_shift) for run in block.runs),
                    )
                )
                keys = torch.cat(runs)
                found[part.batch, :, rows[:, None], keys] += shown.int().expand(-1, -1, len(rows), len(keys))
    return found


@pytest.mark.parametrize("prefix", [0, 5, 16, 40, 77])
@pytest.mark.parametrize(("h", "w"), [(16, 8), (24, 24), (32, 8), (8, 24)])
def test_each_visible_pair_is_computed_once(h, w, prefix):
    """Blocks of the text's keys may take keys of the image with them, which no later block may compute once more."""
    grids = masks.rows(h, w, prefix), masks.columns(h, w, prefix), masks.conv(h, w, 3, prefix)
    for cut, H, D in ((0, 12, 64), (3, 1, 16), (h * w // 2, 4, 64)):
        L = prefix + h * w - cut
        for mask in (*grids, grids[0] | masks.window(3, 3), grids[2] & masks.padding([L, L // 2])):
            assert torch.equal(times(mask, (2, H, L, D)), mask.dense(2, 1, L, L).int())


def test_an_image_behind_a_short_text():
    x = replace(attention_inputs(4, 4, 128, 128, 64, torch.float32, dlse=True), mask=masks.rows(16, 8, 5))
    assert_accurate(run_attention(x, "cpu"), attention_yardstick(x))


def test_a_merged_block_may_hold_rows_that_see_nothing_more():
    keep = IMAGES["rows"].dense(1, 8, 320, 320).clone()
    keep[:, 1, 130:320:3, 128:] = False  # one head's
    mask = masks.dense(keep)
    found = parts_of(mask, (2, 8, 320, 64))
    assert any(block.dead is not None for part in found if part.merged for block in part.blocks)
    x = replace(attention_inputs(2, 8, 320, 320, 64, torch.float32, dlse=True), mask=mask)
    assert_accurate(run_attention(x, "cpu"), attention_yardstick(x))


@pytest.mark.parametrize("mask", MASKS)
def test_any_plan_is_right(monkeypatch, mask):
    """Where calls, merging and gathering cost nothing, small sizes too are served by the blocks of large ones."""
    monkeypatch.setattr(attention_parts, "HIDDEN_WORK", dict.fromkeys(attention_parts.HIDDEN_WORK, 2))
    monkeypatch.setattr(attention_atoms, "MERGED", 0)
    monkeypatch.setattr(attention_atoms, "GATHERED", 0)
    attention_parts._of_bounds.cache_clear()
    for B, M, N in ((1, 170, 170), (3, 130, 200), (9, 200, 96)):
        x = attention_inputs(B, 2, M, N, 8, torch.float32, mask=mask, dlse=True, seed=B)
        assert_accurate(run_attention(x, "cpu"), attention_yardstick(x))
    attention_parts._of_bounds.cache_clear()


@pytest.mark.parametrize(("h", "w"), [(32, 32), (24, 24), (40, 24), (16, 56)])
def test_rows_and_columns_of_an_image_are_views_and_few_blocks(h, w):
    L = 256 + h * w
    for mask in (masks.rows(h, w, 256), masks.columns(h, w, 256)):
        found = parts_of(mask, (2, 8, L, 64))
        assert all(isinstance(where, slice) for part in found for where in (part.queries, part.keys))
        assert sum(len(part.blocks) for part in found) <= 8


def computed(mask, B=2, H=8, L=1280):
    """The share of the pairs that the calls compute."""
    found = parts_of(mask, (B, H, L, 64))
    total = 0
    for part in found:
        for block in part.blocks:
            keys = block.count * block.keys
            total += (part.batch.stop - part.batch.start) * len(block.rows) * keys
    return total / (B * L * L)


def test_images_and_documents_compute_little_more_than_is_visible():
    ids = torch.arange(10).repeat_interleave(128).expand(2, -1)
    shares = {
        "rows": masks.rows(32, 32, 256), "columns": masks.columns(32, 32, 256), "conv": masks.conv(32, 32, 5, 256),
        "window": masks.window(128, 128), "documents": masks.documents(ids),
        "shuffled documents": masks.documents(ids[:, torch.randperm(1280)]),
    }  # fmt: skip
    for name, mask in shares.items():
        visible = mask.dense(2, 1, 1280, 1280).double().mean()
        assert visible <= computed(mask) <= 1.5 * visible, name


def test_parts_live_as_long_as_their_mask():
    mask = masks.columns(8, 8, 5)
    q, k, v = torch.randn(3, 1, 2, 69, 8)
    before = len(attention_parts._kept)
    first = fastattn.attention(q, k, v, mask, backend="cpu")
    parts = attention_parts.parts(mask.lower(69, 69, q.device), q, 69)
    assert attention_parts.parts(mask.lower(69, 69, q.device), q, 69) is parts and len(attention_parts._kept) == before + 1
    assert torch.equal(first, fastattn.attention(q, k, v, mask, backend="cpu"))
    del mask
    gc.collect()
    assert len(attention_parts._kept) == before


def test_one_id_tensor_serves_two_masks():
    """What stands beside the ids belongs to the mask, so the parts of one must not answer for the other."""
    ids = torch.zeros(1, 40, dtype=torch.int32)
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    for length in (40, 17, 3):
        mask = masks.documents(ids) & masks.padding([length])
        expected = fastattn.attention(q, k, v, mask, backend="eager")
        torch.testing.assert_close(fastattn.attention(q, k, v, mask, backend="cpu"), expected)


def test_notes_name_the_copies():
    from fastattn.kernels.cpu import attention as cpu

    problem = AttentionProblem("cpu", torch.float32, B=1, H=4, M=8, N=8, D=16, Hkv=2, Dv=8)
    said = " ".join(cpu.notes(problem))
    assert "v is copied to the width of q and k" in said and "2 calls" in said


def test_a_row_that_sees_only_keys_beyond_the_length_is_dead():
    """The hidden key shares a word of bits with the last live ones."""
    keep = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    keep[..., 3, :37] = False
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    mask = masks.dense(keep) & masks.padding([35], [40])  # with query lengths no call computes the padding too
    served, expected = (fastattn.attention(q, k, v, mask, return_lse=True, backend=name) for name in ("cpu", "eager"))
    for a, b in zip(served, expected, strict=True):
        torch.testing.assert_close(a, b)


LENGTHS = [70, 0, 33, 64, 64, 7, 0, 70, 1, 0]  # of ten sequences of 70
HOLES = torch.rand(10, 70, generator=torch.Generator().manual_seed(0)) > 0.3
RIGHT = torch.arange(70) < torch.tensor(LENGTHS)[:, None]
PADDINGS = {
    "keys": masks.padding(LENGTHS), "queries": masks.padding(LENGTHS, LENGTHS[::-1]), "left": masks.key_padding(RIGHT.flip(1)),
    "holes": masks.key_padding(RIGHT & HOLES), "queries alone": masks.Mask(query_end=torch.tensor(LENGTHS, dtype=torch.int32)),
    "holes, fewer": masks.key_padding(HOLES) & masks.padding(LENGTHS[::-1], LENGTHS),
}  # fmt: skip


@pytest.fixture
def priced(monkeypatch):
    """Sets what a call more must save, in pairs: 0 is a call for each sequence, 10**9 one for all."""

    def prices(pairs, H, D):
        monkeypatch.setattr(attention_padded, "_price", lambda: pairs * H * D)
        for name in ("SHARE", "CUT", "COPIED", "MASK"):
            monkeypatch.setattr(attention_padded, name, 0)
        attention_padded._plan.cache_clear()

    yield prices
    attention_padded._plan.cache_clear()


@pytest.mark.parametrize("price", [0, 1500, 10**9])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", PADDINGS)
def test_sequences_may_share_calls_in_any_way(monkeypatch, priced, name, threads, price):
    H, D = 2, 8
    priced(price, H, D)
    monkeypatch.setattr(attention_padded, "CALL", 100)  # so that heads are shared out too
    monkeypatch.setattr(attention_padded, "SERIAL", 400)
    for dtype in (torch.float32, torch.bfloat16):
        x = replace(attention_inputs(10, H, 70, 70, D, dtype, dlse=dtype == torch.float32), mask=PADDINGS[name])
        with number_of_threads(threads):
            found = run_attention(x, "cpu")
        assert_accurate(found, attention_yardstick(x), cpu_half_gradients=True)


@pytest.mark.parametrize("price", [0, 1500, 10**9])
@pytest.mark.parametrize("name", PADDINGS)
def test_what_padding_holds_changes_no_bit(priced, name, price):
    """One element of one token is enough to be seen; in queries that see nothing, and in their gradients, too."""
    H, D, bads = 2, 8, itertools.cycle((float("nan"), float("inf"), -float("inf")))
    priced(price, H, D)
    x = replace(attention_inputs(10, H, 70, 70, D, torch.float32), mask=PADDINGS[name])
    visible = PADDINGS[name].dense(10, 1, 70, 70)
    hidden_keys, dead = ~visible.any(2)[:, 0], ~visible.any(3)[:, 0]
    clean = run_attention(x, "cpu")
    for field, hidden in (("k", hidden_keys), ("v", hidden_keys), ("q", dead), ("dout", dead)):
        for b, token in hidden.nonzero()[::7].tolist():
            changed = getattr(x, field).clone()
            changed[b, 1, token, 5] = next(bads)
            dirty = run_attention(replace(x, **{field: changed}), "cpu")
            for part, tensor in clean.items():
                assert torch.equal(tensor, dirty[part]), (field, b, token, part)


class Counted:
    """A kernel and how often it was called."""

    def __init__(self, kernel):
        self.kernel, self.times = kernel, 0

    def __call__(self, *args, **kwargs):
        self.times += 1
        return self.kernel(*args, **kwargs)


@pytest.fixture
def kernels(monkeypatch, two_threads):
    """Forward and backward."""
    found = Counted(attention_padded._flash), Counted(attention_padded._flash_backward)
    for name, counted in zip(("_flash", "_flash_backward"), found, strict=True):
        monkeypatch.setattr(attention_padded, name, counted)
    return found


@pytest.mark.parametrize("name", PADDINGS)
def test_padding_of_short_sequences_is_one_call(kernels, name):
    x = replace(attention_inputs(10, 2, 70, 70, 8, torch.float32, dlse=True), mask=PADDINGS[name])  # with dlse it runs once
    run_attention(x, "cpu")
    assert [kernel.times for kernel in kernels] == [1, 1]
    hidden = ~PADDINGS[name].dense(10, 1, 70, 70).any(2)
    if hidden.any():
        run_attention(replace(x, k=x.k.masked_fill(hidden[..., None], float("nan"))), "cpu")
        assert [kernel.times for kernel in kernels] == [3, 3]  # once more where NaN is seen


def calls_of(mask, B, L, backward=False):
    """(sequences, queries, keys, whether a mask is made) of each call that computes something."""
    found = attention_padded.calls(mask.lower(L, L), torch.empty(B, 12, L, 64), L, backward)
    return [
        (call.batch.stop - call.batch.start, call.rows.stop, call.keys.stop - call.keys.start, call.hidden is not None)
        for call in found
        if call.rows.stop
    ]


SOME = [128, 3, 77, 50, 9, 120, 64, 31]


def test_calls_of_padding(two_threads):
    """Several calls where they save many pairs; one region of all threads, for all sequences, where they do not."""
    keys = [(128, False), (3, False), (80, True), (50, False), (16, True), (120, False), (64, False), (32, True)]
    assert [(keys, hides) for _, _, keys, hides in calls_of(masks.padding(SOME), 8, 128)] == keys
    assert [rows for _, rows, _, _ in calls_of(masks.padding(SOME, SOME), 8, 128)] == SOME
    assert calls_of(masks.padding([64] * 8), 8, 128) == [(8, 128, 64, False)]
    assert calls_of(masks.padding([128] * 7 + [100]), 8, 128) == [(8, 128, 128, True)]
    assert calls_of(masks.padding([61] * 8), 8, 128) == [(8, 128, 64, True)]  # whole vectors, the last keys hidden
    assert calls_of(masks.padding([40, 3, 60, 20]), 4, 64) == [(4, 64, 64, True)]  # too little to share


def test_several_calls_are_shared_out(monkeypatch):
    """Each in a thread of its own number of threads, 1: no call has a parallel region; results are the same bits."""
    seen, flash = [], attention_padded._flash

    def watched(*args, **kwargs):
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return flash(*args, **kwargs)

    x = replace(attention_inputs(8, 4, 128, 128, 64, torch.float32), mask=masks.padding(SOME, SOME))
    with number_of_threads(1):
        alone = run_attention(x, "cpu")
    monkeypatch.setattr(attention_padded, "_flash", watched)
    with number_of_threads(2):
        shared = run_attention(x, "cpu")
    assert len(seen) > 4 and threading.get_ident() not in {thread for thread, _ in seen}
    assert {number for _, number in seen} == {1}
    for part, tensor in alone.items():
        assert torch.equal(tensor, shared[part]), part
