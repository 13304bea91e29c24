"""Prune an image classifier with `GradNASPruner`, and measure it before and after.

    python examples/image_classification.py --model my-vit --data FOLDER

The folder holds one sub-folder of images per class. With ``--hub`` instead of ``--data``, images of
the Hub are used. No labels are needed to score: they are drawn from the model's own predictions.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_gradnas import GradNASPruner


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="google/vit-base-patch16-224")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="folder with a sub-folder of images per class")
    source.add_argument("--hub", action="store_true", help="images of timm/mini-imagenet")
    parser.add_argument("--output", default="vit-pruned")
    parser.add_argument("--flops", default="60%", help="share of the FLOPs that is kept")
    parser.add_argument("--num-examples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    return parser.parse_args()


def load_images(args: argparse.Namespace) -> Dataset:
    """Column ``image``, in an order that does not follow the classes."""
    if args.hub:
        data = load_dataset("timm/mini-imagenet", split="train")
    else:
        data = load_dataset("imagefolder", data_dir=args.data, split="train")
    return data.shuffle(seed=0).select(range(min(args.num_examples, len(data))))


@torch.no_grad()
def predictions(model: Any, loader: DataLoader) -> torch.Tensor:
    return torch.cat([model(**batch).logits.argmax(-1) for batch in loader])


def main() -> None:
    args = parse_arguments()
    processor = AutoImageProcessor.from_pretrained(args.model)
    model = AutoModelForImageClassification.from_pretrained(args.model).eval()

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [row["image"].convert("RGB") for row in rows]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"]}

    loader = DataLoader(load_images(args), batch_size=args.batch_size, collate_fn=collate)
    before = predictions(model, loader)
    pruner = GradNASPruner(model)
    plan = pruner.prune(loader, {"flops": args.flops}, labels="model")
    same = (predictions(model, loader) == before).float().mean().item()
    kept = plan.costs["flops"] / pruner.totals["flops"]
    folder = pruner.save_pretrained(args.output, processor)
    print(f"{kept:.1%} of the FLOPs, {same:.1%} of the predictions as before; saved in {folder}")


if __name__ == "__main__":
    main()
