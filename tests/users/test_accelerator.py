"""The `accelerate` package around an accelerated model: prepared, trained, unwrapped, restored, in mixed precision too."""

import pytest
import torch
from twins import assert_close, assert_moved, assert_same, batch, bert, inferred, output, twins

import fastattn

transformers = pytest.importorskip("transformers")

accelerate = pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("fresh_accelerator")
PRECISIONS = ["no", "bf16"]


def classifier():
    return bert(transformers.BertForSequenceClassification, num_labels=3)


def first_of(outputs):
    return next(iter(outputs.values()))


def prepared(model, precision):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05, fused=True))


def assert_as_near(actual, expected, exact):
    """In bf16: as near to the fp32 result as the plain model's, and of its dtype."""
    assert actual.dtype == expected.dtype
    assert (actual - exact).abs().max() <= 2 * (expected - exact).abs().max()


def assert_agrees(plain, ours, exact, precision):
    expected, actual = inferred(plain, batch()), inferred(ours, batch())
    if precision == "no":
        assert_close(actual, expected)
    else:
        assert_as_near(actual, expected, inferred(exact, batch()))
    return expected


def trained(accelerator, model, optimizer):
    for seed in range(3):
        model.train()
        optimizer.zero_grad()
        accelerator.backward((output(model, batch(seed=seed)) - 0.5).square().mean())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        inferred(model.eval(), batch())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_prepared_and_trained(when, precision):
    plain, ours, exact = classifier(), classifier(), classifier()
    if when == "before":
        handle = fastattn.accelerate(ours)
    sets = [prepared(m, precision) for m in (plain, ours)]
    if when == "after":
        handle = fastattn.accelerate(sets[1][1])
    assert handle.report.accelerated
    (_, plain, _), (_, ours, _) = sets
    before = assert_agrees(plain, ours, exact, precision)
    assert before.dtype == torch.float32
    for some in sets:
        trained(*some)
    exact.load_state_dict(plain.state_dict())
    if precision == "no":
        assert_moved(before, assert_agrees(plain, ours, exact, precision))
    else:
        ours.load_state_dict(plain.state_dict())
        assert_moved(before, assert_agrees(plain, ours, exact, precision))
    assert not handle.report.fallbacks


@pytest.mark.parametrize("kind", ["logits", "hidden_states", "loss"])
def test_dtypes_of_a_prepared_model(kind):
    """accelerate gives fp32 back, whatever computed it."""
    plain, ours, _ = twins(classifier())
    plain, ours = (prepared(m, "bf16")[1] for m in (plain, ours))
    inputs = {**batch(), "output_hidden_states": True, "labels": torch.tensor([0, 1, 2, 0])}
    expected, actual = (model(**inputs)[kind] for model in (plain, ours))
    for x, y in zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]:
        assert x.dtype == y.dtype == torch.float32 and x.shape == y.shape


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_restored(when, precision):
    """Afterwards the prepared model is what `prepare` makes of a plain one."""
    plain, ours = classifier(), classifier()
    if when == "before":
        handle = fastattn.accelerate(ours)
    plain, ours = (prepared(m, precision)[1] for m in (plain, ours))
    if when == "after":
        handle = fastattn.accelerate(ours)
    inferred(ours, batch())
    handle.restore()
    expected, actual = (inferred(m, batch()) for m in (plain, ours))
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)
    again = fastattn.accelerate(ours)
    assert again.report.accelerated
    assert_agrees(plain, ours, classifier(), precision)
    fastattn.restore(ours)
    assert torch.equal(inferred(ours, batch()), expected)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("cls", ["head", "encoder"])
def test_unwrapped(cls, precision, keep):
    """With the bare encoder it is the very module that `accelerate` replaced a method of."""
    plain, ours, handle = twins(classifier() if cls == "head" else bert())
    accelerators, models = zip(*(prepared(m, precision)[:2] for m in (plain, ours)), strict=True)
    exact = classifier() if cls == "head" else bert()
    plain, ours = (a.unwrap_model(m, keep_fp32_wrapper=keep) for a, m in zip(accelerators, models, strict=True))
    assert type(ours) is type(plain)
    assert_agrees(plain, ours, exact, precision if keep else "no")
    ids, mask = batch().values()
    with torch.no_grad():  # by position: what `accelerate` puts in place of a method binds as a method does
        assert torch.equal(first_of(ours(ids, mask)), first_of(ours(input_ids=ids, attention_mask=mask)))
    handle.restore()
    assert torch.equal(inferred(ours, batch()), inferred(plain, batch()))


def test_autocast_by_hand():
    """Dtypes of all that comes out, in inference and in training."""
    plain, ours, handle = twins(bert())
    exact = inferred(plain, batch())
    for training in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(training):
            expected, actual = (m.train(training)(**batch(), output_hidden_states=True) for m in (plain, ours))
        for x, y in zip(actual.hidden_states, expected.hidden_states, strict=True):
            assert x.dtype == y.dtype
        assert actual.pooler_output.dtype == expected.pooler_output.dtype
        mask = batch()["attention_mask"][..., None]
        assert_as_near(actual.last_hidden_state * mask, expected.last_hidden_state * mask, exact)
        if training:
            for out in (expected, actual):
                out.last_hidden_state.square().mul(mask).mean().backward()
            for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None) and (p.grad is None or p.grad.dtype == q.grad.dtype)
    assert not handle.report.fallbacks
    assert_same(plain.eval(), ours.eval())


def test_state_saved_and_loaded(tmp_path):
    """The weights of a checkpoint written back into an accelerated model that was evaluated with others."""
    plain, ours, _ = twins(classifier())
    sets = [prepared(m, "no") for m in (plain, ours)]
    before = assert_same(plain, ours)
    for name, (accelerator, model, optimizer) in zip(("plain", "ours"), sets, strict=True):
        accelerator.save_state(tmp_path / name)
        trained(accelerator, model, optimizer)
    assert_moved(before, assert_same(plain, ours))
    for name, (accelerator, *_) in zip(("plain", "ours"), sets, strict=True):
        accelerator.load_state(tmp_path / name)
    assert_close(assert_same(plain, ours), before)
