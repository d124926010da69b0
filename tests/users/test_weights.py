"""Weights that change between two evaluations, in all the ways in which people change them.

Inference keeps packed copies of weights, so each test evaluates before and after.
"""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn
from twins import (
    ENCODERS,
    assert_moved,
    assert_same,
    assert_same_gradients,
    assert_served_again,
    batch,
    bert,
    inferred,
    linears,
    step,
    twins,
)

transformers = pytest.importorskip("transformers")


def other_state(model):
    generator = torch.Generator().manual_seed(7)
    return {
        name: x + torch.randn(x.shape, generator=generator) * 0.1 if x.is_floating_point() else x
        for name, x in model.state_dict().items()
    }


def through_data(model):
    for part in linears(model).values():
        part.weight.data.mul_(1.5)


def one_row_through_data(model):
    for part in linears(model).values():
        part.weight.data[5] += 1


def one_column_through_data(model):
    for part in linears(model).values():
        part.weight.data[:, 5] += 1


def every_other_entry_through_data(model):
    for part in linears(model).values():
        part.weight.data.flatten()[1::2] = 0


def bias_through_data(model):
    for part in linears(model).values():
        part.bias.data += torch.arange(len(part.bias)) / 10


def rows_permuted_through_data(model):
    for part in linears(model).values():
        part.weight.data.copy_(part.weight.data.roll(1, 0))


def transposed_through_data(model):
    """The sum of all entries and the diagonal stay."""
    for part in linears(model).values():
        if part.in_features == part.out_features:
            part.weight.data.copy_(part.weight.data.t().clone())


def data_assigned(model):
    for part in linears(model).values():
        part.weight.data = part.weight.data * 1.5


def through_numpy(model):
    for part in linears(model).values():
        part.weight.detach().numpy()[...] *= 1.5


def out_of_a_numpy_buffer(model):
    for part in linears(model).values():
        buffer = np.array(part.weight.detach().numpy())
        part.weight.data = torch.from_numpy(buffer)
        buffer += 0.1


def through_an_alias(model):
    for part in linears(model).values():
        alias = part.weight.detach()
        alias.add_(torch.eye(*alias.shape))


def by_foreach(model):
    torch._foreach_mul_([part.weight.data for part in linears(model).values()], 1.5)


def by_foreach_under_no_grad(model):
    with torch.no_grad():
        torch._foreach_mul_([part.weight for part in linears(model).values()], 1.5)


def by_vector_to_parameters(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 1.5, model.parameters())


def copied_under_no_grad(model):
    with torch.no_grad():
        for part in linears(model).values():
            part.weight.copy_(part.weight.flip(0))


def copied_under_inference_mode(model):
    with torch.inference_mode():
        for part in linears(model).values():
            part.weight.data.copy_(part.weight.flip(0))


def set_on_the_parameter(model):
    with torch.no_grad():
        for part in linears(model).values():
            part.weight.set_(part.weight * 1.5)


def new_parameters(model):
    for part in linears(model).values():
        part.weight = nn.Parameter(part.weight.detach() * 1.5)


def swapped_between_layers(model):
    """Two tensors trade places: addresses, versions and values are all known ones."""
    first, second = (layer.output.dense for layer in model.encoder.layer)
    first.weight.data, second.weight.data = second.weight.data, first.weight.data


def initialised_again(model):
    torch.manual_seed(9)
    for part in linears(model).values():
        nn.init.normal_(part.weight, std=0.3)


def loaded(model):
    model.load_state_dict(other_state(model))


def loaded_by_assignment(model):
    model.load_state_dict(other_state(model), assign=True)


def loaded_from_a_file(model):
    file = io.BytesIO()
    torch.save(other_state(model), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))


def moved_to_float64_and_back(model):
    model.double()
    assert inferred(model, batch()).dtype == torch.float64
    through_data(model)
    model.float()


def moved_to_bfloat16_and_back(model):
    model.to(torch.bfloat16)
    assert inferred(model, batch()).dtype == torch.bfloat16
    model.to(torch.float32)


def moved_to_half_and_back(model):
    model.half().float()


CHANGES = (
    through_data, one_row_through_data, one_column_through_data, every_other_entry_through_data, bias_through_data,
    rows_permuted_through_data, transposed_through_data, data_assigned, through_numpy, out_of_a_numpy_buffer, through_an_alias,
    by_foreach, by_foreach_under_no_grad, by_vector_to_parameters, copied_under_no_grad, copied_under_inference_mode,
    set_on_the_parameter, new_parameters, swapped_between_layers, initialised_again, loaded,
    loaded_by_assignment, loaded_from_a_file, moved_to_float64_and_back,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_used(change):
    plain, ours, handle = twins(bert())
    before = assert_same(plain, ours)
    for model in (plain, ours):
        change(model)
    assert_moved(before, assert_same(plain, ours))
    for model in (plain, ours):
        change(model)
    assert_same(plain, ours)
    assert_same_gradients(plain, ours)
    assert_served_again(handle, ours)


@pytest.mark.parametrize("name", ENCODERS)
def test_changed_weights_are_used_in_every_family(name):
    plain, ours, _ = twins(ENCODERS[name]())
    before = assert_same(plain, ours)
    for model in (plain, ours):
        through_data(model)
    assert_moved(before, assert_same(plain, ours))


@pytest.mark.parametrize("change", [moved_to_bfloat16_and_back, moved_to_half_and_back], ids=lambda change: change.__name__)
def test_weights_that_lost_bits_on_a_round_trip(change):
    """A small change: told apart by its own size, 1e-3, not by the bound on it."""
    plain, ours, _ = twins(bert())
    before = assert_same(plain, ours)
    for model in (plain, ours):
        change(model)
    after = assert_same(plain, ours)
    assert (after - before).abs().max() > 2e-4
    assert after.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_a_model_that_was_moved_after_its_first_call(dtype):
    plain, ours, _ = twins(bert())
    assert_same(plain, ours)
    exact = copy.deepcopy(plain).to(dtype).double()
    plain, ours = plain.to(dtype), ours.to(dtype)
    expected, actual, true = (inferred(model, batch()) for model in (plain, ours, exact))
    assert actual.dtype == expected.dtype == dtype
    error, own = ((x.double() - true).norm() for x in (actual, expected))
    assert error <= 1.25 * own + 1e-12 * true.norm()


def test_loaded_in_place_from_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    plain, ours, _ = twins(bert())
    before = assert_same(plain, ours)
    safetensors.save_file(other_state(plain), tmp_path / "other.safetensors")
    for model in (plain, ours):
        safetensors.load_model(model, tmp_path / "other.safetensors")
    assert_moved(before, assert_same(plain, ours))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=2e-3, foreach=False),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=2e-3, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=2e-3, momentum=0.9, fused=True),
    "adagrad_foreach": lambda p: torch.optim.Adagrad(p, lr=0.01, foreach=True),
    "adagrad_fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "adafactor_of_transformers": lambda p: transformers.Adafactor(p, lr=0.01, scale_parameter=False, relative_step=False),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_evaluations_between_steps(name, training):
    """Evaluated without gradients after each step; in training mode too, as some loops do."""
    plain, ours, handle = twins(bert())
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (plain, ours)]
    before = assert_same(plain, ours)
    for seed in (1, 2, 3):
        for model in (plain, ours):
            model.train()
        assert_same_gradients(plain, ours, batch(seed=seed))
        # adaptive steps divide a gradient by its size: where it is rounding alone, twins would part
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer, model in zip(optimizers, (plain, ours), strict=True):
            optimizer.step()
            model.train(training)
        assert_same(plain, ours)
    assert_moved(before, assert_same(plain, ours))
    assert not handle.report.fallbacks


def test_one_module_fitted_alone():
    """An optimizer of one linear layer's weights, the rest frozen, the encoder evaluated in between."""
    plain, ours, _ = twins(bert())
    before = assert_same(plain, ours)
    for model in (plain, ours):
        model.requires_grad_(False)
        weight = model.encoder.layer[1].output.dense.weight.requires_grad_(True)
        optimizer = torch.optim.SGD([weight], lr=0.5, fused=True)
        for _ in range(3):
            step(model, optimizer, batch())
            inferred(model, batch())
    assert_moved(before, assert_same(plain, ours))
