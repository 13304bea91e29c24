"""Cuts a checkpoint to a plan from its files to new ones, without the model's weights in memory.

The model is built without numbers, cut and rewritten by the very steps that cut one in memory, and
built once more from the config that is written, to see that it loads. Only then the tensors that
stay are read and written, a few rows at a time, into a folder that becomes the target when all is
there.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from .._files import replace_folder
from .._manifests import digests, stamps
from ..checkpoint.apply import apply_plan
from ..checkpoint.companions import companions_of
from ..checkpoint.fingerprints import check_fingerprints
from ..checkpoint.folders import (
    check_content,
    check_size,
    check_target,
    failing,
    target_of,
    write_files,
)
from ..checkpoint.record import document_of, versions, write_document
from ..checkpoint.reference import Reference
from ..checkpoint.save import stock_class, told_of
from ..checkpoint.twin import build_twin, entries
from ..config.defaults import MAX_SHARD_SIZE
from ..errors import CheckpointError, PlanError, described
from ..repair.repairs import Repair, check_repair
from ..surgery.cut import check_plan
from ..surgery.lists import with_stacks
from ..surgery.modeling_gradnas import auto_class_name
from ..surgery.rows import shapes_of
from ..types import Plan, Prunable, Scores
from .files import INDEX, CheckpointFiles, open_checkpoint
from .model import lazy_model, lend_repair, model_class
from .resuming import Unfinished, resumable, unfinished_bytes
from .writing import MIB, Progress, Weights, weights_of, write_weights

SPARE = 1 << 24
"""Bytes for all that is not weights."""


def apply_to_checkpoint(  # noqa: PLR0913 - all that one folder holds, most of it with defaults
    plan: Plan,
    checkpoint: str | Path,
    directory: str | Path,
    *,
    prunable: Prunable | None = None,
    repair: Repair | None = None,
    scores: Scores | None = None,
    cls: type[PreTrainedModel] | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
    report: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write the checkpoint that `GradNASPruner.apply` and ``save_pretrained`` would write.

    A few rows are in memory at a time, or a whole tensor that loading computes. A run that breaks
    off goes on with the first file that is not complete.

    Args:
        plan: What is kept.
        checkpoint: Folder of the whole model, in safetensors.
        directory: Target; must not exist unless `overwrite`.
        prunable: The axes that the plan was made for, and what the stock class can express; None:
            as its basis says, which also says of which checkpoint.
        repair: New weights for this plan.
        scores: What the plan was made from, if it is known; for the record and the card.
        cls: Class of the model; None: the one that its config names.
        dtype: As of ``from_pretrained``.
        max_shard_size: Largest file of weights, in bytes or as ``"5GB"``.
        overwrite: Replace what hf_gradnas wrote in the target.
        report: Write the folder of the report too.
        progress: Called with the MiB written and their number.

    Raises:
        CheckpointError: A file of the checkpoint is missing or damaged, the target cannot be
            written or has no room, or what would be written could not be loaded.
        CutError: The model cannot be cut from its files.
        PlanError: The plan is that of another model, or its class cannot express it.
        RepairError: The repair is that of another plan or model.
    """
    check_size(max_shard_size)
    prunable, before = prunable or _basis_of(plan), stamps(target_of(directory))
    target = check_target(directory, overwrite=overwrite, source=checkpoint)
    opened = open_checkpoint(checkpoint)
    model = _loaded(opened, plan, cls, dtype)
    plan = cut_model(model, plan, prunable, repair)
    weights = weights_of(model, max_shard_size)
    _check_room(target, weights.total_size)
    with failing(target), resumable(target, _key(opened, weights, plan, repair)) as unfinished:
        hashes = write_weights(weights, unfinished, progress)
        if weights.index is not None:
            (unfinished.folder / INDEX).write_text(weights.index, encoding="utf-8")
        told = document_of(prunable, scores, repair, {})
        card = partial(told_of, model, target.name, prunable, plan, scores, told, pictures=report)
        _write_rest(unfinished, model, plan, told, card, hashes)
        replace_folder(unfinished.folder, target, before)
        unfinished.finish()
    return target


def _loaded(
    opened: CheckpointFiles, plan: Plan, cls: type[PreTrainedModel] | None, dtype: str
) -> PreTrainedModel:
    """The model of a checkpoint, lazy, after a check that the plan is for it."""
    if plan.basis is not None:
        check_fingerprints(opened.folder, plan.basis.checkpoint, "the plan")
    config = read_config(opened.folder)
    return lazy_model(opened, config, cls or model_class(config), dtype=dtype)


def _write_rest(
    unfinished: Unfinished,
    model: PreTrainedModel,
    plan: Plan,
    told: Mapping[str, Any],
    card: Callable[..., dict[str, str | bytes]],
    hashes: Mapping[str, str],
) -> None:
    """Write what belongs beside the weights: config, card, companions and the record of all."""
    companions = companions_of(model, stock_class(model), None)
    folder = unfinished.folder
    _save_settings(model, folder)
    write_files(folder, check_content(told, card(sentence_class=companions.sentence_class)))
    copied = companions.write(folder)
    found = digests(folder, known=hashes)
    write_document(folder, told, plan, _reference(model), copied, found)


def _basis_of(plan: Plan) -> Prunable:
    """What a plan was made from.

    Raises:
        PlanError: It does not say.
    """
    found = None if plan.basis is None else plan.basis.prunables.get(plan.layout)
    if found is None:
        raise PlanError(
            "Plan: does not say which axes it is for (it has no basis); make it with hf-gradnas "
            "score and hf-gradnas plan, or give the scores that it was made from (--scores)."
        )
    return found


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # config classes refuse in their own ways
        raise CheckpointError(
            f"{folder}: its config.json cannot be read ({described(error, whole=True)}); check it, "
            "and that this Transformers knows the model without code of its own."
        ) from error
    return found


def cut_model(
    model: PreTrainedModel, plan: Plan, prunable: Prunable, repair: Repair | None
) -> Plan:
    """Cut the lazy model, and check that what its config builds has the shapes of its tensors."""
    given, plan = plan, check_plan(prunable.axes, plan)
    check_axes(model, prunable)
    if repair is not None:
        check_repair(repair, model, plan, given)
        lend_repair(model, repair)
    apply_plan(model, plan, prunable.structure, prunable.space)
    wants = entries(build_twin(model))
    for name, entry in entries(model).items():
        built = wants.pop(name, None)
        shape = None if built is None or not built.is_saved else list(built.tensor.shape)
        if entry.is_saved and shape != list(entry.tensor.shape):
            raise _misfit(model, name, shape, list(entry.tensor.shape))
    more = [name for name, entry in wants.items() if entry.is_saved]
    if more:
        raise _misfit(model, more[0], list(wants[more[0]].tensor.shape), None)
    return plan


def check_axes(model: PreTrainedModel, prunable: Prunable) -> None:
    """Check that the units of all axes are in the model's tensors.

    Raises:
        PlanError: They are those of another model.
    """
    shapes = with_stacks(shapes_of(model), prunable.axes)
    for axis in prunable.axes:
        for part in axis.slices:
            has = shapes.get(part.tensor, ())
            needed = part.end(part.each or axis.size)
            if part.dim >= len(has) or has[part.dim] < needed:
                raise PlanError(
                    f"{axis.name}: its units are rows of {part.tensor}, at least {needed} of "
                    f"dimension {part.dim}, and {type(model).__name__} has {list(has) or 'none'}; "
                    "give the checkpoint that the plan was made for."
                )


def _misfit(
    model: PreTrainedModel, name: str, built: list[int] | None, cut: list[int] | None
) -> CheckpointError:
    return CheckpointError(
        f"{name}: is cut to {cut or 'nothing'}, but {type(model).__name__} builds "
        f"{built or 'nothing'} from the new config, so that what is written could not be loaded; "
        "nothing was written. Prune the model in memory, and report its class and config."
    )


def _save_settings(model: PreTrainedModel, folder: Path) -> None:
    """Write all that ``save_pretrained`` does but the weights, which an empty state keeps out.

    In a folder of its own: upstream deletes shards that it finds and did not write.
    """
    own = folder / ".settings"
    model.save_pretrained(own, state_dict={}, save_original_format=False)
    for path in own.iterdir():
        path.replace(folder / path.name)
    own.rmdir()


def _check_room(target: Path, total: int) -> None:
    """Check that the disk has room for what is still to be written.

    Raises:
        CheckpointError: It has not.
    """
    needed = total - unfinished_bytes(target) + SPARE
    place = next(folder for folder in target.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{target}: needs {needed / MIB:,.0f} MiB, and {place} has {free / MIB:,.0f} "
            "MiB free; nothing was written. Free some space, or choose another folder."
        )


def _reference(model: PreTrainedModel) -> Reference:
    """How the checkpoint is loaded; no outputs are kept, as the model was not run."""
    stock = stock_class(model)
    return Reference(
        model_class=stock.__name__,
        auto_class=auto_class_name(stock),
        dtype=str(model.dtype).rpartition(".")[2],
        device="cpu",
        attention=model.config._attn_implementation,
        inputs=None,
        output=None,
    )


def _key(opened: CheckpointFiles, weights: Weights, plan: Plan, repair: Repair | None) -> str:
    """What tells this run from others: the files that are read, and what is written of them."""
    shapes = {n: [list(part.shape), str(part.dtype)] for n, part in weights.parts.items()}
    known = {
        "source": str(opened.folder.resolve()),
        "stamps": opened.stamps(),
        "plan": plan.to_dict(),
        "repair": None if repair is None else [repair.summary(), repair.digest()],
        "shards": weights.shards,
        "shapes": shapes,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
