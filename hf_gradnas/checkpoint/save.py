"""Writes a pruned model so that the target folder is never half written, and proves that it loads.

Knows folders and files; the config's values come from `stock.rewrite`, and the classes that load a
per-layer checkpoint from `surgery.modeling_gradnas`. Both layouts are written alike. Knows also
what a report has to be told of a model; what it says and shows is made by `report`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .._files import replace_folder, sync, temporary_sibling
from .._manifests import digests, stamps
from .._redaction import shareable, without_secrets
from ..batches.batch import to_device
from ..batches.longest import flops_inputs, longest_of
from ..config.defaults import MAX_SHARD_SIZE
from ..errors import CheckpointError, GradNASError, GradNASWarning, described
from ..repair.repairs import Repair
from ..report import find_origin, in_one_line, python_string, report_files, summarise
from ..running.wrappers import LIBRARY, save_owner
from ..surgery.modeling_gradnas import auto_class_name
from ..types import Plan, Prunable, Scores
from .apply import (
    RELOADED_TOLERANCE,
    Call,
    allowed_difference,
    largest_difference,
    outputs_of,
)
from .companions import Companions, companions_of
from .folders import (
    check_content,
    check_folder,
    check_size,
    check_target,
    failing,
    root_of,
    target_of,
    write_files,
)
from .record import document_of, versions, write_document
from .reference import Reference, make_reference
from .twin import kernels_of

TOKENS = 16
"""Tokens of the sequence that the written checkpoint is run on, as those of the proof of a cut."""


def save_pruned(  # noqa: PLR0913 - all that one folder holds, most of it with defaults
    model: PreTrainedModel,
    directory: str | Path,
    *,
    plan: Plan,
    document: Mapping[str, Any],
    processing_class: Any = None,
    sample: Mapping[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    companions: Companions | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> Path:
    """Write model, tokenizer or processor and ``gradnas.json``, reload, compare, then rename.

    Everything is written to a hidden folder beside the target and reloaded from there with the
    model's own class. All tensors must be equal bit by bit, and outputs on `sample` agree but for
    rounding (`outputs.allowed_difference`). ``gradnas.json`` keeps digests of all files, and for
    ``verify`` outputs on random inputs.

    Args:
        model: A cut model, its config rewritten.
        directory: Target folder.
        plan: What was cut; kept in ``gradnas.json``.
        document: More to keep in ``gradnas.json``, ready for JSON.
        processing_class: Tokenizer, image processor or processor to save beside the model.
        sample: Batch for ``model(**sample)``.
        files: Further files by path, e.g. ``recipe.yaml``; text, or bytes of a picture.
        companions: What belongs beside it; written where nothing else was.
        overwrite: Replace a checkpoint that hf_gradnas wrote there, see `check_target`.
        max_shard_size: Largest file of weights; a model of sentence-transformers has one file.

    Returns:
        The target folder.

    Raises:
        CheckpointError: The target cannot be written, a name in `files` cannot be used, or the
            checkpoint does not load back as it was. The target is then as it was before.
    """
    check_size(max_shard_size)
    contents = check_content(document, files or {})
    before = stamps(target_of(directory))
    target = check_target(directory, overwrite=overwrite, source=model.name_or_path)
    with failing(target), temporary_sibling(target) as written:
        with failing(target, Exception):  # whatever a tokenizer raises where the disk is full
            if companions is None or companions.owner is None:
                model.save_pretrained(written, max_shard_size=max_shard_size)
            else:
                save_owner(companions.owner, written)
            if processing_class is not None:
                processing_class.save_pretrained(written)
        write_files(written, contents)
        copied = [] if companions is None else companions.write(written)
        with ThreadPoolExecutor(1) as beside:  # neither a digest nor a disk holds Python's lock
            found = beside.submit(_flushed, written)
            with _reloading(model):
                reference = _check_reload(model, written, sample)
        write_document(written, document, plan, reference, copied, found.result())
        replace_folder(written, target, before)
    return target


def _flushed(folder: Path) -> dict[str, str]:
    """Digests of all files in a folder, which are on the disk then."""
    found = digests(folder)
    for name in found:
        sync(folder / name)
    return found


# --- does it load? --------------------------------------------------------------------------------


@contextmanager
def _reloading(model: PreTrainedModel) -> Iterator[None]:
    """Make whatever the model's own code raises while it is loaded and run an error of ours."""
    try:
        yield
    except (GradNASError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{type(model).__name__}: the written checkpoint does not load and run "
            f"({described(error)}); the target is unchanged. Report it "
            "with the model's class and config."
        ) from error


def _check_reload(
    model: PreTrainedModel, folder: Path, sample: Mapping[str, Any] | None
) -> Reference:
    """Load what was written with the model's own class, compare, and run it for later checks."""
    reloaded, info = type(model).from_pretrained(
        folder,
        dtype=model.dtype,
        attn_implementation=kernels_of(model.config),
        experts_implementation=kernels_of(model.config, "experts"),
        output_loading_info=True,
    )
    wrong = {kind: sorted(info[kind])[:4] for kind in info if info[kind]}
    if wrong:
        raise CheckpointError(
            f"{type(model).__name__}: the written checkpoint does not load back whole ({wrong}); "
            "the target is unchanged. Report it with the model's class and config."
        )
    reloaded = reloaded.to(model.device)
    _compare_tensors(model, reloaded)
    if sample is None:
        return make_reference(reloaded, None)
    sample, before = _run_short(model, sample)
    reference = make_reference(reloaded, sample)
    _copy_derived(model, reloaded)
    after = _outputs(reloaded, ((), to_device(sample, model)))
    for name in before.keys() | after.keys():
        _compare_outputs(before.get(name), after.get(name))
    return reference


def _run_short(
    model: PreTrainedModel, sample: Mapping[str, Any]
) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
    """One example of few tokens, and what the model makes of it; the whole sample if that fails.

    All weights are compared by their values. What shows in longer sequences alone, such as a
    window of attention that the config lost, is not seen.
    """
    decoder = bool(model.config.is_encoder_decoder)
    whole = {name: value for name, value in sample.items() if name != "labels" or decoder}
    short = flops_inputs(sample, None, decoder=decoder)
    if longest_of(short, decoder=decoder) > TOKENS:
        short = flops_inputs(sample, TOKENS, decoder=decoder)
    try:
        return short, _outputs(model, ((), to_device(short, model)))
    except (CheckpointError, torch.OutOfMemoryError):
        raise
    except Exception:  # the model's own code may raise anything: images need all of their tokens
        return whole, _outputs(model, ((), to_device(whole, model)))


def _compare_tensors(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    before, after = model.state_dict(), reloaded.state_dict()
    for name in before.keys() | after.keys():
        if name not in before or name not in after or not torch.equal(before[name], after[name]):
            raise CheckpointError(
                f"{name}: the reloaded tensor differs from the one in memory; the target is "
                "unchanged. Report it with the model's class and config."
            )


def _copy_derived(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    """Give the reloaded model the buffers that no checkpoint holds.

    A model that was cast with ``.half()`` has rounded its rotary frequencies, which a fresh one
    computes in float32: a difference of the cast, not of the checkpoint.
    """
    saved, buffers = model.state_dict().keys(), dict(reloaded.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in saved and name in buffers and buffers[name].shape == buffer.shape:
            buffers[name].data = buffer.detach().clone()


def _compare_outputs(before: Tensor | None, after: Tensor | None) -> None:
    difference, limit = float("nan"), RELOADED_TOLERANCE
    if before is not None and after is not None and before.shape == after.shape:
        difference, limit = largest_difference(after, before), allowed_difference(before)
    if not difference <= limit:  # catches nan too
        raise CheckpointError(
            f"outputs of the reloaded checkpoint differ by {difference:.3g} from those in memory "
            f"(at most {limit:.3g} is accepted); the target is unchanged. Report it with the "
            "model's class and config."
        )


def _outputs(model: PreTrainedModel, call: Call) -> dict[str, Tensor]:
    """Floating-point outputs on the sample but for the loss, by path.

    Raises:
        CheckpointError: There are none.
    """
    outputs = outputs_of(model, call)
    found = {name: value for name, value in outputs.items() if name != "loss"}
    if not found:
        raise CheckpointError(
            f"{type(model).__name__}: has no floating-point output on the sample (found "
            f"{list(outputs)}), so that reloading cannot be checked; pass sample=None."
        )
    return found


def loading_snippet(
    model: PreTrainedModel, layout: str, directory: str | Path, sentence_class: str | None = None
) -> str:
    """Python lines that load the checkpoint, for users to copy.

    Args:
        model: The model.
        layout: Of the checkpoint.
        directory: Where it is.
        sentence_class: Class of sentence-transformers that loads it; None: plain Transformers does.
    """
    stock = stock_class(model)
    auto, place = auto_class_name(stock), python_string(directory)
    name = auto or stock.__name__
    lines = [f"from transformers import {name}", f"model = {name}.from_pretrained({place})"]
    if sentence_class is not None:
        name = sentence_class
        lines = [f"from {LIBRARY} import {name}", f"model = {name}({place})"]
    if layout == "per_layer":
        where = "" if sentence_class else " to from_pretrained"
        note = f"  # or pass trust_remote_code=True{where}"
        if auto is None:
            note = f"  # or AutoModel.from_pretrained({place}, trust_remote_code=True)"
        lines = [f"import hf_gradnas{note}", *lines]
    return "\n".join(lines)


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of Transformers that a model is one of, per-layer or not."""
    found: type[PreTrainedModel] = vars(type(model)).get("_gradnas_stock_class", type(model))
    return found


# --- with its card and report ---------------------------------------------------------------------


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
    content = document_of(prunable, scores, repair, document or {})
    companions = companions_of(model, stock_class(model), owner)
    told = told_of(
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


def told_of(*args: Any, **options: Any) -> dict[str, str | bytes]:
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
