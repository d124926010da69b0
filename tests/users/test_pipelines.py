"""transformers' pipelines over an accelerated model, with batches of ragged texts."""

import copy

import pytest
import torch
from torch import nn
from twins import QUIET, SENTENCES, SIZES, TEXT, bert, distilbert, spread, tokenizer

import fastattn

transformers = pytest.importorskip("transformers")

MASKED = ["w1 [MASK] w3", "[MASK]", "w5 w6 w7 w8 [MASK] w10 w11 w12 w13", "w16 w17 w2 w1 [MASK] w3"]


def piped(task, model, **parts):
    """The pipeline of the plain model, that of an accelerated copy, and the handle."""
    ours = copy.deepcopy(model)
    pipes = [transformers.pipeline(task, model=m, device="cpu", **parts) for m in (model, ours)]
    return *pipes, fastattn.accelerate(pipes[1].model)


def flat(results):
    """Numbers and the rest of what a pipeline gives, each as a list."""
    if isinstance(results, dict):
        results = [results[key] for key in sorted(results)]
    if isinstance(results, (list, tuple)):
        found = [flat(x) for x in results]
        return [x for numbers, _ in found for x in numbers], [x for _, rest in found for x in rest]
    if isinstance(results, float) or hasattr(results, "dtype"):
        return [float(results)], []
    return [], [results]


def assert_same_results(expected, actual):
    (numbers, rest), (our_numbers, our_rest) = flat(expected), flat(actual)
    assert numbers and our_rest == rest
    assert our_numbers == pytest.approx(numbers, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("make", [bert, distilbert])
def test_feature_extraction(make, batch_size):
    """States of padding stand in the results of a batch: real tokens are compared."""
    plain, ours, handle = piped("feature-extraction", make(), tokenizer=tokenizer())
    expected, actual = (pipe(SENTENCES, batch_size=batch_size) for pipe in (plain, ours))
    lengths = [len(sentence.split()) + 2 for sentence in SENTENCES]
    for one, other, length in zip(expected, actual, lengths, strict=True):
        assert len(one[0]) == len(other[0]) >= length
        assert_same_results(one[0][:length], other[0][:length])
    assert not handle.report.fallbacks and not handle.report.left


def distilbert_classifier():
    sizes = {"vocab_size": TEXT["vocab_size"], "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
    config = transformers.DistilBertConfig(**sizes, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=3)
    return spread(transformers.DistilBertForSequenceClassification(config))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "make",
    [lambda: bert(transformers.BertForSequenceClassification, num_labels=3), distilbert_classifier],
    ids=["bert", "distilbert"],
)
def test_text_classification(make, batch_size):
    plain, ours, handle = piped("text-classification", make(), tokenizer=tokenizer())
    for options in ({}, {"top_k": None}, {"function_to_apply": "none"}):
        assert_same_results(*(pipe(SENTENCES, batch_size=batch_size, **options) for pipe in (plain, ours)))
    assert_same_results(*(pipe({"text": "w1 w2", "text_pair": "w3"}) for pipe in (plain, ours)))
    assert not handle.report.fallbacks and not handle.report.left


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("strategy", ["none", "simple", "max"])
def test_token_classification(strategy, batch_size):
    plain, ours, handle = piped(
        "token-classification",
        bert(transformers.BertForTokenClassification, num_labels=3),
        tokenizer=tokenizer(),
        aggregation_strategy=strategy,
    )
    assert_same_results(*(pipe(SENTENCES, batch_size=batch_size) for pipe in (plain, ours)))
    assert not handle.report.fallbacks and not handle.report.left


@pytest.mark.parametrize("batch_size", [1, 3])
def test_fill_mask(batch_size):
    plain, ours, handle = piped("fill-mask", bert(transformers.BertForMaskedLM), tokenizer=tokenizer())
    assert_same_results(*(pipe(MASKED, batch_size=batch_size, top_k=4) for pipe in (plain, ours)))
    assert_same_results(*(pipe(MASKED[0], targets=["w7", "w9"]) for pipe in (plain, ours)))
    assert not handle.report.fallbacks and not handle.report.left


@pytest.mark.parametrize("batch_size", [1, 2])
def test_zero_shot_classification(batch_size):
    """Every text with every label as a pair."""
    model = bert(
        transformers.BertForSequenceClassification,
        num_labels=2,
        label2id={"no": 0, "entailment": 1},
        id2label={0: "no", 1: "entailment"},
    )
    plain, ours, handle = piped("zero-shot-classification", model, tokenizer=tokenizer())
    options = {"candidate_labels": ["w30 w31 w32", "w33"], "hypothesis_template": "w20 {} w21", "batch_size": batch_size}
    assert_same_results(*(pipe(SENTENCES[:3], **options) for pipe in (plain, ours)))
    assert not handle.report.fallbacks and not handle.report.left


def pictures():
    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    return [image.fromarray(torch.randint(0, 256, (20, 20, 3), generator=generator, dtype=torch.uint8).numpy()) for _ in range(3)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_zero_shot_image_classification(batch_size):
    pytest.importorskip("PIL")
    processors = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    vision = {**SIZES, "image_size": 16, "patch_size": 4}
    text = {**TEXT, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    model = spread(transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)))
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
    processor = processors.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    plain, ours, handle = piped("zero-shot-image-classification", model, tokenizer=tokenizer(), image_processor=processor)
    labels = {"candidate_labels": ["w1", "w2 w3 w4 w5", "w6 w7"], "hypothesis_template": "w20 {}"}
    assert_same_results(*(pipe(pictures(), batch_size=batch_size, **labels) for pipe in (plain, ours)))
    assert {"text_model", "vision_model"} <= set(handle.report.accelerated) and not handle.report.fallbacks


@pytest.mark.parametrize("batch_size", [1, 3])
def test_image_classification(batch_size):
    pytest.importorskip("PIL")
    processors = pytest.importorskip("transformers.models.vit.image_processing_pil_vit")
    sizes = {**SIZES, **QUIET, "image_size": 16, "patch_size": 4, "num_labels": 3}
    model = spread(transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)))
    processor = processors.ViTImageProcessorPil(size={"height": 16, "width": 16})
    plain, ours, handle = piped("image-classification", model, image_processor=processor)
    assert_same_results(*(pipe(pictures(), batch_size=batch_size) for pipe in (plain, ours)))
    assert not handle.report.fallbacks and not handle.report.left


def test_accelerated_before_the_pipeline_and_restored_inside_of_it():
    model = bert(transformers.BertForSequenceClassification, num_labels=3)
    plain = transformers.pipeline("text-classification", model=copy.deepcopy(model), tokenizer=tokenizer(), device="cpu")
    with fastattn.accelerate(model) as handle:
        ours = transformers.pipeline("text-classification", model=model, tokenizer=tokenizer(), device="cpu")
        assert_same_results(*(pipe(SENTENCES, batch_size=3) for pipe in (plain, ours)))
        assert not handle.report.fallbacks
    assert plain(SENTENCES, batch_size=3) == ours(SENTENCES, batch_size=3)


def test_a_pipeline_itself_is_refused():
    """It is no module: the sentence says what to give instead."""
    pipe = transformers.pipeline("feature-extraction", model=bert(), tokenizer=tokenizer(), device="cpu")
    with pytest.raises(TypeError, match=r"\.model"):
        fastattn.accelerate(pipe)
    assert not any("forward" in vars(module) for module in pipe.model.modules())


@pytest.mark.parametrize("wrong", [None, "bert-base-uncased", {}, nn.Linear, bert])
def test_what_is_no_model_is_refused(wrong):
    with pytest.raises(TypeError, match="model"):
        fastattn.accelerate(wrong)
