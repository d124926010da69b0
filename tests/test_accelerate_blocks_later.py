"""Blocks that stand alone, after their first call: what is changed in them or given to them later is seen."""

import copy
import types

import numpy as np
import pytest
import torch
from modules import perturbed
from stubbed_torchvision import stubbed
from torch import nn

import fastattn
from fastattn import kept

transformers = pytest.importorskip("transformers")
with stubbed():
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    clip = pytest.importorskip("open_clip.transformer")
    from timm.models.beit import Block as BeitBlock
    from timm.models.eva import Eva

EVA = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 5, "use_rot_pos_emb": True}
TEXT = {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 4, "layers": 2, "output_dim": 16}
XLM = {"emb_dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": 60, "max_position_embeddings": 40, "n_langs": 1, "pad_index": 1}
XLM |= {"dropout": 0.0, "attention_dropout": 0.0}


def twice(model):
    torch.manual_seed(0)
    theirs = perturbed(model.eval(), seed=1)
    ours = copy.deepcopy(theirs)
    return theirs, ours, fastattn.accelerate(ours)


def assert_same(theirs, ours, *args, **kwargs):
    with torch.no_grad():
        found, expected = ours(*args, **kwargs), theirs(*args, **kwargs)
    found, expected = (x if isinstance(x, torch.Tensor) else x[0] for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_a_mask_that_numpy_wrote_to_anew():
    """Each tensor of it has the address and the version of the one before."""
    theirs, ours, handle = twice(vision_transformer.Block(32, 4))
    x, buffer = torch.randn(2, 5, 32), np.ones((5, 5), bool)
    for filled in (buffer.copy(), np.tril(buffer), np.triu(buffer)):
        buffer[:] = filled
        assert_same(theirs, ours, x, attn_mask=torch.from_numpy(buffer))
    assert not handle.report.fallbacks and not handle.report.left


def test_a_mask_that_was_written_to_by_data():
    theirs, ours, handle = twice(clip.TextTransformer(**TEXT))
    ids = torch.randint(1, 59, (2, 8))
    assert_same(theirs, ours, ids)
    for model in (theirs, ours):
        model.attn_mask.data.zero_()
    assert_same(theirs, ours, ids)
    assert not handle.report.fallbacks


def test_a_causal_mask_that_is_to_have_a_gradient():
    theirs, ours, _ = twice(clip.ResidualAttentionBlock(32, 4))
    masks = [torch.full((5, 5), float("-inf")).triu(1) for _ in range(2)]
    x = torch.randn(2, 5, 32)
    assert_same(theirs, ours, x, attn_mask=masks[0])
    grads = []
    for model, mask in zip((theirs, ours), masks, strict=True):
        (model(x, attn_mask=mask.requires_grad_()) * x).sum().backward()
        grads.append(mask.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_bool_bias_of_beit(fused):
    """Which timm adds as 0 and 1, unless it goes to PyTorch's function alone."""
    theirs, ours, handle = twice(BeitBlock(32, 4))
    for model in (theirs, ours):
        model.attn.fused_attn = fused
    x, bias = torch.randn(2, 5, 32), torch.rand(1, 4, 5, 5) > 0.3
    bias |= torch.eye(5, dtype=torch.bool)
    for given in (None, bias):
        assert_same(theirs, ours, x, shared_rel_pos_bias=given)
    assert not handle.report.fallbacks and not handle.report.left


def test_another_rope():
    """A table that has another angle for each feature, where there was one for each pair."""

    class Own(nn.Module):
        def get_embed(self, *_, **__):
            return torch.linspace(-1, 1, 16 * 32).view(16, 32)

    theirs, ours, handle = twice(Eva(**EVA))
    x = torch.randn(2, 3, 32, 32)
    assert_same(theirs, ours, x)
    for model in (theirs, ours):
        model.rope = Own()
    assert_same(theirs, ours, x)
    assert sum(handle.report.fallbacks.values()) == 1


def test_masks_that_their_code_refuses():
    for model, mask in (
        (clip.ResidualAttentionBlock(32, 4), torch.zeros(1, 5)),
        (clip.ResidualAttentionBlock(32, 4), torch.zeros(2, 4, 5, 5)),
        (vision_transformer.Block(32, 4), torch.zeros(5, 5, dtype=torch.float64)),
    ):
        theirs, ours, _ = twice(model)
        x = torch.randn(2, 5, 32)
        assert_same(theirs, ours, x)
        for block in (theirs, ours):
            with pytest.raises((RuntimeError, AssertionError)):
                block(x, attn_mask=mask)


def test_a_gate_that_becomes_the_other_half():
    theirs, ours, handle = twice(Eva(**EVA, swiglu_mlp=True))
    x = torch.randn(2, 3, 32, 32)
    assert_same(theirs, ours, x)
    for model in (theirs, ours):
        model.blocks[0].mlp.gate_last = True
    assert_same(theirs, ours, x)
    assert [*handle.report.fallbacks] == ["mlp activates the second half, not the first"]


@pytest.mark.parametrize("of_class", [False, True])
def test_a_method_that_is_replaced(of_class, monkeypatch):
    theirs, ours, handle = twice(transformers.XLMModel(transformers.XLMConfig(**XLM)))
    ids = torch.randint(3, 57, (2, 8))
    assert_same(theirs, ours, ids)
    if of_class:
        monkeypatch.setattr(type(ours.ffns[0]), "ff_chunk", lambda self, x: 2 * self.lin2(self.lin1(x)))
    else:
        for ffn in (theirs.ffns[0], ours.ffns[0]):
            ffn.ff_chunk = types.MethodType(lambda self, x: 2 * self.lin2(self.lin1(x)), ffn)
    assert_same(theirs, ours, ids)
    assert [*handle.report.fallbacks] == ["its method ff_chunk was replaced"]


def test_nothing_is_kept_while_xlm_trains():
    _, ours, _ = twice(transformers.XLMModel(transformers.XLMConfig(**XLM)))
    ids = torch.randint(3, 57, (2, 8))
    for training in (True, False):
        kept.clear_packed()
        ours.train(training)
        with torch.no_grad():
            ours(ids), ours(ids)
        assert bool(len(kept._kept)) == (not training)


@pytest.mark.parametrize("causal", [False, True])
def test_a_trace_holds_the_models_own_code(causal):
    theirs, ours, _ = twice(transformers.XLMModel(transformers.XLMConfig(**XLM, causal=causal, return_dict=False)))
    ids, mask = torch.randint(3, 57, (2, 8)), (torch.arange(8) < torch.tensor([[8], [5]])).long()
    assert_same(theirs, ours, ids, mask)
    traced = torch.jit.trace(ours, (ids, mask), strict=False, check_trace=False)
    assert_same(theirs, traced, ids, mask)
    assert "fastattn" not in str(traced.inlined_graph)


def test_flags_of_layoutlmv3s_layers():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}
    sizes |= {"coordinate_size": 4, "shape_size": 8, "input_size": 16, "patch_size": 8}
    theirs, ours, handle = twice(transformers.LayoutLMv3Model(transformers.LayoutLMv3Config(**sizes)))
    ids, boxes = torch.randint(3, 57, (2, 8)), torch.randint(0, 900, (2, 8, 2)).repeat(1, 1, 2) + torch.tensor([0, 0, 50, 50])
    for flag in (None, "has_spatial_attention_bias", "has_relative_attention_bias"):
        if flag is not None:
            for model in (theirs, ours):
                setattr(model.encoder.layer[0].attention.self, flag, False)
        assert_same(theirs, ours, ids, bbox=boxes)
    assert not handle.report.left
