"""attention_weights: the attention map, row by row, from the log-sum-exp."""

import pytest
import torch

import fastattn
from fastattn import reference
from fastattn.testing import MASKS, attention_inputs


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("Hkv", [4, 2])
def test_chosen_rows_are_those_of_softmax(mask, Hkv):
    x = attention_inputs(2, 4, 40, 70, 8, torch.float64, mask=mask, Hkv=Hkv)
    _, lse = fastattn.attention(x.q, x.k, x.v, x.mask, return_lse=True, backend="eager")
    scores, visible = reference.scores(x.q, x.k, x.lowered(), x.scale)
    expected = torch.where(visible, torch.softmax(scores, -1), 0)
    torch.testing.assert_close(fastattn.attention_weights(x.q, x.k, lse, x.mask), expected)
    rows, heads = [39, 0, 7], torch.tensor([3, 1])
    chosen = fastattn.attention_weights(x.q, x.k, lse, x.mask, rows=rows, heads=heads)
    torch.testing.assert_close(chosen, expected[:, heads][:, :, rows])


def test_weights_times_values_are_the_output():
    x = attention_inputs(2, 2, 20, 30, 8, torch.float32, mask="window")
    out, lse = fastattn.attention(x.q, x.k, x.v, x.mask, scale=0.7, return_lse=True, backend="eager")
    weights = fastattn.attention_weights(x.q, x.k, lse, x.mask, scale=0.7)
    torch.testing.assert_close(weights @ x.v, out)


def test_hidden_nan_reaches_nothing():
    x = attention_inputs(1, 2, 6, 9, 8, torch.float32)
    mask = fastattn.masks.padding([5])
    _, lse = fastattn.attention(x.q, x.k, x.v, mask, return_lse=True, backend="eager")
    k = x.k.clone()
    k[:, :, 5:] = float("nan")
    k.requires_grad_()
    weights = fastattn.attention_weights(x.q, k, lse, mask)
    assert torch.equal(weights, fastattn.attention_weights(x.q, x.k, lse, mask))
    assert torch.autograd.grad(weights.sum(), k)[0].isfinite().all()


def test_no_rows_and_no_keys():
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 0, 8)
    lse = torch.full((2, 3, 4), float("-inf"))
    assert fastattn.attention_weights(q, k, lse).shape == (2, 3, 4, 0)
    assert fastattn.attention_weights(q, q, lse, rows=[]).shape == (2, 3, 0, 4)


Q, LSE = torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 6)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ValueError, "rows must lie in 0..5", lambda: fastattn.attention_weights(Q, Q, LSE, rows=[6])),
        (ValueError, "heads must lie in 0..3", lambda: fastattn.attention_weights(Q, Q, LSE, heads=[-1])),
        (TypeError, "rows must be a list of integers", lambda: fastattn.attention_weights(Q, Q, LSE, rows=[0.5])),
        (ValueError, "lse has shape", lambda: fastattn.attention_weights(Q, Q, LSE[:1])),
        (ValueError, "H a multiple of Hkv", lambda: fastattn.attention_weights(Q, Q[:, :3], LSE)),
        (TypeError, "mask must be", lambda: fastattn.attention_weights(Q, Q, LSE, "causal")),
    ],
)
def test_bad_input_raises_a_sentence(error, words, call):
    with pytest.raises(error, match=words):
        call()
