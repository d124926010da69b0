"""`python -m fastattn info | explain | verify | bench | masks | tune`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

import fastattn
from fastattn import testing
from fastattn.activations import ACTIVATIONS
from fastattn.info import info
from fastattn.ops.attention import BACKENDS

SHAPE, MASK = "8,12,256,64", "padding"  # of a request that names none


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return args.run(args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m fastattn", description=fastattn.__doc__)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("info", help="versions, devices, and which backends are available")
    command.add_argument("--json", action="store_true", help="for a program to read")
    command.add_argument("--verbose", action="store_true", help="also the name of each CUDA kernel")
    command.set_defaults(run=run_info, parser=command)

    command = commands.add_parser("explain", help="which backend a request takes, and why not the others")
    _request_options(command)
    command.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="(default %(default)s)")
    command.add_argument("--verbose", action="store_true", help="of attention also the kernels, their tiles, FLOPs and bytes")
    command.add_argument("--linear", type=_linear_shape, help="ROWS,K,F: a linear layer in place of attention")
    command.add_argument("--activation", choices=ACTIVATIONS, help="of the linear layer")
    command.set_defaults(run=run_explain, parser=command)

    command = commands.add_parser("verify", help="the accuracy rule for every available backend on this device")
    command.add_argument(
        "--quick",
        action="store_true",
        help="made for a minute on a GPU: every op, in fp16 and bf16, with the masks and activations of real models",
    )
    command.add_argument("--json", action="store_true", help="for a program to read")
    command.set_defaults(run=run_verify, parser=command)

    command = commands.add_parser("bench", help="time attention of one shape, or the model in a checkpoint directory")
    command.add_argument(
        "checkpoint", nargs="?", type=Path, help="a directory with config.json and model.safetensors; B, L of --shape"
    )
    _request_options(command)
    command.set_defaults(run=run_bench, parser=command)

    command = commands.add_parser("masks", help="draw each kind of mask, and the tiles that kernels skip, into PNG files")
    command.add_argument("--out", type=Path, default=Path("masks"), help="the folder for them (default %(default)s)")
    command.set_defaults(run=run_masks, parser=command)

    command = commands.add_parser("tune", help="time tiles of the Triton kernels on this GPU, and keep the best for later calls")
    command.add_argument("--quick", action="store_true", help="bf16, 64 columns, a few sizes: made for two minutes on an H100")
    command.add_argument("--out", type=Path, help="the table (default: FASTATTN_TUNED, or the device's file in the user's cache)")
    command.add_argument("--kernels", help="NAME,...: these only (default: all)")
    command.set_defaults(run=run_tune, parser=command)
    return parser.parse_args(argv)


def _request_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--shape", type=_shape, default=SHAPE, help="B,H,L,D or B,H,M,N,D (default %(default)s)")
    command.add_argument(
        "--mask", choices={**testing.REQUESTS, **testing.MASKS}, default=MASK, metavar="NAME",
        help="a function of fastattn.masks, with arguments that suit the shape, or a combination: "
        f"{', '.join((*testing.REQUESTS, *testing.MASKS))} (default %(default)s)",
    )  # fmt: skip
    command.add_argument("--dtype", choices=testing.DTYPES, default="fp32", help="(default %(default)s)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    command.add_argument("--device", type=_device, default=default, help="(default %(default)s)")


def _sizes(text: str, form: str) -> list[int]:
    """The integers of `text`, as many as one of the forms has names."""
    parts = text.split(",")
    whole = all(part.strip().isdecimal() for part in parts)
    if not whole or len(parts) not in (len(one.split(",")) for one in form.split(" or ")):
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}")
    sizes = [int(part) for part in parts]
    if max(sizes) >= 2**31:
        raise argparse.ArgumentTypeError(f"sizes must be below 2^31, got {max(sizes)}")
    return sizes


def _shape(text: str) -> tuple[int, int, int, int, int]:
    sizes = _sizes(text, "B,H,L,D or B,H,M,N,D")
    if len(sizes) == 4:
        sizes.insert(3, sizes[2])
    B, H, M, N, D = sizes
    if D < 1:
        raise argparse.ArgumentTypeError(f"D must be at least 1, got {D}")
    return B, H, M, N, D


def _linear_shape(text: str) -> tuple[int, int, int]:
    rows, inputs, outputs = _sizes(text, "ROWS,K,F")
    return rows, inputs, outputs


def _device(text: str) -> str:
    match = re.fullmatch("cpu|cuda(:[0-9]+)?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if text != "cpu" and int((match[1] or ":0")[1:]) >= count:
        raise argparse.ArgumentTypeError(f"there is no {text} here: PyTorch finds {count} CUDA devices")
    return text


def _refuse(args: argparse.Namespace, sentence: str) -> NoReturn:
    parser: argparse.ArgumentParser = args.parser
    parser.error(sentence)


def _inputs(args: argparse.Namespace) -> testing.AttentionInputs:
    B, H, M, N, D = args.shape
    try:
        return testing.attention_inputs(B, H, M, N, D, testing.DTYPES[args.dtype], args.device, mask=args.mask)
    except RuntimeError as error:  # which PyTorch raises for want of memory
        _refuse(args, f"--shape: no tensors of this shape can be made: {str(error).splitlines()[0]}")


def _linear_inputs(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """x and weight."""
    rows, inputs, outputs = args.linear
    options: dict[str, Any] = {"dtype": testing.DTYPES[args.dtype], "device": args.device}
    try:
        return torch.empty(rows, inputs, **options), torch.empty(outputs, inputs, **options)
    except RuntimeError as error:
        _refuse(args, f"--linear: no tensors of this shape can be made: {str(error).splitlines()[0]}")


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
    cuda = found["cuda_build"]
    if cuda is None or not cuda["cuda"]:
        print(f"{'cuda build':10} none: {cuda['reason'] if cuda else 'the package was not installed by pip'}")
    else:
        archs = ", ".join(f"sm_{arch}" for arch in cuda["archs"])
        print(f"{'cuda build':10} nvcc {cuda['nvcc']} for {archs}; needs a driver of CUDA {cuda['nvcc'].split('.')[0]} or later")
        for kernel in cuda["kernels"] if args.verbose else ():
            print(f"{'kernel':10} {kernel}")
    cpu = found["cpu_build"]
    print(f"{'cpu build':10} {'C++ draws dropout' if cpu['cpu'] else 'none: ' + cpu['reason'].splitlines()[0]}")
    for device, tables in found["tiles"].items():
        print(f"{'tiles':10} of {device}: {', then '.join(tables)}")
    return 0


def run_explain(args: argparse.Namespace) -> int:
    if args.activation and not args.linear:
        _refuse(args, "--activation is for --linear")
    if args.linear and (args.verbose or (args.shape, args.mask) != (_shape(SHAPE), MASK)):
        _refuse(args, "--shape, --mask and --verbose are for attention, not for --linear")
    if args.linear:
        tensors = _linear_inputs(args)
        print(fastattn.explain_linear(*tensors, activation=args.activation, backend=args.backend))
        return 0
    x = _inputs(args)
    print(fastattn.explain(x.q, x.k, x.v, x.mask, scale=x.scale, backend=args.backend, verbose=args.verbose))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from fastattn import verify

    return verify.main(args.json, args.quick)


def run_bench(args: argparse.Namespace) -> int:
    from fastattn import bench

    if args.checkpoint is None:
        return bench.attention(_inputs(args))
    if (args.mask, args.dtype) != (MASK, "fp32"):
        _refuse(args, "--mask and --dtype are for a shape; a checkpoint is timed in fp32 and without padding")
    batch, _, length, *_ = args.shape
    if not batch * length:
        _refuse(args, "--shape: of a checkpoint B and L must be at least 1")
    try:
        models = bench.load(args.checkpoint, args.device)
    except (OSError, ValueError, RuntimeError) as error:  # NotImplementedError among them
        _refuse(args, f"{args.checkpoint}: {' '.join(str(error).split())}")
    except ImportError as error:
        _refuse(args, f"{error.name} is needed for checkpoints: pip install {error.name}")
    return bench.checkpoint(models, batch, length)


def run_masks(args: argparse.Namespace) -> int:
    from fastattn import pictures

    try:
        paths = pictures.draw(args.out)
    except ImportError as error:
        _refuse(args, f"{error.name} is needed for pictures: pip install {error.name}")
    except OSError as error:
        _refuse(args, f"--out: {error}")
    print("\n".join(map(str, paths)))
    return 0


def run_tune(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        _refuse(args, "tune times kernels on a GPU, and PyTorch finds no CUDA device here")
    try:
        from fastattn import tune
    except ModuleNotFoundError as error:
        _refuse(args, f"{error.name} is needed for tiles: pip install {error.name}")
    kernels = args.kernels.split(",") if args.kernels else tune.KERNELS
    if unknown := [name for name in kernels if name not in tune.KERNELS]:
        _refuse(args, f"--kernels: {unknown[0]!r} is not one of {', '.join(tune.KERNELS)}")
    try:
        path = tune.table_path(args.out, tune.launch.gpu_of(torch.device("cuda", torch.cuda.current_device())))
    except (OSError, ValueError) as error:
        _refuse(args, f"--out: {error}")
    return tune.main(args.quick, path, kernels)


if __name__ == "__main__":
    sys.exit(main())
