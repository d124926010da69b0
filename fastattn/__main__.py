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
from fastattn.info import info

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
    command.add_argument("checkpoint", nargs="?", type=Path, help="a directory with config.json and model.safetensors")
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
    """One row per backend, dtype and mask; the figures are the worst relative errors over shapes, in units of roundoff."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    available = [name for name, state in info()["backends"].items() if state["available"] and (name != "cpu" or device == "cpu")]
    rows = []
    for backend, dtype, mask in itertools.product(available, DTYPES, testing.MASKS):
        rows.append({"device": device, "backend": backend, "dtype": dtype, "mask": mask, **_verify(backend, dtype, mask, device)})
        if not args.json:
            row = rows[-1]
            errors = " ".join(f"{name} {error:5.2f}" for name, error in row["errors"].items())
            print(f"{backend:7} {dtype} {mask:16} {row['failure'] or 'ok  ' + errors}", flush=True)
    failures = [row for row in rows if row["failure"]]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print(f"{len(rows) - len(failures)} passed, {len(failures)} failed on {info()['devices'][0]}")
    return 1 if failures or not rows else 0


def _verify(backend: str, dtype: str, mask: str, device: str) -> dict:
    worst: dict[str, float] = {}
    shapes = VERIFY_SHAPES[:2] if backend == "triton" and device == "cpu" else VERIFY_SHAPES  # the interpreter is slow
    for B, H, M, N, D in shapes:
        x = testing.attention_inputs(B, H, M, N, D, DTYPES[dtype], device, mask=mask)
        try:
            result, yardstick = testing.run_attention(x, backend), testing.attention_yardstick(x)
            errors = testing.assert_accurate(result, yardstick, cpu_half_gradients=backend == "cpu")
        except AssertionError as error:
            return {"errors": worst, "failure": f"{(B, H, M, N, D)}: {error}"}
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
    return {"errors": worst, "failure": None}


def run_bench(args: argparse.Namespace) -> int:
    from fastattn import bench

    if args.checkpoint is None:
        return bench.attention(_inputs(args))
    return bench.checkpoint(args.checkpoint, args.shape[0], args.shape[2], args.device)


if __name__ == "__main__":
    sys.exit(main())
