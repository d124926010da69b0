"""`accelerate` in training as models are configured, with dropout, against the model's own code made to drop the same."""

import copy

import pytest
import torch
from ranks import run_by_two_ranks
from replayed import recorded, replayed

import fastattn
from fastattn.dropout import LAYER_NORM

transformers = pytest.importorskip("transformers")
from test_accelerate import CLIP, SMALL, TEXT, VISION, L, gradients, text  # noqa: E402

SMALL_DISTILBERT = {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
IMAGE = {**CLIP, "image_size": 16, "patch_size": 4}
BERT = ([0, LAYER_NORM, LAYER_NORM] * 2, (0,))  # per model: the ops that draw, and the numbers of PyTorch's own dropouts


def bert(name, **options):
    return lambda a, h: getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**SMALL, attention_probs_dropout_prob=a, hidden_dropout_prob=h, **options)
    )


# of the rates of attention's and the hidden dropout
MODELS = {
    "bert": (bert("Bert"), *BERT),
    "roberta": (bert("Roberta", max_position_embeddings=40), *BERT),
    "electra": (bert("Electra", embedding_size=16), *BERT),
    "distilbert": (
        lambda a, h: transformers.DistilBertModel(
            transformers.DistilBertConfig(**SMALL_DISTILBERT, attention_dropout=a, dropout=h)
        ),
        [0, LAYER_NORM] * 2, (0,),
    ),
    "clip_text": (lambda a, h: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, attention_dropout=a)), [0, 0], ()),
    "clip_vision": (
        lambda a, h: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION, attention_dropout=a)), [0, 0], ()
    ),
    "vit": (  # pre-norm: no norm follows what the FFN adds
        lambda a, h: transformers.ViTModel(
            transformers.ViTConfig(**IMAGE, attention_probs_dropout_prob=a, hidden_dropout_prob=h)
        ),
        [0, LAYER_NORM] * 2, (0, 3, 6),
    ),
}  # fmt: skip
IMAGES = ("clip_vision", "vit")
each_model = pytest.mark.parametrize("name", MODELS)


def build(name, attention=0.3, hidden=0.2):
    """The model as it is, and accelerated."""
    torch.manual_seed(0)
    model = MODELS[name][0](attention, hidden)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train(), copy.deepcopy(model)


def inputs(name, **options):
    if name in IMAGES:
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    return text(**options)


def result(model, given):
    out = model(**given).last_hidden_state
    mask = given.get("attention_mask")
    return out if mask is None else out * mask[..., None]


def assert_same(model, ours, given, draws_of, torchs_own, packing=None):
    """In outputs and gradients, of one seed: the accelerated model's draws are replayed in the other."""
    torch.manual_seed(5)
    with recorded() as draws:
        found = result(ours, given)
    assert [tag for _, tag in draws] == draws_of and len({seed.item() for seed, _ in draws}) == len(draws)
    torch.manual_seed(5)
    with replayed(draws, torchs_own, packing):
        expected = result(model, given)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    found_grads, grads = gradients(ours, found), gradients(model, expected)
    assert found_grads.keys() == grads.keys() and len(grads) > 10
    for key, grad in grads.items():
        error = (found_grads[key] - grad).abs().max() / grad.abs().max().clamp(min=1)
        assert error < 2e-5, f"{key}: {error}"


@each_model
def test_training_drops_what_is_configured(name):
    """Also with padding that stays in; the first call proves the layers, and draws nothing for that."""
    model, ours = build(name)
    handle = fastattn.accelerate(ours, strict=True, unpad="never")
    for given in (inputs(name), inputs(name)):
        assert_same(model, ours, given, *MODELS[name][1:])
    assert not handle.report.fallbacks and not handle.report.foreseen
    assert (result(ours, given) - result(ours.eval(), given)).abs().max() > 0.1


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in IMAGES])
def test_without_padding(name, side):
    """Weights of attention are dropped by the sequence and the places in it: under right padding as in the padded batch. What a
    norm adds is dropped by the row of the packed batch."""
    model, ours = build(name, attention=0.3 if side == "right" else 0.0)
    handle = fastattn.accelerate(ours, strict=True, unpad="always")
    draws_of, torchs_own = MODELS[name][1:]
    given = text(side)
    packing = fastattn.Packing.from_mask(given["attention_mask"].bool())
    draws_of = [tag for tag in draws_of if tag or side == "right"]
    assert_same(model, ours, given, draws_of, torchs_own, packing)
    assert not handle.report.fallbacks and not handle.report.padded


@pytest.mark.parametrize("capacity", [None, 80])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_draw_the_same_again(reentrant, capacity):
    grads = []
    for checkpointing in (False, True):
        _, ours = build("bert")
        fastattn.accelerate(ours, strict=True, capacity=capacity)
        if checkpointing:
            ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        given = {**text(lengths=(L, 7, 1, 13)), "output_hidden_states": False}
        torch.manual_seed(5)
        grads.append(gradients(ours, result(ours, given)))
    assert grads[0].keys() == grads[1].keys()
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-5, atol=1e-5)


def test_a_layer_that_differs_is_found_in_training_too():
    """Layers are compared as in evaluation, whatever they drop in training."""
    _, ours = build("bert")
    handle = fastattn.accelerate(ours)
    forward, gelu = torch.nn.functional.gelu, ours.encoder.layer[1].intermediate.intermediate_act_fn
    gelu.act = lambda x: forward(x, approximate="tanh") * 1.01
    result(ours, text())
    assert list(handle.report.left) == ["encoder.layer.1"] and "differs from its own code" in str(handle.report)


def test_compiled_without_a_graph_break():
    _, ours = build("bert")
    fastattn.accelerate(ours, strict=True, prove=False, capacity=80)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    given = text(lengths=(L, 7, 1, 13))
    torch.manual_seed(3)
    found = result(compiled, given)
    gradients(ours, found)
    assert found.isfinite().all() and (found - result(ours.eval(), given)).abs().max() > 0.1


def test_a_dropout_that_is_changed():
    """Rates and modes are read in each call."""
    model, ours = build("bert", 0.0, 0.0)
    fastattn.accelerate(ours, strict=True)
    assert_same(model, ours, text(lengths=(L, L)), [], ())
    for m in (model, ours):
        m.encoder.layer[1].attention.self.dropout.p = 0.5
        m.encoder.layer[0].output.dropout.p = 0.4
    assert_same(model, ours, text(lengths=(L, L)), [LAYER_NORM, 0], ())
    for m in (model, ours):
        m.encoder.layer[1].attention.self.eval()
    assert_same(model, ours, text(lengths=(L, L)), [LAYER_NORM], ())
    for m in (model, ours):
        m.eval()
    assert_same(model, ours, text(lengths=(L, L)), [], ())


@pytest.mark.parametrize("name", ["bert", "clip_text"])
def test_the_report_says_what_is_dropped(name):
    _, ours = build(name)
    handle = fastattn.accelerate(ours, strict=True)
    words = {"bert": "attention dropout (0.3) and hidden dropout (0.2) in training", "clip_text": "attention dropout (0.3) in"}
    assert words[name] in handle.report.accelerated[""] and "own code" not in str(handle.report)
    handle.restore()
    assert "dropout" not in fastattn.accelerate(build(name, 0.0, 0.0)[1]).report.accelerated[""]


def test_everything_is_dropped():
    """A rate of 1 leaves the residual stream alone, and no NaN."""
    _, ours = build("bert", 1.0, 1.0)
    fastattn.accelerate(ours, strict=True)
    out = result(ours, text())
    gradients(ours, out)
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


def test_distributed_ranks_draw_their_own(tmp_path):
    """Each by its default generator, as `nn.Dropout` does: two seeded differently train as one process with both in turn."""
    program = """
        from test_accelerate_dropout import build, result, text
        model, one = build("bert")
        two = copy.deepcopy(one)
        for m in (one, two):
            fastattn.accelerate(m, strict=True)
        parallel = torch.nn.parallel.DistributedDataParallel(two, find_unused_parameters=True)
        given, losses = text(lengths=(24, 7)), []
        torch.manual_seed(7 + rank)
        result(parallel, given).square().sum().backward()
        for seed in (7, 8):
            torch.manual_seed(seed)
            losses.append(result(one, given).square().sum())
        (sum(losses) / 2).backward()
        assert (losses[0] - losses[1]).abs() > 1e-3 * losses[0]
        for (name, p), q in zip(one.named_parameters(), two.parameters()):
            if p.grad is not None:
                assert (p.grad - q.grad).abs().max() <= 2e-5 * p.grad.abs().max().clamp(min=1), name
    """
    run_by_two_ranks(program, tmp_path)
