"""LoRA through PEFT, and adapters by hand: put in before and after `accelerate`, trained, merged, taken out again."""

import pytest
import torch
from torch import nn
from twins import assert_close, assert_moved, assert_named, assert_same, assert_served_again, batch, bert, inferred, step, twins

import fastattn

transformers = pytest.importorskip("transformers")


def classifier():
    return bert(transformers.BertForSequenceClassification, num_labels=3)


def with_lora(model, **options):
    peft = pytest.importorskip("peft")
    options = {"target_modules": ["query", "value", "output.dense"], "modules_to_save": ["classifier"], **options}
    torch.manual_seed(4)
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, **options)).eval()


def trained(model):
    """Three steps with evaluations in between."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, fused=True)
    for seed in range(3):
        step(model.train(), optimizer, batch(seed=seed))
        inferred(model.eval(), batch())


@pytest.fixture(params=["before", "after"])
def adapted(request):
    """The plain model and ours, both with LoRA, and the handle; ours accelerated before or after it got its LoRA."""
    if request.param == "before":
        plain, ours, handle = twins(classifier())
        assert_same(plain, ours)
        return with_lora(plain), with_lora(ours), handle
    plain, ours = with_lora(classifier()), with_lora(classifier())
    return plain, ours, fastattn.accelerate(ours)


def test_lora_trained_and_merged(adapted):
    plain, ours, handle = adapted
    models = plain, ours
    before = assert_same(plain, ours)
    for model in models:
        trained(model)
    tuned = assert_same(plain, ours)
    assert_moved(before, tuned)
    assert_named(handle)
    for model in models:
        model.merge_adapter()
    assert_close(assert_same(plain, ours), tuned)
    for model in models:
        model.unmerge_adapter()
    assert_close(assert_same(plain, ours), tuned)
    with plain.disable_adapter(), ours.disable_adapter():
        assert_moved(tuned, assert_same(plain, ours))
    assert_close(assert_same(plain, ours), tuned)
    for model in models:
        trained(model)
    again = assert_same(plain, ours)
    assert_moved(tuned, again)
    plain, ours = (model.merge_and_unload() for model in models)
    assert_close(assert_same(plain, ours), again)
    for model in (plain, ours):
        trained(model.requires_grad_(True))
    assert_moved(again, assert_same(plain, ours))


def test_lora_merged_into_an_accelerated_model_is_served_again():
    plain, ours, handle = twins(classifier())
    before = assert_same(plain, ours)
    plain, ours = with_lora(plain), with_lora(ours)
    for model in (plain, ours):
        trained(model)
    plain, ours = (model.merge_and_unload() for model in (plain, ours))
    assert_moved(before, assert_same(plain, ours))
    assert_served_again(handle, ours)
    plain, ours = with_lora(plain), with_lora(ours)
    plain, ours = (model.unload() for model in (plain, ours))
    assert_same(plain, ours)


def test_two_adapters_in_turn(adapted):
    peft = pytest.importorskip("peft")
    plain, ours, _ = adapted
    for model in (plain, ours):
        torch.manual_seed(6)
        model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["key", "intermediate.dense"], init_lora_weights=False))
    seen = {}
    for name in ("default", "other", "default", "other"):
        for model in (plain, ours):
            model.set_adapter(name)
        out = assert_same(plain, ours)
        assert_close(out, seen.setdefault(name, out))
    assert_moved(seen["default"], seen["other"])


def test_adapter_saved_and_loaded(adapted, tmp_path):
    peft = pytest.importorskip("peft")
    plain, ours, _ = adapted
    for model in (plain, ours):
        trained(model)
    ours.save_pretrained(tmp_path)
    base = classifier()
    handle = fastattn.accelerate(base)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert_same(plain, loaded)
    assert_named(handle)
    merged = loaded.merge_and_unload()
    assert_same(plain, merged)
    assert_served_again(handle, merged)


def test_lora_on_no_layer_of_the_encoder():
    """On the head alone: the encoder goes on being served."""
    plain, ours, handle = twins(classifier())
    plain, ours = (with_lora(m, target_modules=["classifier"], modules_to_save=None) for m in (plain, ours))
    before = assert_same(plain, ours)
    for model in (plain, ours):
        trained(model)
    assert_moved(before, assert_same(plain, ours))
    assert not handle.report.fallbacks


def test_lora_that_reads_the_weight_it_adapts():
    """DoRA."""
    plain, ours = (with_lora(bert(), use_dora=True, modules_to_save=None) for _ in range(2))
    fastattn.accelerate(ours)
    before = assert_same(plain, ours)
    for model in (plain, ours):
        trained(model)
    assert_moved(before, assert_same(plain, ours))


class Bottleneck(nn.Module):
    """An adapter behind a linear layer, as it is written by hand."""

    def __init__(self, inner):
        super().__init__()
        torch.manual_seed(8)
        self.inner, self.down, self.up = inner, nn.Linear(inner.out_features, 4), nn.Linear(4, inner.out_features)

    def forward(self, x):
        y = self.inner(x)
        return y + self.up(torch.relu(self.down(y)))


class Low(nn.Linear):
    """LoRA by hand: a subclass put over the instance."""

    def forward(self, x):
        return super().forward(x) + x @ self.low.T @ self.high.T


def behind(model):
    for layer in model.bert.encoder.layer:
        layer.output.dense = Bottleneck(layer.output.dense)


def in_sequence(model):
    layer = model.bert.encoder.layer[0]
    layer.attention.self.value = nn.Sequential(layer.attention.self.value, nn.Tanh())


def by_class(model):
    torch.manual_seed(8)
    part = model.bert.encoder.layer[1].attention.self.query
    part.__class__ = Low
    part.low, part.high = nn.Parameter(torch.randn(4, 32)), nn.Parameter(torch.randn(32, 4))


def by_another_activation(model):
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.Tanh()


def by_another_norm(model):
    model.bert.encoder.layer[0].output.LayerNorm = nn.RMSNorm(32)


BY_HAND = (behind, in_sequence, by_class, by_another_activation, by_another_norm)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("adapt", BY_HAND, ids=lambda adapt: adapt.__name__)
def test_adapters_by_hand(adapt, when):
    plain, ours = classifier(), classifier()
    if when == "after":
        handle = fastattn.accelerate(ours)
        assert_same(plain, ours)
    before = inferred(plain, batch())
    for model in (plain, ours):
        adapt(model)
    if when == "before":
        handle = fastattn.accelerate(ours)
    assert_moved(before, assert_same(plain, ours))
    assert_named(handle)
    for model in (plain, ours):
        trained(model)
    assert_same(plain, ours)


def test_batch_norm_in_place_of_a_layer_norm_reads_padding():
    """A part that computes with all rows it gets: what it gets must be the plain model's."""
    plain, ours, handle = twins(classifier())
    for model in (plain, ours):
        norm = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(32), nn.Unflatten(0, (4, 24)))
        model.bert.encoder.layer[1].output.LayerNorm = norm
        model.train()
    out, expected = (model(**batch()).logits for model in (ours, plain))
    assert_close(out, expected)
    assert_named(handle)
