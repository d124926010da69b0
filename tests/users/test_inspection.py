"""People who look inside: hooks that record and hooks that steer, attributions, attention maps, dropout at inference."""

import pytest
import torch
from torch import nn
from twins import (
    assert_close,
    assert_moved,
    assert_named,
    assert_same,
    assert_same_gradients,
    assert_served_again,
    batch,
    bert,
    inferred,
    output,
    twins,
)

import fastattn

transformers = pytest.importorskip("transformers")

INSIDE = (
    "encoder.layer.0",
    "encoder.layer.1.attention",
    "encoder.layer.0.attention.self",
    "encoder.layer.0.attention.self.query",
    "encoder.layer.1.attention.self.value",
    "encoder.layer.0.attention.output",
    "encoder.layer.0.attention.output.dense",
    "encoder.layer.0.attention.output.LayerNorm",
    "encoder.layer.1.intermediate",
    "encoder.layer.1.intermediate.dense",
    "encoder.layer.0.intermediate.intermediate_act_fn",
    "encoder.layer.1.output",
    "encoder.layer.1.output.dense",
    "encoder.layer.1.output.dropout",
    "encoder.layer.1.output.LayerNorm",
)
GIVEN_NO_STATES = ("embeddings", "encoder.layer.0.attention.self")  # by position: token ids, and nothing at all
AROUND = ("", "embeddings", "embeddings.word_embeddings", "embeddings.LayerNorm", "encoder", "pooler", "pooler.dense")


def tensor_of(value):
    while not isinstance(value, torch.Tensor):
        value = next(iter(value.values())) if hasattr(value, "values") else value[0]
    return value


class Recorded:
    """A forward hook that keeps what comes out of a module."""

    def __init__(self):
        self.seen = []

    def __call__(self, module, args, out):
        self.seen.append(tensor_of(out).detach())


class Kept(list):
    """The same as a list, which is false while it is empty."""

    def __call__(self, module, args, out):
        self.append(tensor_of(out).detach())


def direction(states):
    return torch.linspace(-1, 1, states.shape[-1])  # a norm takes a constant out again


def steered(module, args, out):
    """A forward hook that moves token 0 of every sequence."""
    states = tensor_of(out).clone()
    states[:, 0] += direction(states)
    return (states, *out[1:]) if isinstance(out, tuple) else states


def given_other_input(module, args, kwargs):
    return (args[0] + direction(args[0]), *args[1:]), kwargs


def doubled_gradient(module, grads, out_grads):
    return tuple(2 * g if g is not None and g.is_floating_point() else g for g in grads)


HOOKS = {
    "steered": lambda module: module.register_forward_hook(steered),
    "given_other_input": lambda module: module.register_forward_pre_hook(given_other_input, with_kwargs=True),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", INSIDE + AROUND)
def test_hooks_that_record(name, when):
    """Called as often, and with as much, as in the plain model; at padding too."""
    plain, ours = bert(), bert()
    if when == "after":
        handle = fastattn.accelerate(ours)
        assert_same(plain, ours)
    records = [Recorded(), Recorded()]
    hooks = [m.get_submodule(name).register_forward_hook(record) for m, record in zip((plain, ours), records, strict=True)]
    seen = [record.seen for record in records]
    if when == "before":
        handle = fastattn.accelerate(ours)
    assert_same(plain, ours)
    assert len(seen[1]) == len(seen[0]) == 1
    assert seen[1][0].shape == seen[0][0].shape
    mask = batch()["attention_mask"]
    keep = mask[..., None] if seen[0][0].shape[:2] == mask.shape else torch.ones(1)
    assert_close(seen[1][0] * keep, seen[0][0] * keep)
    if name in INSIDE:
        assert "hooks" in str(handle.report)
        assert_close(seen[1][0], seen[0][0])
    for hook in hooks:
        hook.remove()
    assert_same(plain, ours)
    assert len(seen[1]) == 1
    if when == "after":
        assert_served_again(handle, ours)


def test_a_hook_that_is_an_empty_list():
    plain, ours, handle = twins(bert())
    assert_same(plain, ours)
    kept = Kept()
    ours.encoder.layer[0].output.dense.register_forward_hook(kept)
    for calls in (1, 2, 3):
        assert_same(plain, ours)
        assert len(kept) == calls
    assert "hooks" in str(handle.report)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "hook"),
    [
        (name, hook)
        for name in (*INSIDE, "embeddings", "embeddings.LayerNorm")
        for hook in HOOKS
        if hook == "steered" or name not in GIVEN_NO_STATES
    ],
)
def test_hooks_that_steer(name, hook, when):
    plain, ours = bert(), bert()
    if when == "after":
        handle = fastattn.accelerate(ours)
        assert_same(plain, ours)
    before = inferred(plain, batch())
    hooks = [HOOKS[hook](m.get_submodule(name)) for m in (plain, ours)]
    if when == "before":
        handle = fastattn.accelerate(ours)
    assert_moved(before, assert_same(plain, ours))
    assert_same_gradients(plain, ours)
    if name in INSIDE:
        assert "hooks" in str(handle.report)
    for registered in hooks:
        registered.remove()
    assert_close(assert_same(plain, ours), before)


@pytest.mark.parametrize("name", INSIDE)
def test_hooks_on_gradients(name):
    plain, ours, handle = twins(bert())
    before = assert_same(plain, ours)
    hooks = [m.get_submodule(name).register_full_backward_hook(doubled_gradient) for m in (plain, ours)]
    assert_same_gradients(plain, ours)
    assert "hooks" in str(handle.report)
    for hook in hooks:
        hook.remove()
    assert_same_gradients(plain, ours)
    assert_close(assert_same(plain, ours), before)


def test_calls_draw_no_random_numbers():
    """The first one neither, in which a layer may be tried out: seeds go on meaning what they meant."""
    _, ours, _ = twins(bert())
    for training in (False, True):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        output(ours.train(training), batch())
        inferred(ours, batch())
        assert torch.equal(torch.get_rng_state(), before)


def test_hooks_of_the_whole_process():
    """Every module's, as profilers and printers of shapes register them."""
    plain, ours, handle = twins(bert())
    assert_same(plain, ours)
    called = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: called.append(type(module).__name__))
    try:
        inferred(plain, batch())
        expected, called[:] = list(called), []
        inferred(ours, batch())
    finally:
        hook.remove()
    assert called == expected
    assert "hooks" in str(handle.report)
    assert_served_again(handle, ours)


def test_forward_of_a_part_replaced():
    """Without a hook: the function of an instance is another one."""
    plain, ours, handle = twins(bert())
    before = assert_same(plain, ours)
    for model in (plain, ours):
        part = model.encoder.layer[0].output.dense
        part.forward = lambda x, part=part: 2 * nn.functional.linear(x, part.weight, part.bias)
    assert_moved(before, assert_same(plain, ours))
    assert_named(handle)


def classifier(**options):
    return bert(transformers.BertForSequenceClassification, num_labels=3, **options)


def test_integrated_gradients():
    """Along a path of 8 points between no embedding and the text's, by the gradient of one class."""
    found = []
    plain, ours, handle = twins(classifier())
    inputs = batch((24, 7, 13))
    for model in (plain, ours):
        embedded = model.get_input_embeddings()(inputs["input_ids"]).detach()
        total = torch.zeros_like(embedded)
        for i in range(8):
            point = (embedded * (i + 0.5) / 8).requires_grad_()
            logits = model(inputs_embeds=point, attention_mask=inputs["attention_mask"]).logits
            total += torch.autograd.grad(logits[:, 1].sum(), point)[0] / 8
        found.append((total * embedded).sum(-1))
    assert found[0].abs().max() > 0.05
    assert_close(found[1], found[0])
    assert not handle.report.fallbacks


def test_integrated_gradients_through_a_hook():
    """The embeddings' output replaced by points of the path, all of them in one batch."""
    found = []
    plain, ours, _ = twins(classifier())
    inputs = batch((24,))
    for model in (plain, ours):
        kept = Recorded()
        hook = model.bert.embeddings.register_forward_hook(kept)
        model(**inputs)
        hook.remove()
        path = (kept.seen[0] * (torch.arange(8)[:, None, None] + 0.5) / 8).requires_grad_()
        hook = model.bert.embeddings.register_forward_hook(lambda *_, path=path: path)
        logits = model(**{name: x.expand(8, -1) for name, x in inputs.items()}).logits
        hook.remove()
        found.append(torch.autograd.grad(logits[:, 1].sum(), path)[0].mean(0) * kept.seen[0][0])
    assert found[0].abs().max() > 0.01
    assert_close(found[1], found[0])


def test_saliency_of_every_layer():
    """Gradients of the recorded hidden states themselves, by retain_grad."""
    found = []
    for model in twins(bert(transformers.BertForMaskedLM))[:2]:
        out = model(**batch(), output_hidden_states=True)
        for states in out.hidden_states:
            states.retain_grad()
        (out.logits[:, 0].square()).sum().backward()
        found.append([states.grad for states in out.hidden_states])
    mask = batch()["attention_mask"][..., None]
    for expected, actual in zip(*found, strict=True):
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(actual * mask, expected * mask, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("way", ["keyword", "config"])
def test_attention_maps(way):
    plain, ours, handle = twins(bert())
    assert_same(plain, ours)
    options = {"output_attentions": True} if way == "keyword" else {}
    for model in (plain, ours):
        model.set_attn_implementation("eager")
        model.config.output_attentions = way == "config"
    with torch.no_grad():
        expected, actual = (model(**batch(), **options) for model in (plain, ours))
    assert len(actual.attentions) == len(expected.attentions) == 2
    for one, other in zip(actual.attentions, expected.attentions, strict=True):
        assert_close(one, other)
    assert_close(actual.last_hidden_state, expected.last_hidden_state)
    assert_named(handle)


def test_perturbed_tokens():
    """Leave-one-out: every token masked in turn, one batch of rows of one length, no mask given."""
    plain, ours, handle = twins(classifier())
    ids = batch((9,))["input_ids"].expand(9, -1).clone()
    ids.fill_diagonal_(4)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert_same(plain, ours, inputs)
    with torch.no_grad():
        assert_close(ours(ids).logits, plain(ids).logits)
    assert not handle.report.fallbacks


def test_dropout_at_inference():
    """MC dropout: the model evaluates, its `nn.Dropout` modules alone train. Means and spreads of 512 draws of two texts."""
    plain, ours, _ = twins(bert(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3))
    inputs = {name: x.repeat(512, 1) for name, x in batch((6, 3)).items()}
    draws = []
    for seed, model in enumerate((plain, ours)):
        assert_same(plain.eval(), ours.eval())
        for part in model.modules():
            part.train(isinstance(part, nn.Dropout))
        torch.manual_seed(seed)
        first, second = (inferred(model, inputs).view(512, 2, 6, -1) for _ in range(2))
        assert not torch.equal(first, second)
        draws.append(first)
    real = batch((6, 3))["attention_mask"].bool()
    (mean, spread), (our_mean, our_spread) = ((x.mean(0)[real], x.std(0)[real]) for x in draws)
    assert spread.mean() > 0.2
    assert abs(our_spread.mean() / spread.mean() - 1) < 0.05
    assert ((our_mean - mean) / spread * 512**0.5).square().mean() < 4  # 2 where both are of one distribution


def test_dropout_switched_off_in_training():
    """The reverse: a model that trains, whose dropout modules evaluate."""
    plain, ours, _ = twins(bert(hidden_dropout_prob=0.5))
    for model in (plain, ours):
        model.train()
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.eval()
    assert_same(plain, ours)
    assert_same_gradients(plain, ours)


def test_dropout_in_training():
    """Served as configured; a step repeats after its seed, though what it drops is not what PyTorch would."""
    plain, ours, handle = twins(bert(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.1))
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(output(ours.train(), batch()))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not handle.report.fallbacks and not handle.report.left
    assert_same(plain.eval(), ours.eval())
    assert_served_again(handle, ours)
