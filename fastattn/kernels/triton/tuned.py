"""The tables that say which tiles a kernel takes, and the choice of a row among them.

A row holds for one kernel and one class of requests: exact values of some fields (null: any), and the most of one size that it
serves (null: any), from beyond `above` where that is given. The first row that fits wins, of these tables in order: the user's,
written by `python -m fastattn tune` for the GPU that it ran on, then a shipped one for the same device, then the shipped one of
its architecture, which leaves no request without a row. Nothing is timed when a kernel is called: the same request on the same
GPU gets the same tiles.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastattn.kernels.triton.launch import GPU
from fastattn.lowering import TILE

SHIPPED = Path(__file__).parents[2] / "data" / "tiles"
BY = ("measured", "compiled")  # timed on a GPU, or judged by what the compiled kernel holds


class Config(NamedTuple):
    """Tile sizes (queries and keys, or rows and columns), warps per program, pipeline stages of the loop."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


class ProductConfig(NamedTuple):
    """A tile of the result, the step along the reduced index, warps per program, pipeline stages of the loop."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


class Kernel(NamedTuple):
    """The form of a kernel's rows: its config, the fields with the type of their values, the size that is bounded."""

    config: type[Config] | type[ProductConfig]
    fields: dict[str, type]
    bounded: str | None


# block_d: columns of the wider tile; listed: whether the mask comes with lists of tiles; longest: the most keys.
# odd: whether rows are not made of units of 16 bytes; z: whether it is kept; tiles: the most 128 x 128 tiles of the result.
# dtype: half or fp32; block_n: the power of two that holds a row.
_ATTENTION = Kernel(Config, {"block_d": int, "dtype": str, "listed": bool}, "longest")
KERNELS = {
    **dict.fromkeys(("attention_forward", "attention_dq", "attention_dkdv", "attention_backward"), _ATTENTION),
    "linear_forward": Kernel(ProductConfig, {"dtype": str, "odd": bool, "activation": str, "z": bool}, "tiles"),
    "linear_dgrad": Kernel(ProductConfig, {"dtype": str, "odd": bool}, "tiles"),
    **dict.fromkeys(("norm_forward", "norm_backward"), Kernel(Config, {"block_n": int, "dtype": str}, None)),
}
# In place of tiles, of linear_forward: PyTorch's product and then the activation, or its product with the activation behind it
LIBRARY, EPILOGUE = "library", "library_epilogue"
# Activations that are one kernel of PyTorch's, and those that its product can have behind it
ACTIVATIONS = {LIBRARY: ("gelu", "gelu_tanh", "relu", "silu"), EPILOGUE: ("gelu_tanh", "relu")}
ONE_KERNEL = "attention_backward"  # in place of attention_dq and attention_dkdv; without a config it is not taken


class Row(NamedTuple):
    kernel: str
    fields: dict[str, Any]
    above: int | None
    most: int | None
    config: Any  # the kernel's config, or LIBRARY, EPILOGUE, or None
    by: str
    source: str | None  # the device and what told it, of a measured row
    table: str  # where the row is from, for people


class Table(NamedTuple):
    name: str  # for people
    rows: tuple[Row, ...]


class Tiles:
    """The tables that hold for a GPU, in order."""

    def __init__(self, tables: tuple[Table, ...]) -> None:
        self.tables = tables
        self._classes: dict[tuple, list[Row]] = {}

    def row(self, kernel: str, size: int, library: bool = False, **fields: Any) -> Row:
        """The first row that fits. `size`: of what `bounded` names, or 0; `library`: whether PyTorch's product may be a row."""
        key = kernel, library, *fields.items()
        rows = self._classes.get(key)
        if rows is None:
            rows = [row for table in self.tables for row in table.rows if _fits(row, kernel, library, fields)]
            self._classes[key] = rows
        return next(row for row in rows if (row.above is None or row.above < size) and (row.most is None or size <= row.most))


def _fits(row: Row, kernel: str, library: bool, fields: dict[str, Any]) -> bool:
    if row.kernel != kernel or (isinstance(row.config, str) and not library):
        return False
    return all(row.fields[name] in (None, value) for name, value in fields.items())


def sources(rows: Iterable[Row]) -> str:
    """Where rows are from, and by what they were chosen, in words."""
    return "; ".join(dict.fromkeys(f"{row.table} ({row.source if row.by == 'measured' else row.by})" for row in rows))


def dtype_class(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "half"


@cache
def tiles_of(gpu: GPU) -> Tiles:
    """Read when a GPU's kernels are first called, or explained; a table that is wrong is refused by name and row."""
    path = None if gpu.name is None else user_table(gpu.name)
    return shipped(gpu) if path is None else Tiles((read(path, gpu.name), *shipped(gpu).tables))


@cache
def shipped(gpu: GPU) -> Tiles:
    """Without the user's table."""
    paths = [*([] if gpu.name is None else [SHIPPED / file_name(gpu.name)]), architecture(gpu.sm)]
    return Tiles(tuple(read(path, gpu.name) for path in paths if path.exists()))


def architecture(sm: int) -> Path:
    """sm_90's table is for GPUs with its products and its shared memory; those of sm_12x have sm_89's.

    The tiles of sm_80.json fit the 99 KB of shared memory of sm_86, sm_89 and sm_120, and none spills more than 64 bytes. An
    IEEE fp32 tl.dot takes small tiles, as do rows that are not made of units of 16 bytes; ids, bits and the places of listed
    tiles take registers too. With mma.sync both accumulators of 64 keys and the products' operands are more than 255 registers.
    A program of a norm holds about 1024 elements, or one row, with 8 or 16 for each thread: more would spill in the backward.
    """
    return SHIPPED / ("sm_90.json" if 90 <= sm < 120 else "sm_80.json")


def file_name(device: str) -> str:
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def user_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fastattn" / "tiles"


def user_table(device: str) -> Path | None:
    """The file that FASTATTN_TUNED names, else the one in the user's cache folder, if it is there."""
    named = os.environ.get("FASTATTN_TUNED")
    if named:
        if not os.path.isfile(named):
            raise ValueError(f"FASTATTN_TUNED: {named} is not a file")
        return Path(named)
    path = user_folder() / file_name(device)
    return path if os.path.isfile(path) else None


def read(path: Path, device: str | None = None) -> Table:
    """Raises ValueError, naming the file and the row, for a table that is not one, or one of another device."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: this is not a table of tiles: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("device"), str) or not isinstance(found.get("rows"), list):
        raise ValueError(f'{path}: a table of tiles is an object with "device" and "rows"')
    if path.parent != SHIPPED and found["device"] != device:
        raise ValueError(f"{path}: this table is of {found['device']}, but the GPU is {device}")
    name = f"{path.name}, shipped" if path.parent == SHIPPED else str(path)
    rows: list[Row] = []
    for number, row in enumerate(found["rows"], 1):
        try:
            rows.append(_row(row, name))
            _check_order(rows)
        except ValueError as error:
            raise ValueError(f"{path}: row {number}, {json.dumps(row)}: {error}") from None
    return Table(name, tuple(rows))


def _row(given: Any, table: str) -> Row:
    if not isinstance(given, dict) or given.get("kernel") not in list(KERNELS):
        raise ValueError(f'a row is an object whose "kernel" is one of {", ".join(KERNELS)}')
    kernel = KERNELS[given["kernel"]]
    names = ["kernel", *kernel.fields, *filter(None, [kernel.bounded]), "config", "by"]
    if missing := [name for name in names if name not in given]:
        raise ValueError(f"{missing[0]} is missing")
    optional = ("source", "above") if kernel.bounded else ("source",)
    if unknown := [name for name in given if name not in (*names, *optional)]:
        raise ValueError(f"{unknown[0]} is not a field of {given['kernel']}")
    for name, kind in kernel.fields.items():
        if given[name] is not None and type(given[name]) is not kind:
            raise ValueError(f"{name} must be {kind.__name__} or null")
    if given.get("dtype") not in (None, "half", "fp32"):
        raise ValueError("dtype must be half, fp32 or null")
    most, above = given[kernel.bounded] if kernel.bounded else None, given.get("above")
    for name, bound in ((kernel.bounded, most), ("above", above)):
        if bound is not None and (type(bound) is not int or bound < 0):
            raise ValueError(f"{name} must be a number or null")
    if given["by"] not in BY or (given["by"] == "measured" and not given.get("source")):
        raise ValueError('by must be "compiled", or "measured" with a source')
    fields = {name: given[name] for name in kernel.fields}
    return Row(given["kernel"], fields, above, most, _config(given, kernel), given["by"], given.get("source"), table)


def _config(row: dict[str, Any], kernel: Kernel) -> Any:
    """The config of a row, if a kernel can run with it."""
    values, name = row["config"], row["kernel"]
    if values is None and name == ONE_KERNEL:
        return None
    if name == "linear_forward" and values in (LIBRARY, EPILOGUE):
        if row["activation"] not in ACTIVATIONS[values]:
            raise ValueError(f"{values} is for the activations {', '.join(ACTIVATIONS[values])}")
        if values == EPILOGUE and row["z"] is not False:
            raise ValueError(f"{EPILOGUE} leaves no z: z must be false")
        return values
    size = len(kernel.config._fields)
    if not isinstance(values, list) or len(values) != size or any(type(value) is not int for value in values):
        raise ValueError(f"config must be {', '.join(kernel.config._fields)}")
    config = kernel.config(*values)
    least = 1 if name.startswith("norm") else 16  # of tl.dot
    *blocks, warps, stages = values
    if any(block < least or block & (block - 1) for block in blocks) or warps not in (1, 2, 4, 8, 16, 32):
        raise ValueError(f"tiles must be powers of two of at least {least}, warps powers of two up to 32")
    if not 1 <= stages <= 8:
        raise ValueError("num_stages must be in 1..8")
    if name.startswith("norm") and config.BLOCK_N != row["block_n"]:
        raise ValueError("BLOCK_N must be block_n: a program holds whole rows")
    if name == ONE_KERNEL and (row["longest"] is None or row["longest"] > config.BLOCK_N):
        raise ValueError("longest must be at most BLOCK_N: one tile holds all keys")
    listable = name.startswith("attention") and name != ONE_KERNEL and row["listed"] is not False
    if listable and max(config.BLOCK_M, config.BLOCK_N) > TILE:
        raise ValueError(f"tiles of masks that list tiles must be at most {TILE}")
    return config


def _check_order(rows: list[Row]) -> None:
    """The last row is not hidden behind an earlier one of the same class."""
    *earlier, last = rows
    for row in earlier:
        same = (row.kernel, row.fields, isinstance(row.config, str)) == (last.kernel, last.fields, isinstance(last.config, str))
        reaches = row.most is None or (last.most is not None and last.most <= row.most)
        if same and reaches and (row.above or 0) <= (last.above or 0):
            raise ValueError("an earlier row of the same class serves all that this one would")
