"""`accelerate` under torch.compile, export and tracing, with a static capacity, and in DDP."""

import copy

import pytest
import torch
from ranks import run_by_two_ranks
from test_accelerate import Doubled, assert_same, build, result, text
from torch import nn

import fastattn


@pytest.mark.parametrize("capacity", [None, 64])
def test_compile(capacity):
    """Without a capacity the traced call keeps its padding; with one it does not, and shapes are static."""
    model = build("bert").eval()
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours, capacity=capacity, strict=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for inputs in (text(), text("left", (3, 20, 1, 9, 2))):
            torch.testing.assert_close(result(compiled, inputs), result(model, inputs), rtol=2e-5, atol=2e-5)


class Traceable(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


@pytest.mark.parametrize("how", ["export", "trace"])
def test_a_traced_model_keeps_its_padding(how):
    """Lengths of another batch than the one it was traced with."""
    model = build("bert").eval()
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours, strict=True)
    inputs, others = text(), text("left", (3, 20, 1, 9, 2))
    with torch.no_grad():
        if how == "export":
            traced = torch.export.export(Traceable(ours), tuple(inputs.values())).module()
        else:
            traced = torch.jit.trace(Traceable(ours), tuple(inputs.values()))
        keep = others["attention_mask"][..., None]
        torch.testing.assert_close(traced(*others.values()) * keep, result(model, others), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("capacity", [None, 64])
def test_export(capacity, strict):
    """Of the accelerated model itself, in both of torch.export's modes; lengths of another batch afterwards."""
    model = build("bert").eval()
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours, capacity=capacity, strict=True)
    inputs, others = text(), text("left", (3, 20, 1, 9, 2))
    with torch.no_grad():
        exported = torch.export.export(ours, (), inputs, strict=strict).module()
        torch.testing.assert_close(result(exported, others), result(model, others), rtol=2e-5, atol=2e-5)


def test_what_changes_between_compiled_calls():
    """An adapter, layers in another order, a scale: graphs are guarded by what was looked at."""
    model = build("bert").eval()
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours, capacity=64)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)

    def same():
        with torch.no_grad():
            torch.testing.assert_close(result(compiled, text()), result(model, text()), rtol=2e-5, atol=2e-5)

    same()
    for m in (ours, model):
        m.encoder.layer[1].attention.self.scaling = 1.7
    same()
    assert not handle.report.fallbacks
    for m in (ours, model):
        own = m.encoder.layer[1].attention.self
        twice = Doubled(32, 32)
        twice.load_state_dict(own.query.state_dict())
        own.query = twice
    same()
    for m in (ours, model):
        m.encoder.layer = nn.ModuleList(reversed(list(m.encoder.layer)))
    same()
    assert "query is a Doubled, not a plain Linear" in handle.report.fallbacks


def test_compiled_training():
    model = build("bert")
    ours = copy.deepcopy(model)
    fastattn.accelerate(ours, capacity=64, strict=True)
    ours.compile(backend="aot_eager")
    assert_same(model, ours, text())


def test_capacity_in_eager():
    model = build("bert")
    ours = copy.deepcopy(model)
    handle = fastattn.accelerate(ours, capacity=50, strict=True)
    assert_same(model, ours, text())
    assert not handle.overflowed
    out = ours(**text(lengths=(24, 24, 1, 8, 3))).last_hidden_state
    assert handle.overflowed
    live = out.abs().sum(-1) > 0
    assert live.sum(1).tolist() == [24, 24, 1, 1, 0]


def test_distributed_data_parallel(tmp_path):
    """Two processes train as one does on both halves of the batch."""
    program = """
        from test_accelerate import build, text
        plain = build("bert")
        ours = copy.deepcopy(plain)
        fastattn.accelerate(ours, strict=True)
        model = torch.nn.parallel.DistributedDataParallel(ours, find_unused_parameters=True)
        inputs = text(lengths=(24, 7, 1, 13))
        half = {name: x[rank * 2 : rank * 2 + 2] for name, x in inputs.items()}
        ((model(**half).last_hidden_state * half["attention_mask"][..., None]).square().sum()).backward()
        (0.5 * (plain(**inputs).last_hidden_state * inputs["attention_mask"][..., None]).square().sum()).backward()
        for (name, p), q in zip(plain.named_parameters(), ours.parameters()):
            if p.grad is not None:
                assert (p.grad - q.grad).abs().max() <= 2e-5 * p.grad.abs().max().clamp(min=1), name
    """
    run_by_two_ranks(program, tmp_path)
