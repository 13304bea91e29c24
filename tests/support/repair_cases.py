"""Students, teachers and examples for the tests of recovery."""

from __future__ import annotations

import copy
from typing import Any

import score_examples
import torch
import transformers as tf
import zoo

from hf_gradnas import GradNASPruner
from hf_gradnas.repair import Distillation, DistillationTrainer

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXAMPLES = 8


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One padded batch of `score_examples.examples_of`."""
    return score_examples.in_batches(rows, len(rows))[0]


def collate_unlabelled(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The same without labels."""
    return {name: value for name, value in collate(rows).items() if name != "labels"}


def pair(family: str, **kwargs: Any) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A student, a teacher with other weights, and a batch."""
    teacher, batch = zoo.build(family, seed=0, **kwargs)
    student, _ = zoo.build(family, seed=1, **kwargs)
    return student, teacher, batch


def cut(family: str, *, flops: str = "60%", **kwargs: Any) -> tuple[GradNASPruner, Any]:
    """A pruner whose model is cut, and the model as it was."""
    model, batch = zoo.build(family, **kwargs)
    teacher = copy.deepcopy(model)
    pruner = GradNASPruner(model, layout="per_layer")
    pruner.prune([batch], {"flops": flops}, repair="none")
    return pruner, teacher


def arguments(folder: Any, **changes: Any) -> tf.TrainingArguments:
    """One step of plain gradient descent that writes nothing."""
    values = {
        "output_dir": str(folder),
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": EXAMPLES,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return tf.TrainingArguments(**{**values, **changes})


def loss_of(
    student: Any, teacher: Any, batches: list[dict[str, Any]], folder: Any, **weights: float
) -> torch.Tensor:
    """Loss of one optimizer step over `batches`, as the Trainer sums it before its backward."""
    trainer = DistillationTrainer(
        model=student,
        teacher=teacher,
        distillation=Distillation(**weights),
        args=arguments(folder),
        train_dataset=[],
        data_collator=collate,
    )
    trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    student.train()
    losses = [trainer.compute_loss(student, dict(batch)) / len(batches) for batch in batches]
    student.eval()
    return torch.stack(losses).sum()
