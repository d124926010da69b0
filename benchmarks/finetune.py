"""A fine-tuning step of a stock BERT, with the dropouts of its config: `python -m benchmarks.finetune`.

Hugging Face's classes as they come (eager, SDPA, `attn_implementation="fastattn"`) and with `fastattn.accelerate`, from the same
weights and on the same batch, in turns. A step is forward, loss, backward and AdamW. What is dropped is each provider's own, so
losses are compared where nothing is: in evaluation, before a step is timed.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import fastattn
import fastattn.integrations.transformers
from benchmarks import results, shapes
from fastattn import timing

SDPA, CLOSE = "Hugging Face SDPA", 1e-4
PROVIDERS = ("Hugging Face eager", SDPA, "Hugging Face with fastattn", "Hugging Face with fastattn.accelerate")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__)
    for name, value in (("--layers", 4), ("--batch", 8), ("--seq", 256), ("--seconds", 60)):
        parser.add_argument(name, type=int, default=value, help="default %(default)s")
    parser.add_argument("--fill", type=float, default=0.5, help="share of real tokens (default %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1, help="of hidden states and of attention (default %(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the result file")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch, lengths = _batch(args, device)
    models = {name: _model(name, args, device) for name in PROVIDERS}
    _agree(models, batch)
    steps = {name: _step(model, batch) for name, model in models.items()}
    for _ in range(2):  # what compiles, plans or proves itself
        for step in steps.values():
            step()
    samples = timing.interleaved(steps, device, seconds=args.seconds)
    config, tokens = models[SDPA].config, int(lengths.sum())
    rows = [_row(name, samples, config, args, tokens, device) for name in samples]
    for row in rows:
        print(f"{row['provider']:40} {row['ms_median']:9.1f} ms  {row['ratio_vs_sdpa']:.2f}x SDPA")
    print(f"wrote {results.write(rows, 'finetune', device, quick=False, out=args.out)}")
    return 0


def _batch(args: argparse.Namespace, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    g = torch.Generator().manual_seed(0)
    lengths = shapes.ragged_lengths(args.batch, args.seq, args.fill)
    mask = (torch.arange(args.seq) < lengths[:, None]).long()
    ids = torch.randint(5, 30000, (args.batch, args.seq), generator=g) * mask
    labels = torch.randint(0, 2, (args.batch,), generator=g)
    given = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: x.to(device) for name, x in given.items()}, lengths


def _model(name: str, args: argparse.Namespace, device: torch.device) -> BertForSequenceClassification:
    """Seeded weights: the same in each."""
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=args.layers, hidden_dropout_prob=args.dropout, attention_probs_dropout_prob=args.dropout
    )
    config._attn_implementation = {PROVIDERS[0]: "eager", PROVIDERS[2]: "fastattn"}.get(name, "sdpa")
    model = BertForSequenceClassification(config)
    model.to(device)  # type: ignore[arg-type]
    if name == PROVIDERS[3]:
        fastattn.accelerate(model)
    return model


@torch.no_grad()
def _agree(models: dict[str, BertForSequenceClassification], batch: dict[str, Tensor]) -> None:
    losses = {name: float(model.eval()(**batch).loss) for name, model in models.items()}
    for name, loss in losses.items():
        assert abs(loss - losses[PROVIDERS[0]]) <= CLOSE, f"{name}: a loss of {loss} where eager has {losses[PROVIDERS[0]]}"


def _step(model: BertForSequenceClassification, batch: dict[str, Tensor]) -> Callable[[], object]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _row(name: str, samples: dict[str, timing.Samples], config: BertConfig, args, tokens: int, device) -> dict:
    taken = samples[name]
    low, *_, high = statistics.quantiles(taken.ms, n=5)
    return results.record(
        model="bert-base", layers=args.layers, hidden=config.hidden_size, heads=config.num_attention_heads,
        input_source="seeded word pieces", provider=name,
        device=results.device_name(device), dtype="float32", mode="train", batch=args.batch, seq=args.seq, fill=args.fill,
        tokens=tokens, dropout=args.dropout, ms_median=taken.median, ms_p20=low, ms_p80=high,
        tokens_per_s=tokens / taken.median * 1e3, ratio_vs_eager=timing.speedup(taken, samples[PROVIDERS[0]]),
        ratio_vs_sdpa=timing.speedup(taken, samples[SDPA]),
    )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
