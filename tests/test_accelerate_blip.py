"""BLIP: captions, answers and matches, whose text model is a decoder and attends to an image; against the untouched models."""

import copy

import pytest
import torch

import fastattn
from fastattn.integrations import accelerate_decoding, accelerate_proof
from fastattn.integrations.accelerate_parts import Family

transformers = pytest.importorskip("transformers")

L = 9
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 60}
TEXT |= {"max_position_embeddings": 40, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
IMAGE = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16, "patch_size": 8}
CAPTION, ANSWER, MATCH = "BlipForConditionalGeneration", "BlipForQuestionAnswering", "BlipForImageTextRetrieval"
each_model = pytest.mark.parametrize("name", [CAPTION, ANSWER, MATCH])
PADDED = "is_decoder or encoder_hidden_states was given"
CACHE = "use_cache=True"


def build(name, dropout=0.0, prove=True, **options):
    """The model as it is, accelerated, and the handle. An answer's decoder attends to the question, as wide as an image."""
    torch.manual_seed(0)
    width = 32 if name == ANSWER else 48
    text = {**TEXT, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, **options}
    config = transformers.BlipConfig(text_config=text, vision_config={**IMAGE, "hidden_size": width}, projection_dim=32)
    model = getattr(transformers, name)(config).train()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms are not 0 and 1, attention is not uniform
            parameter.add_(torch.randn_like(parameter) * 0.15)
    ours = copy.deepcopy(model)
    return model, ours, fastattn.accelerate(ours, strict=True, prove=prove)


def inputs(name, side="right"):
    g = torch.Generator().manual_seed(1)
    lengths = torch.tensor([L, 4, 6])[:, None]
    keep = torch.arange(L) < lengths if side == "right" else torch.arange(L) >= L - lengths
    if side == "holes":
        keep = torch.ones(3, L).bool().index_fill(1, torch.tensor([2, 5]), False)
    ids = torch.randint(4, 59, (3, L), generator=g).masked_fill(~keep, 1)
    given = {"pixel_values": torch.randn(3, 3, 16, 16, generator=g), "input_ids": ids, "attention_mask": keep.long()}
    if name == CAPTION:
        return {**given, "labels": ids}  # padding is a word to learn, as in transformers' examples
    answers = torch.randint(4, 59, (3, 5), generator=g)
    answered = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    labels = answers.masked_fill(~answered, -100)
    return given | (
        {"labels": labels, "decoder_input_ids": answers, "decoder_attention_mask": answered} if name == ANSWER else {}
    )


def loss_of(model, given):
    outputs = model(**given)
    if "labels" in given:
        return outputs.loss
    return torch.nn.functional.cross_entropy(outputs.itm_score, torch.tensor([0, 1, 1]))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, ours, given):
    found, expected = loss_of(ours, given), loss_of(model, given)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    grads, expected_grads = gradients(ours, found), gradients(model, expected)
    assert grads.keys() == expected_grads.keys()
    for part in ("crossattention.self.key.weight", "vision_model.embeddings.patch_embedding.weight", "attention.self.query.bias"):
        assert any(part in name for name in grads)
    for key, grad in expected_grads.items():
        error = (grads[key] - grad).abs().max() / grad.abs().max().clamp(min=0.05)
        assert error < 2e-5, f"{key}: {error}"


def write(model, name, **options):
    given = {key: x for key, x in inputs(name).items() if key in ("pixel_values", "input_ids", "attention_mask")}
    if name == CAPTION:
        given |= {"input_ids": given["input_ids"][:, :4], "attention_mask": given["attention_mask"][:, :4]}
    options = {"max_new_tokens": 6, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(**given, output_scores=True, **options)


@each_model
@pytest.mark.parametrize("side", ["right", "holes"])
def test_losses_and_gradients_are_the_model_s(name, side):
    """In training, dropout 0; the first call proves the layers. strict=True: no call runs the model's own code."""
    model, ours, handle = build(name)
    for _ in range(2):
        assert_same(model, ours, inputs(name, side))
    assert not handle.report.fallbacks and not handle.report.left
    assert handle.report.padded[PADDED] == (4 if name == ANSWER else 2)
    handle.restore()
    assert torch.equal(loss_of(ours, inputs(name)), loss_of(model, inputs(name)))


def test_each_kind_of_a_call_is_proven_by_itself(monkeypatch):
    """The same text model with an image and without, causal and not."""
    asked, holds = [], accelerate_proof.Proof.holds
    monkeypatch.setattr(accelerate_proof.Proof, "holds", lambda self, name, *rest: asked.append(name) or holds(self, name, *rest))
    model, ours, handle = build(MATCH)
    text, theirs = ours.text_encoder.eval(), model.text_encoder.eval()
    given = {"input_ids": inputs(MATCH)["input_ids"], "attention_mask": inputs(MATCH)["attention_mask"], "use_cache": False}
    states = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(2))
    keep = torch.arange(7) < torch.tensor([7, 1, 4])[:, None]
    cases = [{}, {"is_decoder": True}, {"encoder_hidden_states": states, "encoder_attention_mask": keep}]
    cases += [
        {**cases[1], **cases[2]},
        {**cases[2], "encoder_attention_mask": None},
        {**cases[2], "encoder_attention_mask": keep | True},
    ]
    real = given["attention_mask"][..., None]
    for n, more in enumerate(cases):
        for _ in range(2):
            with torch.no_grad():
                a, b = (m(**given, **more).last_hidden_state for m in (text, theirs))
            torch.testing.assert_close(a * real, b * real, rtol=2e-5, atol=2e-5)
            if n > 0:  # and at padding, which stays in
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
            assert len(asked) == 2 * min(n + 1, 5)
    assert not handle.report.fallbacks


def test_the_gradient_of_states_that_are_given():
    """A graph behind them, as of an image, which is gone through once: also of a checkpoint that has one of its own."""
    model, ours, _ = build(MATCH)
    found = []
    for m in (model, ours):
        for reentrant in (None, False, True):
            text = m.text_encoder
            if reentrant is not None:
                m.gradient_checkpointing_enable({"use_reentrant": reentrant})
            states = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(2)).requires_grad_()
            x = torch.randn(3, L, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
            out = text(inputs_embeds=x.clone(), encoder_hidden_states=states.tanh()).last_hidden_state
            (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
            found.append(states.grad)
    for grad in found[1:]:
        torch.testing.assert_close(grad, found[0], rtol=2e-5, atol=2e-5)


@each_model
def test_inference(name):
    model, ours, handle = build(name)
    given = {key: x for key, x in inputs(name).items() if key != "labels"} | {"use_cache": False}
    for _ in range(2):
        with torch.inference_mode():
            a, b = (m.eval()(**given) for m in (ours, model))
        for key in {CAPTION: ("logits",), ANSWER: ("last_hidden_state",), MATCH: ("itm_score", "question_embeds")}[name]:
            torch.testing.assert_close(a[key], b[key], rtol=5e-5, atol=5e-5)
    assert not handle.report.fallbacks


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("name", [CAPTION, ANSWER])
def test_what_is_written_is_what_the_model_writes(name, cache):
    """With a cache by its own code, said and counted; without one by ours. A padded question's states are read at padding too."""
    model, ours, _ = build(name)
    fastattn.restore(ours)
    handle = fastattn.accelerate(ours)
    a, b = (write(m.eval(), name, use_cache=cache) for m in (ours, model))
    assert torch.equal(a.sequences, b.sequences) and len(a.scores) == len(b.scores) >= 4
    for found, expected in zip(a.scores, b.scores, strict=True):
        torch.testing.assert_close(found, expected, rtol=5e-5, atol=5e-5)
    assert handle.report.fallbacks == ({CACHE: len(a.scores)} if cache else {}) and not handle.report.left


def test_beams():
    model, ours, _ = build(CAPTION)
    a, b = (write(m.eval(), CAPTION, use_cache=False, num_beams=2).sequences for m in (ours, model))
    assert torch.equal(a, b)


@each_model
def test_training_drops_on_the_fast_path(name):
    _, ours, handle = build(name, dropout=0.2)
    given = inputs(name)
    loss_of(ours, given)  # proves the layers
    losses, grads = [], []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        losses.append(loss_of(ours, given))
        grads.append(gradients(ours, losses[-1]))
    assert losses[0] == losses[1] != losses[2] and not handle.report.fallbacks
    assert all(grad.isfinite().all() for grad in grads[0].values())
    assert all(torch.equal(grads[0][key], grad) for key, grad in grads[1].items())


@pytest.mark.parametrize("path", ["crossattention.self.dropout", "crossattention.output.dropout"])
def test_dropout_is_where_the_model_has_it(path):
    """With a rate of 1, by which all that it is of is 0, whoever draws."""
    model, ours, handle = build(MATCH)
    before = loss_of(model, inputs(MATCH))
    for m in (model, ours):
        for layer in m.text_encoder.encoder.layer:
            layer.get_submodule(path).p = 1.0
    assert_same(model, ours, inputs(MATCH))
    assert_same(model, ours, inputs(MATCH))
    assert abs(loss_of(ours, inputs(MATCH)) - before) > 1e-3 and not handle.report.fallbacks


def test_the_proof_sees_a_wrong_number_of_cross_attention(monkeypatch):
    """A scale of cross attention alone that is not the model's: without the proof, losses differ."""
    scale_of = Family.scale_of

    def wrong(self, attention):
        return scale_of(self, attention) * (1.1 if getattr(getattr(attention, "key", None), "in_features", 0) == 48 else 1.0)

    monkeypatch.setattr(Family, "scale_of", wrong)
    model, ours, _ = build(MATCH)
    fastattn.restore(ours)
    handle, given = fastattn.accelerate(ours), inputs(MATCH)
    ours.text_encoder(given["input_ids"])  # which proves nothing of cross attention
    assert torch.allclose(loss_of(ours, given), loss_of(model, given), rtol=2e-6)
    assert "differs from its own code" in str(handle.report) and handle.report.fallbacks
    handle.restore()
    fastattn.accelerate(ours, prove=False, strict=True)
    assert not torch.allclose(loss_of(ours, given), loss_of(model, given), rtol=1e-4)


def test_a_version_whose_cross_attention_reads_the_mask_is_seen(monkeypatch):
    """transformers' hands it on under a name that is not read. A call without a hidden state proves nothing of that."""
    model, ours, _ = build(ANSWER)
    fastattn.restore(ours)
    cls = type(model.text_decoder.bert.encoder.layer[0].crossattention)

    def forward(self, x, attention_mask=None, encoder_hidden_states=None, past_key_values=None, **kwargs):
        mask = {"encoder_attention_mask" if encoder_hidden_states is not None else "attention_mask": attention_mask}
        context, weights = self.self(x, encoder_hidden_states=encoder_hidden_states, past_key_values=past_key_values, **mask)
        return self.output(context, x), weights

    forward.__module__ = cls.__module__
    monkeypatch.setattr(cls, "forward", forward)
    handle, given = fastattn.accelerate(ours), inputs(ANSWER)
    assert_same(model, ours, {**given, "attention_mask": torch.ones(3, L).long()})
    assert not handle.report.fallbacks
    for _ in range(2):
        assert_same(model, ours, given)
    assert list(handle.report.left) == ["text_decoder.bert.encoder.layer.0"] and handle.report.fallbacks.total() == 2


def test_hooks_and_other_parts_are_refused():
    model, ours, _ = build(MATCH)
    fastattn.restore(ours)
    handle, given = fastattn.accelerate(ours), inputs(MATCH)
    hooks = [
        m.text_encoder.encoder.layer[1].crossattention.self.key.register_forward_hook(lambda module, args, out: out * 1.5)
        for m in (model, ours)
    ]
    assert torch.allclose(loss_of(ours, given), loss_of(model, given), rtol=2e-5)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        ours.text_encoder.encoder.layer[0].crossattention.output.LayerNorm = torch.nn.RMSNorm(32)
    loss_of(ours, given)
    words = "cross_norm is a RMSNorm, not a plain LayerNorm"
    assert handle.report.fallbacks == {"cross_key has hooks, which would not run": 1, words: 1}


ONES = torch.ones(3, L).long()
STATES = torch.ones(3, 4, 48)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"is_decoder": True, "use_cache": None}, "use_cache=True, which its config says"),
        ({"is_decoder": True, "attention_mask": ONES.index_fill(1, torch.tensor(0), 0)}, "attention_mask hides all from a token"),
        ({"encoder_hidden_states": STATES, "attention_mask": ONES * torch.tensor([[1], [0], [1]])}, "attention_mask hides all"),
        ({"encoder_hidden_states": STATES[:1]}, "encoder_hidden_states is not of shape"),
        ({"encoder_hidden_states": STATES, "encoder_attention_mask": torch.ones(3, 1, 1, 4)}, "encoder_attention_mask is not of"),
        ({"encoder_attention_mask": ONES}, "encoder_attention_mask was given without"),
        ({"encoder_embeds": torch.ones(3, L, 32)}, "encoder_embeds was given"),
    ],
)
def test_a_call_beyond_what_is_known_runs_the_model_s_own_code(given, words):
    model, ours, _ = build(MATCH)
    fastattn.restore(ours)
    handle = fastattn.accelerate(ours)
    given = {"input_ids": inputs(MATCH)["input_ids"], "use_cache": False, **given}
    with torch.no_grad():
        a, b = (m.text_encoder.eval()(**given).last_hidden_state for m in (ours, model))
    assert torch.equal(a, b) and len(handle.report.fallbacks) == 1
    assert next(iter(handle.report.fallbacks)).startswith(words)


def test_left_padding_with_labels_is_the_model_s():
    """The last token of padding, which sees nothing, is what the first label is read from."""
    model, ours, _ = build(CAPTION)
    fastattn.restore(ours)
    handle = fastattn.accelerate(ours)
    assert_same(model, ours, inputs(CAPTION, "left"))
    assert handle.report.fallbacks == {"attention_mask hides all from a token": 1}


def test_layers_without_cross_attention():
    """A text model that is configured as an encoder."""
    torch.manual_seed(0)
    config = transformers.BlipTextConfig(**TEXT, is_decoder=False)
    ours = transformers.models.blip.modeling_blip_text.BlipTextModel(config).eval()
    handle = fastattn.accelerate(ours)
    with pytest.raises(AttributeError, match="crossattention"):
        ours(ONES, encoder_hidden_states=torch.ones(3, 4, 768))
    assert handle.report.fallbacks == {"encoder_hidden_states was given to layers without cross attention": 1}


@torch.no_grad()
def test_calls_as_a_decoder_are_not_captured():
    _, ours, _ = build(MATCH)
    fastattn.restore(ours)
    handle = fastattn.accelerate(ours.eval(), strict=True, cuda_graphs=True)
    ours(**inputs(MATCH))
    assert handle.report.not_captured["it is causal by is_decoder, or attends to encoder_hidden_states"] == 1


@torch.no_grad()
def test_compiled():
    """Without a graph break; with a mask, of which nothing can be read then, by the model's own code."""
    model, ours, handle = build(MATCH)
    text, theirs = ours.text_encoder.eval(), model.text_encoder.eval()
    given = {"input_ids": inputs(MATCH)["input_ids"], "encoder_hidden_states": STATES.cumsum(1), "is_decoder": True}
    given["use_cache"] = False
    text(**given)  # proves the layers
    torch._dynamo.reset()
    compiled = torch.compile(text, backend="aot_eager", fullgraph=True)
    a, b = (m(**given).last_hidden_state for m in (compiled, theirs))
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    for name, mask in (("attention_mask", ONES), ("encoder_attention_mask", ONES[:, :4])):
        with pytest.raises(Exception, match=f"{name} is not read in a trace"):
            compiled(**given, **{name: mask})
    assert not handle.report.fallbacks


@torch.no_grad()
def test_a_capacity_reads_nothing_on_the_host(monkeypatch):
    """A mask on a GPU, here one that seems to be, is not read; one in the host's memory is."""
    model, ours, _ = build(MATCH)
    fastattn.restore(ours)
    handle, given = fastattn.accelerate(ours.eval(), capacity=3 * L), inputs(MATCH)
    expected = model.eval()(**given).itm_score
    torch.testing.assert_close(ours(**given).itm_score, expected, rtol=2e-5, atol=2e-5)
    assert not handle.report.fallbacks
    monkeypatch.setattr(accelerate_decoding, "HOST", "another")
    torch.testing.assert_close(ours(**given).itm_score, expected, rtol=2e-5, atol=2e-5)
    assert handle.report.fallbacks == {"encoder_attention_mask is not read in a trace, or on a GPU with a capacity": 1}


def test_a_question_s_padding_stays_in_for_its_decoder():
    _, _, handle = build(ANSWER)
    assert "padding stays in (BlipForQuestionAnswering: its decoder attends to all positions)" in str(handle.report)
