"""`accelerate` of transformers' models whose layers stand alone: CLAP's audio encoder, Donut's, and XLM's attention and FFNs."""

import copy

import pytest
import torch
from modules import perturbed
from test_accelerate_families import MASKS as PADDED
from test_accelerate_families import L
from torch import nn

import fastattn
from fastattn.integrations import accelerate_windows, accelerate_xlm

transformers = pytest.importorskip("transformers")
ClapAudioModel = pytest.importorskip("transformers.models.clap.modeling_clap").ClapAudioModel
DonutSwinModel = pytest.importorskip("transformers.models.donut.modeling_donut_swin").DonutSwinModel

CLAP = {
    "spec_size": 32, "num_mel_bins": 16, "patch_size": 4, "patch_stride": 4, "window_size": 4, "patch_embeds_hidden_size": 16,
    "depths": [2, 2], "num_attention_heads": [2, 4], "num_hidden_layers": 2, "hidden_size": 32, "mlp_ratio": 2.0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0,
}  # fmt: skip
DONUT = {
    "image_size": 36, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "mlp_ratio": 2.0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "drop_path_rate": 0.0,
}  # fmt: skip
XLM = {
    "emb_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 60, "max_position_embeddings": 40, "n_langs": 1, "pad_index": 1,
    "pad_token_id": 1, "dropout": 0.0, "attention_dropout": 0.0, "gelu_activation": True,
}  # fmt: skip
# the model's class, its config's, and what that is given
MODELS = {
    "clap": (ClapAudioModel, transformers.ClapAudioConfig, CLAP),
    "clap, without biases": (ClapAudioModel, transformers.ClapAudioConfig, {**CLAP, "qkv_bias": False, "hidden_act": "relu"}),
    "donut": (DonutSwinModel, transformers.DonutSwinConfig, DONUT),  # 9 x 9 patches, which are no whole windows
    "xlm": (transformers.XLMModel, transformers.XLMConfig, XLM),
    "xlm, causal": (transformers.XLMModel, transformers.XLMConfig, {**XLM, "causal": True, "gelu_activation": False}),
}
MASKS = {**PADDED, "a sequence of padding": torch.arange(L) < torch.tensor([L, 0, 4, 8])[:, None]}
CASES = [(name, side) for name in MODELS for side in (MASKS if "xlm" in name else ("none",))]
each_case = pytest.mark.parametrize(("name", "side"), CASES)
each_model = pytest.mark.parametrize("name", ["clap", "donut", "xlm"])


def models(name, **options):
    """The model, twice."""
    cls, config, given = MODELS[name]
    torch.manual_seed(0)
    theirs = perturbed(cls(config(**{**given, **options})).train(), seed=1)
    return theirs, copy.deepcopy(theirs)


def inputs(name, side="none"):
    generator = torch.Generator().manual_seed(2)
    if name.startswith("clap"):
        return {"input_features": torch.randn(2, 1, 64, 16, generator=generator)}
    if name == "donut":
        return {"pixel_values": torch.randn(2, 3, 36, 36, generator=generator)}
    ids = torch.randint(3, 57, (4, L), generator=generator).masked_fill(~MASKS[side], 1)
    return {"input_ids": ids, "attention_mask": MASKS[side].long()}


def run(model, given):
    """What it gives, at padding as well, and all gradients."""
    model.zero_grad()
    outputs = model(**given)
    found = {name: x for name in ("last_hidden_state", "pooler_output") if (x := outputs.get(name)) is not None}
    generator = torch.Generator().manual_seed(3)
    sum((x * torch.randn(x.shape, generator=generator)).sum() for x in found.values()).backward()
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(theirs, ours, given):
    expected, found = run(theirs, given), run(ours, given)
    assert found.keys() == expected.keys() and len(found) > 20
    for name, x in expected.items():
        error = (found[name] - x).abs().max() / x.abs().max().clamp(min=1)
        assert error < 2e-5, f"{name}: {error}"


@each_case
def test_outputs_and_gradients(name, side):
    """The first call proves."""
    theirs, ours = models(name)
    handle, given = fastattn.accelerate(ours, strict=True), inputs(name, side)
    for mode in (True, False):
        theirs.train(mode), ours.train(mode)
        assert_same(theirs, ours, given)
        assert not any(block.unproven for block in handle._blocks) or side == "a sequence of padding"
        with torch.no_grad():
            torch.testing.assert_close(ours(**given)[0], theirs(**given)[0], rtol=2e-5, atol=2e-5)
    assert not handle.report.left and not handle.report.fallbacks
    assert sum("2 layers" in what for what in handle.report.accelerated.values()) == 2
    handle.restore()
    torch.testing.assert_close(ours(**given)[0], theirs(**given)[0], rtol=0, atol=0)


@each_model
def test_the_models_own_attention_and_ffn_do_not_run(name, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it ran")

    _, ours = models(name)
    handle = fastattn.accelerate(ours, strict=True, prove=False)
    for function in ("linear", "softmax", "scaled_dot_product_attention"):
        monkeypatch.setattr(nn.functional, function, never)
    for block in (ours.get_submodule(block.name) for block in handle._blocks[:2]):
        if name == "xlm":
            block(torch.randn(2, 5, 32), torch.ones(2, 5))
        else:
            block(torch.randn(2, 64, 16), (8, 8))
    if name == "xlm":
        ours.ffns[0](torch.randn(2, 5, 32))


RATES = {"clap": ("hidden_dropout_prob", "attention_probs_dropout_prob"), "xlm": ("dropout", "attention_dropout")}


@pytest.mark.parametrize(("name", "rate"), [(name, rate) for name, rates in RATES.items() for rate in rates])
def test_dropout_is_where_the_model_has_it(name, rate):
    """Each alone with a rate of 1, by which all that it is of is 0, whoever draws."""
    theirs, ours = models(name, **{rate: 1.0})
    handle, given = fastattn.accelerate(ours, strict=True), inputs(name, "right")
    ours(**given)
    torch.testing.assert_close(ours(**given)[0], theirs(**given)[0], rtol=1e-4, atol=1e-4)
    assert (theirs(**given)[0] - theirs.eval()(**given)[0]).abs().max() > 1e-3 and not handle.report.fallbacks


@each_model
def test_training_drops(name):
    rates = {"xlm": {"dropout": 0.2, "attention_dropout": 0.2}}
    _, ours = models(name, **rates.get(name, {"hidden_dropout_prob": 0.2, "drop_path_rate": 0.3}))
    handle, given = fastattn.accelerate(ours, strict=True), inputs(name, "right")
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(ours(**given)[0])
        outs[-1].sum().backward()
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[1], outs[2]) and not handle.report.fallbacks


@pytest.mark.parametrize("name", ["clap", "donut"])
def test_grids_of_any_size(name):
    """Also smaller than a window, where transformers' own code raises."""
    theirs, ours = (model.eval() for model in models(name))
    fastattn.accelerate(ours, strict=True)
    layers = [model.audio_encoder.layers[0].blocks[1] if name == "clap" else model.encoder.layers[0].blocks[1]
              for model in (theirs, ours)]  # fmt: skip
    for size in ((8, 8), (5, 9), (12, 7)):
        x = torch.randn(3, size[0] * size[1], 16)
        for more in ((), (False, True)):
            found, expected = (layer(x, size, *more)[0] for layer in reversed(layers))
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    raised = []
    for layer in layers:
        with pytest.raises((RuntimeError, ValueError)) as caught:
            layer(torch.randn(3, 4, 16), (2, 2))
        raised.append(str(caught.value))
    assert len(raised) == 2


def test_a_cache_of_xlms_is_filled_and_read():
    from transformers import DynamicCache, EncoderDecoderCache

    theirs, ours = (model.eval() for model in models("xlm"))
    handle, given = fastattn.accelerate(ours), inputs("xlm")
    caches = [EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2)]
    with torch.no_grad():
        for model, cache in zip((theirs, ours), caches, strict=True):
            model(**given, cache=cache)
        for a, b in zip(*(cache.self_attention_cache.layers for cache in caches), strict=True):
            assert a.keys.shape == (4, 4, L, 8)
            torch.testing.assert_close((b.keys, b.values), (a.keys, a.values), rtol=2e-5, atol=2e-5)
        assert not handle.report.fallbacks  # the proof has left nothing in it
        attention, own = ours.attentions[0], theirs.attentions[0]
        x, mask = torch.randn(4, 3, 32), torch.ones(4, L + 3).long()
        found, expected = attention(x, mask, cache=caches[1])[0], own(x, mask, cache=caches[0])[0]
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert sum(handle.report.fallbacks.values()) == 1


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("clap", {"output_attentions": True}, "output_attentions=True"),
        ("xlm", {"output_attentions": True}, "output_attentions was given"),
    ],
)
def test_calls_that_are_not_served(name, given, why):
    theirs, ours = (model.eval() for model in models(name))
    handle, given = fastattn.accelerate(ours), {**inputs(name), **given}
    found, expected = ours(**given), theirs(**given)
    for a, b in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    assert why in handle.report.fallbacks


@each_model
def test_what_is_put_in_or_hooked_later_is_seen(name):
    theirs, ours = models(name)
    handle, given = fastattn.accelerate(ours), inputs(name)
    ours(**given)
    for model in (theirs, ours):
        block = model.get_submodule(handle._blocks[1].name)
        linear = next(part for part in block.modules() if isinstance(part, nn.Linear))
        linear.register_forward_hook(lambda module, args, out: out * 1.5)
    assert_same(theirs, ours, given)
    assert sum(handle.report.fallbacks.values()) == 1 and "has hooks" in next(iter(handle.report.fallbacks))
    for model in (theirs, ours):
        torch.manual_seed(4)
        block = model.get_submodule(handle._blocks[0].name)
        path = next(path for path, part in block.named_modules() if isinstance(part, nn.Linear))
        block.set_submodule(
            path, type("Mine", (nn.Linear,), {})(16 if "xlm" not in name else 32, 16 if "xlm" not in name else 32)
        )
    assert_same(theirs, ours, given)
    assert any("Mine" in why for why in handle.report.fallbacks)


@pytest.mark.parametrize("kind", [accelerate_windows.Windows, accelerate_xlm.Attention, accelerate_xlm.FeedForward])
def test_the_first_call_proves(kind, monkeypatch):
    """What computes otherwise is found out, and its own code runs."""
    name = "clap" if kind is accelerate_windows.Windows else "xlm"
    theirs, ours = (model.eval() for model in models(name))
    computed = kind.computed
    monkeypatch.setattr(kind, "computed", lambda *args: computed(*args) * 1.001)
    handle, given = fastattn.accelerate(ours), inputs(name)
    for _ in range(2):
        torch.testing.assert_close(ours(**given)[0], theirs(**given)[0], rtol=1e-5, atol=1e-5)
    assert all("differs from its own code" in why for why in handle.report.left.values())
    assert len(handle.report.left) in (2, 4) and handle.report.fallbacks.total() == 2 * len(handle.report.left)


@pytest.mark.parametrize("name", ["donut", "xlm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    """As far from fp32 as the model's own code."""
    theirs, ours = (model.to(dtype).eval() for model in models(name))
    exact, given = copy.deepcopy(theirs).float(), inputs(name, "right")
    fastattn.accelerate(ours, strict=True)
    halved = {key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()}
    with torch.no_grad():
        found, expected, right = ours(**halved)[0], theirs(**halved)[0], exact(**given)[0]
    assert found.dtype == dtype and (found - right).norm() < 2 * (expected - right).norm() + 1e-3 * right.norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    """Donut's; of the others transformers has none. What is computed again draws the same; a reentrant one computes it first
    without gradients, as inference does, which rounds otherwise."""
    grads = []
    for checkpointing in (False, True):
        _, ours = models("donut", hidden_dropout_prob=0.3)
        handle, given = fastattn.accelerate(ours, strict=True), inputs("donut")
        ours(**given)
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(5)
        grads.append(run(ours, given))
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-5)
    assert not handle.report.fallbacks


@each_model
def test_copied_compiled_and_under_autocast(name):
    theirs, ours = (model.eval() for model in models(name))
    handle, given = fastattn.accelerate(ours, strict=True), inputs(name)
    ours(**given)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, expected = ours(**given)[0], theirs(**given)[0]
    assert found.dtype == expected.dtype and (found - expected).norm() < 0.03 * expected.norm()
    twin = copy.deepcopy(ours)
    torch.testing.assert_close(twin(**given)[0], theirs(**given)[0], rtol=2e-5, atol=2e-5)
    fastattn.restore(twin)
    assert not any("forward" in vars(part) for part in twin.modules()) and not handle.report.fallbacks
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(ours, backend="eager")(**given)[0]
        torch.testing.assert_close(compiled, theirs(**given)[0], rtol=2e-5, atol=2e-5)


def test_every_kind_is_here():
    kinds = {**accelerate_windows.KINDS, **accelerate_xlm.KINDS}
    found = {f"{type(part).__module__}.{type(part).__qualname__}" for name in MODELS for part in models(name)[0].modules()}
    assert set(kinds) <= found
