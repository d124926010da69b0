"""A small random model and its accelerated copy, which must give what the model gives; B, L: sequences, padded length."""

import copy

import pytest
import torch
from torch import nn

import fastattn

transformers = pytest.importorskip("transformers")

VOCABULARY, L = 60, 24
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 40}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def spread(model):
    """Weights as far apart as trained ones: attention is not flat, biases and norms are not 0 and 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def bert(cls=transformers.BertModel, **options):
    torch.manual_seed(0)
    return spread(cls(transformers.BertConfig(**{**TEXT, **QUIET, **options})))


def roberta():
    return spread(transformers.RobertaModel(transformers.RobertaConfig(**TEXT, **QUIET)))


def distilbert():
    sizes = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
    return spread(transformers.DistilBertModel(transformers.DistilBertConfig(**sizes, dropout=0.0, attention_dropout=0.0)))


def clip_text():
    """Pre-norm, causal, quick_gelu: what BERT is not."""
    special = {"bos_token_id": 57, "eos_token_id": 58, "pad_token_id": 1}
    return spread(transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, **special)))


ENCODERS = {"bert": bert, "roberta": roberta, "distilbert": distilbert, "clip_text": clip_text}


def twins(model):
    """The model, an accelerated copy that is served whole, and its handle."""
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours)
    assert handle.report.accelerated and not handle.report.left, handle.report
    return model, ours, handle


def batch(lengths=(L, 7, 1, 13), seed=1):
    """Ragged token ids, padded on the right, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 57, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": ids.masked_fill(~mask, 1), "attention_mask": mask.long()}


def output(model, inputs):
    """The main output of a model: at real tokens, where it has one for each token; of question answering at all of them, since
    its loss is a softmax over positions."""
    outputs = model(**inputs)
    if "start_logits" in outputs:
        return torch.stack([outputs.start_logits, outputs.end_logits], -1)
    out = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    mask = inputs["attention_mask"]
    return out * mask[..., None] if out.shape[:2] == mask.shape else out


@torch.no_grad()
def inferred(model, inputs):
    return output(model, inputs)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def assert_same(plain, ours, inputs=None):
    """Without gradients: that is where copies of weights are kept. Returns what the plain model gave."""
    expected = inferred(plain, inputs or batch())
    assert_close(inferred(ours, inputs or batch()), expected)
    return expected


def assert_moved(before, after):
    """What was done to the weights is large beside what counts as the same."""
    assert (after - before).abs().max() > 1e-2


def gradients(model, out):
    """Of a scalar that every element of `out` has a part in."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(2)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(plain, ours, inputs=None):
    expected, actual = (gradients(model, output(model, inputs or batch())) for model in (plain, ours))
    assert expected and actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert (actual[name] - grad).abs().max() <= 2e-5 * grad.abs().max().clamp(min=1), name


def step(model, optimizer, inputs):
    """One step of training on a made-up target."""
    optimizer.zero_grad()
    (output(model, inputs) - 0.5).square().mean().backward()
    optimizer.step()


def assert_named(handle):
    """Something was left to the model's own code, and the report says so."""
    assert handle.report.left or handle.report.fallbacks
    assert str(handle.report)


def assert_served_again(handle, ours, inputs=None):
    """A call with gradients and one without run fused."""
    before = handle.report.fallbacks.total()
    inferred(ours, inputs or batch())
    output(ours, inputs or batch())
    assert handle.report.fallbacks.total() == before, handle.report.fallbacks


def linears(model):
    """The linear layers of a model's encoder, by name."""
    return {name: part for name, part in model.named_modules() if type(part) is nn.Linear and "layer" in name}


def tokenizer():
    """Of 50 words, one token each, with BERT's special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(50))]
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=L, **special)


SENTENCES = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15", "w16 w17 w2 w1 w40 w3", "w44 w45 w46 w47 w48 w49 w0"]
