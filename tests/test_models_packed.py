"""The reference models on packed batches against themselves on padded ones: outputs, gradients, pooling, rows of no sequence."""

from __future__ import annotations

import pytest
import torch
from replayed import recorded, replayed
from test_models import EOS, VOCAB, B, N, attention_mask, bert_config, bert_inputs, clip_config, clip_inputs, minilm_directory
from torch import Tensor

import fastattn
from benchmarks import texts
from fastattn import Packing
from fastattn.models import digits
from fastattn.models.bert import BertForMaskedLM, BertModel
from fastattn.models.clip import CLIPModel
from fastattn.models.implementations import IMPLEMENTATIONS

FAST, TORCH = IMPLEMENTATIONS["fastattn"], IMPLEMENTATIONS["sdpa"]
OPS = {**IMPLEMENTATIONS, "mixed": TORCH._replace(mask=FAST.mask, attention=FAST.attention)}
TOLERANCE = 2e-5  # fp32; of gradients, relative to the largest of a parameter's where that is above 1
LENGTHS = (N, 9, 1, 0)

each_implementation = pytest.mark.parametrize("implementation", list(OPS))


def build(cls, config, implementation: str, seed: int = 0):
    """With biases and norms other than 0 and 1."""
    torch.manual_seed(seed)
    model = cls(config, OPS[implementation])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def mask_of(side: str, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """bool (B, N)"""
    if side == "holes":
        return attention_mask("holes").bool()
    keep = torch.arange(N) < torch.tensor(lengths)[:, None]
    return keep.flip(1) if side == "left" else keep


def packed(keep: Tensor, extra: int | None) -> Packing:
    """extra: rows of no sequence in a static capacity; None: as many rows as tokens, which the host reads."""
    return Packing.from_mask(keep, None if extra is None else int(keep.sum()) + extra)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)


def gradients(model, outputs: list[Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.autograd.backward(outputs, cotangents)
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys() and len(actual) > 10
    for name, grad in expected.items():
        error = (actual[name] - grad).abs().max() / grad.abs().max().clamp(min=1)
        assert error < TOLERANCE, f"{name}: {error}"


def random(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(7))


def check_rows(model, run, keep: Tensor, extra: int | None) -> None:
    """`run(packing)` gives (B, N, ...) without one and (T, ...) with it: the same at real tokens, and the same gradients.

    The cotangent at rows of no sequence is not 0: nothing of them may reach a parameter.
    """
    packing = packed(keep, extra)
    expected, actual = run(None), run(packing)
    close(actual[: packing.total], expected[keep])
    assert not actual[packing.total :].any()
    cotangent = random(expected) * keep.view(*keep.shape, *[1] * (expected.dim() - 2))
    rows = packing.pack(cotangent)
    rows[packing.total :] = 3.0
    assert_same_gradients(gradients(model, [actual], [rows]), gradients(model, [expected], [cotangent]))


@each_implementation
@pytest.mark.parametrize("extra", [None, 0, 5])
@pytest.mark.parametrize("side", ["right", "left", "holes"])
def test_bert(implementation, side, extra):
    model, keep = build(BertModel, bert_config(), implementation), mask_of(side)
    inputs = bert_inputs("none")
    ids, types = inputs["input_ids"], inputs["token_type_ids"]

    def run(packing):
        if packing is None:
            return model(ids, keep.long(), types).last_hidden_state
        return model(packing.pack(ids), token_type_ids=packing.pack(types), packing=packing).last_hidden_state

    check_rows(model, run, keep, extra)


@each_implementation
@pytest.mark.parametrize("extra", [None, 5])
@pytest.mark.parametrize("tied", [True, False])
def test_masked_lm(implementation, tied, extra):
    """With position ids of one's own."""
    model, keep = build(BertForMaskedLM, bert_config(tie_word_embeddings=tied), implementation), mask_of("left")
    ids, places = bert_inputs("none")["input_ids"], torch.arange(B * N).view(B, N) % 32

    def run(packing):
        if packing is None:
            return model(ids, keep.long(), position_ids=places).logits
        return model(packing.pack(ids), position_ids=packing.pack(places), packing=packing).logits

    check_rows(model, run, keep, extra)


@each_implementation
@pytest.mark.parametrize("extra", [None, 5])
def test_pooler_takes_the_first_row_of_each_sequence(implementation, extra):
    """As of the padded batch, but for a sequence without tokens, whose first row counts as 0; also where that one is last."""
    model, inputs = build(BertModel, bert_config(), implementation), bert_inputs("none")
    ids = inputs["input_ids"]
    for lengths in (LENGTHS, (0, 9, 0, 1)):
        keep = mask_of("right", lengths)
        live = keep.any(1)
        packing = packed(keep, extra)
        actual, expected = model(packing.pack(ids), packing=packing).pooler_output, model(ids, keep).pooler_output
        close(actual[live], expected[live])
        close(actual[~live], model.pooler.dense.bias.tanh().expand(int((~live).sum()), -1))
        cotangent = random(expected) * live[:, None]
        assert_same_gradients(gradients(model, [actual], [cotangent]), gradients(model, [expected], [cotangent]))


@torch.no_grad()
def test_pooler_of_left_padding_is_that_of_the_sequence():
    model, ids, keep = build(BertModel, bert_config(), "fastattn"), bert_inputs("none")["input_ids"], mask_of("left")
    packing = packed(keep, None)
    result = model(packing.pack(ids), packing=packing)
    first = keep.long().argmax(1)[:3]
    close(result.pooler_output[:3], model.pooler(model(ids, keep).last_hidden_state[torch.arange(3), first]))


@each_implementation
@pytest.mark.parametrize("extra", [None, 0, 5])
@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("eos_token_id", [EOS, 2])
def test_clip(implementation, eos_token_id, side, extra):
    """Causal text, of which one token stands for the whole; the images beside it are as they were."""
    model, inputs = build(CLIPModel, clip_config(eos_token_id), implementation), clip_inputs("none")
    keep = mask_of(side, (N, 9, 1, 5))
    last = (keep * torch.arange(N)).argmax(1)
    ids, images = inputs["input_ids"].clamp(max=EOS - 1), inputs["pixel_values"]
    ids[torch.arange(B), last] = EOS
    ids[0, 7] = EOS  # an earlier end of text: the first one counts
    packing = packed(keep, extra)
    expected, actual = model(ids, images, keep), model(packing.pack(ids), images, packing=packing)
    text, rows = expected.text_model_output, actual.text_model_output
    close(rows.last_hidden_state[: packing.total], text.last_hidden_state[keep])
    close(rows.pooler_output, text.pooler_output)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        close(getattr(actual, name), getattr(expected, name))
    cotangent = random(expected.logits_per_text)
    wanted = gradients(model, [expected.logits_per_text], [cotangent])
    assert_same_gradients(gradients(model, [actual.logits_per_text], [cotangent]), wanted)

    def run(packing):
        given = (ids, keep) if packing is None else (packing.pack(ids),)
        return model.get_text_features(*given, packing=packing).last_hidden_state

    check_rows(model, run, keep, extra)


@each_implementation
def test_clip_texts_without_tokens_or_without_an_end(implementation):
    """The first has an embedding and logits of 0 and no gradient, the second is stood for by its first token, not by padding."""
    model, inputs = build(CLIPModel, clip_config(), implementation), clip_inputs("none")
    ids, images = inputs["input_ids"].clamp(max=EOS - 1), inputs["pixel_values"]
    keep = mask_of("left", (0, 9, 1, 0))
    packing = packed(keep, None)
    result = model(packing.pack(ids), images, packing=packing)
    assert not result.text_embeds[[0, 3]].any() and not result.logits_per_text[[0, 3]].any()
    features = result.text_model_output
    projected = model.text_projection(features.last_hidden_state[[0, 9]])
    close(features.pooler_output[[1, 2]], projected)
    alone = Packing.from_mask(keep[1:3])
    same = model(alone.pack(ids[1:3]), images, packing=alone)
    close(result.text_embeds[1:3], same.text_embeds)
    cotangent = random(result.logits_per_text)
    grads = gradients(model, [result.logits_per_text], [cotangent])
    assert_same_gradients(grads, gradients(model, [same.logits_per_text], [cotangent[1:3]]))


@each_implementation
@torch.no_grad()
def test_batches_of_nothing(implementation):
    bert, clip = build(BertModel, bert_config(), implementation), build(CLIPModel, clip_config(), implementation)
    nothing = torch.zeros(0, dtype=torch.int64)
    for packing in (Packing.from_lengths([0, 0], 5), Packing.from_lengths([0, 0], 0), Packing.from_lengths([], 5)):
        count = packing.lengths.numel()
        hidden, pooled = bert(nothing, packing=packing)
        assert hidden.shape == (0, 32) and pooled.shape == (count, 32) and pooled.isfinite().all()
        hidden, pooled = clip.get_text_features(nothing, packing=packing)
        assert hidden.shape == (0, 32) and pooled.shape == (count, 24) and not pooled.any()


# Static shapes


@pytest.mark.parametrize("implementation", ["fastattn", "sdpa"])
def test_compiled_without_a_graph_break(implementation):
    """Packing, model, loss and unpacking in one graph: nothing is read on the host. Another batch compiles nothing anew."""
    bert, clip = build(BertModel, bert_config(), implementation), build(CLIPModel, clip_config(), implementation)
    ids, texts = bert_inputs("none")["input_ids"], clip_inputs("right")["input_ids"]

    def step(keep):
        packing = Packing.from_mask(keep, 30)
        hidden, pooled = bert(packing.pack(ids), packing=packing)
        features = clip.get_text_features(packing.pack(texts), packing=packing).pooler_output
        return packing.unpack(hidden), pooled, features

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for lengths in (LENGTHS, (3, 0, N, 11)):
        keep = mask_of("right", lengths)
        with torch.compiler.set_stance("default" if lengths is LENGTHS else "fail_on_recompile"):
            actual = compiled(keep)
        expected = step(keep)
        for a, e in zip(actual, expected, strict=True):
            close(a, e)
        cotangents = [random(x) for x in expected]
        for model in (bert, clip):
            grads = gradients(model, list(step(keep)), cotangents)
            with torch.compiler.set_stance("default" if lengths is LENGTHS else "fail_on_recompile"):
                assert_same_gradients(gradients(model, list(compiled(keep)), cotangents), grads)


@each_implementation
@torch.no_grad()
def test_tokens_beyond_the_capacity_are_dropped(implementation):
    model, ids, keep = build(BertModel, bert_config(), implementation), bert_inputs("none")["input_ids"], mask_of("right")
    packing = Packing.from_mask(keep, 15)
    result = model(packing.pack(ids), packing=packing)
    assert packing.overflowed and packing.lengths.tolist() == [N, 2, 0, 0]
    close(result.last_hidden_state, model(ids, mask_of("right", (N, 2, 0, 0))).last_hidden_state.flatten(0, 1)[: N + 2])
    assert torch.equal(result.pooler_output[2], result.pooler_output[3])


@torch.no_grad()
def test_offsets_that_nobody_validated():
    """A sequence longer than max_length is cut: the rows beyond are of none."""
    ids = bert_inputs("none")["input_ids"].flatten()[:12]
    packing = Packing.from_cu_seqlens(torch.tensor([0, 8, 10]), 5, validate=False, capacity=12)
    expected = Packing.from_lengths([5, 2], 5)
    for implementation in OPS:
        model = build(BertModel, bert_config(), implementation)
        hidden, pooled = model(ids, packing=packing)
        wanted, wanted_pooled = model(ids[[0, 1, 2, 3, 4, 8, 9]], packing=expected)
        close(hidden[[0, 1, 2, 3, 4, 8, 9]], wanted)
        close(pooled, wanted_pooled)
        assert not hidden[[5, 6, 7, 10, 11]].any()


# Trained weights


@each_implementation
@torch.no_grad()
def test_minilm(implementation):
    """Sentences as they come, one much longer than another, and the cosines that the model is made for."""
    pytest.importorskip("tokenizers")
    directory, (found, _) = minilm_directory(), texts.sentences()
    ids, keep = texts.padded(texts.word_pieces(found[:12])[0], 64)
    model = BertModel.from_pretrained(directory, OPS[implementation])
    packing = Packing.from_mask(keep.bool())
    assert packing.total < 0.7 * keep.numel()
    expected, pooled = model(ids, keep)
    result = model(packing.pack(ids), packing=packing)
    close(result.last_hidden_state, expected[keep.bool()])
    close(result.pooler_output, pooled)
    means = [torch.nn.functional.normalize((x * keep[..., None]).sum(1)) for x in (expected, packing.unpack(result[0]))]
    close(means[1] @ means[1].mT, means[0] @ means[0].mT)


@each_implementation
def test_digits(implementation):
    """Every caption of the trained CLIP in one packed batch: logits, and a training step's gradients."""
    pytest.importorskip("sklearn")
    model = CLIPModel.from_pretrained(digits.DIRECTORY, OPS[implementation])
    ids, mask = digits.tokenize([t.format(name) for t in digits.TEMPLATES for name in digits.NAMES])
    images = digits.load_images()[1].pixel_values[:30]
    packing = Packing.from_mask(mask.bool())
    expected, actual = model(ids, images, mask), model(packing.pack(ids), images, packing=packing)
    torch.testing.assert_close(actual.logits_per_image, expected.logits_per_image, rtol=0, atol=1e-4)
    grads = []
    for result in (actual, expected):
        loss = torch.nn.functional.cross_entropy(result.logits_per_text, torch.arange(30))
        grads.append(gradients(model, [loss], [torch.ones(())]))
    assert_same_gradients(*grads)


# What is refused


def test_bad_arguments():
    bert, lm = BertModel(bert_config()).eval(), BertForMaskedLM(bert_config()).eval()
    clip = CLIPModel(clip_config()).eval()
    ids, packing = torch.ones(6, dtype=torch.int64), Packing.from_lengths([4, 2], 5)
    images = clip_inputs("none")["pixel_values"]
    for call in (
        lambda given, mask, packing: bert(given, mask, packing=packing),
        lambda given, mask, packing: lm(given, mask, packing=packing),
        lambda given, mask, packing: clip(given, images, mask, packing=packing),
        lambda given, mask, packing: clip.get_text_features(given, mask, packing=packing),
    ):
        call(ids, None, packing)
        with pytest.raises(ValueError, match="attention_mask must be None with a packing"):
            call(ids, torch.ones(6), packing)
        for wrong in (ids[:5], ids.view(2, 3)):
            with pytest.raises(ValueError, match=r"input_ids must have shape \(6,\) as its packing"):
                call(wrong, None, packing)
        with pytest.raises(ValueError, match=r"input_ids must have shape \(B, N\), or \(T,\) with a packing"):
            call(ids, None, None)
        with pytest.raises(ValueError, match="sequences of 40 tokens, but max_position_embeddings is"):
            call(ids, None, Packing.from_lengths([4, 2], 40))


# Dropout


@pytest.mark.parametrize("extra", [None, 5])
@pytest.mark.parametrize("implementation", ["fastattn", "mixed"])
def test_padded_and_packed_drop_the_same_weights(implementation, extra):
    """Of attention: which do not depend on where a sequence's tokens lie. Under right padding, or none."""
    model = build(BertModel, bert_config(attention_probs_dropout_prob=0.3), implementation).train()
    keep, ids = mask_of("right"), bert_inputs("none")["input_ids"]
    packing, results = packed(keep, extra), []
    for run in (lambda: model(ids, keep).last_hidden_state, lambda: unpacked(model(packing.pack(ids), packing=packing), packing)):
        torch.manual_seed(5)
        x = run()[keep]
        results.append((x, gradients(model, [x], [random(x)])))
    (padded, grads), (found, found_grads) = results
    close(found, padded)
    assert_same_gradients(found_grads, grads)
    assert (padded - model.eval()(ids, keep).last_hidden_state[keep]).abs().max() > 0.01


def test_dropout_of_packed_rows_is_pytorch_s_with_fastattn_s_draws():
    config = bert_config(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.3)
    packing, ids = packed(mask_of("right"), None), bert_inputs("none")["input_ids"]
    ours, eager = (build(BertModel, config, implementation).train() for implementation in ("fastattn", "eager"))
    torch.manual_seed(5)
    with recorded() as draws:
        found = ours(packing.pack(ids), packing=packing).last_hidden_state
    torch.manual_seed(5)
    with replayed(draws, torchs_own=(0,)):  # of the embeddings
        close(found, eager(packing.pack(ids), packing=packing).last_hidden_state)


def unpacked(output, packing: Packing) -> Tensor:
    return packing.unpack(output.last_hidden_state)


def test_torch_s_attention_has_dropout_on_packed_batches_too():
    ids, packing = torch.arange(6) % VOCAB, Packing.from_lengths([4, 2], 5)
    for implementation in ("sdpa", "eager"):
        model = BertModel(bert_config(attention_probs_dropout_prob=0.5), implementation).train()
        first, second = (model(ids, packing=packing).last_hidden_state for _ in range(2))
        assert not torch.equal(first, second) and first.isfinite().all()


@torch.no_grad()
def test_layers_see_no_padding():
    """All but PyTorch's attention is computed for real tokens alone, and fastattn's attention for nothing else either."""
    seen = []

    def counted(x, *args, **kwargs):
        seen.append(tuple(x.shape[:-1]))
        return fastattn.linear(x, *args, **kwargs)

    keep, ids = mask_of("right"), bert_inputs("none")["input_ids"]
    packing = packed(keep, None)
    model = build(BertModel, bert_config(), "fastattn")
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = module.ops._replace(linear=counted)
    model(packing.pack(ids), packing=packing)
    assert set(seen) == {(packing.total,), (B,)} and len(seen) == 2 * 4 + 1
