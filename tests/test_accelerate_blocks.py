"""`accelerate` of timm's and open_clip's transformers: equal, proven, looked at in each call, and given back."""

import copy
import pickle

import pytest
import torch
from modules import perturbed, run
from stubbed_torchvision import stubbed
from torch import nn

import fastattn
from fastattn.integrations.accelerate_prenorm import KINDS, PreNorm

with stubbed():
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    clip = pytest.importorskip("open_clip.transformer")
    from timm.layers import LayerNormFp32, RmsNorm
    from timm.models.beit import Beit
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.eva import Eva

IMAGE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2, "num_classes": 5}
ROTARY, GATED = {"use_rot_pos_emb": True}, {"swiglu_mlp": True}
TOWER = {"width": 32, "layers": 2, "heads": 4, "mlp_ratio": 2.0, "output_dim": 24}
CLIP_IMAGE = {"image_size": 32, "patch_size": 8, **TOWER}
CLIP_TEXT = {"context_length": 10, "vocab_size": 40, **TOWER}


def vit(**options):
    return vision_transformer.VisionTransformer(**IMAGE, **options)


MODELS = {
    "vit": vit,
    "no class token": lambda: vit(class_token=False, global_pool="avg", reg_tokens=2, qkv_bias=False, pre_norm=True),
    "layer scale": lambda: vit(init_values=0.5, act_layer="gelu_tanh"),
    "norms of heads": lambda: vit(qk_norm=True, scale_attn_norm=True),
    "other norms": lambda: vit(qk_norm=True, norm_layer=RmsNorm),
    "norms in fp32": lambda: vit(norm_layer=LayerNormFp32),
    "quick gelu": lambda: vit(act_layer="quick_gelu"),
    "deit": lambda: VisionTransformerDistilled(**IMAGE),
    "eva": lambda: Eva(**IMAGE, init_values=0.5),
    "eva, unbiased": lambda: Eva(**IMAGE, qkv_bias=False, scale_attn_inner=True),
    "eva-02": lambda: Eva(**IMAGE, **ROTARY, **GATED, scale_mlp=True, qkv_fused=False),
    "eva-02, tiny": lambda: Eva(**IMAGE, **ROTARY, **GATED, use_abs_pos_emb=False),
    "eva, halves": lambda: Eva(**IMAGE, **ROTARY, rope_rotate_half=True, scale_mlp=True, qk_norm=True),
    "beit": lambda: Beit(**IMAGE, use_abs_pos_emb=True, init_values=0.5),
    "beit, biased": lambda: Beit(**IMAGE, use_rel_pos_bias=True, init_values=0.5),
    "beit, one bias": lambda: Beit(**IMAGE, use_shared_rel_pos_bias=True, swiglu_mlp=True, scale_mlp=True),
    "clip's images": lambda: clip.VisionTransformer(**CLIP_IMAGE),
    "clip's images, quick gelu": lambda: clip.VisionTransformer(**CLIP_IMAGE, act_layer=clip.QuickGELU, ls_init_value=0.5),
    "clip's text": lambda: clip.TextTransformer(**CLIP_TEXT),
    "clip's text with a class token": lambda: clip.TextTransformer(**CLIP_TEXT, embed_cls=True),
    "clip's text, norms in fp32": lambda: clip.TextTransformer(**CLIP_TEXT, norm_layer=clip.LayerNormFp32),
}
TEXTS = torch.tensor([[1, 2, 3, 4, 39, 0, 0, 0, 0, 0], [5, 6, 7, 8, 9, 10, 11, 12, 13, 39]])


def models(make=vit, **options):
    torch.manual_seed(0)
    theirs = perturbed(make(**options), seed=1)
    return theirs, copy.deepcopy(theirs)


def inputs_of(model):
    torch.manual_seed(2)
    if isinstance(model, clip.TextTransformer):
        return TEXTS
    return torch.randn(3, 3, 32, 32, dtype=next(model.parameters()).dtype)


def call(model, x):
    y = model(x)
    return y if isinstance(y, tuple) else (y,)


def blocks_of(model):
    return model.blocks if hasattr(model, "blocks") else model.transformer.resblocks


def assert_same(theirs, ours, x, call=call):
    """Outputs and all gradients, within rounding of sums in another order."""
    bounds = {"rtol": 1e-10, "atol": 1e-10} if next(ours.parameters()).dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    expected, found = run(theirs, call, {"x": x}), run(ours, call, {"x": x})
    assert found.keys() == expected.keys() and len(found) > 10
    for name, y in found.items():
        torch.testing.assert_close(y, expected[name], msg=lambda text, name=name: f"{name}: {text}", **bounds)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name):
    theirs, ours = models(MODELS[name])
    if "fp32" not in name:
        theirs, ours = theirs.double(), ours.double()
    handle, x = fastattn.accelerate(ours, strict=True), inputs_of(ours)
    for mode in (True, False):
        theirs.train(mode), ours.train(mode)
        assert_same(theirs, ours, x)  # the first call proves
        assert not any(block.unproven for block in handle._blocks)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert len(handle.report.accelerated) == 1 and "2 layers" in str(handle.report)
    assert not handle.report.left and not handle.report.fallbacks


@pytest.mark.parametrize("name", ["vit", "eva", "beit", "clip's images", "clip's text"])
def test_the_models_own_attention_and_ffn_do_not_run(name, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it ran")

    _, ours = models(MODELS[name])
    fastattn.accelerate(ours, strict=True, prove=False)
    for function in ("scaled_dot_product_attention", "multi_head_attention_forward", "linear"):
        monkeypatch.setattr(torch.nn.functional, function, never)
    for block in blocks_of(ours):
        block(torch.randn(2, 5, 32))


def causal(length, dtype=torch.float32):
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)


HIDES = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(4)) > 0.4
MASKS = {
    "bool (L, L)": {"attn_mask": torch.ones(7, 7, dtype=torch.bool).tril()},
    "bool (B, 1, L, L)": {"attn_mask": HIDES | torch.eye(7, dtype=torch.bool)},
    "float (L, L)": {"attn_mask": torch.linspace(-3, 3, 49).view(7, 7)},
    "float (H, L, L)": {"attn_mask": torch.linspace(-3, 3, 196).view(4, 7, 7)},
    "float, causal": {"attn_mask": causal(7)},
    "is_causal": {"is_causal": True},
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kind", ["vit", "eva"])
def test_masks_of_timms_blocks(kind, name):
    theirs, ours = ([*model.double().blocks][0] for model in models(MODELS[kind]))
    handle = fastattn.accelerate(ours, strict=True)
    with torch.inference_mode():
        ours(torch.randn(2, 7, 32, dtype=torch.float64))  # proves itself
    more = {key: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in MASKS[name].items()}
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x, **more), theirs(x, **more))
    for _ in range(2):  # what was made of a mask in inference serves training
        assert_same(theirs, ours, x, lambda m, x: (m(x, **more),))
    assert not handle.report.left and (theirs(x) - theirs(x, **more)).abs().max() > 1e-3


@pytest.mark.parametrize("shape", ["(L, L)", "(B H, L, L)", "causal", "bool"])
def test_masks_of_open_clips_blocks(shape):
    theirs, ours = (model.double().transformer.resblocks[0] for model in models(MODELS["clip's images"]))
    handle, x = fastattn.accelerate(ours, strict=True), torch.randn(2, 7, 32, dtype=torch.float64)
    given = {
        "(L, L)": torch.linspace(-3, 3, 49).view(7, 7), "(B H, L, L)": torch.linspace(-3, 3, 392).view(8, 7, 7),
        "causal": causal(7, torch.float64), "bool": torch.ones(7, 7, dtype=torch.bool).triu(1),
    }  # fmt: skip
    for mask in (given[shape], given[shape]):
        assert_same(theirs, ours, x, lambda m, x, mask=mask: (m(x, attn_mask=mask),))
        assert_same(theirs, ours, x, lambda m, x, mask=mask: (m(x, None, None, mask),))
    assert (handle._blocks[0].seen.last[-1] is not None) == (shape == "causal")
    for mask in (given["causal"], *given.values()):  # each in turn
        assert_same(theirs, ours, x, lambda m, x, mask=mask: (m(x, attn_mask=mask),))
    if shape == "causal":  # written to, so that it is another mask
        ours(x, attn_mask=given[shape])
        given[shape][0, 1] = 0.0
        assert_same(theirs, ours, x, lambda m, x: (m(x, attn_mask=given[shape]),))
    assert not handle.report.left


DROPPING = {
    "attention": {"attn_drop_rate": 0.3},
    "projections and hidden": {"proj_drop_rate": 0.3},
    "paths": {"drop_path_rate": 0.5},
    "with layer scale": {"proj_drop_rate": 0.3, "drop_path_rate": 0.5, "init_values": 0.5},
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_trains(name):
    theirs, ours = models(vit, **DROPPING[name])
    handle, x = fastattn.accelerate(ours, strict=True), inputs_of(ours)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(ours(x))
        outs[-1].sum().backward()
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[1], outs[2])
    assert all(part.training for part in ours.modules()) and not handle.report.fallbacks
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"attn_drop_rate": 0.4}, {"init_values": 0.9}], ids=["with attention's", "with layer scale"])
def test_dropouts_drop_as_much_as_they_say(options):
    """The mean of many draws of a block is near what the model's own gives; and a mode of its own is heeded."""
    theirs, ours = (model.blocks[0] for model in models(vit, proj_drop_rate=0.4, **options))
    fastattn.accelerate(ours, strict=True)
    x = torch.randn(1, 5, 32)
    ours(x)
    with torch.no_grad():
        drawn = {block: torch.stack([block(x) for _ in range(600)]) for block in (theirs, ours)}
    spread = drawn[theirs].std(0)
    assert ((drawn[ours].mean(0) - drawn[theirs].mean(0)).abs() < 6 * spread / 600**0.5 + 1e-4).all()
    torch.testing.assert_close(drawn[ours].std(0), spread, rtol=0.35, atol=0.02)
    for block in (theirs, ours):
        block.attn.eval(), block.mlp.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["eva-02", "eva-02, tiny"])
def test_hidden_features_of_a_gated_ffn_are_dropped_before_their_norm(name):
    """With a rate of 1, by which all are 0, whoever draws."""
    theirs, ours = models(MODELS[name])
    fastattn.accelerate(ours, strict=True)
    for model in (theirs, ours):
        model(inputs_of(model))
        for block in model.blocks:
            block.mlp.drop1.p = 1.0
    torch.testing.assert_close(ours(inputs_of(ours)), theirs(inputs_of(ours)), rtol=1e-4, atol=1e-5)


def test_what_is_not_what_it_seems():
    theirs, ours = models()
    handle, x = fastattn.accelerate(ours), inputs_of(ours)
    ours(x)
    seen = []
    hook = ours.blocks[1].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert len(seen) == 1 and handle.report.fallbacks == {"mlp.fc1 has hooks, or a forward that was set, which would not run": 1}
    hook.remove()
    ours(x)
    assert sum(handle.report.fallbacks.values()) == 1
    own = ours.blocks[0].register_forward_hook(lambda *_: seen.append(2))
    ours(x)
    assert seen == [1, 2] and sum(handle.report.fallbacks.values()) == 1  # a block's own hooks see what they always did
    own.remove()
    for model in (theirs, ours):
        model.blocks[0].mlp.act = nn.Mish()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert "activation Mish is not served" in handle.report.fallbacks
    for model in (theirs, ours):
        model.blocks[0].mlp.act = nn.ReLU()  # a change proves itself anew
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert sum(handle.report.fallbacks.values()) == 2


class OwnLinear(nn.Linear):
    pass


def _subclassed(block):
    block.__class__ = type("Own", (type(block),), {})


def _adapted(block):
    block.attn.qkv = OwnLinear(32, 96)


def _set(block):
    block.attn.forward = lambda x, **_: x


def _replaced(block):
    own = type(block).forward
    block.forward = lambda x, *args, **kwargs: 2 * own(block, x, *args, **kwargs)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_subclassed, "Own is no class that is known"),
        (_adapted, "OwnLinear"),
        (_set, "a forward that was set"),
        (_replaced, "a forward was set on it"),
    ],  # fmt: skip
)
def test_what_is_left(change, why):
    theirs, ours = models()
    for model in (theirs, ours):
        torch.manual_seed(5)
        change(model.blocks[1])
    handle, x = fastattn.accelerate(ours), inputs_of(ours)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert [*handle.report.left] == ["blocks.1"] and why in handle.report.left["blocks.1"]
    assert "1 layer:" in handle.report.accelerated["blocks"]
    with pytest.raises(NotImplementedError, match="blocks.1"):
        fastattn.accelerate(theirs, strict=True)
    assert "forward" not in vars(theirs.blocks[0])


def test_a_class_that_is_patched_is_left(monkeypatch):
    theirs, ours = models()
    handle, x = fastattn.accelerate(ours), inputs_of(ours)
    ours(x)
    monkeypatch.setattr(type(ours.blocks[0].attn), "forward", lambda self, x, **_: self.proj(x))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert sum(handle.report.fallbacks.values()) == 2 and "attn is a" in [*handle.report.fallbacks][0]


def test_attention_that_is_not_fused_and_that_is_gated():
    """Where timm does not call PyTorch's attention, its module's scale counts."""
    theirs, ours = (model.double() for model in models(vit))
    for model in (theirs, ours):
        torch.manual_seed(5)
        model.blocks[0].attn.fused_attn, model.blocks[0].attn.scale = False, 0.9
        model.blocks[1].attn.scale, model.blocks[1].attn.gate = 0.9, nn.Linear(32, 32).double()
    handle = fastattn.accelerate(ours, strict=True)
    assert_same(theirs, ours, inputs_of(ours))
    assert not handle.report.left


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["norms of heads", "layer scale", "eva", "clip's text, norms in fp32"])
def test_half_precision(name, dtype):
    """As far from fp32 as the model's own code."""
    theirs, ours = (model.to(dtype).eval() for model in models(MODELS[name]))
    for part in (*theirs.modules(), *ours.modules()):
        if isinstance(part, clip.LayerNormFp32):
            part.float()  # as open_clip's own conversion leaves it
    exact = copy.deepcopy(theirs).float()
    fastattn.accelerate(ours, strict=True)
    x = inputs_of(ours)
    with torch.no_grad():
        found, expected, right = ours(x), theirs(x), exact(x.float() if x.is_floating_point() else x)
    assert found.dtype == dtype and (found - right).norm() < 2 * (expected - right).norm() + 1e-3 * right.norm()


def test_others_are_left():
    for block in (vision_transformer.ResPostBlock, vision_transformer.ParallelScalingBlock):
        with pytest.raises(ValueError, match="timm's VisionTransformer"):
            fastattn.accelerate(vit(block_fn=block), strict=True)
    for change, why in (({"gate_last": True}, "second half"), ({"norm": nn.LayerNorm(64)}, "mlp has a norm")):
        gated = MODELS["eva-02, tiny"]()
        for name, value in change.items():
            setattr(gated.blocks[0].mlp, name, value)
        assert why in fastattn.accelerate(gated).report.left["blocks.0"]
    for options, why in (({"batch_first": False}, "batch_first"), ({"is_cross_attention": True}, "ln_1_kv")):
        block = clip.ResidualAttentionBlock(32, 4, **options)
        assert why in fastattn.accelerate(block).report.left[""]
    with pytest.raises(NotImplementedError, match="capacity"):
        fastattn.accelerate(vit(), strict=True, capacity=40)


def test_calls_that_are_not_served():
    theirs, ours = (model.transformer.resblocks[0] for model in models(MODELS["clip's images"]))
    handle, x, k = fastattn.accelerate(ours), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    torch.testing.assert_close(ours(x, k), theirs(x, k), rtol=1e-4, atol=1e-5)
    assert handle.report.fallbacks == {"k_x was given": 1}
    theirs, ours = (model.eval().blocks[0] for model in models(MODELS["eva-02"]))
    handle, x = fastattn.accelerate(ours), torch.randn(2, 7, 32)
    for rope in (torch.randn(6, 16, requires_grad=True), torch.randn(2, 1, 6, 16)):  # learned, and of each image
        torch.testing.assert_close(ours(x, rope=rope), theirs(x, rope=rope), rtol=0, atol=0)
    assert handle.report.fallbacks == {"rope is no plain table of the tokens behind the first ones": 2}
    with pytest.raises(TypeError, match="unknown"):
        ours(x, unknown=None)
    strict = models()[1]
    fastattn.accelerate(strict, strict=True)
    with pytest.raises(NotImplementedError, match="beside is_causal"):
        strict.blocks[0](torch.randn(2, 7, 32), causal(7), is_causal=True)


def test_the_first_call_proves(monkeypatch):
    """A block that computes otherwise is found out, and its own code runs."""
    theirs, ours = models()
    computed = PreNorm.computed
    monkeypatch.setattr(PreNorm, "computed", lambda kind, block, *rest: computed(kind, block, *rest) * 1.001)
    handle, x = fastattn.accelerate(ours), inputs_of(ours)
    for _ in range(2):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    assert "layer blocks.1 differs" in handle.report.left["blocks.1"] and sum(handle.report.fallbacks.values()) == 4
    strict = copy.deepcopy(theirs)
    fastattn.accelerate(strict, strict=True)
    with pytest.raises(NotImplementedError, match="differs"):
        strict(x)
    unproven = copy.deepcopy(theirs)
    fastattn.accelerate(unproven, prove=False)
    assert not torch.allclose(unproven(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "clip's images"])
def test_restored_copied_and_unpickled(name):
    theirs, ours = models(MODELS[name])
    x = inputs_of(ours)
    with fastattn.accelerate(ours, strict=True) as handle:
        expected = ours(x)
        assert list(ours.state_dict()) == list(theirs.state_dict()) and "1 encoder accelerated" in repr(handle)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert all(block.forward.settings.noted == () for block in blocks_of(twin))  # it is to prove itself
            with torch.no_grad():
                next(blocks_of(twin)[0].mlp.parameters()).zero_()
            assert not torch.allclose(twin(x), expected)
            fastattn.restore(twin)
            assert not any("forward" in vars(part) for part in twin.modules())
        with pytest.raises(ValueError, match="accelerated already"):
            fastattn.accelerate(ours)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)
        handle.refresh()
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)
    assert not any("forward" in vars(part) for part in ours.modules())
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_weights_may_change_in_any_way():
    theirs, ours = (model.eval() for model in models())
    fastattn.accelerate(ours, strict=True)
    x = inputs_of(ours)
    ours(x)

    def same():
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)

    block = ours.blocks[0]
    with torch.no_grad():
        block.attn.qkv.weight.mul_(1.5)
        same()
        block.mlp.fc1 = perturbed(nn.Linear(32, 64), seed=3)
        same()
        block.attn.proj.weight.data = block.attn.proj.weight.data * 0.5
        same()
        ours.load_state_dict({name: x + 0.01 for name, x in ours.state_dict().items()}, assign=True)
        same()


@pytest.mark.parametrize("name", ["vit", "clip's text"])
def test_checkpointed_compiled_and_under_autocast(name):
    theirs, ours = models(MODELS[name])
    handle, x = fastattn.accelerate(ours, strict=True), inputs_of(ours)
    for model in (theirs, ours):
        model.set_grad_checkpointing()
    assert_same(theirs, ours, x)
    assert_same(theirs, ours, x)
    for model in (theirs, ours):
        model.set_grad_checkpointing(False)
        model.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        out, plain = ours(x), theirs(x)
    assert out.dtype == plain.dtype and (out - plain).norm() < 0.03 * plain.norm() and not handle.report.fallbacks
    compiled = torch.compile(ours, backend="eager")
    torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-4, atol=1e-5)
    if name == "vit":
        exported = torch.export.export(ours, (x,)).module()
        torch.testing.assert_close(exported(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_cuda_graphs_are_said_not_to_be():
    _, ours = models()
    handle = fastattn.accelerate(ours, cuda_graphs=True)
    ours(inputs_of(ours))
    assert handle.report.not_captured == {"blocks that stand alone are not captured": 2}


def test_all_kinds_are_tested():
    made = {f"{type(b).__module__}.{type(b).__qualname__}" for make in MODELS.values() for b in blocks_of(make())}
    assert made == set(KINDS)
