"""Writes what digits.yaml beside it starts from: scikit-learn's handwritten digits as folders of images, 1,437 to
train on and 360 to test on, 8 × 8 pixels enlarged to 32 × 32; and a small ViT with random weights and its image
processor.

    python recipes/vit/digits.py digits
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

SIDE, PATCH = 32, 8


def write_images(folder: Path) -> None:
    """``folder``/PART/DIGIT/NUMBER.png, as many of each digit in both parts, by a split that is always the same."""
    digits = load_digits()
    rows = range(len(digits.target))
    train, test = train_test_split(rows, test_size=0.2, random_state=0, stratify=digits.target)
    for part, members in (("train", train), ("test", test)):
        for row in members:
            pixels = (digits.images[row] / 16 * 255).round().astype("uint8")
            image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            place = folder / part / str(digits.target[row])
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{row:04}.png")


def write_model(folder: Path) -> None:
    """A ViT of 4 layers, 0.2 million parameters."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
    config = ViTConfig(**size, image_size=SIDE, patch_size=PATCH, num_labels=10)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "digits")
    write_images(target)
    write_model(target / "model")
