"""`accelerate` for T5's encoder: a relative bias that all layers share, RMSNorms, gated and plain FFNs; padded and not."""

import copy

import pytest
import torch
from replayed import recorded, replayed
from torch import nn

import fastattn
from fastattn.dropout import FFN_HIDDEN, RMS_NORM

transformers = pytest.importorskip("transformers")

L = 24
SIZES = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
SIZES |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12}
LENGTHS = torch.tensor([24, 7, 1, 13])[:, None]
MASKS = {
    "none": torch.ones(4, L).bool(),
    "right": torch.arange(L) < LENGTHS,
    "left": torch.arange(L) >= L - LENGTHS,
    "holes": torch.rand(4, L, generator=torch.Generator().manual_seed(2)) > 0.4,
}
HOLES = "a mask with holes, over which distances count"


def build(cls="T5EncoderModel", ffn="relu", dropout=0.0, **accelerate):
    """The model as it is, accelerated, and the handle."""
    torch.manual_seed(0)
    config = transformers.T5Config(**SIZES, dropout_rate=dropout, feed_forward_proj=ffn)
    config._attn_implementation = "eager"
    model = getattr(transformers, cls)(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = copy.deepcopy(model)
    return model, ours, fastattn.accelerate(ours, **accelerate)


def text(side="right"):
    ids = torch.randint(3, 59, (4, L), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": MASKS[side].long()}


def result(model, given):
    return model(**given).last_hidden_state * given["attention_mask"][..., None]


def gradients(model, out):
    model.zero_grad()
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys() and any("relative_attention_bias" in name for name in found)
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= 5e-6 * grad.abs().max().clamp(min=1), name


def assert_same(model, ours, given):
    found, expected = result(ours, given), result(model, given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(ours, found), gradients(model, expected))


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("ffn", ["relu", "gated-gelu"])
def test_outputs_and_gradients_are_the_model_s(ffn, side):
    model, ours, handle = build(ffn=ffn, strict=True)
    for _ in range(2):  # the first call proves the layers
        assert_same(model, ours, text(side))
    assert not handle.report.fallbacks and dict(handle.report.padded) == ({HOLES: 2} if side == "holes" else {})


@pytest.mark.parametrize("side", ["none", "right"])
def test_inference(side):
    model, ours, _ = build(strict=True)
    model.eval(), ours.eval()
    given, keep = text(side), MASKS[side][..., None]
    with torch.no_grad():
        for _ in range(2):
            found, expected = (m(**given, output_hidden_states=True) for m in (ours, model))
            torch.testing.assert_close(found.last_hidden_state * keep, expected.last_hidden_state * keep, rtol=1e-5, atol=1e-5)
            for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(a * keep, b * keep, rtol=1e-5, atol=1e-5)
        as_tuple = ours(**given, return_dict=False)[0]
        assert torch.equal(as_tuple, found.last_hidden_state) and not as_tuple.masked_fill(keep, 0).any()
        alone = ours(given["input_ids"]).last_hidden_state
        torch.testing.assert_close(alone, model(given["input_ids"]).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ffn", ["relu", "gated-gelu"])
def test_dropout_is_where_the_model_has_it(ffn):
    """Of the embeddings, of the last norm, at the end of a layer and inside a gated FFN it is PyTorch's own."""
    model, ours, handle = build(ffn=ffn, dropout=0.2, strict=True)
    given, gated = text("none"), ffn != "relu"
    result(ours, given)  # proves itself
    torch.manual_seed(5)
    with recorded(norms=RMS_NORM) as draws:
        found = result(ours, given)
    assert [tag for _, tag in draws] == [0, RMS_NORM, *([] if gated else [FFN_HIDDEN])] * 2
    torch.manual_seed(5)
    with replayed(draws, (0, 4, 8, 9, *((3, 7) if gated else ()))):
        expected = result(model, given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(ours, found), gradients(model, expected))
    assert not handle.report.fallbacks and "attention dropout (0.2) and hidden dropout (0.2)" in str(handle.report)


def test_without_padding_attention_drops_the_same_weights():
    model, ours, handle = build(dropout=0.3, strict=True)
    for part in (*model.modules(), *ours.modules()):
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # attention's is a number
    given = text("right")
    with recorded() as draws:
        found = result(ours, given)
    assert len(draws) == 2
    with replayed(draws):
        expected = result(model, given)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(ours, found), gradients(model, expected))
    assert not handle.report.padded


def test_inside_a_model_with_a_decoder():
    model, ours, handle = build("T5ForConditionalGeneration")
    assert list(handle.report.accelerated) == ["encoder"]
    assert handle.report.left == {"decoder": "decoders are not served"}
    given = {**text(), "labels": torch.randint(3, 59, (4, 5), generator=torch.Generator().manual_seed(3))}
    losses = [m(**given).loss for m in (ours, model)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    [loss.backward() for loss in losses]
    assert_same_gradients(*({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (ours, model)))
    written = [m.eval().generate(**text(), max_new_tokens=5, do_sample=False) for m in (ours, model)]
    assert torch.equal(*written) and not handle.report.fallbacks
    with pytest.raises(NotImplementedError, match="decoder: decoders are not served"):
        fastattn.accelerate(model, strict=True)


def test_a_layer_that_differs_keeps_its_own_code_and_the_table_its_gradient(monkeypatch):
    modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
    model, ours, handle = build()
    act = type("ReLU", (nn.ReLU,), {"forward": lambda self, x: torch.relu(x) * 1.5, "__module__": nn.ReLU.__module__})
    for m in (model, ours):
        m.encoder.block[1].layer[1].DenseReluDense.act = act()
    assert_same(model, ours, text())
    assert list(handle.report.left) == ["encoder.block.1"]
    model, ours, handle = build()
    bucket = modeling.T5Attention._relative_position_bucket
    monkeypatch.setattr(modeling.T5Attention, "_relative_position_bucket", staticmethod(lambda d, **kw: 7 - bucket(d, **kw)))
    assert_same(model, ours, text())
    assert list(handle.report.left) == ["encoder.block.0"]


def test_what_is_left_to_the_model():
    model, ours, handle = build()
    assert_same(model, ours, text())
    ours.encoder.block[0].register_forward_hook(lambda *_: None)
    assert_same(model, ours, text())
    assert list(handle.report.fallbacks) == ["layer 0 has hooks, which would see another bias"]
    _, ours, handle = build()
    with torch.no_grad():
        ours.eval().half()(**text())
    assert "float16" in next(iter(handle.report.fallbacks))
    _, ours, handle = build()
    ours.encoder.block[1].layer[0].layer_norm = nn.LayerNorm(32)
    ours(**text())
    assert list(handle.report.fallbacks) == ["first_norm is a torch.nn.modules.normalization.LayerNorm, not a T5LayerNorm"]


def test_a_capacity_reads_no_mask():
    model, ours, handle = build(capacity=80)
    assert_same(model, ours, text())
    assert "distances count" in next(iter(handle.report.padded))
    model, ours, handle = build(capacity=80, unpad="always", strict=True)
    assert_same(model, ours, text())
    assert not handle.report.padded


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    grads = []
    for checkpointing in (False, True):
        _, ours, _ = build(dropout=0.2, strict=True)
        result(ours, text())
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        grads.append(gradients(ours, result(ours, text())))
    assert_same_gradients(grads[1], grads[0])


def test_compiled_without_a_graph_break():
    model, ours, _ = build(strict=True, prove=False)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(result(compiled, text()), result(model, text()), rtol=1e-5, atol=1e-5)


def test_restored():
    model, ours, handle = build(strict=True)
    result(ours, text())
    handle.restore()
    assert torch.equal(result(ours, text()), result(model, text()))
