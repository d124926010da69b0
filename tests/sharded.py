"""What two ranks compute for tests/test_nn_distributed.py, compared with one process on each: {name: error or what was said}."""

import copy
import json

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastattn
from fastattn import biases, masks
from fastattn.dropout import LAYER_NORM, draw_seed, kept_elements
from fastattn.nn import DecoderLayer, Encoder, EncoderLayer, FeedForward, MultiHeadAttention, tensor_parallel_plan

E, H, F, B, L, S = 24, 4, 16, 4, 8, 6
LENGTHS = {"equal": [5, 5, 5, 5], "unequal": [8, 7, 2, 2]}  # 19, which two ranks do not divide
FULL = StateDictOptions(full_state_dict=True)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def error(found, expected):
    """The largest difference, in units of the largest number."""
    found, expected = whole(found).detach(), whole(expected).detach()
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def worst(found, expected):
    return max(error(a, b) for a, b in zip(found, expected, strict=True))


def perturbed(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return module


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# Data parallelism: each rank has half of a batch


class Model(nn.Module):
    """Words over an encoded input, both with losses of their own."""

    def __init__(self):
        super().__init__()
        layer = EncoderLayer(E, H, F, dropout=0.0, batch_first=True)
        self.encoder = Encoder(layer, 2, norm=nn.LayerNorm(E))
        self.decoder = DecoderLayer(E, H, F, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(E, 3)

    def forward(self, x, padding, words):
        memory = self.encoder(x, src_key_padding_mask=padding)
        words = self.decoder(words, memory, memory_key_padding_mask=padding, mask=masks.causal())
        return self.head(memory), self.head(words)


def data(lengths):
    padding = torch.arange(L) >= torch.tensor(LENGTHS[lengths])[:, None]
    return random(B, L, E), padding, random(B, S, E)


def loss_sum(outputs, padding):
    """Over real tokens and words."""
    tokens, words = outputs
    return tokens[~padding].logsumexp(-1).sum() + words.square().sum()


def stepped(model, x, padding, words, share):
    """Outputs, gradients and parameters after a step. share: by how much a rank's sum is multiplied."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    outputs = model(x, padding, words)
    (loss_sum(outputs, padding) * share).backward()
    grads = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
    optimizer.step()
    return outputs, grads, {name: whole(p) for name, p in model.named_parameters()}


def ddp(model):
    return DistributedDataParallel(model)


def fsdp2(model):
    for layer in (*model.encoder.layers, model.decoder):
        fully_shard(layer)
    return fully_shard(model)


def data_parallel(rank, wrap, lengths):
    model = perturbed(Model())
    parallel = wrap(copy.deepcopy(model))
    x, padding, words = data(lengths)
    count = (~padding).sum() + words[..., 0].numel()
    expected = stepped(model, x, padding, words, 1 / count)
    own = slice(rank * B // 2, (rank + 1) * B // 2)
    counted = (~padding[own]).sum() + words[own][..., 0].numel()
    dist.all_reduce(counted)  # the tokens of all ranks; gradients are averaged, so that a rank's sum counts twice
    outputs, grads, after = stepped(parallel, x[own], padding[own], words[own], 2 / counted)
    names = [f"module.{name}" if wrap is ddp else name for name in expected[1]]
    assert names == list(grads)
    tokens, said = expected[0][0][own], expected[0][1][own]
    return {
        "outputs": worst((outputs[0][~padding[own]], outputs[1]), (tokens[~padding[own]], said)),
        "gradients": worst(grads.values(), expected[1].values()),
        "step": worst(after.values(), expected[2].values()),
    }


# Tensor parallelism: each rank has half of the heads


def compared(module, call, *inputs, sequence_parallel=False, mesh, divide=parallelize_module):
    module = copy.deepcopy(perturbed(module))
    plan = tensor_parallel_plan(module, sequence_parallel=sequence_parallel)
    ours = divide(copy.deepcopy(module), mesh, plan)
    found = []
    for m in (ours, module):
        given = [x.clone().requires_grad_() for x in inputs]
        outputs = [out for out in call(m, *given) if out is not None]
        sum((out * random(*out.shape)).sum() for out in outputs).backward()
        grads = [whole(p.grad).clone() for p in m.parameters()]
        total = nn.utils.clip_grad_norm_(m.parameters(), 1.0)
        torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01).step()
        found.append((outputs, [x.grad for x in given], grads, [total], list(m.parameters())))
    names = "outputs", "inputs' gradients", "gradients", "norm of gradients", "step"
    return {name: worst(a, b) for name, a, b in zip(names, *found, strict=True)}


def attend(module, query, key=None, value=None, **options):
    key = query if key is None else key
    return module(query, key, key if value is None else value, **options)


def over(*names, **options):
    """A call with the inputs after the first as these arguments."""
    return lambda m, x, *given: attend(m, x, **dict(zip(names, given, strict=True)), **options)


def layers(norm_first, batch_first):
    """By name a layer of each kind, a call and the inputs."""
    options = {"dropout": 0.0, "norm_first": norm_first, "batch_first": batch_first}
    padding = torch.arange(L) >= torch.tensor(LENGTHS["unequal"])[:, None]
    real = (~padding if batch_first else ~padding.T)[..., None]
    x, memory = (random(B, n, E) if batch_first else random(n, B, E) for n in (L, S))
    encoder = Encoder(EncoderLayer(E, H, F, **options), 2, norm=nn.LayerNorm(E))
    grouped = Encoder(EncoderLayer(E, H, F, bias=False, num_kv_heads=2, **options), 1)
    return {
        "encoder": (encoder, lambda m, x: [m(x, src_key_padding_mask=padding) * real], x),
        "grouped heads": (grouped, lambda m, x: [m(x)], x),
        "decoder": (DecoderLayer(E, H, F, **options), lambda m, x, y: [m(x, y, mask=masks.causal())], x, memory),
    }


def attentions():
    def made(**options):
        return MultiHeadAttention(E, H, batch_first=True, **options)

    x, memory, none = random(B, L, E), random(B, S, E), {"need_weights": False}
    encoder = Encoder(EncoderLayer(E, H, F, dropout=0.0, batch_first=True), 2)
    packing = fastattn.Packing.from_lengths(torch.tensor(LENGTHS["unequal"]), L)
    return {
        "weights": (made(), over(), x),
        "weights of each head": (made(), over("key", average_attn_weights=False), x, memory),
        "one sequence": (made(), over(), x[0]),
        "key and value": (made(kdim=10, vdim=12), over("key", "value"), x, random(B, S, 10), random(B, S, 12)),
        "added keys": (made(add_bias_kv=True, add_zero_attn=True), over(), x),
        "alibi": (made(alibi=True), over(**none), x),
        "a mask of each head": (made(), over("attn_mask"), x, random(B * H, L, L)),
        "an encoder's": (encoder, lambda m, x, floats: [m(x, floats)], x, random(B * H, L, L)),
        "a mask of all heads": (made(), over("attn_mask"), x, random(L, L)),
        "a bias of each head": (made(), over("bias", **none), x, random(1, H, L, L)),
        "a bias of all heads": (made(), over("bias", **none), x, random(B, 1, L, L)),
        "a relative bias": (made(), lambda m, x, t: attend(m, x, bias=biases.relative(t), **none), x, random(32, H)),
        "bools of each head": (made(), over(mask=random(1, H, L, L) > 0, **none), x),
        "packed": (encoder, lambda m, x: [m(x, packing=packing)], random(sum(LENGTHS["unequal"]), E)),
        "feed-forward": (FeedForward(E, F), lambda m, x: [m(x)], x),
    }


def fsdp2_of_divided():
    """On a mesh of two dimensions, of which one has but one process."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(1)
    encoder = Encoder(EncoderLayer(E, H, F, dropout=0.0, batch_first=True), 2, norm=nn.LayerNorm(E))

    def sharded(module, tp, plan):
        parallelize_module(module, tp, plan)
        for layer in module.layers:
            fully_shard(layer, mesh=mesh["dp"])
        return fully_shard(module, mesh=mesh["dp"])

    return compared(encoder, lambda m, x: [m(x)], random(B, L, E), mesh=mesh["tp"], divide=sharded)


def gated_rows(mesh):
    """Of both halves of a gated activation's first map, a rank's rows."""
    module = perturbed(FeedForward(E, F, "swiglu"))
    weight = module.linear1.weight.detach().clone()
    ours = parallelize_module(module, mesh, tensor_parallel_plan(module))
    rows = ours.shards.rows(ours.linear1.weight, (1, 1))
    (rows * (1 + mesh.get_local_rank())).sum().backward()
    own = [half.chunk(2)[mesh.get_local_rank()] for half in weight.chunk(2)]
    places = torch.tensor([1.0, 2.0, 1.0, 2.0]).repeat_interleave(F // 2)[:, None].expand(-1, E)
    return {"rows": error(rows, torch.cat(own)), "gradient": error(ours.linear1.weight.grad, places)}


# Dropout


def dropout_of_attention(mesh):
    """By the seed of an undivided call plus the rank, of heads that count from 0."""
    module = perturbed(MultiHeadAttention(E, H, dropout=0.5, batch_first=True))
    ours = parallelize_module(copy.deepcopy(module), mesh, tensor_parallel_plan(module))
    x, found = random(B, L, E), {}
    for weights in (False, True):
        torch.manual_seed(3)
        out, kept = ours(x, x, x, need_weights=weights, average_attn_weights=False)
        torch.manual_seed(3)
        seed = draw_seed(None, x.device)
        qkv = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).unflatten(-1, (3, H, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        drawn = torch.cat([fastattn.dropout_mask(seed + r, B, H // 2, L, L, 0.5) for r in range(2)], 1)
        expected = (q @ k.mT * (E // H) ** -0.5).softmax(-1) * drawn * 2
        found[f"output {weights}"] = error(out, module.out_proj((expected @ v).transpose(1, 2).flatten(2)))
        if weights:
            found["weights"] = error(kept, expected)
    assert not torch.equal(*drawn.chunk(2, 1))
    return found | {"in evaluation": error(ours.eval()(x, x, x)[0], module.eval()(x, x, x)[0])}


def dropout_of_features(mesh):
    module = perturbed(FeedForward(E, F, dropout=0.5))
    ours, x = parallelize_module(copy.deepcopy(module), mesh, tensor_parallel_plan(module)), random(B, L, E)
    torch.manual_seed(3)
    out = ours(x)
    torch.manual_seed(3)
    seed = draw_seed(None, x.device)
    w1, b1, w2 = module.linear1.weight.chunk(2), module.linear1.bias.chunk(2), module.linear2.weight.chunk(2, 1)
    parts = [fastattn.ffn(x, w1[r], b1[r], w2[r], None, dropout=0.5, seed=seed + r) for r in range(2)]
    return {"output": error(out, sum(parts) + module.linear2.bias)}


def dropout_of_layers(mesh):
    """What all ranks have is dropped alike, and their parts of a sequence differently."""
    found = {}
    for norm_first in (False, True):
        for sequence_parallel in (False, True):
            layer = perturbed(EncoderLayer(E, H, F, dropout=0.3, batch_first=True, norm_first=norm_first))
            parallelize_module(layer, mesh, tensor_parallel_plan(layer, sequence_parallel=sequence_parallel))
            torch.manual_seed(3)
            out, others = layer(random(B, L, E)), torch.empty(2 * B, L, E)
            gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(others, out.detach())
            found[f"{norm_first} {sequence_parallel}"] = worst(others.chunk(2), [out] * 2)
    return found


def dropout_of_parts(mesh):
    """Of ones that attention, or the feed-forward block, adds to nothing: what a rank's part of a sequence loses of them."""
    layer = EncoderLayer(E, H, F, dropout=0.0, batch_first=True, norm_first=True)
    found = {}
    for drops, adds in (("dropout1", layer.self_attn.out_proj), ("dropout2", layer.linear2)):
        one = copy.deepcopy(layer)
        with torch.no_grad():
            for part in (one.self_attn.out_proj, one.linear2):
                part.weight.zero_()
                part.bias.zero_()
            (one.self_attn.out_proj if adds is layer.self_attn.out_proj else one.linear2).bias.fill_(1)
        getattr(one, drops).p = 0.5
        ours = parallelize_module(copy.deepcopy(one), mesh, tensor_parallel_plan(one, sequence_parallel=True))
        torch.manual_seed(3)
        out = ours(torch.zeros(B, L, E))
        torch.manual_seed(3)
        if drops == "dropout1":
            seed = draw_seed(None, out.device)
            parts = [kept_elements(seed + r, B * L // 2, E, 0.5, LAYER_NORM).unflatten(0, (B, -1)) for r in range(2)]
            expected = torch.cat(parts, 1) * 2.0
        else:
            expected = one(torch.zeros(B, L, E))
        found[drops] = error(out, expected)
    return found


# State dicts


def tensor_parallel_model(mesh, seed=0):
    torch.manual_seed(seed)
    encoder = Encoder(EncoderLayer(E, H, F, batch_first=True, num_kv_heads=2), 2, norm=nn.LayerNorm(E))
    plain = copy.deepcopy(encoder)
    return plain, parallelize_module(encoder, mesh, tensor_parallel_plan(encoder))


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(whole(found[k]), whole(x)) for k, x in expected.items())


def state_dicts(mesh, folder):
    plain, ours = tensor_parallel_model(mesh)
    expected, found = plain.state_dict(), {}
    found["gathered"] = same(get_model_state_dict(ours, options=FULL), expected)
    weight = ours.layers[0].self_attn.in_proj_weight
    found["a part each"] = weight.to_local().shape[0] * 2 == weight.shape[0] and weight.placements == (Shard(0),)
    for name, options in (("loaded", {}), ("from rank 0", {"broadcast_from_rank0": True})):
        _, other = tensor_parallel_model(mesh, seed=5)
        given = dict(expected) if not options or dist.get_rank() == 0 else {}  # which it changes
        set_model_state_dict(other, given, options=StateDictOptions(full_state_dict=True, **options))
        found[name] = same(other.state_dict(), expected)
    checkpoint.save(get_model_state_dict(ours), checkpoint_id=folder / "divided")
    read = {name: torch.zeros_like(x) for name, x in expected.items()}
    checkpoint.load(read, checkpoint_id=folder / "divided")
    found["file read undivided"] = same(read, expected)
    checkpoint.save(dict(expected), checkpoint_id=folder / "plain")
    read = get_model_state_dict(tensor_parallel_model(mesh, seed=5)[1])
    checkpoint.load(read, checkpoint_id=folder / "plain")
    found["file read divided"] = same(read, expected)
    return found


def autocast(mesh):
    """Dtypes are those of the undivided module."""
    x, found = random(B, L, E), {}
    for module in (MultiHeadAttention(E, H, batch_first=True), FeedForward(E, F), EncoderLayer(E, H, F, 0.0, batch_first=True)):
        call = attend if isinstance(module, MultiHeadAttention) else lambda m, x: (m(x),)
        ours = parallelize_module(copy.deepcopy(module), mesh, tensor_parallel_plan(module))
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = call(ours, x)[0], call(module, x)[0]
        assert out.dtype == expected.dtype
        found[type(module).__name__] = error(out.float(), expected.float())
    return found


def values_of_rank_0(mesh):
    """A model whose ranks began differently is the first rank's."""
    torch.manual_seed(dist.get_rank())
    encoder = Encoder(EncoderLayer(E, H, F, batch_first=True), 1)
    first = copy.deepcopy(encoder).state_dict()
    for x in first.values():
        dist.broadcast(x, 0)
    return {"same": same(parallelize_module(encoder, mesh, tensor_parallel_plan(encoder)).state_dict(), first)}


def sharded_inside(mesh):
    """FSDP2 of linears and norms inside of a layer, which then are called."""
    torch.manual_seed(0)
    layer, x = EncoderLayer(E, H, F, 0.0, batch_first=True), torch.randn(B, L, E)
    inside = copy.deepcopy(layer)
    for part in (inside.linear1, inside.norm2, inside.self_attn.out_proj, inside):
        fully_shard(part)
    return {"output": error(inside(x), layer(x))}


# What is refused


def said(function, *args, **options):
    try:
        function(*args, **options)
    except (TypeError, ValueError, RuntimeError) as refusal:
        return f"{type(refusal).__name__}: {refusal}"
    return ""


def refusals(mesh):
    def divide(module, mesh=mesh, **options):
        return parallelize_module(module, mesh, tensor_parallel_plan(module, **options))

    layer = {"dropout": 0.0, "batch_first": True}
    divided = divide(EncoderLayer(E, H, F, **layer), sequence_parallel=True)
    x = random(B, L, E)
    heads = divide(MultiHeadAttention(E, H, batch_first=True))
    bits = masks.dense(torch.ones(1, H, L, L, dtype=torch.bool))
    return {
        "heads": said(divide, MultiHeadAttention(E, 3)),
        "kv heads": said(divide, MultiHeadAttention(E, H, num_kv_heads=1)),
        "features": said(divide, FeedForward(E, 17)),
        "twice": said(divide, divided),
        "mesh": said(divide, FeedForward(E, F), init_device_mesh("cpu", (1, 2))),
        "length": said(divided, x[:, :7]),
        "bits of all heads": said(attend, heads, x, mask=bits),
        "too many": said(heads, x, x, x, None, True, None, True, False, bits),
        "two queries": said(heads, x, x, x, query=x),
        "no query": said(heads, key=x, value=x),
    }


def main(rank, folder):
    """Writes what rank `rank` found to a file."""
    mesh, found = init_device_mesh("cpu", (2,)), {}
    torch.manual_seed(0)  # models begin alike on both
    for wrap in (ddp, fsdp2):
        for lengths in LENGTHS:
            found[f"{wrap.__name__}, {lengths}"] = data_parallel(rank, wrap, lengths)
    for norm_first, batch_first in ((False, True), (True, False)):
        for kind, case in layers(norm_first, batch_first).items():
            for split in (False, True):
                name = f"{kind}, {'pre' if norm_first else 'post'}-norm{', sequence_parallel' * split}"
                found[name] = compared(*case, sequence_parallel=split, mesh=mesh)
    for name, case in attentions().items():
        found[f"heads: {name}"] = compared(*case, mesh=mesh)
    found["fsdp2 of divided"] = fsdp2_of_divided()
    dropouts = dropout_of_attention, dropout_of_features, dropout_of_layers, dropout_of_parts
    for check in (gated_rows, *dropouts, autocast, values_of_rank_0, sharded_inside):
        found[check.__name__] = check(mesh)
    found["state_dicts"] = state_dicts(mesh, folder)
    found["refusals"] = refusals(mesh)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
