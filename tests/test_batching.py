"""Batches within a budget of tokens, and results in the order of the items."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch

import fastattn
from fastattn.batching import map_in_batches, token_batches

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies

LENGTHS = st.lists(st.integers(0, 40), max_size=60)
LIMITS = {"max_tokens": st.integers(1, 100), "max_sequences": st.none() | st.integers(1, 9)}


@given(lengths=LENGTHS, **LIMITS)
def test_batches_hold_the_budget(lengths, max_tokens, max_sequences):
    batches = token_batches(lengths, max_tokens, max_sequences)
    taken = [index for batch in batches for index in batch]
    assert taken == sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))  # each once, longest first, ties as given
    assert all(batches)
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= max_tokens
        assert max_sequences is None or len(batch) <= max_sequences
    for batch, following in zip(batches, batches[1:], strict=False):  # none was closed early
        full = len(batch) == max_sequences
        assert full or sum(lengths[i] for i in batch) + lengths[following[0]] > max_tokens
    assert batches == token_batches(torch.tensor(lengths, dtype=torch.int32), max_tokens, max_sequences)
    assert batches == token_batches(np.array(lengths, dtype=np.int64), max_tokens, max_sequences)


@given(lengths=LENGTHS, kind=st.sampled_from(["tensor", "array", "list", "ragged"]), **LIMITS)
def test_results_stand_in_the_order_of_the_items(lengths, kind, max_tokens, max_sequences):
    """One row per item, or tensors whose second dimension differs from batch to batch."""
    calls = []

    def function(items):
        calls.append([number for number, _ in items])
        longest = max(length for _, length in items) if kind == "ragged" else 1
        rows = torch.tensor([number for number, _ in items])[:, None].expand(-1, longest)
        return {"tensor": rows, "ragged": rows, "array": rows.numpy(), "list": list(rows)}[kind]

    items = list(enumerate(lengths))
    results = map_in_batches(function, items, lengths, max_tokens, max_sequences=max_sequences)
    assert calls == token_batches(lengths, max_tokens, max_sequences)
    assert len(results) == len(items)
    for number, row in enumerate(results):
        assert (np.asarray(row) == number).all()
    if kind == "ragged":
        assert all(len(row) >= length for row, length in zip(results, lengths, strict=True))


def test_the_batches_of_an_example():
    assert token_batches([3, 9, 3, 50, 1, 0, 3], 10) == [[3], [1], [0, 2, 6, 4, 5]]
    assert token_batches([3, 9, 3, 50, 1, 0, 3], 10, max_sequences=2) == [[3], [1], [0, 2], [6, 4], [5]]


@pytest.mark.parametrize("lengths", [[], (), torch.zeros(0)])
def test_nothing_makes_no_batch(lengths):
    assert token_batches(lengths, 8) == []
    assert map_in_batches(lambda items: pytest.fail("called"), [], lengths, 8) == []


def test_item_beyond_the_budget_is_alone():
    """Even empty items do not join it."""
    assert token_batches([0, 100, 4, 0], 8) == [[1], [2, 0, 3]]
    assert token_batches([100, 100], 8) == [[0], [1]]


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (ValueError, "max_tokens must be at least 1", ([1], 0)),
        (ValueError, "max_sequences must be at least 1", ([1], 1, 0)),
        (ValueError, "must not be negative, got -2", ([1, -2], 8)),
        (ValueError, r"one dimension, got shape \(2, 2\)", (torch.ones(2, 2, dtype=torch.int64), 8)),
        (TypeError, "a length must be an integer, got 1.5", ([1, 1.5], 8)),
        (TypeError, "a length must be an integer, got 1.0", (torch.ones(2), 8)),
        (TypeError, "a length must be an integer, got True", (torch.ones(2, dtype=torch.bool), 8)),
        (TypeError, "max_tokens must be an integer, got 8.0", ([1], 8.0)),
        (TypeError, "max_sequences must be an integer, got '2'", ([1], 8, "2")),
    ],
)
def test_bad_batches_raise_a_sentence(error, words, arguments):
    with pytest.raises(error, match=words):
        token_batches(*arguments)


@pytest.mark.parametrize(
    ("error", "words", "function"),
    [
        (ValueError, "got 1 for a batch of 2", lambda items: torch.zeros(1, 3)),
        (ValueError, "got 3 for a batch of 2", lambda items: [0, 0, 0]),
        (ValueError, "got 0 for a batch of 2", lambda items: torch.tensor(1.0)),
        (TypeError, "got dict", lambda items: {"last_hidden_state": 0, "pooler_output": 0}),
        (TypeError, "got tuple", lambda items: (0, 0)),
        (TypeError, "got NoneType", lambda items: None),
        (KeyError, "mine", lambda items: {}["mine"]),
    ],
)
def test_bad_results_raise_a_sentence(error, words, function):
    with pytest.raises(error, match=words):
        map_in_batches(function, ["a", "b"], [1, 1], 8)


def test_lengths_belong_to_items():
    with pytest.raises(ValueError, match="got 1 for 2 items"):
        map_in_batches(list, ["a", "b"], [1], 8)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("progress", [None, True, False])
def test_progress_is_for_terminals(monkeypatch, progress, terminal, installed):
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm", None)
        monkeypatch.setattr("fastattn.batching.find_spec", lambda name: None)
    if progress and not installed:
        with pytest.raises(ImportError):
            map_in_batches(list, ["a"], [5], 8, progress=progress)
        return
    assert map_in_batches(list, ["a", "b"], [5, 7], 8, progress=progress) == ["a", "b"]
    shown = stderr.getvalue()
    assert bool(shown) == bool(progress or (progress is None and terminal and installed))
    assert not shown or ("12.0/12.0" in shown and "tokens" in shown)


def test_batches_of_an_accelerated_model():
    """What the module is for: real tokens alone, in the order of the input, equal to one text at a time."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    model = transformers.BertModel(config).eval()
    ids = [torch.randint(1, 50, (n,)) for n in (5, 17, 1, 9, 17, 3)]

    @torch.no_grad()
    def first_states(batch):
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        return model(padded, (padded != 0).long()).last_hidden_state[:, 0]

    expected = torch.cat([first_states([x]) for x in ids])
    with fastattn.accelerate(model, strict=True) as handle:
        results = map_in_batches(first_states, ids, [len(x) for x in ids], max_tokens=20)
        assert not handle.report.fallbacks
    torch.testing.assert_close(torch.stack(results), expected, rtol=2e-5, atol=2e-5)
