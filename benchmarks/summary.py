"""What a run showed, in five lines made of its records: where fastattn gained on PyTorch, where not, and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

EVEN = 0.05  # a ratio this near to 1 is neither a gain nor a loss
NOTHING, NOT_RUN = "nothing was timed", "not run: "
NAMED = 4  # cases that a line names at most


def lines(records: list[dict], ours: str | tuple[str, ...], left_out: Sequence[str] = ()) -> list[str]:
    """`ours`, or one of several, is in the names of the providers that are compared; of a case's several the fastest counts."""
    called = "ratio_vs_sdpa", "ratio_vs_eager"
    forward, backward = (ratios(records, ours, modes, *called) for modes in (("infer", "forward"), ("train", "backward")))
    graphs = ratios(records, ours, ("infer",), "captured_ratio_vs_sdpa")
    everywhere = all(row["ratio_vs_sdpa"] is not None for row in _timed(records, ours))
    whom = "SDPA" if everywhere else "SDPA or, where there is none, eager"
    captured = any("captured_ms" in row for row in records)
    return [
        _gains("forward passes", forward, whom),
        _gains("backward passes" if any(row["mode"] == "backward" for row in records) else "training steps", backward, whom),
        _gains("both in CUDA graphs", graphs, "SDPA") if captured else _fastest(records),
        _no_gain({**forward, **backward}),
        _left_out(records, left_out),
    ]


def ratios(records: list[dict], ours: str | tuple[str, ...], modes: tuple[str, ...], *fields: str) -> dict[str, float]:
    """Case -> how many times faster the fastest of ours is, by the first of a row's fields that is there."""
    found: dict[str, float] = {}
    for row in _timed(records, ours):
        known = [row[field] for field in fields if row.get(field) is not None]
        if row["mode"] in modes and known:
            found[case_name(row)] = max(known[0], found.get(case_name(row), known[0]))
    return found


def case_name(row: dict) -> str:
    size = f"{row['batch']} x {row['seq']}" if row["seq"] is not None else f"{row['tokens']} tokens"
    what = f"{row['op']} {row['model']}" if "op" in row else row["model"]
    real = "" if row["fill"] == 1 else f", {row['fill']:.0%} real tokens"
    return f"{what} {size}{real} {row['dtype']} {row['mode']}"


def _timed(records: list[dict], ours: str | tuple[str, ...] = "") -> list[dict]:
    """The drawing of dropout alone is no case of its own."""
    names = (ours,) if isinstance(ours, str) else ours
    timed = [row for row in records if row["ms_median"] is not None and row["mode"] != "bits"]
    return [row for row in timed if any(name in row["provider"] for name in names)]


def _gains(what: str, found: dict[str, float], whom: str) -> str:
    if not found:
        return f"{what}: {NOTHING}"
    faster = {name: ratio for name, ratio in found.items() if ratio > 1 + EVEN}
    words = f"{what}: {len(faster)} of {len(found)} cases more than {EVEN:.0%} faster than {whom}"
    if not faster:
        return words
    most = max(faster, key=lambda name: faster[name])
    span = f"{faster[most]:.2f}x" if len(faster) == 1 else f"{min(faster.values()):.2f}x to {faster[most]:.2f}x, the most"
    return f"{words}: {span} in {most}"


def _fastest(records: list[dict]) -> str:
    best: dict[str, dict] = {}
    for row in _timed(records):
        if row["ms_median"] < best.setdefault(case_name(row), row)["ms_median"]:
            best[case_name(row)] = row
    counts = Counter(row["provider"] for row in best.values()).most_common()
    return f"fastest of all: {', '.join(f'{name} in {count}' for name, count in counts) or NOTHING}"


def _no_gain(found: dict[str, float]) -> str:
    behind = sorted((ratio, name) for name, ratio in found.items() if ratio <= 1 + EVEN)
    named = ", ".join(f"{name} {ratio:.2f}x" for ratio, name in behind[:NAMED])
    more = f" and {len(behind) - NAMED} more" if len(behind) > NAMED else ""
    return f"no gain: {named}{more}" if behind else f"no gain: {'in none' if found else NOTHING}"


def _left_out(records: list[dict], left_out: Sequence[str]) -> str:
    """Cases by name, and how many rows for which reason."""
    refused = [row["refusal"] for row in records if row["refusal"]]
    reasons = Counter(words.removeprefix(NOT_RUN).split(";")[0] for words in refused if words.startswith(NOT_RUN))
    said = [*left_out, *(f"{count} rows ({reason})" for reason, count in reasons.most_common())]
    return f"left out: {'; '.join(said) or 'nothing'}"
