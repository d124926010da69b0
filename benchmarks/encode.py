"""all-MiniLM-L6-v2 through sentence-transformers' own `encode`, plain and accelerated: `python -m benchmarks.encode`.

The texts are ragged English prose as it stands. `encode` sorts them by length itself, makes batches, tokenizes and pools, all of
which is in the time. Embeddings must agree before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import sys
from pathlib import Path

import torch

import fastattn
from benchmarks import results, texts
from benchmarks.ops import pick_device
from fastattn import timing

PLAIN, OURS = "sentence-transformers", "with fastattn.accelerate"
AGREE = 2e-5  # of embeddings, which have length 1
COLUMNS = {"batch": "", "seq": "", "fill": ".2f", "provider": "", "ms_median": ".1f", "tokens_per_s": ".0f", "ratio": ".2f",
           "max_error": ".1e"}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encode", description=__doc__)
    parser.add_argument("--texts", type=int, default=256, help="how many")
    parser.add_argument("--batch", default="32,128", help="encode's batch_size, comma-separated (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of timing for each batch size")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="a smoke run; written only where --out says")
    parser.add_argument("--out", type=Path, help="folder of results; default benchmarks/results")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    found, source = texts.sentences()
    found = found[: 24 if args.quick else args.texts]
    records: list[dict] = []
    for batch in results.progress([int(text) for text in args.batch.split(",")], "encode"):
        records += run(found, source, batch, 0.1 if args.quick else args.seconds, device)
    results.print_table(records, COLUMNS)
    if args.out or not args.quick:
        print(f"wrote {results.write(records, 'encode', device, quick=args.quick, out=args.out)}")
    wrong = results.failures(records)
    for row in wrong:
        print(f"WRONG: {row['provider']}: {row['wrong']}", file=sys.stderr)
    return 1 if wrong else 0


def run(found: list[str], source: str, batch: int, seconds: float, device: torch.device) -> list[dict]:
    import transformers
    from sentence_transformers import SentenceTransformer

    transformers.logging.disable_progress_bar()
    plain = SentenceTransformer(str(texts.minilm_folder()), device=str(device))
    ours = copy.deepcopy(plain)
    fastattn.accelerate(ours, strict=True)
    encode = {PLAIN: plain.encode, OURS: ours.encode}
    calls: dict[str, timing.Call] = {name: functools.partial(one, found, batch_size=batch) for name, one in encode.items()}
    fields = {**shape(found, batch), "input_source": source, "device": results.device_name(device)}
    error = float(abs(encode[OURS](found, batch_size=batch) - encode[PLAIN](found, batch_size=batch)).max())
    if not error <= AGREE:
        return [results.record(**fields, provider=OURS, wrong=f"embeddings differ by {error:.1e}, more than {AGREE}")]
    samples = timing.interleaved(calls, device, seconds=seconds)
    return [
        results.record(
            **fields, provider=name, ms_median=taken.median, ms_p20=taken.quantile(0.2), ms_p80=taken.quantile(0.8),
            rounds=len(taken.ms), method=taken.method, tokens_per_s=fields["tokens"] / taken.median * 1e3,
            ratio=timing.speedup(taken, samples[PLAIN]), max_error=error if name == OURS else None,
        )
        for name, taken in samples.items()
    ]  # fmt: skip


def shape(found: list[str], batch: int) -> dict:
    """What a record says of the texts. fill: of `encode`'s own batches, which it makes of neighbours in length."""
    lengths = sorted((len(ids) for ids in texts.word_pieces(found)[0]), reverse=True)
    padded = sum(lengths[n] * len(lengths[n : n + batch]) for n in range(0, len(lengths), batch))
    return {
        "model": "minilm", "op": "encode", "dtype": "float32", "mode": "infer", "batch": batch, "seq": lengths[0],
        "texts": len(found), "tokens": sum(lengths), "fill": round(sum(lengths) / padded, 3),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
