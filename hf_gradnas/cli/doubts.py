"""Figures of an unpruned model that are worse than guessing: said, with what is likely wrong."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..data.tasks import Head

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .evaluate import Metrics

# Standard errors below chance, and share above the vocabulary, that are put down to chance.
_ERRORS = 3.0
_SLACK = 1.02


def doubts(metrics: Metrics, head: Head, config: PreTrainedConfig) -> list[str]:
    """Where an unpruned model does worse than one that knows nothing; a warning each.

    Args:
        metrics: Measured on the model before anything was cut.
        head: What is predicted.
        config: Of the model: its number of labels, and the size of its vocabulary.
    """
    found = (_below_chance(metrics, config), _above_vocabulary(metrics, head, config))
    return [text for text in found if text]


def _below_chance(metrics: Metrics, config: PreTrainedConfig) -> str:
    """An accuracy that is lower than guessing's by more than the error of so few examples."""
    several = config.problem_type == "multi_label_classification"  # all must be right at once
    if metrics.accuracy is None or several:
        return ""
    chance = 1 / config.num_labels
    error = math.sqrt(chance * (1 - chance) / metrics.examples)
    if metrics.accuracy >= chance - _ERRORS * error:
        return ""
    return (
        f"the accuracy of the unpruned model is {metrics.accuracy:.1%} on {metrics.examples} "
        f"examples, and guessing among its {config.num_labels} labels gives {chance:.1%}; the "
        "labels of the data are likely in another order than the model's (give --label-map "
        "NAME=NUMBER), or the model or its task is another one. The figures mean little until "
        "that is put right."
    )


def _above_vocabulary(metrics: Metrics, head: Head, config: PreTrainedConfig) -> str:
    """A perplexity that is higher than that of guessing every token alike."""
    if metrics.perplexity is None:
        return ""
    words = config.get_text_config(decoder=head is Head.SEQ2SEQ).vocab_size
    if metrics.perplexity <= words * _SLACK:
        return ""
    return (
        f"the perplexity of the unpruned model is {metrics.perplexity:,.0f} on "
        f"{metrics.examples} examples, and guessing among the {words:,} tokens of its vocabulary "
        f"gives {words:,}; the tokenizer is likely that of another model, the weights were never "
        "trained, or the text is nothing like what they were trained on. The figures mean little "
        "until that is put right."
    )
