"""Converted and accelerated models leave PyTorch: by torch.export with fastattn's ops, to ONNX with standard ones."""

import copy
import warnings

import pytest
import torch
from modules import perturbed
from torch import nn

import fastattn

BATCH, LENGTH = torch.export.Dim("batch"), torch.export.Dim("length", min=2, max=512)
SIZES = [(3, 9), (2, 14)]  # what a model is exported with, and another


class Text(nn.Module):
    """Embeddings, torch.nn's encoder and decoder, and an attention with weights."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.pool = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, ids, padding):
        x = self.encoder(self.words(ids), src_key_padding_mask=padding)
        x = self.decoder(x, x, memory_key_padding_mask=padding, tgt_key_padding_mask=padding)
        return self.pool(x[:, :1], x, x, key_padding_mask=padding)[0].squeeze(1)


def text():
    torch.manual_seed(0)
    return perturbed(Text()).eval()


def inputs(batch, length):
    g = torch.Generator().manual_seed(length)
    padding = torch.arange(length) >= torch.randint(1, length + 1, (batch, 1), generator=g)
    return torch.randint(0, 50, (batch, length), generator=g), padding


def exported(model, given):
    dynamic = tuple({0: BATCH, 1: LENGTH} for _ in given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(model, given, dynamic_shapes=dynamic)


def test_torch_export_of_a_converted_model():
    model, own = text(), text()
    fastattn.nn.convert(model)
    program = exported(model, inputs(*SIZES[0]))
    ops = {str(node.target).split(".")[1] for node in program.graph.nodes if "fastattn" in str(node.target)}
    assert ops == {"attention_forward", "linear_forward", "ffn_forward", "add_norm_forward"}
    for size in SIZES:
        given = inputs(*size)
        torch.testing.assert_close(program.module()(*given), own(*given), rtol=1e-5, atol=1e-5)


def run_onnx(model, given, others):
    """An ONNX model of `model`, run by ONNX Runtime on `given`, and on `others`."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(exported(model, given), dynamo=True, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    names = [x.name for x in session.get_inputs()]
    return [session.run(None, {n: x.numpy() for n, x in zip(names, one, strict=True)})[0] for one in (given, others)]


@pytest.mark.slow
def test_onnx_of_a_converted_model():
    model, own = fastattn.nn.convert(text()), text()
    expected = [model(*inputs(*size)) for size in SIZES]
    fastattn.nn.convert(model, for_export=True)
    found = run_onnx(model, *(inputs(*size) for size in SIZES))
    for out, ours, size in zip(found, expected, SIZES, strict=True):
        torch.testing.assert_close(torch.from_numpy(out), ours, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own(*inputs(*size)), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnx_of_an_accelerated_model():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 50}

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.bert = perturbed(transformers.BertModel(transformers.BertConfig(**small), add_pooling_layer=False))

        def forward(self, ids, mask):
            return self.bert(ids, attention_mask=mask).last_hidden_state[:, 0]

    model = Pooled().eval()
    own = copy.deepcopy(model)
    handle = fastattn.accelerate(model, strict=True)
    given, others = ((ids, (~padding).long()) for ids, padding in (inputs(*size) for size in SIZES))
    expected = [model(*one) for one in (given, others)]
    assert not handle.report.fallbacks
    program = exported(model, given)  # with our ops; padding stays in where nothing is read
    assert any("fastattn" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*others), expected[1], rtol=1e-5, atol=1e-5)
    fastattn.nn.convert(model, for_export=True)
    for out, ours, one in zip(run_onnx(model, given, others), expected, (given, others), strict=True):
        torch.testing.assert_close(torch.from_numpy(out), ours, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own(*one), ours, rtol=1e-4, atol=1e-5)
