"""What the callback's tests train: tiny models of the zoo, in float64, without dropout."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import zoo
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from hf_gradnas import GradNASCallback

NO_DROPOUT = {
    "bert": {
        "num_hidden_layers": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "llama": {"num_hidden_layers": 2},
}
BUDGET = {"flops": "60%"}


def pruning(**options: Any) -> GradNASCallback:
    """A callback that keeps 60 % of the FLOPs, scored with four examples."""
    return GradNASCallback(BUDGET, **{"num_examples": 4, "stages": 3, "score": "fisher", **options})


@cache
def batch_of(family: str, seed: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """A family's batch; nothing of it is changed."""
    return zoo.build(family, seed=seed, dtype=dtype)[1]


class Rows(Dataset):
    """Examples of several batches of a family, one by one."""

    def __init__(self, family: str, rows: int = 16, dtype: torch.dtype = torch.float64) -> None:
        self.rows = [
            {key: column[row] for key, column in batch_of(family, seed, dtype).items()}
            for seed in range(-(-rows // zoo.BATCH))
            for row in range(zoo.BATCH)
        ][:rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


def build(family: str = "bert", seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model without dropout; the random state it was built in does not show in it."""
    return zoo.build(family, seed=seed, **{**NO_DROPOUT[family], **options})[0]


def train_arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Ten steps of two micro-batches of two."""
    chosen = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 10,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 2,
        **options,
    }
    return TrainingArguments(str(folder), **chosen)


def make_trainer(
    folder: Path,
    callback: Any,
    *,
    family: str = "bert",
    model: PreTrainedModel | None = None,
    trainer_class: type[Trainer] = Trainer,
    more: tuple[Any, ...] = (),
    data: Dataset | None = None,
    **options: Any,
) -> Trainer:
    """A trainer with a callback; `options` are training arguments."""
    # Not random in the state of a test, or two trainers would differ.
    torch.manual_seed(0)
    chosen = {"model_init": options.pop("model_init")} if "model_init" in options else {}
    if not chosen:
        chosen["model"] = build(family) if model is None else model
    return trainer_class(
        args=train_arguments(folder, **options),
        train_dataset=Rows(family) if data is None else data,
        eval_dataset=Rows(family, 4),
        callbacks=[*([] if callback is None else [callback]), *more],
        **chosen,
    )


def logits_of(model: PreTrainedModel, family: str = "bert") -> torch.Tensor:
    """Logits in eval mode on one batch."""
    inputs = batch_of(family, 9)
    was = model.training
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    model.train(was)
    return logits


def numel(model: torch.nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())
