"""Train a small CLIP from scratch on scikit-learn's handwritten digits, with fastattn in every layer. About a minute on a CPU.

    python examples/train_digits_clip.py --out digits_clip

It writes config.json and model.safetensors, which fastattn's CLIPModel and Hugging Face's both load.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from fastattn.models import digits
from fastattn.models.clip import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from fastattn.models.implementations import IMPLEMENTATIONS

TOWER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
TEXT = CLIPTextConfig(vocab_size=digits.VOCAB_SIZE, max_position_embeddings=digits.MAX_TOKENS, eos_token_id=digits.END, **TOWER)
VISION = CLIPVisionConfig(image_size=8, patch_size=2, num_channels=1, **TOWER)


def train(epochs: int, batch: int, learning_rate: float, seed: int, implementation: str) -> CLIPModel:
    """Every step compares a batch of images with ten captions, one per digit, in a random wording."""
    torch.manual_seed(seed)
    images, _ = digits.load_images()
    wordings = [digits.captions(template) for template in digits.TEMPLATES]
    model = CLIPModel(CLIPConfig(TEXT, VISION, projection_dim=64), implementation).train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.1)
    steps = epochs * -(-len(images.labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)

    progress = tqdm(range(epochs), desc="epochs", disable=None)  # none where the output is not a terminal
    for _ in progress:
        for rows in torch.randperm(len(images.labels)).split(batch):
            input_ids, attention_mask = wordings[torch.randint(len(wordings), ()).item()]
            logits = model(input_ids, images.pixel_values[rows], attention_mask).logits_per_image
            loss = F.cross_entropy(logits, images.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for config.json and model.safetensors")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--implementation", choices=list(IMPLEMENTATIONS), default="fastattn")
    args = parser.parse_args()

    start = time.perf_counter()
    model = train(args.epochs, args.batch, args.learning_rate, args.seed, args.implementation)
    print(f"trained {sum(p.numel() for p in model.parameters()):,} parameters in {time.perf_counter() - start:.0f} s")
    model.save_pretrained(args.out)
    _, held_out = digits.load_images()
    for template in digits.TEMPLATES:
        accuracy = digits.zero_shot_accuracy(model, held_out, template)
        print(f"zero-shot accuracy on {len(held_out.labels)} held-out images, captions {template!r}: {accuracy:.3f}")


if __name__ == "__main__":
    main()
