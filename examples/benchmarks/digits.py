"""Accuracy of a small ResNet on scikit-learn's handwritten digits, pruned and recovered.

    python examples/benchmarks/digits.py

Trains a ResNet on 1,347 images of 8 x 8 pixels (scaled up by 4), prunes it with ``hf_gradnas.nas``
to the given budget, trains one more epoch, and prints the accuracy on the other 450 images at each
step.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from hf_gradnas import nas

Batch = dict[str, Tensor]

BATCH_SIZE, TEST_IMAGES, CLASSES = 32, 450, 10
RULE = {"channels_ratio": [0.125 * i for i in range(1, 9)], "channel_divisor": 4}


def load_images() -> tuple[Batch, Batch]:
    """Training and test images ``(n, 1, 32, 32)`` in [0, 1] with labels, in random order."""
    digits = load_digits()
    small = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(small, scale_factor=4, mode="bilinear")
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    train = {"pixel_values": images[TEST_IMAGES:], "labels": labels[TEST_IMAGES:]}
    return train, {"pixel_values": images[:TEST_IMAGES], "labels": labels[:TEST_IMAGES]}


def build() -> ResNetForImageClassification:
    """A ResNet of three stages."""
    config = ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[2, 2, 2],
        layer_type="basic",
        num_labels=CLASSES,
    )
    return ResNetForImageClassification(config)


def batches(images: Batch, generator: torch.Generator) -> Iterator[Batch]:
    """Shuffled batches of one epoch."""
    order = torch.randperm(len(images["labels"]), generator=generator)
    for rows in order.split(BATCH_SIZE):
        yield {name: values[rows] for name, values in images.items()}


def train(model: torch.nn.Module, images: Batch, *, epochs: int, rate: float) -> None:
    """Train with AdamW and a one-cycle schedule."""
    generator = torch.Generator().manual_seed(0)
    steps = epochs * -(-len(images["labels"]) // BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for batch in batches(images, generator):
            model(**batch).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Batch) -> float:
    """Share of right predictions."""
    hits = model(pixel_values=images["pixel_values"]).logits.argmax(-1) == images["labels"]
    return float(hits.float().mean())


def prune(model: torch.nn.Module, images: Batch, flops: str) -> float:
    """Prune a model in place; return the share of FLOPs that is left."""
    generator = torch.Generator().manual_seed(1)
    _, history = nas.prune(
        model,
        [("gradnas", {"nn.Conv2d": RULE, "nn.BatchNorm2d": {"feature_divisor": 4}})],
        {"flops": flops},
        dummy_input=images["pixel_values"][:1],
        config={
            "data_loader": batches(images, generator),
            "collect_func": lambda batch: (batch,),
            "loss_func": lambda output, batch: output.loss,
            "verbose": False,
        },
    )
    return history["best"]["constraints"]["flops"] / history["original"]["flops"]


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Print the accuracy of the whole, the pruned and the recovered model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flops", default="60%")
    parser.add_argument("--epochs", type=int, default=6, help="epochs before pruning")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    images, test = load_images()
    model = build()
    train(model, images, epochs=args.epochs, rate=5e-3)
    found = {"whole": accuracy(model, test)}
    found["flops_ratio"] = prune(model, images, args.flops)
    found["pruned"] = accuracy(model, test)
    train(model, images, epochs=1, rate=2e-3)
    found["recovered"] = accuracy(model, test)
    for name, value in found.items():
        print(f"{name}: {value:.4f}")
    return found


if __name__ == "__main__":
    main()
