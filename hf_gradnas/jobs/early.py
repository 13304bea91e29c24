"""What is judged before torch is imported: names, paths, budgets, and what excludes what.

Imports neither torch nor transformers nor datasets, so that a slip costs no waiting.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.folders import body_folder, check_size, check_target
from ..config.defaults import AUTO
from ..config.limits import parse_budgets, parse_rules
from ..config.recipe import QUICKSTART, Recipe
from ..config.recipe_files import check_inputs
from ..data.files import READERS
from ..data.tasks import named_task
from ..errors import CheckpointError, DataError, HubError, RecipeError, ScoresError
from ..types import COSTS
from .foreign import LOADED, check_format, check_pointers, id_in_address
from .idle import Known, check_idle
from .latency import check_latency

if TYPE_CHECKING:
    from ..types import Scores

# Devices of torch and of its better-known extensions.
_DEVICES = (
    "cpu", "cuda", "mps", "xpu", "xla", "hpu", "npu", "mlu", "musa", "mtia", "maia", "hip", "ipu",
    "vulkan", "privateuseone",
)  # fmt: skip
_DEVICE = re.compile(r"([a-z]+)(:(0|[1-9]\d{0,3}))?")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_LONGEST_ID = 96
_WHOLE = ("model*.safetensors", "pytorch_model*.bin")


def check_early(recipe: Recipe, *, given: Set[str]) -> Recipe:
    """Check all options of a prune that need neither model nor data; fill in where results go.

    Args:
        recipe: As it was given.
        given: Names of the options that were given; the others are defaults.

    Returns:
        The recipe with `output` and `save_scores` filled in, ``~`` resolved.

    Raises:
        RecipeError: An option, or a combination of them, cannot be used.
        BudgetError: A target cannot be read.
        PlanError: A rule cannot be read.
        DataError: A data set is not there.
        ScoresError: The scores file cannot be used.
        CheckpointError: The output exists and `overwrite` is off, or is not writable.
    """
    check_inputs(recipe)
    check_size(recipe.max_shard_size)
    parse_budgets(recipe.target, dict.fromkeys(COSTS, math.inf))
    parse_rules(recipe.rules())
    if recipe.training is not None:
        raise RecipeError(
            "training: the recipe is for a Trainer, and this command does not train; give it to "
            "GradNASCallback.from_recipe, or leave `training` out of it."
        )
    if recipe.private and recipe.push_to_hub is None:
        raise RecipeError(
            "--private: nothing is pushed; give --push-to-hub user/name, or omit --private."
        )
    _check_inputs(recipe, given)
    recipe = resolve_paths(recipe)
    check_latency(recipe)
    read_scores(recipe, given=given)
    return recipe


def check_inspected(recipe: Recipe, *, given: Set[str], needs_weights: bool = True) -> None:
    """The same for inspect, which writes nothing and may do without weights.

    Raises:
        RecipeError: An option, or a combination of them, cannot be used.
        DataError: The data set is not there.
    """
    if recipe.model == QUICKSTART:
        raise RecipeError(
            f"--model {QUICKSTART}: is trained by prune only; inspect the folder that it leaves."
        )
    parse_rules(recipe.rules())
    _check_inputs(recipe, given, needs_weights=needs_weights)


def _check_inputs(recipe: Recipe, given: Set[str], *, needs_weights: bool = True) -> None:
    check_model(recipe.model, needs_weights=needs_weights)
    if recipe.device is not None:
        check_device(recipe.device)
    task = named_task(recipe.task) if recipe.task is not None else None
    for name, option in ((recipe.dataset, "dataset"), (recipe.eval_dataset, "eval_dataset")):
        if name is not None:
            _check_data(name, option)
    check_idle(recipe, given, Known.of_task(task))


# --- paths ----------------------------------------------------------------------------------------


def model_folder(name: str) -> str:
    """What ``from_pretrained`` takes: a Hub id, or the folder of the Transformers model in one."""
    return str(body_folder(Path(name).expanduser())) if is_local(name) else name


def is_local(name: str) -> bool:
    """Whether a model's name is that of a file or folder here."""
    return name != QUICKSTART and _kind(name, "model") != ""


def check_model(name: str, *, needs_weights: bool = True) -> None:
    """Check that a model could be loaded from there: its folder, or the form of its Hub id.

    Raises:
        RecipeError: It could not.
    """
    if name == QUICKSTART:
        return
    kind, path = _kind(name, "model"), Path(name).expanduser()
    if kind == "file":
        check_format(name, path)
        raise RecipeError(
            f"--model {name}: is a file, needed the folder of a model; give the folder that holds "
            "its config.json."
        )
    if kind == "folder":
        _check_model_folder(name, path, needs_weights=needs_weights)
    elif name.startswith((".", "/", "~")):
        raise RecipeError(
            f"--model {name}: there is no such folder; check the path, or give a Hub id."
        )
    elif not _is_hub_id(name):
        example = id_in_address(name) or "an id such as google-bert/bert-base-uncased"
        raise RecipeError(
            f"--model {name}: there is no such folder, and the Hub has no ids of this form; check "
            f"the path, or give {example}."
        )


def _check_model_folder(name: str, folder: Path, *, needs_weights: bool) -> None:
    config = folder / "config.json"
    adapter = (folder / "adapter_config.json").is_file()
    if (folder / "modules.json").is_file() and not config.is_file():
        return  # an old folder of sentence-transformers, whose model is in a sub-folder
    if adapter and not (config.is_file() and _holds(folder, _WHOLE)):
        raise RecipeError(
            f"--model {name}: is the folder of an adapter (adapter_config.json), not of a whole "
            "model; merge it first: model = AutoPeftModel….from_pretrained(folder)"
            ".merge_and_unload(), save that with save_pretrained, and give its folder."
        )
    if needs_weights or not config.is_file():
        check_format(name, folder)
    if not config.is_file():
        raise RecipeError(
            f"--model {name}: cannot be loaded, its folder has no config.json; give the folder "
            "that save_pretrained wrote, or a Hub id."
        )
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"--model {name}: cannot be loaded, its config.json cannot be read ({error}); restore "
            "it, or save the model again."
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(
            f"--model {name}: cannot be loaded, its config.json holds {type(content).__name__}, "
            "needed an object; restore it, or save the model again."
        )
    if needs_weights:
        check_pointers(name, folder)
    if needs_weights and not _holds(folder, LOADED):
        raise RecipeError(
            f"--model {name}: its weights cannot be loaded, the folder holds none (such as "
            "model.safetensors); check that the model was saved or downloaded whole."
        )


def _holds(folder: Path, patterns: Sequence[str]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


def _check_data(name: str, option: str) -> None:
    """Check that a data set is there, as far as that can be told without opening it."""
    flag = f"--{option.replace('_', '-')} {name}"
    kind, path = _kind(name, option), Path(name).expanduser()
    if kind == "file":
        if path.suffix.lower() not in READERS:
            raise DataError(
                f"{flag}: cannot tell the format of {path.suffix or 'a file without suffix'!r}; "
                f"give one of {', '.join(READERS)}."
            )
        if path.stat().st_size == 0:
            raise DataError(f"{flag}: holds no example; give a file with at least one.")
        if not os.access(path, os.R_OK):
            raise DataError(f"{flag}: cannot be read; change its permissions.")
    elif kind == "folder":
        if not any(path.iterdir()):
            raise DataError(f"{flag}: is an empty folder; give one with a data file.")
    elif name.startswith((".", "/", "~")) or path.suffix.lower() in READERS:
        raise DataError(f"{flag}: there is no such file or folder; check the path.")
    elif not _is_hub_id(name.partition(":")[0]):
        raise DataError(
            f"{flag}: there is no such file or folder, and the Hub has no ids of this form; check "
            "the path, or give an id such as nyu-mll/glue:sst2."
        )


def _is_hub_id(name: str) -> bool:
    plain = _HUB_ID.fullmatch(name) and not name.endswith((".", "-", ".git"))
    return bool(plain) and len(name) <= _LONGEST_ID and "--" not in name and ".." not in name


def local_path(name: str) -> Path:
    """The absolute path of a folder that a command names, links and ``~`` resolved.

    Raises:
        CheckpointError: It is no path.
    """
    try:
        path = Path(name).expanduser().resolve()
        path.is_dir()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{name}: cannot be a path ({error}); check it.") from error
    return path


def check_pushed(folder: str, repository: str) -> None:
    """Check what is pushed and where to, as far as that needs no client of the Hub.

    Raises:
        HubError: The folder holds no model, or the repository has no id of the Hub's form.
        CheckpointError: The folder is no path.
    """
    place = local_path(folder)
    if not ((place / "config.json").is_file() and _holds(place, ["*.safetensors"])):
        raise HubError(
            f"{folder}: is not a saved model (needed config.json and *.safetensors), so nothing "
            "was pushed; give the folder that the pruned model was saved in."
        )
    if not _is_hub_id(repository):
        raise HubError(
            f"{repository!r}: is not the id of a repository; needed user/name, of letters, digits, "
            "'-', '_' and '.'."
        )


def _kind(name: str, option: str) -> str:
    """``file``, ``folder``, or nothing."""
    try:
        path = Path(name).expanduser()
        return "folder" if path.is_dir() else "file" if path.exists() else ""
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"--{option.replace('_', '-')} {name}: cannot be a path ({error}); check it."
        ) from error


def resolve_paths(recipe: Recipe) -> Recipe:
    """Fill in where the results go, ``~`` resolved, and check that they can be written there.

    Raises:
        RecipeError: The output is the model itself, or no scores file can be there.
        CheckpointError: The output exists and `overwrite` is off, or is not writable.
    """
    local = is_local(recipe.model)
    name = _folder_name(Path(recipe.model).expanduser()) if local else ""
    default = f"./{name or recipe.model.rstrip('/').rsplit('/', 1)[-1]}-gradnas"
    output = _without_tilde(recipe.output or default, "output")
    default = f"{output.rstrip('/')}.scores.safetensors"
    save_scores = _without_tilde(recipe.save_scores or default, "save_scores")
    scores = recipe.scores and _without_tilde(recipe.scores, "scores")
    source = Path(recipe.model).expanduser() if local else None
    if source is not None and Path(output).resolve() == source.resolve():
        raise RecipeError(
            f"--output {output}: is the folder of the model itself; give another folder, the "
            "original is kept."
        )
    if not recipe.dry_run:
        check_target(output, overwrite=recipe.overwrite, source=source)
    if recipe.scores is None:
        by = f"--save-scores {save_scores}" if recipe.save_scores else f"--output {output}"
        check_scores_place(Path(save_scores), by)
        _check_outside(Path(save_scores), output, by)
    if recipe.repair != "none":
        _check_repair_place(repair_file(output))
    own = {"output": output, "save_scores": save_scores, "scores": scores}
    return recipe.model_copy(update=own)


def check_scores_place(file: Path, by: str) -> None:
    """Check that scores can be written to a file, which an option says; `by` is that option.

    Raises:
        RecipeError: They cannot.
    """
    option = by.split(maxsplit=1)[0][2:]
    folder = file.absolute().parent
    if _kind(str(folder), option) != "folder" or not os.access(folder, os.W_OK):
        raise RecipeError(
            f"{by}: {folder} is not a folder that can be written to; make it, or give another file."
        )
    if _kind(str(file), option) == "folder":
        raise RecipeError(f"{by}: {file} is a folder, needed a file; give another name.")
    if file.exists() and file.stat().st_size:
        from ..types import Scores

        if not Scores.is_file(file):
            raise RecipeError(
                f"{by}: {file} holds no scores, and only scores are replaced; give another file."
            )


def _check_outside(file: Path, output: str, by: str) -> None:
    place, target = file.resolve(), Path(output).resolve()
    if target in (place, *place.parents):
        raise RecipeError(
            f"{by}: {'is' if place == target else 'is in'} the output folder {output}, which is "
            "written as a whole at the end; give a file beside it."
        )


def repair_file(output: str) -> Path:
    """Where the repair goes: beside the output."""
    return Path(f"{output.rstrip('/')}.repair.safetensors")


def _check_repair_place(file: Path) -> None:
    from ..types import REPAIR_MARK, metadata_of

    if _kind(str(file), "output") and REPAIR_MARK not in metadata_of(file):
        raise RecipeError(
            f"--output: {file} is where the repair is saved, and it holds none, and only repairs "
            "are replaced; give another output, or --repair none."
        )


def _folder_name(folder: Path) -> str:
    """A folder's name as it was given; that of a link is the link's."""
    return folder.resolve().name if folder.name in ("", "..") else folder.name


def _without_tilde(path: str, option: str) -> str:
    _kind(path, option)
    return str(Path(path).expanduser()) if path.startswith("~") else path


# --- scores and devices ---------------------------------------------------------------------------


def read_scores(recipe: Recipe, *, given: Set[str]) -> Scores | None:
    """Scores of an earlier run, if the recipe names a file.

    Raises:
        ScoresError: The file is missing, damaged, or holds another score than was asked for.
    """
    if recipe.scores is None:
        return None
    from ..types import Scores

    if not Path(recipe.scores).is_file():
        raise ScoresError(
            f"--scores {recipe.scores}: there is no such file; omit --scores to score."
        )
    scores = Scores.load(recipe.scores)
    if "score" not in given or recipe.score == AUTO or "method" not in scores.metadata:
        return scores
    if recipe.score not in scores.methods:
        raise ScoresError(
            f"--scores {recipe.scores}: holds {' and '.join(map(repr, scores.methods))} scores, "
            f"but --score {recipe.score} was asked for; omit one of the two."
        )
    return scores.of(recipe.score)


def check_device(device: str) -> None:
    """Check that torch could know a device of that name.

    Raises:
        RecipeError: It could not.
    """
    found = _DEVICE.fullmatch(device)
    if found is None or found[1] not in _DEVICES:
        advice = "for an NVIDIA or AMD GPU give cuda" if "gpu" in device.lower() else "give another"
        raise RecipeError(
            f"--device {device}: is no device of torch, which are {', '.join(_DEVICES[:4])}, …, "
            f"with a number after a colon where there are several (cuda:1); {advice}."
        )
