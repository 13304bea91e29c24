"""Tasks: which class loads a model, what feeds it, and what its labels are.

A table of rows, no class per task. Knows names of Transformers' classes; imports none of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Head(str, Enum):
    """What a head predicts, which decides its labels and its metric."""

    CLASS = "class"
    TOKENS = "tokens"
    SPAN = "span"
    MASKED = "masked"
    CAUSAL = "causal"
    SEQ2SEQ = "seq2seq"
    BASE = "base"

    __str__ = str.__str__

    @property
    def makes_text(self) -> bool:
        """Whether plain text is all that its labels need."""
        return self in (Head.MASKED, Head.CAUSAL, Head.SEQ2SEQ)


@dataclass(frozen=True, slots=True)
class Task:
    """One task.

    Attributes:
        name: As in Transformers' pipelines.
        head: What is predicted.
        input: ``"text"``, ``"image"`` or ``"audio"``.
        classes: Pairs of auto class and the name of its table of model types; the first table that
            knows the model type decides.
    """

    name: str
    head: Head
    input: str
    classes: tuple[tuple[str, str], ...]


def _row(name: str, head: Head, feeds: str, *classes: tuple[str, str]) -> tuple[str, Task]:
    return name, Task(name, head, feeds, classes)


# Order matters: a class that is in two tables is taken for the earlier task.
TASKS: Mapping[str, Task] = dict(
    (
        _row(
            "text-classification",
            Head.CLASS,
            "text",
            ("AutoModelForSequenceClassification", "SEQUENCE_CLASSIFICATION"),
        ),
        _row(
            "token-classification",
            Head.TOKENS,
            "text",
            ("AutoModelForTokenClassification", "TOKEN_CLASSIFICATION"),
        ),
        _row(
            "question-answering",
            Head.SPAN,
            "text",
            ("AutoModelForQuestionAnswering", "QUESTION_ANSWERING"),
        ),
        _row("text-generation", Head.CAUSAL, "text", ("AutoModelForCausalLM", "CAUSAL_LM")),
        _row(
            "text2text-generation",
            Head.SEQ2SEQ,
            "text",
            ("AutoModelForSeq2SeqLM", "SEQ_TO_SEQ_CAUSAL_LM"),
        ),
        _row("fill-mask", Head.MASKED, "text", ("AutoModelForMaskedLM", "MASKED_LM")),
        _row(
            "automatic-speech-recognition",
            Head.SEQ2SEQ,
            "audio",
            ("AutoModelForSpeechSeq2Seq", "SPEECH_SEQ_2_SEQ"),
        ),
        _row(
            "audio-classification",
            Head.CLASS,
            "audio",
            ("AutoModelForAudioClassification", "AUDIO_CLASSIFICATION"),
        ),
        _row(
            "image-classification",
            Head.CLASS,
            "image",
            ("AutoModelForImageClassification", "IMAGE_CLASSIFICATION"),
        ),
        _row("feature-extraction", Head.BASE, "text", ("AutoModel", "")),
    )
)

ALIASES: Mapping[str, str] = {
    "sentiment-analysis": "text-classification",
    "regression": "text-classification",
    "ner": "token-classification",
    "masked-lm": "fill-mask",
    "causal-lm": "text-generation",
    "summarization": "text2text-generation",
    "translation": "text2text-generation",
}

_INPUTS: Mapping[str, str] = {
    "input_ids": "text",
    "pixel_values": "image",
    "input_features": "audio",
    "input_values": "audio",
}


def named_task(name: str) -> Task:
    """The task of that name or alias.

    Raises:
        RecipeError: There is none; the message names the nearest and all others.
    """
    task = TASKS.get(ALIASES.get(name, name))
    if task is None:
        known = (*TASKS, *ALIASES)
        close = get_close_matches(name, known, n=1, cutoff=0.0)
        raise RecipeError(
            f"--task {name}: unknown task (did you mean {close[0]!r}?); "
            f"known are {', '.join(sorted(known))}."
        )
    return task


def architecture_of(config: PreTrainedConfig) -> str | None:
    """The class that the checkpoint names as its own."""
    return (config.architectures or [None])[0]


def task_of(config: PreTrainedConfig) -> Task | None:
    """The task of ``config.architectures``, or None for a class that no table knows."""
    architecture = architecture_of(config)
    for task in TASKS.values():
        for auto, table in task.classes:
            if table and architecture in _class_names(config.model_type, table):
                return task
            remote = config.to_dict().get("auto_map") or {}
            if table and str(remote.get(auto, "")).endswith(f".{architecture}"):
                return task
    return None


def model_class(config: PreTrainedConfig, task: Task | None) -> Any:
    """The class to load: that of `task` if given, else the one the checkpoint names.

    Raises:
        RecipeError: The model type has no class for the task, or the checkpoint names none.
    """
    import transformers

    if task is None:
        architecture = architecture_of(config)
        if architecture is not None and hasattr(transformers, architecture):
            return getattr(transformers, architecture)
        # A class of remote code is not in Transformers; the auto class reads it from `auto_map`.
        task = task_of(config)
    if task is None:
        raise RecipeError(
            f"--model: config.architectures is {config.architectures!r}, needed a class that "
            f"Transformers has; give --task, one of {', '.join(TASKS)}."
        )
    for auto, table in task.classes:
        remote = config.to_dict().get("auto_map") or {}
        if not table or auto in remote or _class_names(config.model_type, table):
            return getattr(transformers, auto)
    raise RecipeError(
        f"--task {task.name}: Transformers has no such class for model type "
        f"{config.model_type!r}; the checkpoint's own class is {architecture_of(config)}, "
        "omit --task to use it."
    )


def input_of(cls: Any, config: PreTrainedConfig, task: Task | None) -> str:
    """What feeds the model: ``"text"``, ``"image"`` or ``"audio"``.

    Raises:
        RecipeError: The class takes something else.
    """
    if task is not None and task.head is not Head.BASE:
        return task.input
    from transformers import MODEL_MAPPING

    if not hasattr(cls, "main_input_name"):  # an auto class says nothing about its input
        cls = MODEL_MAPPING.get(type(config), cls)
        cls = cls[0] if isinstance(cls, tuple) else cls
    main = getattr(cls, "main_input_name", "input_ids")
    if main not in _INPUTS:
        raise RecipeError(
            f"{cls.__name__}: its main input is {main!r}, the command line feeds "
            f"{', '.join(_INPUTS)}; use GradNASPruner with a dataloader of your own."
        )
    return _INPUTS[main]


def _class_names(model_type: str, table: str) -> tuple[str, ...]:
    from transformers.models.auto import modeling_auto

    names = vars(modeling_auto)[f"MODEL_FOR_{table}_MAPPING_NAMES"].get(model_type, ())
    return (names,) if isinstance(names, str) else tuple(names)
