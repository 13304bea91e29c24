"""Distil one step on this process's share of the examples, and write down the weights' sums."""

import json
import os
import sys
from pathlib import Path

import torch
import zoo
from repair_cases import arguments, collate, pair
from score_examples import examples_of

from hf_gradnas.repair import recover


def trained(folder: Path, processes: int) -> dict[str, float]:
    """Sums of the weights after one step, and the loss before it."""
    student, teacher, _ = pair("llama")
    with zoo.float64_throughout():
        done = recover(
            student,
            teacher,
            examples_of("llama", 8),
            alpha=0.6,
            hidden_weight=0.5,
            args=arguments(
                folder,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=4 // processes,
            ),
            data_collator=collate,
        )
    generator = torch.Generator().manual_seed(0)
    sums = {
        name: float((value * torch.randn(value.shape, generator=generator)).sum())
        for name, value in student.state_dict().items()
    }
    return {"loss": done.loss, **sums}


def main() -> None:
    """Arguments: the folder that every process writes ``<processes>-<rank>.json`` to."""
    torch.set_num_threads(1)
    folder, processes = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    file = folder / f"{processes}-{os.environ['RANK']}.json"
    file.write_text(json.dumps(trained(folder, processes)), encoding="utf-8")


if __name__ == "__main__":
    main()
