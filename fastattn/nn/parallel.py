"""`tensor_parallel_plan`: fastattn's layers over several ranks, by torch.distributed.tensor.parallel.parallelize_module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fastattn.nn.attention import MultiHeadAttention
from fastattn.nn.decoder import DecoderLayer
from fastattn.nn.encoder import Encoder, EncoderLayer
from fastattn.nn.feed_forward import FeedForward

if TYPE_CHECKING:
    from torch.distributed.tensor.parallel import ParallelStyle


def tensor_parallel_plan(module: nn.Module, *, sequence_parallel: bool = False) -> dict[str, ParallelStyle]:
    """A plan that divides fastattn's layers inside a model over the n ranks of a mesh of one dimension.

    Attention is divided by heads, feed-forward blocks by hidden features. Every rank is given the same input, and gets the same
    output, as of the undivided model. Parameters of fastattn's layers, and of a LayerNorm at the end of an `Encoder`, become
    DTensors of the same names, shapes and values; other modules are left, and plans for them may be joined to this one.

    Args:
        module: a model that contains MultiHeadAttention, FeedForward, EncoderLayer, Encoder or DecoderLayer, or is one.
        sequence_parallel: between attention and feed-forward block each rank has one n-th of the places of a sequence, for which
            alone it computes sums, norms and dropout, and keeps what their gradients need: inside an Encoder from its first layer
            to its last, inside each other layer. Lengths have to be multiples of n; padding is not taken out.

    Returns:
        A style by the name of a submodule, for `parallelize_module(module, mesh, plan)`. That raises ValueError where n does not
        divide num_heads, num_kv_heads or dim_feedforward, where a module is divided already, or the mesh has more dimensions.

    Raises:
        TypeError: module is none. ValueError: there is nothing to divide.

    In training with dropout, seed all n ranks alike: what all of them have is dropped alike. Weights of attention and hidden
    features are drawn by the seed that the undivided call would draw, plus the rank, and a rank's heads and features count from
    0; with sequence_parallel, so is what a norm adds.

    >>> encoder = fastattn.nn.Encoder(fastattn.nn.EncoderLayer(32, 4, 64, batch_first=True), num_layers=2)
    >>> list(fastattn.nn.tensor_parallel_plan(encoder))
    ['layers.0', 'layers.0.self_attn', 'layers.1', 'layers.1.self_attn']
    """
    from fastattn.nn import styles  # PyTorch's own take a second to import

    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    plan: dict[str, ParallelStyle] = {}
    ends: dict[nn.Module, tuple[bool, bool]] = {}  # of an encoder's layers: whether it divides the sequence, and joins it again
    dims: dict[nn.Module, int] = {}  # along which an attention is given a part of the sequence
    for name, part in module.named_modules():
        if isinstance(part, Encoder):
            ends |= {layer: (layer is part.layers[0], layer is part.layers[-1]) for layer in part.layers}
            if type(part.norm) is nn.LayerNorm:
                plan[f"{name}.norm".lstrip(".")] = styles.Replicated()
        elif isinstance(part, (EncoderLayer, DecoderLayer)):
            dim = None
            if sequence_parallel:
                dim = 1 if part.self_attn.batch_first else 0
                dims |= {child: dim for child in part.children() if isinstance(child, MultiHeadAttention)}
            plan[name] = styles.LayerParallel(dim, *ends.get(part, (True, True)))
        elif isinstance(part, MultiHeadAttention):
            plan[name] = styles.HeadParallel(dims.get(part))
        elif isinstance(part, FeedForward):
            plan[name] = styles.FeatureParallel()
    if not plan:
        raise ValueError("module has none of fastattn's layers to divide")
    if sequence_parallel and not any(isinstance(style, styles.LayerParallel) for style in plan.values()):
        raise ValueError("sequence_parallel is for an EncoderLayer or a DecoderLayer, of which module has none")
    return plan
