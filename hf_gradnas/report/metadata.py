"""The header of the model card, and where the model came from: what the Hub reads of both."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._redaction import shareable
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
        base_model=origin.base_model if origin.is_hub else None,  # the Hub makes it a link
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


# --- where a model came from ----------------------------------------------------------------------


CARD = "README.md"
# Folders that trainers and this package name alike for everybody; the one above tells more.
_GENERIC = re.compile(r"model|pruned|checkpoint-\d+|snapshots|[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_NOT_ALLOWED = re.compile(r"[^\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Origin:
    """The original of a pruned model.

    Attributes:
        base_model: Hub id, or a name; None: not known. Never a path.
        metadata: What its card says in its header.
        is_hub: Whether `base_model` is known to be a Hub id.
    """

    base_model: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    is_hub: bool = False


def find_origin(source: str, *, revision: str | None = None) -> Origin:
    """The original that was loaded from `source`, without asking the network.

    Args:
        source: Folder or Hub id that the model was loaded from; "" if it was built from a config.
        revision: Branch, tag or commit on the Hub.
    """
    if not source:
        return Origin()
    folder = Path(source).expanduser()
    if folder.is_dir():
        metadata = _read_metadata(folder / CARD)
        cached = _cached_id(folder.resolve())
        if cached and _REPOSITORY.fullmatch(cached):
            return Origin(cached, metadata, is_hub=True)
        named = _named_in(metadata)
        return Origin(named or folder_name(folder), metadata, is_hub=bool(named))
    if not is_hub_id(source):
        return Origin(folder_name(Path(source.replace("\\", "/"))))
    return Origin(source, _read_metadata(_cached_card(source, revision)), is_hub=True)


def fetch_card(source: str, *, revision: str | None = None) -> None:
    """Put the card of a model on the Hub into the cache, if it has one and the Hub answers."""
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - takes long to import

    if Path(source).expanduser().exists() or not is_hub_id(source):
        return
    try:
        hf_hub_download(source, CARD, revision=revision)
    except (OSError, ValueError):
        return  # no card, no network, no permission: the new card then inherits nothing


def folder_name(folder: Path) -> str | None:
    """Name of a folder as a Hub id could have it; that of the one above for names like ``model``.

    None where no name is left; the user's, of the home directory, is none.
    """
    folder, home = folder.expanduser().absolute(), Path.home()
    folder = (
        Path(folder.anchor, folder.relative_to(home)) if folder.is_relative_to(home) else folder
    )
    names = [part for part in reversed(folder.parts) if part != folder.anchor]
    telling = next((name for name in names if not _GENERIC.fullmatch(name)), None)
    if telling is None:
        return None
    return _NOT_ALLOWED.sub("-", telling.removesuffix(".quickstart")).strip("-.") or None


def is_hub_id(source: str) -> bool:
    """Whether a text could be the id of a repository."""
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415 - takes long to import
    from huggingface_hub.utils import validate_repo_id  # noqa: PLC0415

    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return True


def _cached_id(folder: Path) -> str | None:
    """Hub id of a folder in the Hub's cache: ``models--<owner>--<name>/snapshots/<commit>``."""
    for part in folder.parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return None


def _cached_card(source: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - takes long to import

    found = try_to_load_from_cache(source, CARD, revision=revision)
    return Path(found) if isinstance(found, str) else None


def _named_in(metadata: Mapping[str, Any]) -> str | None:
    """The model that a card in a folder names: its base model, if it is one and a Hub id."""
    found = metadata.get("base_model")
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    if isinstance(found, str) and not Path(found).exists() and is_hub_id(found):
        return found
    return None


def _read_metadata(card: Path | None) -> Mapping[str, Any]:
    """Header of a card; empty where there is none, or none that can be read."""
    import yaml  # noqa: PLC0415
    from huggingface_hub.repocard import REGEX_YAML_BLOCK  # noqa: PLC0415 - takes long to import

    if card is None or not card.is_file():
        return {}
    try:
        header = REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8-sig"))
        found = yaml.safe_load(header.group(2)) if header else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return shareable(found) if isinstance(found, dict) else {}
