"""How each of fastattn's layers is divided over ranks: the styles that `tensor_parallel_plan` makes.

Parameters become DTensors of PyTorch's plain placements: Shard(0) of what makes q, k, v and hidden features, Shard(1) of what
takes them, Replicate() of the rest. What a rank computes and communicates is in `Shards`.

n: ranks; B, L, S, H, E: sequences, queries, keys, heads, features.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DeviceMesh, DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from fastattn.biases import Bias
from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.shards import Shards

ROWS: dict[str, Placement] = {"weight": Shard(0), "bias": Shard(0)}
COLUMNS: dict[str, Placement] = {"weight": Shard(1)}
HEADS: dict[str, Placement] = {
    **dict.fromkeys(("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"), Shard(0)),
    **dict.fromkeys(("bias_k", "bias_v"), Shard(2)),  # (1, 1, E)
}
ARGUMENTS = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"
)  # fmt: skip


class HeadParallel(ParallelStyle):
    """A MultiHeadAttention: H / n heads. sequence: the dimension along which ranks have parts of query and output, or None."""

    def __init__(self, sequence: int | None = None) -> None:
        self.sequence = sequence

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, MultiHeadAttention)
        heads = {"num_heads": module.num_heads, "num_kv_heads": module.num_kv_heads}
        module.shards = _shards(module, device_mesh, self.sequence, heads)
        _distribute(module, HEADS, device_mesh, self.src_data_rank)
        _distribute(module.out_proj, COLUMNS, device_mesh, self.src_data_rank)
        module.num_heads, module.num_kv_heads = (count // module.shards.count for count in heads.values())
        module.register_forward_pre_hook(_given_to_heads, with_kwargs=True)
        module.register_forward_hook(_weights_of_all_heads, with_kwargs=True)
        return module


class FeatureParallel(ParallelStyle):
    """A FeedForward: F / n hidden features. sequence: the dimension along which ranks have parts of x and the result, or None."""

    def __init__(self, sequence: int | None = None) -> None:
        self.sequence = sequence

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        sizes = {"dim_feedforward": module.linear2.in_features}
        module.shards = _shards(module, device_mesh, self.sequence, sizes)
        _distribute(module.linear1, ROWS, device_mesh, self.src_data_rank)
        _distribute(module.linear2, COLUMNS, device_mesh, self.src_data_rank)
        return module


class LayerParallel(FeatureParallel):
    """The feed-forward block and the norms of an EncoderLayer or a DecoderLayer, whose attentions have styles of their own.

    divides, joins: of parts of a sequence, whether what the layer is given, and gives, is whole.
    """

    def __init__(self, sequence: int | None = None, divides: bool = True, joins: bool = True) -> None:
        super().__init__(sequence)
        self.divides, self.joins = divides, joins

    def _apply(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)
        for part in module.children():
            if isinstance(part, nn.LayerNorm):
                _distribute(part, {}, device_mesh, self.src_data_rank)
        if self.sequence is not None and self.divides:
            module.register_forward_pre_hook(_divide_sequence, with_kwargs=True)
        if self.sequence is not None and self.joins:
            module.register_forward_hook(_join_sequence)
        return module


class Replicated(ParallelStyle):
    """A module of one tensor that all ranks compute alike."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, {}, device_mesh, self.src_data_rank)
        module.register_forward_pre_hook(lambda _, args: DTensor.from_local(args[0], device_mesh, [Replicate()], run_check=False))
        module.register_forward_hook(lambda _, args, out: out.to_local())
        return module


# Parameters


def _shards(module: Any, mesh: DeviceMesh, sequence: int | None, sizes: dict[str, int]) -> Shards:
    """sizes: of the module, by name, which ranks have to divide."""
    if mesh.ndim != 1:
        raise ValueError(f"device_mesh must have one dimension, got {mesh.ndim}: take one of it by its name")
    if module.shards is not None:
        raise ValueError(f"this {type(module).__name__} is divided already")
    for name, size in sizes.items():
        if size % mesh.size():
            raise ValueError(f"{name} is {size}, which {mesh.size()} ranks do not divide")
    return Shards(mesh.get_group(), mesh.get_local_rank(), mesh.size(), sequence)


def _distribute(module: nn.Module, placements: dict[str, Placement], mesh: DeviceMesh, source: int | None) -> None:
    """The module's own parameters, those without a placement whole. source: the rank whose values count; None: each rank's."""
    for name, parameter in [*module.named_parameters(recurse=False)]:
        divided = distribute_tensor(parameter.detach(), mesh, [placements.get(name, Replicate())], src_data_rank=source)
        module.register_parameter(name, nn.Parameter(divided, requires_grad=parameter.requires_grad))


# What goes in, and comes out


def _given_to_heads(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """What `MultiHeadAttention.forward` is given, for a rank's heads. What is one tensor stays one; a memory is never a part."""
    names = ARGUMENTS[: len(args)]
    if len(args) > len(ARGUMENTS) or not kwargs.keys().isdisjoint(names):
        return args, kwargs  # which `forward` refuses
    given = {**dict(zip(names, args, strict=True)), **kwargs}
    shards, heads = module.shards, module.num_heads * module.shards.count
    entered: dict[int, Tensor] = {}
    for name in ("query", "key", "value"):
        x = given.get(name)
        if not isinstance(x, Tensor) or x.is_nested:
            continue  # `forward` says what is wrong
        if id(x) not in entered:
            entered[id(x)] = shards.enter(x) if x is given.get("query") else shards.shared(x)
        given[name] = entered[id(x)]
    for name in ("key_padding_mask", "attn_mask", "mask", "bias"):
        given[name] = _of_own_heads(shards, given.get(name), heads)
    return (), given


def _of_own_heads(shards: Shards, x: Any, heads: int) -> Any:
    """Of a mask or a bias of all heads; what is for none in particular as it is."""
    if isinstance(x, Bias):
        table, slopes = (None if t is None else _own(shards, t, -1, heads) for t in (x.table, x.slopes))
        return dataclasses.replace(x, table=table, slopes=slopes)
    return _own(shards, x, -3, heads) if isinstance(x, Tensor) else x


def _own(shards: Shards, x: Tensor, dim: int, heads: int) -> Tensor:
    """Of a dimension of heads, or of sequences times heads, a rank's heads. Ranks' gradients are summed."""
    x = shards.shared(x) if x.requires_grad else x
    if x.dim() < -dim or not x.shape[dim] or x.shape[dim] % heads:
        return x
    return shards.part(x.unflatten(dim, (-1, heads)), dim).flatten(dim - 1, dim)


def _weights_of_all_heads(module: Any, args: tuple, kwargs: dict[str, Any], result: tuple) -> tuple[Tensor, Tensor | None]:
    out, weights = result
    if weights is None:
        return result
    if kwargs.get("average_attn_weights", True):
        return out, module.shards.summed(weights) / module.shards.count
    return out, module.shards.joined(weights, -3)


def _divide_sequence(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Of an EncoderLayer's src or a DecoderLayer's tgt."""
    if args:
        return (module.shards.divided(args[0]), *args[1:]), kwargs
    name = "src" if "src" in kwargs else "tgt"
    return args, kwargs if name not in kwargs else {**kwargs, name: module.shards.divided(kwargs[name])}


def _join_sequence(module: Any, args: tuple, out: Tensor) -> Tensor:
    return module.shards.joined(out)
