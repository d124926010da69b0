"""Copies of weights that inference keeps: whoever changes a weight, in whatever way, the next call sees it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from test_accelerate import build, result, text
from torch import nn
from torch.nn.utils import parametrize, prune, vector_to_parameters

import fastattn
from fastattn import kept

OPTIMIZERS = {
    **{f"{name}_{way}": (name, {way: True}) for name in ("AdamW", "Adam", "SGD") for way in ("fused", "foreach")},
    "Adagrad_fused": ("Adagrad", {"fused": True}),
    "Adafactor": ("Adafactor", {}),
    "RMSprop": ("RMSprop", {}),
    "Muon": ("Muon", {}),
}


@pytest.fixture(autouse=True)
def nothing_before(monkeypatch):
    monkeypatch.delenv("FASTATTN_PREPACK", raising=False)
    fastattn.clear_packed()
    yield
    fastattn.clear_packed()


def optimizer_step(module, name, options):
    torch.manual_seed(3)
    parameters = [p for p in module.parameters() if p.dim() == 2 or name != "Muon"]
    for p in parameters:
        p.grad = torch.randn_like(p)
    getattr(torch.optim, name)(parameters, lr=0.1, **options).step()


class Decayed(torch.optim.Optimizer):
    """An optimizer that is not PyTorch's, and writes where nothing is counted."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(0.5)


def bare_step(module):
    """What an engine with kernels of its own does: no optimizer of PyTorch's, one write through a flat buffer."""
    for p in module.parameters():
        flat = p.data.view(-1)
        flat.add_(torch.linspace(-1, 1, flat.numel()))


def through_numpy(module):
    for p in module.parameters():
        p.detach().numpy()[:] *= 2


def merged_adapter(module):
    for p in module.parameters():
        if p.dim() == 2:
            p.data += 0.1 * torch.outer(torch.arange(p.shape[0]) + 1.0, torch.arange(p.shape[1]) + 1.0) / p.numel() ** 0.5


def offloaded(module):
    """Away and back at another place, as sharding and offloading do, with other values."""
    for p in module.parameters():
        away = p.data.clone() * 3
        p.data = torch.empty(0)
        p.data = away


def same_address(module):
    """A new tensor that happens to lie where the old one lay."""
    for p in module.parameters():
        storage = p.detach().clone() * 2
        p.untyped_storage().copy_(storage.untyped_storage())


def foreach_writes(module):
    torch._foreach_mul_([p.data for p in module.parameters()], 1.5)


def averaged(module):
    """An exponential moving average put in place of the weights."""
    weights = [p.detach() for p in module.parameters()]
    torch._foreach_lerp_(weights, [torch.randn_like(p) for p in weights], 0.5)


def swapped_storage(module):
    with torch.no_grad():
        for p in module.parameters():
            p.set_(p.detach().clone().mul_(2))


def vector(module):
    vector_to_parameters(torch.linspace(-1, 1, sum(p.numel() for p in module.parameters())), module.parameters())


def assigned(module):
    module.load_state_dict({name: x * 2 for name, x in module.state_dict().items()}, assign=True)


def loaded(module):
    module.load_state_dict({name: x * 2 for name, x in module.state_dict().items()})


def one_element(module):
    """Of a small weight all bits are compared."""
    for p in module.parameters():
        p.data.view(-1)[p.numel() // 3] += 3.0


def one_row(module):
    for p in module.parameters():
        p.data[p.shape[0] // 2] = 5.0


def one_column(module):
    for p in module.parameters():
        p.data[..., p.shape[-1] // 2] = -5.0


def alias(module):
    """Two parameters that share memory, of which the other is written."""
    for p in module.parameters():
        nn.Parameter(p.data).data.mul_(-1)


WRITERS = {
    **{
        name: (lambda optimizer, options: lambda m: optimizer_step(m, optimizer, options))(*how)
        for name, how in OPTIMIZERS.items()
        if hasattr(torch.optim, how[0])
    },
    "own_optimizer": lambda m: Decayed(m.parameters()).step(),
    **{
        f.__name__: f
        for f in (
            *(bare_step, through_numpy, merged_adapter, offloaded, same_address, foreach_writes, averaged, swapped_storage),
            *(vector, assigned, loaded, one_element, one_row, one_column, alias),
        )
    },
    "half_and_back": lambda m: m.half().float(),
    "in_place": lambda m: [p.detach().mul_(2) for p in m.parameters()],
    "pruned": lambda m: [prune.random_unstructured(x, "weight", 0.5) for x in m.modules() if type(x) is nn.Linear],
    "parametrized": lambda m: [
        parametrize.register_parametrization(x, "weight", nn.Tanh()) for x in list(m.modules()) if type(x) is nn.Linear
    ],
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("hooks", [True, False], ids=["", "unseen"])
def test_evaluate_write_evaluate(writer, hooks, monkeypatch):
    """With the hook behind PyTorch's optimizers, and by the weights' bits alone."""
    if not hooks:
        monkeypatch.setattr(kept, "clear_packed", lambda: None)
    size = 40 if writer == "one_element" else 160
    layer, plain, x = nn.Linear(size, 120), nn.Linear(size, 120), torch.randn(17, size)
    plain.load_state_dict(layer.state_dict())
    answers = []
    for _ in range(3):
        with torch.no_grad():
            answers.append(fastattn.linear(x, layer.weight, layer.bias))
            torch.testing.assert_close(answers[-1], plain(x), rtol=1e-4, atol=1e-4)
        for module in (layer, plain):
            torch.manual_seed(5)
            WRITERS[writer](module)
    assert not torch.equal(answers[0], answers[1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_an_accelerated_model_follows(writer, training):
    """Also where evaluation is done in training mode."""
    model, plain = build("bert").train(training), build("bert").train(training)
    fastattn.accelerate(model)
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(result(model, text()), result(plain, text()), rtol=1e-4, atol=1e-4)
        for module in (model, plain):
            torch.manual_seed(5)
            WRITERS[writer](module.encoder)
    with torch.no_grad():
        torch.testing.assert_close(result(model, text()), result(plain, text()), rtol=1e-4, atol=1e-4)


def test_a_sample_meets_every_row_and_column(monkeypatch):
    monkeypatch.setattr(kept, "SMALL", 0)
    for rows, columns in itertools.product((1, 2, 3, 5, 8, 16, 31, 48, 96), repeat=2):
        weight = torch.arange(rows * columns, dtype=torch.float64).view(rows, columns)
        met = kept.sample(weight).contiguous().view(torch.float64).long()
        assert set((met // columns).flatten().tolist()) == set(range(rows)), (rows, columns)
        assert set((met % columns).flatten().tolist()) == set(range(columns)), (rows, columns)
        if min(rows, columns) >= 8:  # and no more of it than that takes
            assert met.numel() <= 2 * (rows + columns) and len(met) <= 1.4 * rows + 2, (rows, columns)


def test_bits_are_compared():
    """Values that are equal and bits that are not; NaN, which is equal to nothing, is kept all the same."""
    made = []
    weight = nn.Parameter(torch.zeros(4, 4))
    weight.data[0, 0] = torch.nan

    def ask():
        with torch.no_grad():
            return kept.kept([weight], "test", lambda: made.append(1))

    ask(), ask()
    assert len(made) == 1
    weight.data.neg_()
    ask()
    assert len(made) == 2


def test_what_is_kept():
    """Of parameters on the CPU, once per purpose; it goes with its weight, and with a step of any optimizer."""
    layer, x = nn.Linear(32, 24), torch.randn(8, 32)
    with torch.no_grad():
        for _ in range(3):
            fastattn.linear(x, layer.weight, layer.bias, activation="gelu")
            fastattn.linear(x, layer.weight, layer.bias, activation="quick_gelu")
    assert len(kept._kept) == 1 and len(kept._kept[layer.weight]) == 2
    optimizer_step(nn.Linear(2, 2), "SGD", {})
    assert len(kept._kept) == 0
    with torch.no_grad():
        fastattn.linear(x, layer.weight)
    assert len(kept._kept) == 1
    del layer
    assert len(kept._kept) == 0


def test_what_is_never_kept(monkeypatch):
    layer, x = nn.Linear(32, 24), torch.randn(8, 32)
    frozen = nn.Linear(32, 24).requires_grad_(False)
    fastattn.linear(x, layer.weight, layer.bias)
    fastattn.linear(x, frozen.weight, frozen.bias)  # gradients are on
    with torch.inference_mode():
        fastattn.linear(x, nn.Parameter(torch.randn(24, 32)))  # an inference tensor has no version counter
    with torch.no_grad():
        fastattn.linear(x, torch.randn(24, 32))
        fastattn.linear(x, layer.weight.T.contiguous().T)
        with kept.nothing_kept():
            fastattn.linear(x, layer.weight)
        monkeypatch.setenv("FASTATTN_PREPACK", "0")
        fastattn.linear(x, layer.weight)
    assert len(kept._kept) == 0


def test_nothing_is_kept_of_a_model_in_training_mode():
    model = build("bert").train()
    fastattn.accelerate(model)
    with torch.no_grad():
        model(**text())
    model(**text())
    assert len(kept._kept) == 0
    model.eval()
    with torch.no_grad():
        model(**text())
    assert len(kept._kept) > 0


def test_compiled_code_is_guarded_too():
    layer, x = nn.Linear(32, 24), torch.randn(8, 32)
    compiled = torch.compile(lambda x: fastattn.linear(x, layer.weight, layer.bias, activation="gelu"), backend="aot_eager")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), F.gelu(layer(x)))
            layer.weight.data.mul_(-1.5)
        torch.testing.assert_close(compiled(x), F.gelu(layer(x)))


def test_clear_packed():
    """For the one kind of write that is not noticed: to a few elements of a large weight, uncounted."""
    layer, x = nn.Linear(160, 120), torch.randn(8, 160)
    count, length, step = kept.runs(120, 160)
    unmet = next(i for i in range(120 * 160) if i % step >= length)
    with torch.no_grad():
        before = fastattn.linear(x, layer.weight, layer.bias)
        layer.weight.data.view(-1)[unmet] = 9.0
        assert torch.equal(fastattn.linear(x, layer.weight, layer.bias), before)
        fastattn.clear_packed()
        torch.testing.assert_close(fastattn.linear(x, layer.weight, layer.bias), layer(x))
