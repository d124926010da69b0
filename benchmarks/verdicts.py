"""Sentences that result files say of themselves: what is slower than what. Nothing in them is typed."""

from __future__ import annotations

from benchmarks import results, tables

GPU_KERNELS = ("fastattn triton", "fastattn cuda")


def models(records: list[dict]) -> list[str]:
    """Of each of fastattn's ways into Hugging Face's models: its time over that of SDPA, as called, captured and in training."""
    rows = results.with_captured(records)
    names = [name for name in _providers(rows) if name.startswith("Hugging Face with fastattn")]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    found = [(name, mode, over_sdpa(rows, name, mode)) for name in names for mode in modes]
    return [f"{name}, {mode}, is {compared(values, 'Hugging Face SDPA')}" for name, mode, values in found if values]


def kernels(records: list[dict]) -> list[str]:
    """Of each of fastattn's GPU backends: its time over that of the fastest SDPA; and one over the other."""
    lines = []
    for padded, words in ((True, "with padding"), (False, "without padding")):
        rows = [row for row in records if (row["fill"] < 1) == padded]
        for mode in dict.fromkeys(row["mode"] for row in rows):
            values = over(rows, GPU_KERNELS[0], "SDPA", mode)
            lines.append(f"{GPU_KERNELS[0]}, {mode}, {words}, is {compared(values, 'the fastest backend of SDPA')}")
    triton, cuda = GPU_KERNELS
    values = [x for mode in dict.fromkeys(row["mode"] for row in records) for x in over(records, cuda, triton, mode)]
    return [*lines, f"{cuda} is {compared(values, triton)}"]


def held(records: list[dict]) -> list[str]:
    """How many results of fastattn's kernels were held to the accuracy rule, and how many kept to it."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in records):
        for name in _providers(records):
            rows = [row for row in records if row["op"] == op and row["provider"] == name and row["refusal"] is None]
            if name in GPU_KERNELS and rows:
                kept = sum(row["wrong"] is None for row in rows)
                dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in rows))
                lines.append(f"{name}, {op}, forward and backward, {dtypes}: {kept} of {len(rows)} results kept to the rule")
    return lines


def encode(records: list[dict]) -> list[str]:
    """The fastest of each provider against the other's, over the rows that embed the same texts."""
    lines = []
    for texts in dict.fromkeys(row["texts"] for row in records):
        rows = [row for row in records if row["texts"] == texts and row["ms_median"] is not None]
        best = {name: min(row["ms_median"] for row in rows if row["provider"] == name) for name in _providers(rows)}
        if len(rows) > len(best) == 2:
            (plain, theirs), (own, ours) = best.items()
            lines.append(
                f"{len(rows) // 2} rows embed the same {texts} texts; best against best: {theirs:.3g} ms for {plain}, "
                f"{ours:.3g} ms {own}, {theirs / ours:.2f} times faster"
            )
    return lines


def over_sdpa(rows: list[dict], name: str, mode: str) -> list[float]:
    """The inverse of the ratios that the tables show, of each case."""
    found = tables.cases([row for row in rows if row["mode"] == mode]).values()
    ratios = [tables.ratio(case[name], case, tables.baseline_of(case, tables.MODELS)) for case in found if name in case]
    return [1 / known[0] for known in ratios if known is not None]


def over(rows: list[dict], name: str, whose: str, mode: str) -> list[float]:
    """The provider's time over the least of those whose names begin with `whose`, for each case that has both."""
    ratios = []
    for found in tables.cases([row for row in rows if row["mode"] == mode and row["ms_median"] is not None]).values():
        others = [row["ms_median"] for provider, row in found.items() if provider.startswith(whose)]
        if name in found and others:
            ratios.append(found[name]["ms_median"] / min(others))
    return ratios


def compared(ratios: list[float], whose: str) -> str:
    """Times over those of another, in words."""
    if not ratios:
        return "not measured"
    low, high, count = min(ratios), max(ratios), len(ratios)
    faster = sum(x < 1 for x in ratios)
    verdict = "**slower**" if not faster else "faster"
    if count == 1:
        return f"{verdict}: {low:.2f} times the time of {whose}"
    cases = f"all {count}" if faster in (0, count) else f"{faster} of {count}"
    return f"{verdict} in {cases} cases: {low:.2f} to {high:.2f} times the time of {whose}"


def _providers(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["provider"] for row in rows))
