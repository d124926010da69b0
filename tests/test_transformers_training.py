"""attn_implementation="fastattn" in training and with a bias: transformers' own models against their "eager" implementation.

Where weights are dropped, "eager" is made to drop those that fastattn's seeds name.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from replayed import recorded, replayed
from torch import nn

transformers = pytest.importorskip("transformers")

from transformers import AutoModel  # noqa: E402

import fastattn  # noqa: E402
from fastattn.integrations import transformers as integration  # noqa: E402

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = SIZES | {"vocab_size": 60, "max_position_embeddings": 40}
IMAGE = SIZES | {"image_size": 12, "patch_size": 4}
BERT = {"hidden_dropout_prob": 0.0}
DISTILBERT = {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40}
GPT2 = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0}
SWIN = {
    "hidden_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "image_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
CLIP_TEXT = TEXT | {"bos_token_id": 1, "eos_token_id": 59, "pad_token_id": 0}
MODERNBERT = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
MODERNBERT |= {"local_attention": 4, "global_attn_every_n_layers": 2}
EUROBERT = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3}

# of the rate of attention dropout; all others are switched off in `build`
CONFIGS = {
    "bert": lambda p: transformers.BertConfig(**TEXT, **BERT, attention_probs_dropout_prob=p),
    "roberta": lambda p: transformers.RobertaConfig(**TEXT, **BERT, attention_probs_dropout_prob=p, pad_token_id=1),
    "electra": lambda p: transformers.ElectraConfig(**TEXT, **BERT, attention_probs_dropout_prob=p, embedding_size=16),
    "distilbert": lambda p: transformers.DistilBertConfig(**DISTILBERT, dropout=0.0, attention_dropout=p),
    "vit": lambda p: transformers.ViTConfig(**IMAGE, **BERT, attention_probs_dropout_prob=p),
    "clip": lambda p: transformers.CLIPConfig(
        text_config=CLIP_TEXT | {"attention_dropout": p}, vision_config=IMAGE | {"attention_dropout": p}, projection_dim=16
    ),
    "gpt2": lambda p: transformers.GPT2Config(**GPT2, attn_pdrop=p),  # causal
    "t5": lambda p: transformers.T5Config(**T5, dropout_rate=p),  # a bias with a gradient; encoder, decoder, cross attention
    "swin": lambda p: transformers.SwinConfig(**SWIN, attention_probs_dropout_prob=p),  # floats as a mask: a bias and windows
    "modernbert": lambda p: transformers.ModernBertConfig(**TEXT, **MODERNBERT, attention_dropout=p),  # a window
    "eurobert": lambda p: transformers.EuroBertConfig(**TEXT, **EUROBERT, attention_dropout=p),  # grouped heads
}  # fmt: skip
CALLS = {"clip": 4, "t5": 6, "swin": 4}
KEEP = [[1] * 9, [1] * 6 + [0] * 3, [1] * 2 + [0] * 7]


def build(name: str, implementation: str, p: float) -> nn.Module:
    torch.manual_seed(7)
    model = AutoModel.from_config(CONFIGS[name](p), attn_implementation=implementation).train()
    with torch.no_grad():
        for parameter in model.parameters():  # else biases are 0, and all of a table's entries nearly alike
            parameter.add_(0.1 * torch.randn(parameter.shape))
    for module in model.modules():
        if isinstance(module, nn.Dropout) and name in ("t5", "modernbert"):  # theirs have the rate of attention, a number there
            module.p = 0.0
    return model


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    keep = torch.tensor(KEEP)
    ids = torch.randint(3, 59, keep.shape, generator=generator)
    if name == "clip":
        ids[:, 1] = 59  # the end-of-text token, where the text is pooled
    text = {"input_ids": ids, "attention_mask": keep}
    image = {"pixel_values": torch.randn(3, 3, 12, 12, generator=generator)}
    if name == "swin":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)}
    if name == "t5":
        return text | {"decoder_input_ids": ids[:, :7], "decoder_attention_mask": keep[:, :7]}
    return {"vit": image, "clip": text | image}.get(name, text)


def states(name: str, output, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of real tokens, one after the other."""
    if name == "clip":
        text, image = output.text_model_output.last_hidden_state, output.vision_model_output.last_hidden_state
        return torch.cat([text[x["attention_mask"].bool()], image.flatten(0, 1)])
    keep = x.get("decoder_attention_mask", x.get("attention_mask"))
    return output.last_hidden_state.flatten(0, 1) if keep is None else output.last_hidden_state[keep.bool()]


def trained(name: str, model: nn.Module, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hidden states, and the gradients of a loss of them."""
    out = states(name, model(**x), x)
    generator = torch.Generator().manual_seed(4)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return {"states": out.detach()} | {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 10
    for key, x in expected.items():
        atol = 4e-6 * max(1.0, x.abs().max().item())
        torch.testing.assert_close(found[key], x, atol=atol, rtol=1e-5, msg=partial("{}: {}".format, key))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_equals_eager(name, p):
    x = inputs(name)
    with recorded() as draws:
        found = trained(name, build(name, "fastattn", p), x)
    assert len({seed.item() for seed, _ in draws}) == len(draws) == (CALLS.get(name, 2) if p else 0)
    with replayed(draws):
        assert_same(found, trained(name, build(name, "eager", p), x))


@pytest.mark.parametrize("name", ["t5", "swin", "modernbert", "eurobert"])
def test_evaluation_equals_eager(name):
    x = inputs(name)
    out, expected = (states(name, build(name, way, 0.1).eval()(**x), x) for way in ("fastattn", "eager"))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_a_step_repeats_after_its_seed():
    x, model = inputs("bert"), build("bert", "fastattn", 0.1)
    steps = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        steps.append(model(**x).last_hidden_state)
    assert torch.equal(steps[0], steps[1]) and not torch.equal(steps[0], steps[2])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_drop_the_same_weights_again(reentrant):
    grads = []
    for checkpointing in (False, True):
        model = build("bert", "fastattn", 0.3)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        grads.append(trained("bert", model, inputs("bert")))
    assert_same(grads[1], grads[0])


def test_padded_and_end_to_end_drop_the_same_weights():
    """Packed sequences have no padding; which weights are dropped depends on the sequence and the places in it alone."""
    x, model = inputs("bert"), build("bert", "fastattn", 0.3)
    keep = x["attention_mask"].bool()
    torch.manual_seed(5)
    padded = model(**x).last_hidden_state[keep]
    offsets = nn.functional.pad(keep.sum(1).cumsum(0), (1, 0)).int()
    torch.manual_seed(5)
    packed = model(
        input_ids=x["input_ids"][keep][None], position_ids=torch.arange(9).expand(3, 9)[keep][None],
        cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, max_length_q=9, max_length_k=9,
    ).last_hidden_state[0]  # fmt: skip
    torch.testing.assert_close(packed, padded, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generation_with_a_cache_equals_eager(name):
    classes = {"gpt2": "GPT2LMHeadModel", "t5": "T5ForConditionalGeneration"}
    ids, keep = torch.randint(3, 59, (2, 8), generator=torch.Generator().manual_seed(2)), torch.ones(2, 8).long()
    keep[0, :3] = 0  # texts are padded on the left for this
    written = []
    for implementation in ("eager", "fastattn"):
        torch.manual_seed(7)
        config = CONFIGS[name](0.1)
        config._attn_implementation = implementation
        model = getattr(transformers, classes[name])(config).eval()
        options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        written.append(model.generate(ids, attention_mask=keep, pad_token_id=0, eos_token_id=None, use_cache=True, **options))
    assert torch.equal(written[0].sequences, written[1].sequences)
    torch.testing.assert_close(torch.stack(written[1].logits), torch.stack(written[0].logits), atol=2e-5, rtol=0)


def test_a_window_is_no_mask_of_pairs(monkeypatch):
    """ModernBERT's layers give it beside a mask of padding: nothing of size N x N is made."""
    given = []
    attention = integration.attention
    monkeypatch.setattr(
        integration, "attention", lambda q, k, v, mask, **kw: given.append(mask) or attention(q, k, v, mask, **kw)
    )
    model, x = build("modernbert", "fastattn", 0.0), inputs("modernbert")
    model(**x)
    model(x["input_ids"])  # no padding
    whole, window, none, alone = given
    assert none is None and all(isinstance(mask, fastattn.masks.Mask) for mask in (whole, window, alone))
    i, j = torch.arange(9)[:, None], torch.arange(9)
    near, real = (i - j).abs() <= model.config.sliding_window, x["attention_mask"].bool()[:, None, None]
    for mask, expected in ((whole, real), (window, real & near), (alone, near)):
        assert torch.equal(mask.dense(3, 4, 9, 9), expected.expand(3, 4, 9, 9))
    assert not near.all()


# The attention function alone


def layer(**attributes) -> nn.Module:
    module = nn.Module()
    for name, value in ({"is_causal": False} | attributes).items():
        setattr(module, name, value)
    return module


def request(M: int = 5, N: int = 5) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(M)
    return [torch.randn(2, n, 4, 8, generator=generator).transpose(1, 2) for n in (M, N, N)]


@pytest.mark.parametrize("mask_shape", [None, (2, 1, 5, 5), (2, 4, 5, 5), (1, 1, 1, 5)])
@pytest.mark.parametrize("bias_shape", [None, (1, 4, 5, 5), (2, 4, 1, 5)])
def test_floats_are_added_to_the_scores(mask_shape, bias_shape):
    if mask_shape is bias_shape is None:
        return
    q, k, v = request()
    added = {"attention_mask": mask_shape, "position_bias": bias_shape}
    given = {name: shape and torch.randn(shape, generator=torch.Generator().manual_seed(3)) for name, shape in added.items()}
    leaves = [x.requires_grad_() for x in given.values() if x is not None]
    causal = mask_shape is None  # a float mask says everything, None leaves causality to the layer
    out = integration.attention_forward(layer(is_causal=True), q, k, v, scaling=1.0, **given)[0]
    scores = q @ k.mT + sum(leaves)
    if causal:
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=2e-6)
    grads, expected_grads = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected))
    for found, grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, grad, atol=1e-5, rtol=1e-5)


def test_minus_infinity_and_the_least_number_hide():
    q, k, v = request()
    keep = torch.tensor([True, False, True, True, False])
    expected = integration.attention_forward(layer(), q, k, v, keep.expand(2, 1, 5, 5))[0]
    for hidden in (float("-inf"), torch.finfo(torch.float32).min):
        mask = torch.zeros(2, 1, 5, 5).masked_fill(~keep, hidden)
        torch.testing.assert_close(integration.attention_forward(layer(), q, k, v, mask)[0], expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize(("M", "N"), [(7, 7), (1, 7), (3, 7)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_window_beside_padding(M, N, causal, padded):
    q, k, v = request(M, N)
    keep = torch.tensor([[True] * 7, [False] * 2 + [True] * 5]) if padded else torch.ones(2, 7).bool()
    mask = keep if padded or M == 3 else None  # None says that queries and keys are as many, or one query
    out = integration.attention_forward(layer(is_causal=causal), q, k, v, mask, sliding_window=3)[0]
    distance = torch.arange(N) - torch.arange(M)[:, None] - (N - M)
    visible = (distance > -3) & (distance <= 0 if causal or M == 1 else distance < 3) & keep[:, None, None]
    expected = integration.attention_forward(layer(), q, k, v, visible)[0]
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)
    wide = integration.attention_forward(layer(is_causal=causal), q, k, v, mask, sliding_window=N)[0]
    assert torch.equal(wide, integration.attention_forward(layer(is_causal=causal), q, k, v, mask)[0])


def test_a_window_of_sequences_end_to_end():
    q, k, v = (x[:1] for x in request())
    offsets = {"cu_seq_lens_q": torch.tensor([0, 5], dtype=torch.int32), "max_length_q": 5}
    packed = integration.attention_forward(layer(), q, k, v, None, sliding_window=2, **offsets)[0]
    alone = integration.attention_forward(layer(), q, k, v, None, sliding_window=2)[0]
    torch.testing.assert_close(packed, alone, atol=2e-6, rtol=0)
    assert not torch.allclose(alone, integration.attention_forward(layer(), q, k, v, None)[0])
    with pytest.raises(NotImplementedError, match="position_bias beside cu_seq_lens_q"):
        integration.attention_forward(layer(), q, k, v, None, position_bias=torch.zeros(1, 4, 5, 5), **offsets)


def test_what_does_not_fit_is_named():
    q, k, v = request()
    with pytest.raises(TypeError, match=r"attention_mask must be bool .* torch.int64"):
        integration.attention_forward(layer(), q, k, v, torch.ones(2, 5).long())
    with pytest.raises(ValueError, match=r"attention_mask of torch.float32.* \(2, 5\)"):
        integration.attention_forward(layer(), q, k, v, torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"bias has shape \(1, 3, 5, 5\)"):
        integration.attention_forward(layer(), q, k, v, None, position_bias=torch.zeros(1, 3, 5, 5))
    for window in (0, -1, 2.5):
        with pytest.raises(NotImplementedError, match="sliding_window="):
            integration.attention_forward(layer(), q, k, v, None, sliding_window=window)
