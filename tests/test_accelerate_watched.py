"""`accelerate(model, cuda_graphs=True)`: what a replay asks once and shares, and what it gives. A capture is pretended."""

import copy

import pytest
import torch
from test_accelerate import L, result, text
from test_accelerate_graphs import ONE_BUCKET, both, close, hook, proven, query
from torch import nn

from fastattn.integrations.accelerate_checks import Examined


@torch.no_grad()
def test_back_to_what_was_captured(capturing):
    """The layers were looked at with another part in between, so that what is known of them is not of what is there again."""
    model, ours, _ = both()
    proven(ours)
    ours(**text())
    before = query(ours)
    ours.encoder.layer[0].attention.self.query = copy.deepcopy(before).requires_grad_(False)
    query(ours).weight.mul_(3)
    proven(ours)
    ours.encoder.layer[0].attention.self.query = before
    for lengths in ((L, L), ONE_BUCKET[0]) * 2:
        inputs = text(lengths=lengths)
        close(result(ours, inputs), result(model, inputs))
    assert capturing.captures == 2


@torch.no_grad()
def test_a_replay_looks_at_the_modules_once(capturing, monkeypatch):
    """What graphs have found as it was, the layers' own check does not ask again."""
    _, ours, _ = both()
    proven(ours)
    ours(**text())
    asked = []
    honest = Examined.holds
    monkeypatch.setattr(Examined, "holds", lambda examined: asked.append(1) or honest(examined))
    ours(**text())
    assert not asked and capturing.replays == 2
    hook(ours)
    ours(**text())
    assert asked


@torch.no_grad()
def test_hooks_on_every_module_are_never_left_out(capturing):
    _, ours, _ = both()
    proven(ours)
    ours(**text())
    added = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(NotImplementedError, match="hooks on every module"):
            ours(**text())
    finally:
        added.remove()
    assert capturing.replays == 1


def test_hooks_of_a_backward_pass_count_where_there_may_be_one(capturing):
    _, ours, _ = both()
    ours.requires_grad_(False)
    proven(ours)
    ours(**text())
    query(ours).register_full_backward_hook(lambda *_: None)
    with torch.no_grad():
        ours(**text())
    assert capturing.replays == 2
    with pytest.raises(NotImplementedError, match="query has hooks"):
        ours(**text())


@torch.no_grad()
def test_an_output_is_filled_as_its_class_would_make_it(capturing):
    """Items, fields and places agree, and nothing in it is the graph's."""
    model, ours, _ = both(prove=False)
    ours(**text())
    out, expected = ours(**text()), model(**text())
    assert capturing.replays == 2 and vars(out).keys() == vars(expected).keys() and out.hidden_states is None
    assert len(out.to_tuple()) == 2 and out[0] is out.last_hidden_state is out["last_hidden_state"]
    out.hidden_states = (out.pooler_output,)
    assert "hidden_states" in out
    held = out.last_hidden_state.clone()
    other = ours(**text(lengths=ONE_BUCKET[1]))
    assert torch.equal(out.last_hidden_state, held) and other.hidden_states is None
