"""The header of the model card: what the Hub reads of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .origin import Origin
from .summary import Summary

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

TAGS = ("pruned", "structured-pruning", "gradnas")
METRICS = ("accuracy", "perplexity", "loss")
FINAL_STATES = ("recovered", "after")
"""State of the model whose values the card states, the last there is first."""

# The Hub's name of what a class is for, by the auto class that builds it.
PIPELINE_TAGS: Mapping[str, str] = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModel": "feature-extraction",
}
# The original's card may say more than these.
_BROAD_TAGS = ("text2text-generation", "feature-extraction")
_RENAMED = {"sentiment-analysis": "text-classification", "ner": "token-classification"}
_RENAMED |= {"regression": "text-classification", "masked-lm": "fill-mask"}
_RENAMED |= {"causal-lm": "text-generation"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)
_DATA_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet")


def card_data(
    summary: Summary, origin: Origin, *, auto_class: str | None, library: str
) -> ModelCardData:
    """Fields of the header, with what the original's card passes on.

    Args:
        summary: What was done.
        origin: The original, and its card.
        auto_class: Name of the auto class that builds the model.
        library: The library that loads it.
    """
    from huggingface_hub import ModelCardData  # noqa: PLC0415 - takes long to import

    inherited = origin.metadata
    tag = pipeline_tag(summary.recipe.get("task"), auto_class, inherited.get("pipeline_tag"))
    results = list(_results(summary, tag)) or None
    license_link = _absolute(inherited.get("license_link"), origin)
    return ModelCardData(
        language=_list(inherited.get("language")) or None,
        license=inherited.get("license"),
        license_name=inherited.get("license_name"),
        license_link=license_link,
        library_name=library,
        pipeline_tag=tag,
        tags=[*_list(inherited.get("tags")), *TAGS],
        base_model=origin.base_model,
        datasets=_datasets(summary, inherited) or None,
        metrics=[result.metric_type for result in results] if results else None,
        model_name=summary.name if results else None,
        eval_results=results,
    )


def pipeline_tag(task: str | None, auto_class: str | None, inherited: str | None) -> str | None:
    """The Hub's name of the task: the command's, that of the class, or that of the original.

    A model that was fine-tuned may still carry the name of its base, whose card tells another task.
    """
    own = (_RENAMED.get(task or "", task), PIPELINE_TAGS.get(auto_class or ""))
    telling = (tag for tag in own if tag and tag not in _BROAD_TAGS)
    return next(telling, inherited or own[1] or own[0])


def final_metrics(summary: Summary) -> Mapping[str, float]:
    """Values of the model as it was saved; empty where nothing was measured."""
    state = next((state for state in FINAL_STATES if state in summary.metrics), None)
    return {} if state is None else summary.metrics[state]


def hub_dataset(name: object) -> tuple[str, str | None] | None:
    """Id and config of a data set on the Hub; None for a file or folder."""
    if not isinstance(name, str) or Path(name).suffix.lower() in _DATA_SUFFIXES:
        return None
    data, _, config = name.partition(":")
    if not _HUB_ID.fullmatch(data) or Path(name).expanduser().exists():
        return None
    return data, config or None


def data_name(name: str) -> str:
    """What a data set is called: its Hub id, or the name of its file or folder, never a path."""
    return name if hub_dataset(name) else Path(name).stem


def _results(summary: Summary, task: str | None) -> Iterator[EvalResult]:
    from huggingface_hub import EvalResult  # noqa: PLC0415 - takes long to import

    recipe, values = summary.recipe, final_metrics(summary)
    name = recipe.get("eval_dataset") or recipe.get("dataset")
    if not values or not name or summary.evaluation.get("held_out"):
        return  # examples that are held out here are no split that others could measure on
    found = hub_dataset(name) or (data_name(name), None)
    for metric in METRICS:
        if metric in values:
            yield EvalResult(
                task_type=task or "other",
                dataset_type=found[0],
                dataset_name=found[0],
                dataset_config=found[1],
                dataset_split=recipe.get("eval_split"),
                metric_type=metric,
                metric_value=round(values[metric], 6),
            )


def _datasets(summary: Summary, inherited: Mapping[str, Any]) -> list[str]:
    """Ids of the original's data sets, and of those of this run."""
    own = [hub_dataset(summary.recipe.get("dataset"))]
    found = [*_list(inherited.get("datasets")), *(item[0] for item in own if item)]
    return list(dict.fromkeys(found))


def _absolute(link: object, origin: Origin) -> str | None:
    """A link to the license that holds elsewhere too: one to a file beside the original's card."""
    if not isinstance(link, str) or link.startswith(("http:", "https:")):
        return link if isinstance(link, str) else None
    if not origin.is_hub:
        return None
    return f"https://huggingface.co/{origin.base_model}/blob/main/{link}"


def _list(value: object) -> list[str]:
    """A field that is a string or a list of strings."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, str)]
