"""Result files, `benchmarks/results/<device>/<suite>.json`, and the table that a run prints."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

import fastattn
from fastattn.info import cpu_name
from fastattn.timing import Ceilings

SLEPT_US = 200  # of host time for each call, which the timing of records without a `method` allowed for
ROOT = Path(__file__).resolve().parent
RESULTS = ROOT / "results"
RECORD = (
    "model", "layers", "hidden", "heads", "input_source", "provider", "device", "dtype", "mode", "batch", "seq", "fill",
    "ms_median", "ms_p20", "ms_p80", "tokens_per_s", "peak_bytes", "ratio_vs_eager", "ratio_vs_sdpa", "floor_fraction",
    "max_error", "refusal", "wrong",
)  # fmt: skip
PACKAGES = (
    "triton", "transformers", "numpy", "onnxruntime", "openvino", "flash-attn", "xformers",
    "transformer-engine", "liger-kernel",
)  # fmt: skip


def record(**fields) -> dict:
    """One row of a result file: every field of RECORD, None where nothing was measured, then what only its suite has.

    `refusal` holds the provider's own words where it could not serve, `wrong` those of the accuracy gate; neither has a time.
    """
    return {**dict.fromkeys(RECORD), **fields}


def device_name(device: torch.device) -> str:
    """The model of the processor, as it calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def device_slug(device: torch.device) -> str:
    """The folder of a device: "h100" for an NVIDIA H100 of any form, "cpu-..." with the model's name for a CPU."""
    name = device_name(device)
    if device.type == "cuda":
        known = re.search(r"\b([ABHLV]\d{2,3}S?|GB?\d{3}|RTX \w+)\b", name)
        return _slug(known[1] if known else name)
    return "cpu-" + _slug(re.sub(r"\((R|TM)\)|\bprocessor\b|\bcpu\b|\d+-core.*|@.*|,.*", " ", name, flags=re.IGNORECASE))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return {**found, "torch": torch.__version__, "fastattn": fastattn.__version__}


def commit() -> str | None:
    """The short hash of the working tree's commit, "-dirty" if a file that is not itself a result differs; None outside git."""
    git = ["git", "-C", str(ROOT.parent)]
    code = [".", ":!benchmarks/results", ":!docs", ":!README.md"]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = [*git, "status", "--porcelain", "--untracked-files=no", "--", *code]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def add_floor(records: list[dict], ceilings: dict[torch.dtype, Ceilings]) -> None:
    """Fill in which fraction of a row's time the floor is, for rows that have their useful work."""
    known = {_dtype_name(dtype): found for dtype, found in ceilings.items()}
    for row in records:
        if row["ms_median"] is not None:
            row["floor_fraction"] = known[row["dtype"]].floor_ms(row["useful_flops"], row["useful_bytes"]) / row["ms_median"]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write(
    records: list[dict], suite: str, device: torch.device, *, quick: bool, out: Path | None = None,
    ceilings: dict[torch.dtype, Ceilings] | None = None, **extra,
) -> Path:  # fmt: skip
    """Write one suite's file, replacing that file alone, and return its path."""
    measured = {
        _dtype_name(dtype): {"gemm_tflops": found.flops * 1e-12, "copy_gbps": found.bandwidth * 1e-9}
        for dtype, found in (ceilings or {}).items()
    }
    path = (out or RESULTS) / device_slug(device) / f"{suite}.json"
    command = " ".join(["python -m", "benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]])
    content = {
        "device": device_name(device), "versions": versions(), "commit": commit(), "command": command, "quick": quick,
        "ceilings": measured, **extra,
        "records": records,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")  # a run that dies while writing leaves the earlier result whole
    partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    os.replace(partial, path)
    return path


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def without_leaks(records: list[dict]) -> tuple[list[dict], str | None]:
    """(the records, without the times that hold the host's, a sentence that says how many and why).

    Records that name no `method` come from a GPU timing that slept a fixed time for each call: where the host took longer, the
    kernels waited for it. A method that is named is one that keeps the host out, or means to have it in.
    """
    leaked = [row for row in records if _leaked(row)]
    if not leaked:
        return records, None
    timed = sum(row["ms_median"] is not None for row in records)
    empty: dict = dict.fromkeys(("ms_median", "ms_p20", "ms_p80", "tokens_per_s", "floor_fraction"))
    rows = [{**row, **empty, "left_out": True} if _leaked(row) else row for row in records]
    words = (
        f"Left out: {len(leaked)} of {timed} timed rows, whose calls took the host more than {SLEPT_US} us each. This run's "
        "timing covered no more than that, so that such a row would hold the host's time and not the kernel's."
    )
    return rows, words


def _leaked(row: dict) -> bool:
    return row["ms_median"] is not None and row.get("method") is None and (row.get("host_us") or 0) > SLEPT_US


def with_captured(records: list[dict]) -> list[dict]:
    """Whole models that were timed both as called and as a CUDA graph, as two rows each. Of a training step that no graph can
    hold there is the first alone."""
    if not any(map(was_captured, records)):
        return records
    rows = []
    for row in records:
        rows.append({**row, "mode": f"{row['mode']}, as called"})
        if was_captured(row) and (row["mode"] != "train" or row["captured_ms"] is not None):
            own = dict.fromkeys(("ms_p20", "ms_p80", "ratio_vs_eager", "wrong"))
            own |= {"ms_median": row["captured_ms"], "refusal": row.get("captured_refusal")}
            own |= {"ratio_vs_sdpa": row.get("captured_ratio_vs_sdpa"), "mode": f"{row['mode']}, captured"}
            rows.append({**row, **own})
    return rows


def was_captured(row: dict) -> bool:
    """Whether that was tried."""
    return row.get("captured_ms") is not None or bool(row.get("captured_refusal"))


def failures(records: list[dict]) -> list[dict]:
    """Rows that must fail the run: a result beyond the accuracy gate, or an error where fastattn should serve."""
    return [row for row in records if row["wrong"]]


def print_table(rows: list[dict], columns: dict[str, str]) -> None:
    """Rows as aligned text; columns: field -> format spec. A row without a time shows its words instead."""
    cells = [list(columns)]
    for row in rows:
        cells.append([format(row[field], spec) if row.get(field) is not None else "-" for field, spec in columns.items()])
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    said = ["", *("" if row["ms_median"] is not None else f"  {row['wrong'] or row['refusal'] or ''}" for row in rows)]
    for line, words in zip(cells, said, strict=True):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() + words)


def progress(items: list, what: str):
    """The items behind a progress bar, on a terminal only."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, leave=False)
