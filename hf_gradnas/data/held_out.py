"""What is measured on: a data set of its own, or examples that are held out from scoring.

Knows counts of examples and what their labels are; opens nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config.recipe import Recipe
from ..types import Scores
from .datasets import BUNDLED
from .examples import Examples
from .loading import Source
from .tasks import Head

if TYPE_CHECKING:
    from .files import Rows

SCORED_PER_HELD_OUT = 4
FEWEST, MOST = 16, 256
"""Examples that are held out where there are enough: one for every four that are scored."""
FEWEST_OF_ALL = 8
"""Fewer say nothing; then nothing is measured."""
SHARE_OF_FEW = 5
"""Where the data holds too few, every fifth example of it is held out rather than scored."""


@dataclass(frozen=True)
class Evaluation:
    """What loss and metrics are measured on.

    Attributes:
        examples: The examples.
        dataset: Name of their data set.
        held_out: Whether they come from the calibration data.
        by_model: Whether their labels are the whole model's own predictions.
        scored_too: Whether they are of the data that is scored, and not held out from it.
        scores_given: Whether scores of an earlier run are used, which may know the examples.
    """

    examples: Examples
    dataset: str
    held_out: bool = False
    by_model: bool = False
    scored_too: bool = False
    scores_given: bool = False

    def __str__(self) -> str:
        """What was measured on, after the number of examples."""
        if not self.held_out:
            return f"of {self.dataset}" + (", which was scored on too" if self.scored_too else "")
        said = f"held out from the calibration data ({self.dataset})"
        if self.dataset != BUNDLED:
            said += ", which the model may have been trained on"
        if self.scores_given:
            said += "; whether the given scores were made with them is not known"
        return said

    def to_dict(self) -> dict[str, Any]:
        """What ``gradnas.json`` keeps, beside the name of the data set."""
        return {
            "examples": len(self.examples),
            "held_out": self.held_out,
            "scored_too": self.scored_too,
            "scores_given": self.scores_given,
            "labels": "whole model" if self.by_model else "data",
        }


def wanted(recipe: Recipe) -> int:
    """Examples to hold out, where the data has enough of them; 0 where there is no need."""
    if not recipe.eval or recipe.eval_dataset is not None or recipe.eval_split is not None:
        return 0
    usual = min(MOST, max(FEWEST, recipe.num_examples // SCORED_PER_HELD_OUT))
    return recipe.eval_num_examples or usual


def divide(found: int, scored: int, most: int) -> tuple[int, int]:
    """How many of the first examples are scored, and how many after them are held out.

    Args:
        found: Examples that there are.
        scored: Examples to score; so many are, if the data has more.
        most: Examples to hold out. Where the data has too few, a fifth of it is held out.
    """
    held_out = min(most, max(found - scored, found // SHARE_OF_FEW))
    if held_out < min(FEWEST_OF_ALL, most):
        return min(found, scored), 0
    return min(scored, found - held_out), held_out


def span(examples: Examples, first: int, count: int) -> Examples:
    """`count` examples from `first` on."""
    return replace(examples, count=count, encode=lambda index: examples[first + index])


def without(examples: Examples, first: int, count: int) -> Examples:
    """All examples but `count` of them from `first` on."""
    end = min(first + count, len(examples))
    left = len(examples) - max(0, end - first)
    gap = end - first
    return replace(
        examples,
        count=left,
        encode=lambda index: examples[index if index < first else index + gap],
    )


def drawn(examples: Examples, count: int, seed: int) -> Examples:
    """`count` examples drawn at random, in the order of the data."""
    chosen = np.random.default_rng(seed).choice(len(examples), count, replace=False)
    places = np.sort(chosen).tolist()
    return replace(examples, count=count, encode=lambda index: examples[places[index]])


def labelled_by(recipe: Recipe, source: Source) -> tuple[str, str]:
    """Who labels the examples that are held out (``"data"``, ``"model"``), or "" and why nobody.

    Args:
        recipe: With its labels settled.
        source: The model.
    """
    head = source.task.head
    if head is Head.BASE:
        return "", f"{source.cls.__name__} has no head whose loss could be measured"
    if recipe.labels == "data" or (head.makes_text and source.input == "text"):
        return "data", ""
    config = source.config
    is_regression = config.problem_type == "regression" or config.num_labels == 1
    if head in (Head.CLASS, Head.TOKENS) and not is_regression:
        return "model", ""
    return "", "labels are sampled from the model, and there are none to measure against"


def is_same_data(recipe: Recipe, scored: Rows, measured: Rows) -> bool:
    """Whether the data of `--eval-dataset` is that which is scored."""
    names = [Path(rows.origin).expanduser() for rows in (scored, measured)]
    if scored.origin != measured.origin and names[0].resolve() != names[1].resolve():
        return False
    return names[0].is_file() or (recipe.eval_split or "validation") == recipe.split


def shown_name(dataset: str) -> str:
    """A data set's name on the screen: that of its file or folder, or its Hub id."""
    return (
        Path(dataset).expanduser().resolve().name
        if Path(dataset).expanduser().exists()
        else dataset
    )


def data_warnings(
    recipe: Recipe, source: Source, scores: Scores | None, evaluation: Evaluation | None
) -> Iterator[str]:
    """What the choice of data does to the result."""
    reads_data = scores is None and recipe.score not in ("magnitude", "random")
    uses = ["scored"] * reads_data + ["repaired"] * (recipe.repair != "none")
    if recipe.dataset is None and source.input == "text" and uses:
        yield (
            f"no --dataset was given, so the model is {' and '.join(uses)} on the {BUNDLED}. Text "
            "of the model's own kind tells better what to keep (a Llama trained on Python source: "
            "perplexity 16.13 instead of 17.15 with the bundled text); give --dataset."
        )
    if evaluation is not None and evaluation.scored_too:
        trained = " and trained" if recipe.recover_epochs else ""
        yield (
            f"--eval-dataset {evaluation.dataset}: is the data that is scored{trained} on too, so "
            "that the metrics flatter the result; give other data, or omit --eval-dataset "
            "to hold some examples out."
        )
