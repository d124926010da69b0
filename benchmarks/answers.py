"""What the trained models answer through each provider: nearest sentences and zero-shot accuracy."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import texts
from benchmarks.model_cases import Case
from fastattn.models import digits

QUERIES = 3


def lines(case: Case, outputs: dict[str, dict[str, Tensor]]) -> list[str]:
    """Lines to print, one per provider and question; [] for a model with random weights."""
    if case.weights == "random":
        return []
    if case.name == "minilm":
        return nearest_sentences(case, {name: found["last_hidden_state"] for name, found in outputs.items()})
    if case.name == "digits-clip":
        return accuracies({name: (found["image_embeds"], found["text_embeds"]) for name, found in outputs.items()})
    return []


def nearest_sentences(case: Case, hidden: dict[str, Tensor]) -> list[str]:
    """For the first sentences the one whose mean over real tokens has the largest cosine with theirs."""
    found, _ = texts.sentences()
    result = []
    for query in range(min(QUERIES, len(case.lengths[0]))):
        result.append(f'nearest to "{found[query][:70]}"')
        for name, x in hidden.items():
            real = case.inputs["attention_mask"][..., None].to(x.dtype)
            mean = torch.nn.functional.normalize((x * real).sum(1) / real.sum(1), dim=-1).float()
            cosine = mean @ mean[query]
            cosine[query] = -1
            best = int(cosine.argmax())
            result.append(f'  {name:37} {cosine[best]:.4f} "{found[best][:70]}"')
    return result


def accuracies(embeddings: dict[str, tuple[Tensor, Tensor]]) -> list[str]:
    labels = digits.load_images()[1].labels
    result = []
    for name, (images, captions) in embeddings.items():
        nearest = (images.float() @ captions.float().mT).argmax(1).cpu()
        share = (nearest == labels[: len(nearest)]).double().mean()
        result.append(f"zero-shot accuracy on {len(nearest)} held-out digits  {name:37} {share:.1%}")
    return result
