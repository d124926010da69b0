"""Heads that read padding get the loss and the gradients that they get without us."""

import copy

import pytest
import torch
from test_accelerate import QUIET, SMALL, TEXT, gradients, text
from torch import nn

import fastattn

transformers = pytest.importorskip("transformers")

LENGTHS = (24, 5, 3, 13)
L = 24
POSITIONS = {"start_positions": torch.tensor([1, 1, 0, 2]), "end_positions": torch.tensor([2, 3, 0, 4])}
EVERYWHERE = torch.arange(4 * L).view(4, L) % 3
REAL = torch.arange(L) < torch.tensor(LENGTHS)[:, None]
SIZES = {**SMALL, **QUIET, "initializer_range": 0.2}


def head(name, **options):
    torch.manual_seed(0)
    if name.startswith("DistilBert"):
        sizes = {
            "vocab_size": 60,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 48,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        }
        config = transformers.DistilBertConfig(**sizes, initializer_range=0.2, qa_dropout=0.0, seq_classif_dropout=0.0, **options)
    elif name.startswith("Electra"):
        config = transformers.ElectraConfig(**SIZES, embedding_size=16, summary_last_dropout=0.0, **options)
    elif name.startswith("Roberta"):
        config = transformers.RobertaConfig(**SIZES, max_position_embeddings=40, **options)
    else:
        config = transformers.BertConfig(**SIZES, **options)
    return getattr(transformers, name)(config).train()


def loss_and_gradients(model, inputs):
    loss = model(**inputs).loss
    model.zero_grad()
    loss.backward()
    return loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same_training(model, ours, inputs):
    (loss, grads), (our_loss, our_grads) = loss_and_gradients(model, inputs), loss_and_gradients(ours, inputs)
    torch.testing.assert_close(our_loss, loss, rtol=2e-5, atol=2e-5)
    assert (our_grads - grads).norm() < 2e-5 * grads.norm()


HEADS = {
    "BertForQuestionAnswering": POSITIONS,
    "RobertaForQuestionAnswering": POSITIONS,
    "DistilBertForQuestionAnswering": POSITIONS,
    "ElectraForQuestionAnswering": POSITIONS,
    "BertForTokenClassification": {"labels": EVERYWHERE},
    "DistilBertForTokenClassification": {"labels": EVERYWHERE},
    "BertForMaskedLM": {"labels": EVERYWHERE},
    "BertForPreTraining": {"labels": EVERYWHERE, "next_sentence_label": torch.tensor([0, 1, 1, 0])},
}


@pytest.mark.parametrize("name", HEADS)
def test_padding_stays_where_it_is_read(name):
    model = head(name, **({"num_labels": 3} if "Token" in name else {}))
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours, strict=True)
    inputs = {**text(lengths=LENGTHS), **HEADS[name]}
    assert_same_training(model, ours, inputs)
    assert not handle.report.fallbacks and sum(handle.report.padded.values()) == 1
    (why,) = handle.report.padded
    assert ("ForQuestionAnswering" in why) if "Question" in name else why == "labels at padding"
    assert why in str(handle.report)


@pytest.mark.parametrize("name", ["BertForTokenClassification", "BertForMaskedLM", "ElectraForPreTraining"])
def test_padding_goes_where_labels_leave_it_out(name):
    model = head(name, **({"num_labels": 3} if "Token" in name else {}))
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours, strict=True)
    labels = EVERYWHERE.clamp(max=1) if "PreTraining" in name else EVERYWHERE.masked_fill(~REAL, -100)
    assert_same_training(model, ours, {**text(lengths=LENGTHS), "labels": labels})
    assert not handle.report.fallbacks and not handle.report.padded


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "DistilBertForSequenceClassification"])
def test_labels_of_sequences_are_no_labels_of_tokens(name):
    model = head(name)
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours, strict=True)
    assert_same_training(model, ours, {**text(lengths=LENGTHS), "labels": torch.tensor([0, 1, 1, 0])})
    assert not handle.report.padded


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "DistilBertForSequenceClassification", "BertModel"])
def test_the_first_token_of_what_is_padded_on_the_left(name):
    """Poolers and classifiers read position 0, whatever is there."""
    model = head(name)
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours, strict=True)
    outs = [m(**text("left", LENGTHS)) for m in (model, ours)]
    pooled = [out.pooler_output if name == "BertModel" else out.logits for out in outs]
    torch.testing.assert_close(pooled[1], pooled[0], rtol=2e-5, atol=2e-5)
    assert list(handle.report.padded) == ["the token that is pooled is padding"]


@pytest.mark.parametrize("eos", [59, 2])
def test_the_end_of_text_that_clip_reads(eos):
    """Cut off, or hidden by the mask: what CLIP pools then is another token, maybe padding. (Of old configs: the greatest id.)"""
    torch.manual_seed(0)
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**TEXT, "eos_token_id": eos})).eval()
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours, strict=True)
    inputs = text(lengths=LENGTHS)
    inputs["input_ids"].scatter_(1, inputs["attention_mask"].sum(1, keepdim=True) - 1, 59)
    ours(**inputs)
    assert not handle.report.padded
    inputs["input_ids"].scatter_(1, inputs["attention_mask"].sum(1, keepdim=True).clamp(max=L - 1), 59)
    inputs["input_ids"].scatter_(1, inputs["attention_mask"].sum(1, keepdim=True) - 1, 5)
    torch.testing.assert_close(ours(**inputs).pooler_output, model(**inputs).pooler_output, rtol=2e-5, atol=2e-5)
    assert list(handle.report.padded) == ["the token that is pooled is padding"]


class Tagger(nn.Module):
    """A user's own: arguments by position, a loss without an ignored label."""

    def __init__(self, model):
        super().__init__()
        self.model, self.score = model, nn.Linear(32, 3)

    def forward(self, input_ids, attention_mask, labels=None):
        return nn.functional.cross_entropy(self.score(self.model(input_ids, attention_mask)[0]).flatten(0, 1), labels.flatten())


def test_a_head_of_the_user_s():
    torch.manual_seed(0)
    model = Tagger(head("BertModel")).train()
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours, strict=True)
    inputs = (*text(lengths=LENGTHS).values(), EVERYWHERE)
    torch.testing.assert_close(ours(*inputs), model(*inputs), rtol=2e-5, atol=2e-5)
    assert handle.report.padded == {"labels at padding": 1}
    handle.restore()
    assert not any("forward" in vars(m) for m in ours.modules())


def test_the_user_s_word():
    """`always` takes padding out of a head that reads it, `never` leaves it in one that does not."""
    model = head("BertForQuestionAnswering").eval()
    inputs = text(lengths=LENGTHS)
    expected = model(**inputs).start_logits
    for unpad, packs in (("always", True), ("never", False), ("auto", False)):
        with fastattn.accelerate(model, strict=True, unpad=unpad) as handle:
            out = model(**inputs).start_logits
            torch.testing.assert_close(out * REAL, expected * REAL, rtol=2e-5, atol=2e-5)
            assert torch.allclose(out, expected, atol=1e-4) != packs
            assert ("real tokens alone" in handle.report.accelerated["bert"]) == packs
    plain = head("BertModel").eval()
    ours = copy.deepcopy(plain)
    fastattn.accelerate(ours, unpad="never")
    torch.testing.assert_close(ours(**inputs)[0], plain(**inputs)[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_capacity_reads_no_labels(compiled):
    """So labels for each token keep padding in, unless the user says that it does not matter."""
    model = head("BertForTokenClassification", num_labels=3)
    inputs = {**text(lengths=LENGTHS), "labels": EVERYWHERE.masked_fill(~REAL, -100)}
    for unpad in ("auto", "always"):
        ours = copy.deepcopy(model)
        handle = fastattn.accelerate(ours, strict=True, capacity=60, unpad=unpad)
        ours(**inputs)
        if compiled:
            torch._dynamo.reset()
            ours.compile(backend="aot_eager", fullgraph=True)
        assert_same_training(model, ours, inputs)
        assert bool(handle.report.padded) == (unpad == "auto")


def test_sentence_transformers_modules_beside_the_encoder():
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    encoder = nn.Sequential()
    encoder.bert, encoder.cnn = head("BertModel"), modules.CNN(32, 32, [3])
    assert "convolutions" in fastattn.accelerate(encoder).report.accelerated["bert"]


def test_masked_rows_keep_their_gradients():
    """What a loss over real tokens alone gives, with and without padding, is one."""
    model = head("BertModel")
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours, strict=True)
    grads = [gradients(m, m(**text(lengths=LENGTHS)).last_hidden_state * REAL[..., None]) for m in (model, ours)]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=2e-4, atol=2e-5)
