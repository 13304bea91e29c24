"""Which options are read when: one that was given and has no effect is an error, not a silence.

A row per option that is not always read. Permissions (``--trust-remote-code``, ``--overwrite``) are
not judged, nor is what ``--dry-run`` leaves out: it may be added to any command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from ..config.recipe import QUICKSTART, Recipe
from ..data.tasks import Head, Task
from ..errors import RecipeError


@dataclass(frozen=True)
class Known:
    """What is known of the model; None: nothing yet, so that nothing is judged by it."""

    head: Head | None = None
    input: str | None = None

    @classmethod
    def of_task(cls, task: Task | None) -> Known:
        """What a task says of any model; one without a head takes any input."""
        if task is None:
            return cls()
        return cls(task.head, None if task.head is Head.BASE else task.input)

    def is_not(self, *heads: Head) -> bool:
        """Whether the head is known to be none of these."""
        return self.head is not None and self.head not in heads

    def takes_other(self, feeds: str) -> bool:
        """Whether the input is known to be another."""
        return self.input is not None and self.input != feeds


def check_idle(recipe: Recipe, given: Set[str], known: Known) -> None:
    """Check that every option that was given has an effect.

    Raises:
        RecipeError: One has none.
    """
    for name, reason in idle_options(recipe, known).items():
        if name in given:
            raise RecipeError(
                f"{_as_given(name, vars(recipe)[name])}: has no effect here, as {reason}."
            )


def _as_given(name: str, value: object) -> str:
    """An option as it is on the command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, Mapping):
        value = ",".join(f"{key}={item}" for key, item in value.items())
    elif isinstance(value, tuple):
        value = ",".join(map(str, value))
    return f"--{flag} {value}"


def without_idle(recipe: Recipe, known: Known) -> Recipe:
    """The recipe with options that have no effect at their defaults, to be saved."""
    return recipe.model_copy(
        update={name: Recipe.default_of(name) for name in idle_options(recipe, known)}
    )


def idle_options(recipe: Recipe, known: Known) -> dict[str, str]:
    """Options without effect, each with the reason and what to do."""
    found = {name: reason(recipe, known) for name, reason in _ROWS.items()}
    return {name: reason for name, reason in found.items() if reason}


# --- reasons --------------------------------------------------------------------------------------

_Reason = Callable[[Recipe, Known], str]


def _is_file(name: str | None) -> bool:
    return name is not None and Path(name).expanduser().is_file()


def _tables(recipe: Recipe) -> list[str]:
    """Data sets that may have columns."""
    names = (recipe.dataset, recipe.eval_dataset)
    return [name for name in names if name is not None and not _is_text(name)]


def _is_text(name: str) -> bool:
    return _is_file(name) and Path(name).suffix.lower() == ".txt"


def _measures(recipe: Recipe) -> bool:
    """Whether labels are read for an evaluation, whatever the scores are made of."""
    return recipe.eval and bool(recipe.eval_dataset or recipe.eval_split)


def _no_columns(recipe: Recipe) -> str:
    if _tables(recipe):
        return ""
    if recipe.dataset is None and recipe.eval_dataset is None:
        return "there is no data with columns; give --dataset too, or omit it"
    return f"{recipe.dataset or recipe.eval_dataset} is plain text, without columns; omit it"


def _no_labels(recipe: Recipe) -> str:
    if recipe.labels == "model" and not _measures(recipe):
        return "--labels model takes them from the model; omit one of the two"
    return ""


def _split(recipe: Recipe, _: Known) -> str:
    if recipe.dataset is None:
        return "there is no --dataset to take it from; give one, or omit it"
    return f"{recipe.dataset} is one file, without splits; omit it" * _is_file(recipe.dataset)


def _eval_split(recipe: Recipe, known: Known) -> str:
    if not recipe.eval:
        return _evaluation(recipe, known)
    name = recipe.eval_dataset or recipe.dataset
    if name is None:
        return "there is no data set to take it from; give --eval-dataset, or --dataset"
    advice = "omit it" if recipe.eval_dataset else "give --eval-dataset FILE instead"
    return f"{name} is one file, without splits; {advice}" * _is_file(name)


def _evaluation(recipe: Recipe, _: Known) -> str:
    return "" if recipe.eval else "--no-eval measures nothing; omit one of the two"


def _text_column(recipe: Recipe, known: Known) -> str:
    if known.takes_other("text"):
        advice = f"give --{known.input}-column, or omit it"
        return f"the model takes {known.input} and no text; {advice}"
    return _no_columns(recipe)


def _label_column(recipe: Recipe, known: Known) -> str:
    if known.is_not(Head.CLASS, Head.TOKENS):
        has_target = known.head in (Head.SEQ2SEQ, Head.SPAN)
        advice = "give --target-column, or omit it" if has_target else "omit it"
        return f"this kind of model has no classes, and reads no such column; {advice}"
    return _no_columns(recipe) or _no_labels(recipe)


def _label_map(recipe: Recipe, known: Known) -> str:
    if known.is_not(Head.CLASS, Head.TOKENS):
        return "this kind of model has no classes; omit it"
    return _no_columns(recipe) or _no_labels(recipe)


def _target_column(recipe: Recipe, known: Known) -> str:
    if known.is_not(Head.SEQ2SEQ, Head.SPAN):
        has_classes = known.head in (Head.CLASS, Head.TOKENS)
        advice = "give --label-column, or omit it" if has_classes else "omit it"
        return f"this kind of model generates no separate text; {advice}"
    reads_anyway = known.input != "text"  # a decoder of speech needs tokens to read
    return _no_columns(recipe) or ("" if reads_anyway else _no_labels(recipe))


def _media_column(feeds: str) -> _Reason:
    def reason(recipe: Recipe, known: Known) -> str:
        if known.takes_other(feeds):
            return f"the model takes {known.input} and no {feeds}; omit it"
        return _no_columns(recipe)

    return reason


def _length(_: Recipe, known: Known) -> str:
    if known.input == "image" or (known.input == "audio" and known.is_not(Head.SEQ2SEQ)):
        return f"the model takes {known.input} and reads no tokens; omit it"
    return ""


def _labels(recipe: Recipe, _: Known) -> str:
    if recipe.scores is None or recipe.recover_epochs:
        return ""
    return "--scores are made already, with labels of their own; omit one of the two"


def _device(recipe: Recipe, _: Known) -> str:
    return "" if recipe.device_map is None else "--device-map places the model; omit one of the two"


def _of_device_map(recipe: Recipe, _: Known) -> str:
    return "" if recipe.device_map else "there is no --device-map; give one, or omit it"


def _checkpointing(recipe: Recipe, _: Known) -> str:
    if recipe.scores is not None:
        return "--scores are used, and nothing is scored; omit one of the two"
    is_by_weights = recipe.score in ("magnitude", "random")
    return f"--score {recipe.score} runs no backward; omit it" * is_by_weights


def _multiple(recipe: Recipe, _: Known) -> str:
    kept = recipe.multiple.keys() - {
        *recipe.axes,
        *("kv_groups" for k in recipe.axes if k == "heads"),
    }
    if not recipe.axes or not kept:
        return ""
    return f"--axes {','.join(recipe.axes)} keeps all {sorted(kept)[0]}; name them there, too"


def _save_scores(recipe: Recipe, _: Known) -> str:
    return "" if recipe.scores is None else "--scores are made already; omit one of the two"


def _revision(recipe: Recipe, _: Known) -> str:
    if recipe.model == QUICKSTART or Path(recipe.model).expanduser().exists():
        return f"--model {recipe.model} does not come from the Hub; omit it"
    return ""


def _recovery(recipe: Recipe, _: Known) -> str:
    return "" if recipe.recover_epochs else "nothing is trained; give --recover-epochs, or omit it"


def _temperature(recipe: Recipe, known: Known) -> str:
    if recipe.recover_alpha == 0 and recipe.recover_epochs:
        return "--recover-alpha 0 leaves the teacher's predictions out; omit it"
    return _recovery(recipe, known)


def _latency(recipe: Recipe, _: Known) -> str:
    if "latency_ms" in recipe.target:
        return ""
    return "no budget is in milliseconds; give --target latency_ms=…, or omit it"


def _measured(recipe: Recipe, known: Known) -> str:
    if recipe.latency_table is not None:
        return "--latency-table says for what it was measured; omit one of the two"
    return _latency(recipe, known)


_ROWS: Mapping[str, _Reason] = {
    "revision": _revision,
    "split": _split,
    "text_column": _text_column,
    "label_column": _label_column,
    "target_column": _target_column,
    "image_column": _media_column("image"),
    "audio_column": _media_column("audio"),
    "max_length": _length,
    "labels": _labels,
    "label_map": _label_map,
    "eval_dataset": _evaluation,
    "eval_split": _eval_split,
    "eval_num_examples": _evaluation,
    "flops_length": _length,
    "multiple": _multiple,
    "latency_table": _latency,
    "latency_batch_size": _measured,
    "latency_phase": _measured,
    "save_scores": _save_scores,
    "checkpointing": _checkpointing,
    "device": _device,
    "max_memory": _of_device_map,
    "offload_folder": _of_device_map,
    "recover_num_examples": _recovery,
    "recover_batch_size": _recovery,
    "recover_learning_rate": _recovery,
    "recover_temperature": _temperature,
    "recover_alpha": _recovery,
    "recover_hidden_weight": _recovery,
    "recover_lora_rank": _recovery,
}
