"""Averages of weights, evaluated while the training goes on: EMA, SWA, weights lent to the model for an evaluation."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from twins import SIZES, assert_close, assert_moved, assert_same, batch, bert, inferred, step, twins


def trained(model, steps=3, **options):
    """Each step of a training, to be read in turn with the twin's."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **options)
    for seed in range(steps):
        model.train()
        step(model, optimizer, batch(seed=seed))
        yield model.eval()


@pytest.mark.parametrize("options", [{"multi_avg_fn": get_ema_multi_avg_fn(0.5)}, {}], ids=["ema", "mean"])
def test_averaged_model(options):
    plain, ours, _ = twins(bert())
    averages = [AveragedModel(m, **options) for m in (plain, ours)]
    before = assert_same(*averages)
    for _ in zip(trained(plain, fused=True), trained(ours, fused=True), strict=True):
        for average, model in zip(averages, (plain, ours), strict=True):
            average.update_parameters(model)
        assert_same(*averages)
        assert_same(plain, ours)
    assert_moved(before, assert_same(*averages))
    assert_moved(inferred(plain, batch()), assert_same(*averages))


class Ema:
    """As it stands in many training scripts: a shadow of the model, written through `.data`."""

    def __init__(self, model):
        self.shadow = copy.deepcopy(model)

    def update(self, model):
        for mean, parameter in zip(self.shadow.parameters(), model.parameters(), strict=True):
            mean.data.mul_(0.5).add_(parameter.data, alpha=0.5)


def test_hand_written_average():
    plain, ours, _ = twins(bert())
    averages = [Ema(m) for m in (plain, ours)]
    before = assert_same(*(ema.shadow for ema in averages))
    for _ in zip(trained(plain), trained(ours), strict=True):
        for ema, model in zip(averages, (plain, ours), strict=True):
            ema.update(model)
        assert_same(*(ema.shadow for ema in averages))
        assert_same(plain, ours)
    assert_moved(before, assert_same(*(ema.shadow for ema in averages)))


def test_averages_lent_to_the_model_for_an_evaluation():
    """Written into the parameters, evaluated, and the weights of the training put back."""
    plain, ours, _ = twins(bert())
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for _ in zip(trained(plain), trained(ours), strict=True):
        seen = assert_same(plain, ours)
        kept = [[p.data.clone() for p in m.parameters()] for m in (plain, ours)]
        for model in (plain, ours):
            for name, parameter in model.named_parameters():
                parameter.data.lerp_(start[name], 0.5)
        assert_moved(seen, assert_same(plain, ours))
        for model, weights in zip((plain, ours), kept, strict=True):
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.data.copy_(weight)
        assert_close(assert_same(plain, ours), seen)


class Classifier(nn.Module):
    """An encoder below a batch norm; padding is told by its id."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.norm, self.top = encoder, nn.BatchNorm1d(SIZES["hidden_size"]), nn.Linear(SIZES["hidden_size"], 3)

    def forward(self, ids):
        states = self.encoder(input_ids=ids, attention_mask=(ids != 1).long()).last_hidden_state
        return self.top(self.norm(states[:, 0]))


def test_swa_with_batch_norm():
    plain, ours, _ = twins(Classifier(bert()))
    loader = [batch(seed=seed)["input_ids"] for seed in range(3)]
    averages = [AveragedModel(m) for m in (plain, ours)]
    for model, average in zip((plain, ours), averages, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for ids in loader:
            model.train()
            optimizer.zero_grad()
            model(ids).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
            with torch.no_grad():
                model.eval()(ids)
        update_bn(loader, average)
    for kept in ("running_mean", "running_var"):
        assert_close(*(getattr(average.module.norm, kept) for average in reversed(averages)))
    with torch.no_grad():
        out, expected = (average.eval()(loader[0]) for average in reversed(averages))
    assert_close(out, expected)
