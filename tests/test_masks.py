"""Masks against a pair-by-pair definition written out here."""

import itertools

import pytest
import torch

from fastattn import masks

B, H, M, N = 3, 2, 4, 6
LENGTHS, QUERIES = [0, 4, 6], [4, 0, 2]
KEEP = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]], dtype=torch.bool)
OTHER = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 0]], dtype=torch.bool)
PAIRS = torch.arange(M * N).reshape(M, N) % 3 > 0

# mask and the sentence that defines it
ATOMS = [
    (masks.causal(), lambda b, h, i, j: j - i <= N - M),
    (masks.causal("top_left"), lambda b, h, i, j: j <= i),
    (masks.padding(LENGTHS), lambda b, h, i, j: j < LENGTHS[b]),
    (masks.padding(torch.tensor(LENGTHS), QUERIES), lambda b, h, i, j: j < LENGTHS[b] and i < QUERIES[b]),
    (masks.key_padding(KEEP), lambda b, h, i, j: KEEP[b, j]),
    (masks.key_padding(OTHER), lambda b, h, i, j: OTHER[b, j]),
    (masks.dense(PAIRS), lambda b, h, i, j: PAIRS[i, j]),
    (masks.dense(KEEP[:, None, None]), lambda b, h, i, j: KEEP[b, j]),
]


def defined(*definitions):
    result = torch.zeros(B, H, M, N, dtype=torch.bool)
    for b, h, i, j in itertools.product(range(B), range(H), range(M), range(N)):
        result[b, h, i, j] = all(bool(d(b, h, i, j)) for d in definitions)
    return result


@pytest.mark.parametrize("parts", [p for n in (1, 2, 3) for p in itertools.combinations(range(len(ATOMS)), n)])
def test_and_is_the_conjunction(parts):
    mask, definitions = ATOMS[parts[0]][0], [ATOMS[p][1] for p in parts]
    for p in parts[1:]:
        mask = mask & ATOMS[p][0]
    assert torch.equal(mask.dense(B, H, M, N), defined(*definitions))


@pytest.mark.parametrize("parts", [(4,), (5,), (4, 5), (2, 4), (2, 5), (7, 5)])
def test_key_range_is_tight(parts):
    """Kernels take a row for dead when it ends before the first live key, so key_begin must be one."""
    mask = ATOMS[parts[0]][0]
    for p in parts[1:]:
        mask = mask & ATOMS[p][0]
    live = mask.dense(B, 1, 1, N)[:, 0, 0]
    for b in range(B):
        if live[b].any():
            assert int(mask.key_begin[b]) == int(live[b].nonzero()[0])


def test_lengths_are_clamped():
    assert torch.equal(masks.padding([-3, 99, 2]).dense(3, 1, 1, 6)[:, 0, 0].sum(-1), torch.tensor([0, 6, 2]))


def test_mask_is_a_pytree():
    leaves, spec = torch.utils._pytree.tree_flatten(masks.causal() & masks.padding(LENGTHS))
    rebuilt = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert torch.equal(rebuilt.dense(B, H, M, N), (masks.causal() & masks.padding(LENGTHS)).dense(B, H, M, N))


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "align must be", lambda: masks.causal("left")),
        (TypeError, "key_lengths must hold integers", lambda: masks.padding(torch.tensor([1.0]))),
        (ValueError, "key_lengths must have shape", lambda: masks.padding(torch.zeros(2, 2, dtype=int))),
        (ValueError, "query_lengths must have shape", lambda: masks.padding([1], torch.tensor(3))),
        (TypeError, "keep must be a bool tensor", lambda: masks.key_padding(torch.ones(2, 3))),
        (ValueError, "keep must have shape", lambda: masks.key_padding(torch.ones(3) > 0)),
        (ValueError, "must broadcast", lambda: masks.dense(torch.ones(1, 1, 1, 2, 2) > 0)),
        (TypeError, "unsupported operand", lambda: masks.causal() & torch.ones(2)),
    ],
)
def test_bad_input_raises_a_sentence(error, words, call):
    with pytest.raises(error, match=words):
        call()
