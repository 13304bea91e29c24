"""What is refused before the first step, since it would fail or mislead at the last one."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.training_args import ParallelMode

from ..batches.batch import read_batches
from ..errors import DataError, OrderError, PlanError
from ..scores.normaliser import own_loss
from .settings import Settings

# Which callback prunes a model, and in the training of which state.
_PRUNES: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref[Any], weakref.ref[Any]]]
_PRUNES = weakref.WeakKeyDictionary()


def check_whole(args: Any) -> None:
    """Check that every process holds all weights.

    Raises:
        PlanError: They are sharded.
    """
    sharded = [name for name in ("fsdp", "deepspeed") if getattr(args, name)]
    if sharded:
        raise PlanError(
            f"{sharded[0]}: GradNASCallback reads and cuts weights in place, which are sharded "
            "here; train without the callback, and prune what was saved with GradNASPruner."
        )


def check_labels(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Check that a batch has labels to take gradients with, or the model a loss without.

    Raises:
        DataError: It has none.
    """
    found = next(read_batches([batch], model, None))
    if not found.labels and not own_loss(model, found):
        raise DataError(
            f"labels='data': found no labels among {', '.join(sorted(found.columns))} in what is "
            f"scored with; give the labels that {type(model).__name__} takes, in dataloader=… if "
            "the training computes its loss without them, or use labels='model'."
        )


def check_sentence_settings(settings: Settings, body: nn.Module, owner: nn.Module) -> None:
    """Check that scores do not need the loss with which sentence-transformers trains.

    Raises:
        PlanError: They do: a module of that library computes it from the embeddings of several
            texts, and the Transformers model in it knows nothing of it.
    """
    names = f"{type(owner).__name__} around a {type(body).__name__}"
    if settings.scores_from == "training":
        raise PlanError(
            f"scores_from='training': the trainer trains a {names}, whose loss is not the model's "
            "own; use scores_from='private' with labels='model'."
        )
    if settings.needs_labels:
        raise PlanError(
            f"labels='data': the trainer trains a {names}, whose loss is not the model's own; use "
            f"labels='model', or give dataloader=… of batches with the labels of the "
            f"{type(body).__name__}."
        )


def check_only_one(callback: Any, model: nn.Module, state: Any) -> None:
    """Check that one callback prunes a model in one training.

    Raises:
        OrderError: Another one does.
    """
    if model in _PRUNES:
        training, other = (reference() for reference in _PRUNES[model])
        if training is state and other is not callback:
            raise OrderError(
                f"train: found two {type(callback).__name__}s on one trainer, needed is one, since "
                "each counts the units of the whole model; remove one of them."
            )
    _PRUNES[model] = weakref.ref(state), weakref.ref(callback)


def check_unwrapped(args: Any) -> None:
    """Check that a trainer, which is not known, can train a cut model.

    Raises:
        OrderError: It wraps the whole one for several processes.
    """
    if args.parallel_mode == ParallelMode.DISTRIBUTED:
        raise OrderError(
            "train: the model was cut, but the trainer still wraps the whole one for several "
            "processes; call callback.attach(trainer) before the first train()."
        )
