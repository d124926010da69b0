"""What the attention kernels compute and move beside the least possible, for the lengths of real encoders.

From the kernels' own tiles and launches (`fastattn.plans`), as they are laid out for an H100: nothing is run or timed here.
"""

from __future__ import annotations

import importlib

import torch

from fastattn import masks, plans
from fastattn.lowering import LoweredMask
from fastattn.ops.attention_plans import AttentionProblem

B, H, D = 32, 12, 64
SHAPES = {  # model: (length, is it causal)
    "CLIP ViT-B/32, vision": (50, False),
    "CLIP, text": (77, True),
    "BERT": (128, False),
    "CLIP ViT-B/16, vision": (197, False),
    "CLIP ViT-L/14, vision": (257, False),
    "BERT, long": (384, False),
    "BERT, longest": (512, False),
    "CLIP ViT-L/14@336, vision": (577, False),
}
BACKENDS = ("cuda", "triton")


def rows() -> list[list[str]]:
    """A line for each shape and backend: bytes and FLOPs over the least, forward and backward."""
    lines = []
    for model, (length, causal) in SHAPES.items():
        mask = masks.causal().lower(length, length) if causal else LoweredMask()
        problem = AttentionProblem("cuda", torch.float16, B=B, H=H, M=length, N=length, D=D, Hkv=H, Dv=D, band=causal)
        for backend in BACKENDS:
            module = importlib.import_module(f"fastattn.kernels.{backend}.attention")
            forward, backward = (
                plans.work(module.plan(problem, direction), mask, problem, direction) for direction in (False, True)
            )
            elements = B * H * length * D
            lines.append([
                f"{model}, {length}{', causal' if causal else ''}",
                backend,
                f"{forward.moved / forward.least_bytes:.2f}x",
                f"{forward.flops / forward.useful_flops:.2f}x",
                str(len(backward.kernels)),
                f"{backward.moved / elements:.1f}",
                f"{backward.flops / backward.useful_flops:.2f}x",
            ])  # fmt: skip
    return lines


HEAD = ["shape", "backend", "forward: bytes", "FLOPs", "backward: kernels", "bytes per element", "FLOPs"]
