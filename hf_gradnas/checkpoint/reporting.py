"""Saves a pruned model together with its model card and report.

Knows what a report has to be told of a model; what it says and shows is made by `report`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .._redaction import shareable, without_secrets
from ..errors import CheckpointError, GradNASWarning, described
from ..repair.repairs import Repair
from ..report import find_origin, in_one_line, report_files, summarise
from ..surgery.modeling_gradnas import auto_class_name
from ..types import Plan, Prunable, Scores
from .companions import companions_of
from .save import loading_snippet, save_pruned, stock_class, versions
from .sentence_folders import root_of
from .targets import check_folder


def save_with_report(  # noqa: PLR0913 - one call writes all that is known
    model: PreTrainedModel,
    directory: str | Path,
    prunable: Prunable,
    plan: Plan,
    *,
    scores: Scores | None = None,
    repair: Repair | None = None,
    document: Mapping[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    report: bool = True,
    owner: Any = None,
    **options: Any,
) -> Path:
    """Write model, ``gradnas.json``, model card and report, all or nothing.

    Args:
        model: A cut model, its config rewritten.
        directory: Target folder.
        prunable: What could be cut, before it was.
        plan: What was cut.
        scores: What the plan was made from, if it is known.
        repair: The new weights that it was cut with, if there were any.
        document: More to keep in ``gradnas.json``; the card tells of what it knows in it.
        files: Further files by path.
        report: Write the folder of the report; the card comes in any case.
        owner: The model of sentence-transformers around it, which writes its modules; or None.
        **options: Further arguments of `save_pruned`.

    Raises:
        CheckpointError: As of `save_pruned`.
    """
    check_folder(directory)
    if isinstance(options.get("processing_class"), str | Path):
        raise CheckpointError(
            f"processing_class={options['processing_class']!r}: found a name, needed the tokenizer "
            "or processor itself; load it with from_pretrained, or give none."
        )
    content = _document(prunable, scores, repair, document or {})
    companions = companions_of(model, stock_class(model), owner)
    told = _told_of(
        model,
        Path(directory).resolve().name,
        prunable,
        plan,
        scores,
        content,
        pictures=report,
        sentence_class=companions.sentence_class,
    )
    return save_pruned(
        model,
        directory,
        plan=plan,
        document=content,
        files={**told, **(files or {})},
        companions=companions,
        **options,
    )


def _document(
    prunable: Prunable, scores: Scores | None, repair: Repair | None, more: Mapping[str, Any]
) -> dict[str, Any]:
    """Content of ``gradnas.json``; `more` wins."""
    metadata = {} if scores is None else dict(scores.metadata)
    mended = {} if repair is None else {"repair": repair.record()}
    return {"totals": dict(prunable.totals), "scores": metadata, **mended, **more}


def _told_of(*args: Any, **options: Any) -> dict[str, str | bytes]:
    """As `describe`; nothing, with a warning, where that fails."""
    try:
        return describe(*args, **options)
    except Exception as error:  # whatever a picture does, a model that took hours is saved
        warnings.warn(
            f"report: could not be made ({described(error, whole=True)}), so that the checkpoint "
            "comes without model card and report; report it with the model's class.",
            GradNASWarning,
            stacklevel=3,
        )
        return {}


def describe(
    model: PreTrainedModel,
    name: str,
    prunable: Prunable,
    plan: Plan,
    scores: Scores | None,
    document: Mapping[str, Any],
    *,
    pictures: bool = True,
    sentence_class: str | None = None,
) -> dict[str, str | bytes]:
    """Card and report of a cut model that is called `name`, by path."""
    document, name = shareable(document), without_secrets(name)
    source = root_of(model.name_or_path)
    origin = find_origin(source, revision=document.get("recipe", {}).get("revision"))
    stock = stock_class(model)
    summary = summarise(
        plan,
        prunable,
        document=document,
        name=in_one_line(name),
        model=stock.__name__,
        base_model=origin.base_model,
        versions=versions(),
    )
    return report_files(
        summary,
        plan,
        scores,
        origin,
        auto_class=auto_class_name(stock),
        loading=loading_snippet(model, plan.layout, name, sentence_class),
        library="transformers" if sentence_class is None else "sentence-transformers",
        pictures=pictures,
    )
