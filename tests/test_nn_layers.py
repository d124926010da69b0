"""EncoderLayer, Encoder and DecoderLayer in the place of torch.nn's, `convert` there and back, and FeedForward."""

import copy
import functools
import logging
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from backends import TRITON, device_of
from modules import assert_like, perturbed
from torch import nn

import fastattn
from fastattn import masks
from fastattn.activations import GATED
from fastattn.testing import assert_accurate, ffn_yardstick
from fastattn.testing_elements import gated_ffn_yardstick

BACKENDS = ["eager", "cpu", TRITON]
SHARE = {"cpu": 1, "eager": 4, "triton": 8}
LENGTHS = torch.tensor([9, 4, 1])
PADDING = torch.arange(9) >= LENGTHS[:, None]  # (3, 9)
SIDES = {"right": PADDING, "left": PADDING.flip(1), "holes": PADDING.flip(1).roll(3, 1), "none": None}
ROTARY = fastattn.nn.Rotary(base=100.0, dim=4)
CAUSAL = torch.ones(9, 9, dtype=torch.bool).triu(1)


def sample(seed):
    r = random.Random(seed)
    return {
        "options": {
            "norm_first": r.random() < 0.5, "batch_first": r.random() < 0.5, "bias": r.random() < 0.7,
            "activation": r.choice(["relu", "gelu", F.gelu, nn.ReLU(), F.silu]), "layer_norm_eps": r.choice([1e-5, 1e-3]),
        },
        "padding": r.choice([*SIDES, "float"]),
        "mask": r.choice(["none", "causal", "hint", "bool", "float"]),
        "train": r.random() < 0.7,
    }  # fmt: skip


def masks_of(case, device):
    """The padding mask, the mask and the hint."""
    padding, kind = SIDES.get(case["padding"], PADDING), case["mask"]
    if case["padding"] == "float":
        padding = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    mask = {"none": None, "causal": CAUSAL, "hint": CAUSAL, "bool": torch.rand(9, 9) < 0.3, "float": torch.randn(9, 9)}[kind]
    if kind in ("bool", "causal", "hint") and padding is not None:  # every row sees something, else torch.nn gives NaN
        padding = padding if case["padding"] == "float" else PADDING
    if kind == "bool":
        mask[:, 0] = False
    return tuple(None if x is None else x.to(device) for x in (padding, mask))


def real(case, padding):
    """(3, 9, 1) or (9, 3, 1): where torch.nn's result is no garbage of padding, and ours not 0."""
    if padding is None or case["padding"] == "float":
        return 1
    keep = ~padding if case["options"]["batch_first"] else ~padding.T
    return keep[..., None]


def source(case, device, length=9):
    x = torch.randn(3, length, 16)
    return (x if case["options"]["batch_first"] else x.transpose(0, 1).contiguous()).to(device)


def pair(case, backend, theirs, ours, **more):
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    given = {**case["options"], "dropout": 0.0}
    one = perturbed(theirs(16, 2, 24, **given)).train(case["train"])
    other = ours(16, 2, 24, **given, backend=backend, **more).train(case["train"])
    assert list(one.state_dict()) == list(other.state_dict())
    other.load_state_dict(one.state_dict())
    return one.to(device_of(backend)), other.to(device_of(backend))


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_encoder_layer(backend, part):
    for n in range(part, 96, 4 * SHARE[backend]):
        case, device = sample(n), device_of(backend)
        theirs, ours = pair(case, backend, nn.TransformerEncoderLayer, fastattn.nn.EncoderLayer)
        padding, mask = masks_of(case, device)

        def call(layer, src, padding=padding, mask=mask, case=case):
            out = layer(src, mask, padding, is_causal=case["mask"] == "hint")
            return (out * real(case, padding),)

        try:
            assert_like(theirs, ours, call, {"src": source(case, device)})
        except AssertionError as error:
            raise AssertionError(f"{case}: {error}") from error


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
def test_encoder(backend, part):
    """Two layers and a norm; with padding taken out, which is 0 then."""
    for n in range(part, 64, 4 * SHARE[backend]):
        case, device = sample(n + 1000), device_of(backend)
        theirs, ours = pair(case, backend, nn.TransformerEncoderLayer, fastattn.nn.EncoderLayer)
        norm = perturbed(nn.LayerNorm(16)).to(device)
        theirs, ours = nn.TransformerEncoder(theirs, 2, norm), fastattn.nn.Encoder(ours, 2, copy.deepcopy(norm))
        assert list(theirs.state_dict()) == list(ours.state_dict())
        padding, mask = masks_of(case, device)

        def call(encoder, src, padding=padding, mask=mask, case=case):
            out = encoder(src, mask, padding, is_causal=True if case["mask"] == "hint" else None)
            return (out * real(case, padding),)

        assert_like(theirs, ours, call, {"src": source(case, device)})
        if padding is not None and case["padding"] != "float" and case["mask"] in ("none", "causal", "hint"):
            out = ours(source(case, device), mask, padding)
            out = out if case["options"]["batch_first"] else out.transpose(0, 1)
            assert not out[padding].any()


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoder_layer(backend, part):
    for n in range(part, 32, 2 * SHARE[backend]):
        case, device = sample(n + 2000), device_of(backend)
        theirs, ours = pair(case, backend, nn.TransformerDecoderLayer, fastattn.nn.DecoderLayer)
        padding, mask = masks_of(case, device)
        over = (torch.arange(7) >= torch.tensor([[7], [3], [5]])).to(device)

        def call(layer, tgt, memory, padding=padding, mask=mask, case=case, over=over):
            hint = case["mask"] == "hint"
            out = layer(tgt, memory, mask, None, padding, over, tgt_is_causal=hint)
            return (out * real(case, padding),)

        assert_like(theirs, ours, call, {"tgt": source(case, device), "memory": source(case, device, 7)})


def encoder(**options):
    torch.manual_seed(0)
    layer = fastattn.nn.EncoderLayer(16, 2, 24, batch_first=True, **{"dropout": 0.0, **options})
    return perturbed(fastattn.nn.Encoder(layer, 2))


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": 1}, {"alibi": True}, {"norm_first": True}, {"rotary": ROTARY, "activation": "geglu"}],
    ids=str,
)
def test_padding_is_taken_out(side, options, monkeypatch):
    """Of what does not count distances; and padding that holds NaN changes nothing."""
    model, x, hide = encoder(**options), torch.randn(3, 9, 16), SIDES[side]
    seen, forward = [], fastattn.nn.EncoderLayer.forward

    def noted(self, src, *args, **kwargs):
        seen.append(tuple(src.shape))
        return forward(self, src, *args, **kwargs)

    monkeypatch.setattr(fastattn.nn.EncoderLayer, "forward", noted)
    out = model(x, src_key_padding_mask=hide)
    packed = "alibi" not in options
    assert set(seen) == {(14, 16) if packed else (3, 9, 16)}
    model.enable_nested_tensor = False
    padded = model(x, src_key_padding_mask=hide)
    torch.testing.assert_close(out[~hide], padded[~hide], rtol=1e-5, atol=1e-5)
    if packed:
        model.enable_nested_tensor = True
        assert torch.equal(model(x.masked_fill(hide[..., None], torch.nan), src_key_padding_mask=hide), out)
        full = model(x, src_key_padding_mask=torch.zeros_like(hide))
        torch.testing.assert_close(full, model(x), rtol=0, atol=0)


def test_dropout_of_layers_is_drawn_and_repeats():
    model, x = encoder(dropout=0.3), torch.randn(3, 9, 16)
    torch.manual_seed(3)
    first = model(x, src_key_padding_mask=PADDING)
    second = model(x, src_key_padding_mask=PADDING)
    torch.manual_seed(3)
    assert torch.equal(model(x, src_key_padding_mask=PADDING), first) and not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(x, src_key_padding_mask=PADDING), model(x, src_key_padding_mask=PADDING))
    for layer in model.layers:  # each rate is read from its module
        for part in layer.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
            part.dropout = 0.0 if isinstance(part, fastattn.nn.MultiHeadAttention) else getattr(part, "dropout", None)
    model.train()
    torch.testing.assert_close(model(x), model.eval()(x), rtol=1e-6, atol=1e-6)


def test_compile_and_export():
    """While a call is traced padding stays in, since nothing may be read."""
    model, x = encoder().eval(), torch.randn(3, 9, 16)
    call = functools.partial(model, src_key_padding_mask=PADDING)
    expected, keep = call(x), ~PADDING[..., None]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, src_key_padding_mask=PADDING) * keep, expected * keep, rtol=1e-5, atol=1e-5)
    exported = torch.export.export(model, (x,), {"src_key_padding_mask": PADDING}).module()
    torch.testing.assert_close(exported(x, src_key_padding_mask=PADDING) * keep, expected * keep, rtol=1e-5, atol=1e-5)


def test_wrong_arguments():
    model, x, layer = encoder(), torch.randn(3, 9, 16), fastattn.nn.DecoderLayer(16, 2, 24, batch_first=True)
    packing = fastattn.Packing.from_mask(~PADDING)
    with pytest.raises(ValueError, match="src_key_padding_mask"):
        model(x, src_key_padding_mask=PADDING[:, :5])
    for padding in (PADDING.int(), PADDING.T):
        with pytest.raises((ValueError, TypeError), match="src_key_padding_mask must"):
            model(x, src_key_padding_mask=padding)
    with pytest.raises(ValueError, match="mask must have the shape"):
        model(x, torch.zeros(5, 9))
    with pytest.raises(TypeError, match="mask must be a tensor"):
        model(x, [[0]])
    for padding in (None, PADDING):
        with pytest.raises(ValueError, match="is_causal says"):
            model(x, src_key_padding_mask=padding, is_causal=True)
    with pytest.raises(ValueError, match="is_causal is about"):
        model(x, masks.full(), is_causal=True)
    with pytest.raises(TypeError, match="EncoderLayer"):
        fastattn.nn.Encoder(nn.TransformerEncoderLayer(16, 2), 2)
    with pytest.raises(ValueError, match="memory_packing"):
        layer(packing.pack(x), x, packing=packing)
    with pytest.raises(ValueError, match="activation"):
        fastattn.nn.FeedForward(16, 24, activation="tanh")
    with pytest.raises(NotImplementedError, match="mask"):
        model.layers[0](packing.pack(x), CAUSAL, packing=packing)


def test_decoder_of_packings():
    layer = perturbed(fastattn.nn.DecoderLayer(16, 2, 24, dropout=0.0, batch_first=True))
    tgt, memory = torch.randn(3, 9, 16), torch.randn(3, 7, 16)
    over = torch.arange(7) >= torch.tensor([[7], [3], [5]])
    padded = layer(tgt, memory, CAUSAL, None, PADDING, over, tgt_is_causal=True)
    own, others = fastattn.Packing.from_mask(~PADDING), fastattn.Packing.from_mask(~over)
    packed = layer(own.pack(tgt), others.pack(memory), mask=masks.causal(), packing=own, memory_packing=others)
    torch.testing.assert_close(packed, own.pack(padded), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu", "relu", "geglu", "swiglu"])
def test_feed_forward(activation):
    ffn, x, dy = perturbed(fastattn.nn.FeedForward(16, 24, activation)), torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    leaf = x.clone().requires_grad_()
    ffn(leaf).backward(dy)
    weights = ffn.linear1.weight, ffn.linear1.bias, ffn.linear2.weight, ffn.linear2.bias
    names = "dw1", "db1", "dw2", "db2"
    found = {"y": ffn(x).detach(), "dx": leaf.grad, **{name: w.grad for name, w in zip(names, weights, strict=True)}}
    yardstick = gated_ffn_yardstick if activation in GATED else ffn_yardstick
    assert_accurate(found, yardstick(x, *(w.detach() for w in weights), dy, activation))


# convert


def whole():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2, nn.LayerNorm(16)),
            "decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24, batch_first=True, activation="gelu"), 1),
            "attention": nn.MultiheadAttention(16, 2, kdim=8, vdim=4, add_bias_kv=True),
        }
    ).eval()


def results(model):
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(3, 9, 16, generator=g), torch.randn(3, 9, 16, generator=g)
    memory = model["encoder"](x, src_key_padding_mask=PADDING)
    out = model["decoder"](y, memory, tgt_mask=CAUSAL, memory_key_padding_mask=PADDING)
    one, weights = model["attention"](y, x[..., :8], x[..., 4:8])
    return memory * ~PADDING[..., None], out, one, weights


def test_convert_there_and_back():
    model = whole()
    expected, parameters, names = results(model), list(model.parameters()), list(model.state_dict())
    converted = fastattn.nn.convert(model)
    assert converted is model
    kinds = {type(part).__name__ for part in model.modules()}
    assert {"Encoder", "EncoderLayer", "DecoderLayer", "MultiHeadAttention"} <= kinds
    assert not kinds & {"TransformerEncoder", "TransformerEncoderLayer", "TransformerDecoderLayer", "MultiheadAttention"}
    assert all(x is y for x, y in zip(model.parameters(), parameters, strict=True)) and list(model.state_dict()) == names
    for found, wanted in zip(results(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    fastattn.nn.convert(model, for_export=True)
    assert [type(part) for part in model.modules()] == [type(part) for part in whole().modules()]
    assert all(x is y for x, y in zip(model.parameters(), parameters, strict=True)) and list(model.state_dict()) == names
    assert not any(part.training for part in model.modules())
    for found, wanted in zip(results(model), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_convert_leaves(caplog):
    class Own(nn.TransformerEncoderLayer):
        pass

    hooked = nn.MultiheadAttention(16, 2)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict(
        {
            "own": nn.TransformerEncoder(Own(16, 2, batch_first=True), 2),
            "tanh": nn.TransformerEncoderLayer(16, 2, activation=torch.tanh),
            "hooked": hooked,
            "taken": nn.MultiheadAttention(16, 2),
        }
    )
    before = [type(part) for part in model.modules()]
    with caplog.at_level(logging.WARNING, "fastattn"):
        fastattn.nn.convert(model)
    assert [type(part) for part in model.modules()][:-2] == before[:-2]
    assert type(model["taken"]) is fastattn.nn.MultiHeadAttention
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(" ")[0] for line in told] == ["own", "tanh", "hooked"]
    assert "Own" in told[0] and "activation" in told[1] and "hooks" in told[2]
    with pytest.raises(TypeError, match="module"):
        fastattn.nn.convert("bert")
    for options in ({"num_kv_heads": 1}, {"alibi": True}, {"rotary": fastattn.nn.Rotary()}):
        with pytest.raises(NotImplementedError, match=f"has no {next(iter(options))}"):
            fastattn.nn.convert(encoder(**options), for_export=True)
    with pytest.raises(NotImplementedError, match="swiglu"):
        fastattn.nn.convert(encoder(activation="swiglu"), for_export=True)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):  # a name like torch.nn's
    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


def spoil(layer, part):
    if part == "linear":
        layer.linear1 = Doubled(16, 24)
    elif part == "norm":
        layer.norm2 = nn.RMSNorm(16)
    elif part == "dropout":
        layer.dropout1 = nn.Identity()
    elif part == "attention":
        layer.self_attn = type("Own", (nn.MultiheadAttention,), {})(16, 2, batch_first=True)
    elif part == "method":
        layer._ff_block = lambda x: x * 0
    elif part == "parameter":
        layer.gamma = nn.Parameter(torch.ones(1))
    else:
        nn.utils.parametrizations.weight_norm(layer.self_attn, "in_proj_weight")
    return layer


@pytest.mark.parametrize("part", ["linear", "norm", "dropout", "attention", "method", "parameter", "parametrized", "name"])
def test_convert_looks_at_every_part(part, caplog):
    """What one of them computes otherwise is never lost, also inside an encoder."""
    make = TransformerEncoderLayer if part == "name" else nn.TransformerEncoderLayer
    layer = make(16, 2, 24, 0.0, batch_first=True)
    layer = layer if part == "name" else spoil(layer, part)
    whole = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True), 2)
    whole.layers[1] = layer
    x = torch.randn(3, 9, 16)
    for model in (layer, whole):
        expected, names = model(x), list(model.state_dict())
        with caplog.at_level(logging.WARNING, "fastattn"):
            assert fastattn.nn.convert(model) is model
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        assert list(model.state_dict()) == names
    assert len(caplog.records) == 2


@pytest.mark.parametrize("other", [nn.Identity(), nn.TransformerDecoderLayer(16, 2), nn.Sequential()])
def test_an_encoder_of_other_layers_is_left(other, caplog):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2)
    model.layers[1] = other
    with caplog.at_level(logging.WARNING, "fastattn"):
        assert fastattn.nn.convert(model) is model and type(model.layers[0]) is nn.TransformerEncoderLayer
    assert type(other).__name__ in caplog.text
    assert type(other).__name__ in fastattn.accelerate(model).report.left[""]


def test_convert_keeps_modes_ties_and_activations():
    layer = nn.TransformerEncoderLayer(16, 2, 24, 0.5, nn.GELU(), batch_first=True)
    model = nn.TransformerEncoder(layer, 2).train()
    model.layers[1] = model.layers[0]
    model.layers[0].eval()
    model.layers[0].dropout2.train()
    modes = {name: part.training for name, part in model.named_modules() if "activation" not in name}
    converted = fastattn.nn.convert(model)
    assert {name: part.training for name, part in converted.named_modules()} == modes
    assert converted.layers[0] is converted.layers[1] and converted.layers[0].activation == "gelu"
    back = fastattn.nn.convert(converted, for_export=True)
    assert back.training and not back.layers[0].training and back.layers[0].activation is F.gelu


@pytest.mark.parametrize(
    "name", ["linear1", "linear2", "norm1", "norm2", "dropout1", "dropout2", "dropout", "self_attn.out_proj"]
)
@pytest.mark.parametrize("norm_first", [False, True])
def test_what_is_put_into_a_layer_later_runs(name, norm_first):
    """A hook, or another module in a part's place, as adapters are."""
    layer = perturbed(fastattn.nn.EncoderLayer(16, 2, 24, 0.0, norm_first=norm_first, batch_first=True))
    x, part = torch.randn(3, 9, 16), layer.get_submodule(name)
    expected = layer(x)
    hook = part.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)  # called, and not fused
    hook.remove()
    hook = part.register_forward_hook(lambda module, args, out: out * 1.5)
    hooked = layer(x)
    hook.remove()
    layer.set_submodule(name, nn.Sequential(part, nn.Hardtanh(-1e9, 1e9)))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(hooked, expected)


def test_results_may_be_changed_in_place():
    x = torch.randn(3, 9, 16, requires_grad=True)
    model, ffn = fastattn.nn.MultiHeadAttention(16, 2, batch_first=True), fastattn.nn.FeedForward(16, 24, "geglu")
    for out in (model(x, x, x, need_weights=False)[0], ffn(x), encoder()(x)):
        expected = torch.autograd.grad((out + x).sum(), x, retain_graph=True)[0]
        out += x
        torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], expected)


def test_one_module_under_two_names():
    shared = nn.MultiheadAttention(16, 2)
    model = fastattn.nn.convert(nn.ModuleDict({"one": shared, "two": shared}))
    assert model["one"] is model["two"] and type(model["one"]) is fastattn.nn.MultiHeadAttention
