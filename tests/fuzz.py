"""Random requests to attention against the fp64 specification, each a line that can be run again.

A case is a dict of plain values. `python tests/fuzz.py '<JSON of a case>'` runs one; `python tests/fuzz.py --backend cpu
--examples 5000` searches for longer than the tests do. Mask expressions are nested lists: ["&", ["window", 3, null, "top_left"],
["rows"]].
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import hypothesis
import torch
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent))
from backends import device_of

from fastattn import masks
from fastattn.testing import BIASES, COLD, DTYPES, HOT, assert_accurate, attention_inputs, attention_yardstick, run_attention

LAYOUTS = {  # of (B, L, H, D) memory, which the others are copied from; what lies between is NaN
    "heads inside": lambda x: x,
    "heads outside": lambda x: x.contiguous(),
    "odd address": lambda x: torch.cat([x.new_full((1,), float("nan")), x.flatten()])[1:].view(x.shape),
    "wide rows": lambda x: torch.cat([x, torch.full_like(x, float("nan"))], -1)[..., : x.shape[-1]],
    "last stride 2": lambda x: torch.stack([x, torch.full_like(x, float("nan"))], -1).flatten(-2)[..., ::2],
    "stride 0": lambda x: x[:1].expand(x.shape),
}
HEAD_DIMS = {"cuda": (32, 64, 128), "triton": (8, 16, 40, 80), "cpu": (1, 8, 40, 64), "eager": (1, 8, 40)}
HALF = {"cuda": ("fp16", "bf16")}


def atoms():
    bound = st.none() | st.integers(-5, 80)
    align = st.sampled_from(masks.ALIGNMENTS)
    named = st.sampled_from(["causal", "padding", "padding_queries", "left", "holes", "documents", "rows", "columns", "conv"])
    return st.one_of(
        st.tuples(st.just("window"), bound, bound, align).map(list),
        st.tuples(st.just("prefix_lm"), align).map(list),
        st.tuples(named).map(list),
        st.tuples(st.just("dense"), st.lists(st.booleans(), min_size=4, max_size=4)).map(list),
    )


def expressions():
    """Up to three operators deep."""
    depth = atoms()
    for _ in range(3):
        depth = depth | st.tuples(st.sampled_from("&|"), depth, depth).map(list)
    return depth


@st.composite
def cases(draw, backend: str) -> dict:
    longest = {"cuda": 140, "triton": 100}.get(backend, 140)
    length = st.integers(0, longest) | st.sampled_from([0, 1, 63, 64, 65, 77, 129])
    Hkv = draw(st.integers(1, 2))
    D = draw(st.sampled_from(HEAD_DIMS[backend]))
    bias, dropout = "none", 0.0
    if backend != "cuda":
        bias, dropout = draw(st.just("none") | st.sampled_from(list(BIASES))), draw(st.sampled_from([0.0, 0.0, 0.1, 0.6]))
    # where rows see one key, dropout leaves no gradient of q and k but what the output was rounded by, which no rule can judge
    dtypes = ("fp32",) if dropout else HALF.get(backend, ("fp32", "fp32", "fp16", "bf16"))
    return {
        "backend": backend,
        "dtype": draw(st.sampled_from(dtypes)),
        "B": draw(st.integers(1, 2)),
        "H": Hkv * draw(st.integers(1, 2)),
        "Hkv": Hkv,
        "M": draw(length),
        "N": draw(length),
        "D": D,
        "Dv": D if backend == "cuda" else draw(st.sampled_from(HEAD_DIMS[backend])),
        "mask": draw(st.none() | expressions()),
        "bias": bias,
        "dropout": dropout,
        "layout": draw(st.sampled_from(list(LAYOUTS))),
        "amplitude": draw(st.sampled_from([1, 1, 4])),
        "dlse": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


def build(expression: list, B: int, H: int, M: int, N: int, g: torch.Generator, device: str) -> masks.Mask:
    kind, *arguments = expression
    if kind in "&|":
        left, right = (build(part, B, H, M, N, g, device) for part in arguments)
        return left & right if kind == "&" else left | right

    def lengths(most: int) -> torch.Tensor:
        return torch.randint(0, most + 1, (B,), generator=g).to(device)

    def ids(length: int) -> torch.Tensor:
        return (torch.rand(B, length, generator=g) < 0.1).cumsum(1).sub(torch.randint(0, 2, (B, 1), generator=g)).to(device)

    grid = (max(-(-(N - 7) // 6), 1), 6)
    if kind == "window":
        return masks.window(*arguments)
    if kind == "prefix_lm":
        return masks.prefix_lm(lengths(N), *arguments)
    if kind == "dense":
        shape = [size if wanted else 1 for size, wanted in zip((B, H, M, N), *arguments, strict=True)]
        return masks.dense((torch.rand(shape, generator=g) < 0.7).to(device))
    return {
        "causal": masks.causal,
        "padding": lambda: masks.padding(lengths(N)),
        "padding_queries": lambda: masks.padding(lengths(N), lengths(M)),
        "left": lambda: masks.key_padding(torch.arange(N, device=device) >= lengths(N)[:, None]),
        "holes": lambda: masks.key_padding((torch.rand(B, N, generator=g) < 0.6).to(device)),
        "documents": lambda: masks.documents(ids(M), ids(N)),
        "rows": lambda: masks.rows(*grid, prefix=7),
        "columns": lambda: masks.columns(*grid, prefix=7),
        "conv": lambda: masks.conv(*grid, 3, prefix=7),
    }[kind]()


def check(case: dict) -> None:
    """Raise AssertionError unless the request is answered within the accuracy rule, its mask as its definition says."""
    B, H, M, N = (case[name] for name in "BHMN")
    device = device_of(case["backend"])
    x = attention_inputs(
        B, H, M, N, case["D"], DTYPES[case["dtype"]], device, Hkv=case["Hkv"], Dv=case["Dv"],
        seed=case["seed"], amplitude=case["amplitude"], dlse=case["dlse"], bias=case["bias"], dropout=case["dropout"],
    )  # fmt: skip
    mask = case["mask"] and build(case["mask"], B, H, M, N, torch.Generator().manual_seed(case["seed"]), device)
    layout = LAYOUTS[case["layout"]]
    q, k, v, dout = (layout(t) for t in (x.q, x.k, x.v, x.dout))
    x = replace(x, q=q, k=k, v=v, dout=dout, mask=mask)
    if mask is not None:
        assert torch.equal(x.lowered().visible(B, H, M, N, q.device), mask.dense(B, H, M, N, q.device)), "lowered mask"
    c = HOT if case["amplitude"] > 1 else COLD
    assert_accurate(run_attention(x, case["backend"]), attention_yardstick(x), c=c, cpu_half_gradients=case["backend"] == "cpu")


def search(backend: str, examples: int, seed: int | None = None) -> None:
    """Run `examples` cases; the smallest that fails is reported with the line that runs it again."""

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=seed is None, database=None)
    @hypothesis.given(cases(backend))
    def one(case):
        hypothesis.note(f"python tests/fuzz.py '{json.dumps(case)}'")
        check(case)

    if seed is not None:
        one = hypothesis.seed(seed)(one)
    one()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", type=json.loads)
    parser.add_argument("--backend", choices=HEAD_DIMS, default="cpu")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.case is not None:
        check(args.case)
    else:
        search(args.backend, args.examples, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
