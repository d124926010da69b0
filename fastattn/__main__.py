"""`python -m fastattn info | explain | verify | bench`."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

import fastattn
from fastattn import testing
from fastattn.activations import ACTIVATIONS
from fastattn.info import info
from fastattn.ops.ffn import BACKENDS as LINEAR_BACKENDS

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VERIFY_SHAPES = [(2, 2, 64, 64, 64), (2, 2, 77, 77, 64), (2, 2, 129, 129, 32), (2, 2, 197, 197, 80), (2, 2, 65, 130, 128)]


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return args.run(args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m fastattn", description=fastattn.__doc__)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("info", help="versions, devices, and which backends are available")
    command.add_argument("--json", action="store_true", help="for a program to read")
    command.set_defaults(run=run_info)

    command = commands.add_parser("explain", help="which backend a request takes, and why not the others")
    _request_options(command)
    command.add_argument("--backend", default="auto")
    command.set_defaults(run=run_explain)

    command = commands.add_parser("verify", help="the accuracy rule for every available backend on this device")
    command.add_argument("--json", action="store_true", help="for a program to read")
    command.set_defaults(run=run_verify)

    command = commands.add_parser("bench", help="time attention of one shape, or the model in a checkpoint directory")
    command.add_argument(
        "checkpoint", nargs="?", type=Path, help="a directory with config.json and model.safetensors; B, L of --shape"
    )
    _request_options(command)
    command.set_defaults(run=run_bench)
    return parser.parse_args(argv)


def _request_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shape", type=_shape, default="8,12,256,64", help="B,H,L,D or B,H,M,N,D (default %(default)s)")
    command.add_argument("--mask", choices=testing.MASKS, default="padding", help="(default %(default)s)")
    command.add_argument("--dtype", choices=DTYPES, default="fp32", help="(default %(default)s)")
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")


def _shape(text: str) -> tuple[int, int, int, int, int]:
    sizes = [int(size) for size in text.split(",")]
    if len(sizes) == 4:
        sizes.insert(3, sizes[2])
    if len(sizes) != 5 or min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,H,L,D or B,H,M,N,D")
    B, H, M, N, D = sizes
    return B, H, M, N, D


def _inputs(args: argparse.Namespace) -> testing.AttentionInputs:
    B, H, M, N, D = args.shape
    return testing.attention_inputs(B, H, M, N, D, DTYPES[args.dtype], args.device, mask=args.mask)


def run_info(args: argparse.Namespace) -> int:
    found = info()
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for name in ("fastattn", "python", "torch", "triton"):
        print(f"{name:10} {found[name] or 'not installed'}")
    for device in found["devices"]:
        print(f"{'device':10} {device}")
    for name, state in found["backends"].items():
        print(f"{'backend':10} {name}: {'available' if state['available'] else state['reason']}")
    return 0


def run_explain(args: argparse.Namespace) -> int:
    x = _inputs(args)
    print(fastattn.explain(x.q, x.k, x.v, x.mask, scale=x.scale, backend=args.backend))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """A row per op, backend, dtype and mask or activation; its figures are relative errors in units of the dtype's roundoff."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    available = [name for name, state in info()["backends"].items() if state["available"] and (name != "cpu" or device == "cpu")]
    requests = [("attention", *request) for request in itertools.product(available, DTYPES, testing.MASKS)]
    linear = [name for name in available if name in LINEAR_BACKENDS]
    requests += [("linear", *request) for request in itertools.product(linear, DTYPES, ACTIVATIONS)]
    rows = []
    for op, backend, dtype, kind in requests:
        verify = _verify_attention if op == "attention" else _verify_linear
        errors, failure = verify(backend, dtype, kind, device)
        row = {"device": device, "op": op, "backend": backend, "dtype": dtype, "kind": kind}
        rows.append({**row, "errors": errors, "failure": failure})
        if not args.json:
            figures = " ".join(f"{name} {error:5.2f}" for name, error in errors.items())
            print(f"{op:9} {backend:7} {dtype} {kind:16} {failure or 'ok  ' + figures}", flush=True)
    failures = [row for row in rows if row["failure"]]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print(f"{len(rows) - len(failures)} passed, {len(failures)} failed on {info()['devices'][0]}")
    return 1 if failures or not rows else 0


def _verify_attention(backend: str, dtype: str, mask: str, device: str) -> tuple[dict[str, float], str | None]:
    """The worst error of each tensor over shapes, and what failed, if anything did."""
    worst: dict[str, float] = {}
    shapes = VERIFY_SHAPES[:2] if backend == "triton" and device == "cpu" else VERIFY_SHAPES  # the interpreter is slow
    for B, H, M, N, D in shapes:
        x = testing.attention_inputs(B, H, M, N, D, DTYPES[dtype], device, mask=mask)
        try:
            result, yardstick = testing.run_attention(x, backend), testing.attention_yardstick(x)
            errors = testing.assert_accurate(result, yardstick, cpu_half_gradients=backend == "cpu")
        except AssertionError as error:
            return worst, f"{(B, H, M, N, D)}: {error}"
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
    return worst, None


def _verify_linear(backend: str, dtype: str, activation: str, device: str) -> tuple[dict[str, float], str | None]:
    """The same for `linear` with an activation, with bias and residual."""
    g = torch.Generator().manual_seed(0)
    sizes = ((2, 33, 65), (96, 65), (96,), (2, 33, 96), (2, 33, 96))
    tensors = [torch.randn(size, generator=g).div(size[-1] ** 0.5 if len(size) == 2 else 1) for size in sizes]
    x, weight, bias, residual, dy = (t.to(device, DTYPES[dtype]) for t in tensors)
    try:
        result = testing.run_linear(x, weight, bias, residual, dy, activation, backend)
        return testing.assert_accurate(result, testing.linear_yardstick(x, weight, bias, residual, dy, activation)), None
    except AssertionError as error:
        return {}, str(error)


def run_bench(args: argparse.Namespace) -> int:
    from fastattn import bench

    if args.checkpoint is None:
        return bench.attention(_inputs(args))
    if (args.mask, args.dtype) != ("padding", "fp32"):
        raise SystemExit("bench: --mask and --dtype are for a shape; a checkpoint is timed in fp32 and without padding")
    return bench.checkpoint(args.checkpoint, args.shape[0], args.shape[2], args.device)


if __name__ == "__main__":
    sys.exit(main())
