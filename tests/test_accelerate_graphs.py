"""`accelerate(model, cuda_graphs=True)`: what is captured and replayed, what is read for it, and what is not captured.

A capture is pretended (`pretended_graphs`), and all that decides about it is real. `test_graphs_gpu.py` has real ones.
"""

import copy
import pickle

import pytest
import torch
from pretended_graphs import OnHost, on_host
from test_accelerate import MODELS, QUIET, SMALL, TEXT, VISION, L, build, result, text
from torch import nn

import fastattn
from fastattn import graphs
from fastattn.graphs import bucket
from fastattn.integrations import accelerate_forward

transformers = pytest.importorskip("transformers")
ONE_BUCKET = ((24, 7, 1, 0, 13), (24, 9, 2, 4, 3), (1, 13, 24, 0, 8))  # 45, 42 and 46 tokens of 120: 48 rows


def both(name="bert", head=None, **settings):
    torch.manual_seed(0)
    model = (build(name) if head is None else head()).eval()
    ours = copy.deepcopy(model)
    return model, ours, fastattn.accelerate(ours, strict=True, **{"cuda_graphs": True, **settings})


def close(out, expected, mask=None):
    if mask is not None:
        out, expected = (y * mask[..., None] for y in (out, expected))
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)


def proven(ours, inputs=None):
    """After the first call, which compares the layers."""
    ours(**(text() if inputs is None else inputs))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_replays_give_what_the_model_gives(capturing, name):
    """Batches whose numbers of tokens are of one bucket share a graph; the first call proves the layers, and is none."""
    model, ours, handle = both(name)
    proven(ours)
    assert capturing.captures == 0 and handle.report.not_captured.total() == 1
    for lengths in ONE_BUCKET:
        inputs = text(lengths=lengths)
        assert bucket(sum(lengths)) == 48
        close(result(ours, inputs), result(model, inputs))
    assert (capturing.captures, capturing.replays) == (1, 3)
    assert handle.report.not_captured.total() == 1
    assert "1 calls ran without a CUDA graph: its layers are to be compared" in str(handle.report)


@torch.no_grad()
def test_other_buckets_shapes_and_batches_without_padding(capturing):
    model, ours, _ = both(prove=False)
    some = [text(lengths=lengths) for lengths in ((24, 7, 1, 0, 13), (24, 24, 24, 0, 13), (5, 5), (L, L), (L, L, L, L, L))]
    for inputs in some * 2:
        close(result(ours, inputs), result(model, inputs))
    assert (capturing.captures, capturing.replays) == (5, 10)
    ids = some[3]["input_ids"]
    close(ours(input_ids=ids).last_hidden_state, model(input_ids=ids).last_hidden_state)
    assert capturing.captures == 6  # without a mask: another call
    close(ours(ids).last_hidden_state, model(ids).last_hidden_state)
    assert capturing.captures == 6  # a name that is not said


@torch.no_grad()
def test_vit(capturing):
    def vit():
        return transformers.ViTModel(transformers.ViTConfig(**{**SMALL, **QUIET, **VISION}))

    model, ours, handle = both(head=vit)
    for _ in range(3):
        capturing.reads = 0
        pixels = torch.randn(2, 3, 16, 16)
        close(ours(pixels).last_hidden_state, model(pixels).last_hidden_state)
    assert capturing.replays == 2 and capturing.reads == 0 and handle.report.not_captured.total() == 1


@torch.no_grad()
def test_both_towers_of_clip(capturing):
    def clip():
        return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=VISION))

    model, ours, _ = both(head=clip, cuda_graphs=2)
    inputs = text(lengths=(24, 7, 9))
    inputs["input_ids"][torch.arange(3), torch.tensor([23, 6, 8])] = 59
    for _ in range(3):
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16)
        out, expected = ours(**inputs), model(**inputs)
        close(out.logits_per_image, expected.logits_per_image)
    assert (capturing.captures, capturing.replays) == (2, 4) and set(capturing.pools) == {0}


@pytest.mark.parametrize("return_dict", [True, False])
@torch.no_grad()
def test_hidden_states_and_tuples(capturing, return_dict):
    """Outputs are of the class that the model gives, nested tuples too, and copies."""
    model, ours, _ = both()
    inputs = {**text(), "output_hidden_states": True, "return_dict": return_dict}
    for _ in range(2):  # in the first one transformers' own hooks come, and then all is looked at again
        proven(ours, inputs)
    first = ours(**inputs)
    expected = model(**inputs)
    assert type(first) is type(expected) and len(first) == len(expected)
    states, theirs = (y[-1] if isinstance(y, tuple) else y.hidden_states for y in (first, expected))
    held = [y.clone() for y in states]
    for one, other in zip(states, theirs, strict=True):
        close(one, other, inputs["attention_mask"])
    other = text(lengths=ONE_BUCKET[1])
    ours(**{**inputs, **other})
    assert capturing.captures == 1 and capturing.replays == 2
    assert all(torch.equal(one, two) for one, two in zip(states, held, strict=True))


@torch.no_grad()
def test_a_batch_without_padding_is_a_class_of_its_own(capturing, monkeypatch):
    """It needs no mask, where one of as many rows that has padding does."""
    hidden = []
    honest = accelerate_forward.padded
    monkeypatch.setattr(accelerate_forward, "padded", lambda encoder, keep: hidden.append(keep) or honest(encoder, keep))
    model, ours, _ = both(prove=False)
    for lengths in ((L, L), (L, L - 1), (L, L)):
        close(result(ours, text(lengths=lengths)), result(model, text(lengths=lengths)))
    assert capturing.captures == 2 and hidden and all(keep is None for keep in hidden)


@torch.no_grad()
def test_plain_values_are_in_the_key(capturing):
    model, ours, _ = both()
    for _ in range(2):
        proven(ours, {**text(), "output_hidden_states": True})
    for asked in (False, True, None, False, True):
        out, expected = (m(**text(), output_hidden_states=asked) for m in (ours, model))
        assert out.keys() == expected.keys()
    assert capturing.captures == 3 and capturing.replays == 5


# What is read on the host


@torch.no_grad()
def test_one_read_in_a_call(capturing):
    """The number of tokens, whether padding has a label and whether a token that is pooled is padding come together."""
    model, ours, handle = both(head=token_classifier)
    inputs = {**text(lengths=(24, 7, 1, 0, 13)), "labels": torch.randint(0, 2, (5, L))}
    proven(ours, inputs)
    capturing.reads = 0
    for wrong in (True, False):
        if not wrong:
            inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
        close(ours(**inputs).loss, model(**inputs).loss)
        assert capturing.reads == 1
        capturing.reads = 0
    assert capturing.captures == 2 and handle.report.padded["labels at padding"] == 2  # with that of the proof


def token_classifier():
    return transformers.BertForTokenClassification(transformers.BertConfig(**SMALL, **QUIET))


@torch.no_grad()
def test_a_mask_alone_is_read_at_once(capturing, monkeypatch):
    """As a copy, of which all that there is to know is known on the host."""
    monkeypatch.setattr(graphs, "DeviceContext", OnHost)
    model, ours, handle = both(prove=False)
    for side in ("right", "left"):
        capturing.reads = 0
        with OnHost():
            out = ours(**text(side))
        assert capturing.reads == 1
        close(result(ours, text(side)), result(model, text(side)), text(side)["attention_mask"])
    assert handle.report.padded == {"the token that is pooled is padding": 2} and out.pooler_output is not None


@pytest.mark.parametrize("name", ["bert", "distilbert"])
@torch.no_grad()
def test_a_mask_in_the_host_s_memory_is_counted_there(capturing, monkeypatch, name):
    monkeypatch.setattr(graphs, "DeviceContext", OnHost)  # the one kind of mode in which calls are captured
    model, ours, _ = both(name)
    proven(ours)
    capturing.reads = 0
    for lengths in ONE_BUCKET:
        inputs = text(lengths=lengths)
        expected = result(model, inputs)
        mask = inputs.pop("attention_mask")
        with OnHost():
            out = ours(**inputs, attention_mask=on_host(mask.clone())).last_hidden_state
        close(out, expected, mask)
    assert capturing.captures == 1 and capturing.replays == 3 and capturing.reads == 0


@torch.no_grad()
def test_a_capacity_is_the_bucket_and_reads_nothing(capturing):
    model, ours, handle = both(capacity=64)
    proven(ours)
    capturing.reads = 0
    for lengths in (*ONE_BUCKET, (24, 24, 9, 0, 0), (24, 24, 24, 24, 24)):
        inputs = text(lengths=lengths)
        out = result(ours, inputs)
        assert capturing.reads == 0
        assert handle.overflowed == (sum(lengths) > 64)
        if not handle.overflowed:
            close(out, result(model, inputs))
        capturing.reads = 0
    assert capturing.captures == 1 and capturing.replays == 5


@torch.no_grad()
def test_dropped_tokens_are_told_of_the_last_call(capturing):
    """Not of the graph's memory, which the next call writes to."""
    _, ours, handle = both(capacity=64, prove=False)
    ours(**text(lengths=(24, 24, 24, 24, 24)))
    held = handle._encoders[0].overflowed
    ours(**text())
    assert bool(held) and not handle.overflowed
    ours(**text(lengths=(L, L)))
    assert not handle.overflowed


@torch.no_grad()
def test_padding_stays_where_it_is_read(capturing):
    """Decided outside of a graph, in each call."""
    model, ours, handle = both(head=token_classifier, unpad="never")
    inputs = text()
    proven(ours, inputs)
    capturing.reads = 0
    close(ours(**inputs).logits, model(**inputs).logits, inputs["attention_mask"])
    assert handle.report.padded == {"unpad=never": 2} and capturing.captures == 1 and capturing.reads == 0
    model, ours, handle = both(prove=False)
    close(ours(**text("left")).pooler_output[:3], model(**text("left")).pooler_output[:3])
    close(result(ours, text()), result(model, text()))
    assert handle.report.padded == {"the token that is pooled is padding": 1}
    model, ours, handle = both(prove=False, unpad="always")
    close(result(ours, text("left")), result(model, text("left")))
    assert not handle.report.padded and capturing.captures == 4


# Weights and modules that change


@torch.no_grad()
def test_updates_in_place_are_seen(capturing):
    model, ours, _ = both()
    proven(ours)
    close(result(ours, text()), result(model, text()))
    for m in (model, ours):
        generator = torch.Generator().manual_seed(3)
        for p in m.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    close(result(ours, text()), result(model, text()))
    assert capturing.captures == 1


def query(m):
    return m.encoder.layer[0].attention.self.query


CHANGES = {
    "replaced": lambda m: setattr(query(m), "weight", nn.Parameter(query(m).weight * 2)),
    "data": lambda m: setattr(query(m).weight, "data", query(m).weight * 2),
    "embedding": lambda m: setattr(m.embeddings.word_embeddings.weight, "data", m.embeddings.word_embeddings.weight * 2),
    "assigned": lambda m: m.load_state_dict({name: v * 1.1 for name, v in m.state_dict().items()}, strict=False, assign=True),
    "cast": lambda m: m.double(),
    "eps": lambda m: setattr(m.encoder.layer[1].output.LayerNorm, "eps", 0.5),
    "eps of embeddings": lambda m: setattr(m.embeddings.LayerNorm, "eps", 0.5),
    "scale": lambda m: setattr(m.encoder.layer[0].attention.self, "scaling", 0.1),
    "config": lambda m: setattr(m.config, "output_hidden_states", True),
    "order": lambda m: m.encoder.layer.insert(0, m.encoder.layer.pop(1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_change_is_never_replayed_from_before(capturing, change):
    model, ours, _ = both()
    for _ in range(2):  # in the first one transformers' own hooks come, and then all is looked at again
        proven(ours, {**text(), "output_hidden_states": True})
    ours(**text())
    assert capturing.captures == 1
    for m in (model, ours):
        change(m)
    for _ in range(3):  # the first may prove the layers once more
        out, expected = ours(**text()), model(**text())
        assert out.keys() == expected.keys() and out.last_hidden_state.dtype == expected.last_hidden_state.dtype
        close(result(ours, text()), result(model, text()))
    assert capturing.captures == 2 and len(graphs_of(ours)) == 1


def graphs_of(model):
    return model.forward.settings.graphs.calls.graphs


@torch.no_grad()
def test_restore_and_refresh_drop_graphs(capturing):
    model, ours, handle = both()
    proven(ours)
    ours(**text())
    kept = graphs_of(ours)
    assert len(kept) == 1
    handle.refresh()
    assert len(kept) == 0
    proven(ours)
    close(result(ours, text()), result(model, text()))
    assert len(kept) == 1
    handle.restore()
    assert len(kept) == 0
    close(result(ours, text()), result(model, text()), text()["attention_mask"])


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_a_copy_starts_without_graphs(capturing, how):
    model, ours, _ = both()
    proven(ours)
    ours(**text())
    other = how(ours)
    assert len(graphs_of(other)) == 0 and len(graphs_of(ours)) == 1
    for p in other.parameters():
        p.mul_(1.1)
    proven(other)
    changed = copy.deepcopy(model)
    for p in changed.parameters():
        p.mul_(1.1)
    close(result(other, text()), result(changed, text()))
    close(result(ours, text()), result(model, text()))
    kept = graphs_of(other)
    assert len(kept) == 1
    fastattn.restore(other)
    assert len(kept) == 0 and len(graphs_of(ours)) == 1


# What is not captured


def train(m):
    m.train()


def hook(m):
    m.pooler.register_forward_hook(lambda *_: None)


def layer_hook(m):
    m.encoder.layer[0].register_forward_hook(lambda *_: None)


def own_pooler(m):
    class Pooler(nn.Module):
        def forward(self, states):
            return states[:, 0]

    m.pooler = Pooler().eval()


def own_forward(m):
    m.pooler.forward = lambda states: states[:, 0]


REFUSED = {
    train: "training mode",
    hook: "hooks inside",
    layer_hook: "hooks inside",
    own_pooler: "pooler is a Pooler, which may do anything",
    own_forward: "a forward was set on pooler",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
@torch.no_grad()
def test_a_model_that_is_not_captured(capturing, change):
    model, ours, handle = both()
    proven(ours)
    ours(**text())
    for m in (model, ours):
        change(m)
    for _ in range(2):  # the first may prove the layers once more
        close(result(ours, text()), result(model, text()))
    assert capturing.captures == 1 and capturing.replays == 1
    assert REFUSED[change] in list(handle.report.not_captured)[-1]


@torch.no_grad()
def test_a_hook_on_the_model_itself_runs_outside(capturing):
    """It sees the caller's tensors, and the copies."""
    model, ours, _ = both()
    proven(ours)
    seen = []
    ours.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    out = [ours(**text()).last_hidden_state for _ in range(2)]
    assert capturing.replays == 2 and all(one is other for one, other in zip(out, seen, strict=True))


def test_gradients_are_wanted(capturing):
    model, ours, handle = both()
    proven(ours)
    for m in (model, ours):
        result(m, text()).sum().backward()
    close(query(ours).weight.grad, query(model).weight.grad)
    assert "a gradient may be wanted" in list(handle.report.not_captured)[-1] and capturing.captures == 0


@torch.no_grad()
def test_the_model_s_own_code_is_not_captured(capturing):
    model = build("bert", "eager").eval()
    handle = fastattn.accelerate(model, cuda_graphs=True)
    model(**text(), output_attentions=True)
    assert handle.report.not_captured == {"the model's own code runs": 1} and capturing.captures == 0


@torch.no_grad()
def test_traced_and_compiled_calls_are_not_captured(capturing):
    model, ours, handle = both()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    close(result(compiled, text()), result(model, text()))
    assert set(handle.report.not_captured) == {"it is traced or compiled"} and capturing.captures == 0


@torch.no_grad()
def test_a_capture_that_fails_runs_as_before(capturing):
    model, ours, handle = both()
    proven(ours)
    capturing.fails = "its capture failed with RuntimeError: no"
    for _ in range(2):
        close(result(ours, text()), result(model, text()))
    assert handle.report.not_captured[capturing.fails] == 2
    inputs = text()
    inputs["attention_mask"] = on_host(inputs["attention_mask"])
    close(ours(**inputs).last_hidden_state, model(**text()).last_hidden_state, text()["attention_mask"])


@torch.no_grad()
def test_a_model_on_a_cpu_is_not_changed_by_it():
    model, ours, handle = both()
    proven(ours)
    close(result(ours, text()), result(model, text()))
    why = "only calls on a CUDA device are captured, and this one is on cpu"
    assert handle.report.not_captured[why] == 1 and why in str(handle.report)


@pytest.mark.parametrize(("given", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("yes", TypeError)])
def test_bad_numbers_of_graphs(given, error):
    model = build("bert")
    with pytest.raises(error, match="cuda_graphs must be"):
        fastattn.accelerate(model, cuda_graphs=given)
    fastattn.accelerate(model)  # nothing was done


@torch.no_grad()
def test_a_number_of_graphs(capturing):
    _, ours, _ = both(prove=False, cuda_graphs=2)
    for lengths in ((24,), (24, 24), (24, 24, 24), (24, 24)):
        ours(**text(lengths=lengths))
    assert capturing.captures == 3 and len(graphs_of(ours)) == 2


@torch.no_grad()
def test_autocast_is_in_the_key(capturing):
    model, ours, _ = both(prove=False)
    close(result(ours, text()), result(model, text()))
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = result(ours, text()), result(model, text())
    assert out.dtype == expected.dtype and (out - expected).norm() < 0.02 * expected.norm()
    close(result(ours, text()), result(model, text()))
    assert capturing.captures == 2
