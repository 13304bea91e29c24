"""The apply command: cuts a checkpoint from its files to new ones, without loading the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.folders import check_target
from ..config.recipe_files import build_recipe
from ..errors import (
    CheckpointError,
    GradNASError,
    PlanError,
    RecipeError,
    ScoresError,
    check_choice,
)
from ..jobs.early import local_path, model_folder
from ..types import Kind
from . import BAD_INPUT, DONE, FAILED, INTERRUPTED
from .show import Screen, quiet_libraries

if TYPE_CHECKING:
    from ..types import Plan, Prunable, Scores

DTYPES = ("auto", "float32", "bfloat16", "float16")


def apply_from_arguments(
    plan: str,
    checkpoint: str,
    output: str,
    *,
    scores: str | None = None,
    repair: str | None = None,
    check: bool = False,
    **options: Any,
) -> int:
    """Run the command; errors become a message and a code.

    Args:
        plan: File of the plan.
        checkpoint: Folder of the whole model.
        output: Folder of the cut one.
        scores: File of the scores that the plan was made from; None: none.
        repair: File of new weights for the plan; None: none.
        check: Run the original and the result, and compare.
        **options: Further arguments of `shards.apply_to_checkpoint`.

    Returns:
        0 done, 1 the check failed, 2 bad input, 130 interrupted.
    """
    screen, failed = Screen(), BAD_INPUT
    left = (
        f"{output} is as it was, and the same command goes on with the first file that is not "
        "complete"
    )
    try:
        with quiet_libraries(screen):
            compare = _apply(screen, plan, checkpoint, output, scores, repair, options, check=check)
            left, failed = f"{output} is complete, and was not checked", FAILED
            if check:
                with screen.progress("Checking"):
                    found = compare()
                screen.line(found)
    except KeyboardInterrupt:
        screen.error(f"interrupted; {left}.")
        return INTERRUPTED
    except GradNASError as error:
        screen.error(str(error))
        return failed
    return DONE


def _apply(
    screen: Screen,
    plan_file: str,
    checkpoint: str,
    output: str,
    scores_file: str | None,
    repair_file: str | None,
    options: Mapping[str, Any],
    *,
    check: bool,
) -> Callable[[], str]:
    """Write the cut checkpoint; what compares it with the original."""
    from ..types import Plan

    plan = Plan.load(Path(plan_file).expanduser())
    check_choice("--dtype", options.get("dtype", "auto"), DTYPES, RecipeError)
    scores = scores_of(plan, scores_file)
    folder = checkpoint_folder(checkpoint)
    from ..shards.files import check_whole_model

    check_whole_model(folder)
    target = Path(output).expanduser()
    check_target(target, overwrite=bool(options.get("overwrite")), source=folder)
    from ..repair import Repair
    from ..shards import apply_to_checkpoint

    repair = None if repair_file is None else Repair.load(Path(repair_file).expanduser())
    prunable = prunable_of(screen, plan, scores, folder)
    screen.line(f"Layout {plan.layout}: {_said(plan)}.")
    with screen.progress("Writing (MiB)") as progress:
        place = apply_to_checkpoint(
            plan,
            folder,
            target,
            prunable=prunable,
            scores=scores,
            repair=repair,
            progress=progress,
            **options,
        )
    said = "" if check else " No weights were in memory, so the model was not run; --check runs it."
    screen.line(f"Saved: {place}.{said}")

    def compare() -> str:
        from .checked import compare_outputs

        dtype = str(options.get("dtype", "auto"))
        return compare_outputs(folder, Path(place), prunable.axes, plan, repair, dtype=dtype)

    return compare


def _said(plan: Plan) -> str:
    stay = sum(plan.counts().values())
    return f"{stay:,} of {sum(plan.sizes.values()):,} units stay"


def scores_of(plan: Plan, file: str | None) -> Scores | None:
    """The scores in a file, which a plan was made from; None: no file was given.

    Raises:
        ScoresError: They cannot be read, or are of other axes than the plan.
    """
    from ..types import Scores

    if file is None:
        return None
    scores = Scores.load(Path(file).expanduser())
    if scores.format_version != plan.format_version:  # names of axes differ
        return scores
    for name, size in plan.sizes.items():
        if len(scores.values.get(name, ())) != size:
            raise ScoresError(
                f"--scores {file}: they are of another model: {name} has {size} units in the "
                f"plan, and {len(scores.values.get(name, ()))} there; give the scores that the "
                "plan was made from, or omit them."
            )
    return scores


def prunable_of(screen: Screen, plan: Plan, scores: Scores | None, folder: Path) -> Prunable:
    """The axes of a plan: of the plan itself, of the scores, or found from the config alone."""
    given = {"the plan": plan.basis, "the file of scores": None if scores is None else scores.basis}
    for what, basis in given.items():
        if basis is not None and plan.layout in basis.prunables:
            if basis.checkpoint:
                from ..checkpoint.fingerprints import check_fingerprints

                check_fingerprints(folder, basis.checkpoint, what)
            return basis.prunables[plan.layout]
    from ..blueprint import NeedsWeightsError
    from .unloaded import inspect_config

    screen.line("The plan does not say which axes it is for: they are found from the config.")
    kinds = [str(kind) for kind in Kind if str(kind) in ("heads", "neurons", "experts", "channels")]
    has_layers = any(name.endswith(f":{Kind.LAYERS}") for name in plan.sizes)
    axes = [*kinds, *([str(Kind.LAYERS)] if has_layers else [])]
    recipe = build_recipe({"model": str(folder), "layout": plan.layout, "axes": axes})
    try:
        return inspect_config(recipe).prunable
    except NeedsWeightsError as error:
        raise PlanError(
            f"{folder}: the plan does not say which axes it is for, and the config alone cannot "
            f"({error}); give the scores that it was made from (--scores), or make it again with "
            "hf-gradnas score and hf-gradnas plan."
        ) from error


def checkpoint_folder(name: str) -> Path:
    """The folder of a checkpoint's files.

    Raises:
        CheckpointError: It is not there: a Hub id has to be downloaded first.
    """
    folder = Path(model_folder(str(local_path(name))))
    if not folder.is_dir():
        raise CheckpointError(
            f"{name}: is no folder; download the checkpoint (hf download), and give its folder."
        )
    return folder
