"""Loads config, model and processor, with one clear message for what goes wrong.

Are the weights all from the checkpoint, and is the head that of the task? What is drawn at random
is worth nothing: its scores, and every figure, would say nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import GradNASWarning, RecipeError, first_line
from ..types import read_object
from .tasks import TASKS, Head, Task, architecture_of, input_of, model_class, named_task, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..config.recipe import Recipe


DEFAULT_MAX_LENGTH = 128
ADAPTER = "adapter_config.json"
"""File by which an adapter of PEFT is known."""
# Tokenizers without a limit of their own say 10^30.
_NO_LIMIT = 10**9


@dataclass(frozen=True)
class Source:
    """A model that is known but not loaded yet.

    Attributes:
        config: The checkpoint's config.
        cls: Class to load it with.
        task: Task with its head; ``feature-extraction`` for a class that no table knows.
        input: ``"text"``, ``"image"`` or ``"audio"``.
        processor: Tokenizer, image processor, feature extractor or processor.
        tokenizer: The tokenizer, or None where text plays no part.
        head_is_unknown: Whether no table knows the class and no task was asked for.
    """

    config: PreTrainedConfig
    cls: Any
    task: Task
    input: str
    processor: Any
    tokenizer: Any
    head_is_unknown: bool = False


def open_source(recipe: Recipe, folder: str, *, needs_processor: bool = True) -> Source:
    """Read config and processor of the model in `folder` (or of that Hub id).

    Args:
        recipe: Options of the run.
        folder: Where the model is.
        needs_processor: Whether one that is missing is an error; else it is None.

    Raises:
        RecipeError: Nothing is there, the task does not fit, or the processor is missing.
    """
    from transformers import AutoConfig

    asked = named_task(recipe.task) if recipe.task else None
    if recipe.model.startswith((".", "/", "~")) and not Path(folder).exists():
        raise RecipeError(
            f"--model {recipe.model}: there is no such folder; check the path, or give a Hub id."
        )
    options = _hub_options(recipe)
    if Path(folder, ADAPTER).is_file():
        raise _adapter_error(recipe, Path(folder, ADAPTER))
    try:
        config = _load(
            AutoConfig.from_pretrained,
            folder,
            what=f"--model {recipe.model}: cannot be loaded",
            advice="give a Hub id or a folder with config.json; a private model needs "
            "'hf auth login', remote code needs --trust-remote-code.",
            **options,
        )
    except RecipeError as error:
        file = _adapter_file(recipe, folder)
        if file is not None:
            raise _adapter_error(recipe, file) from None
        if "does not recognize this architecture" in str(error):
            raise RecipeError(
                f"--model {recipe.model}: this Transformers ({version('transformers')}) does not "
                "know the model_type in its config.json; upgrade it (pip install -U transformers), "
                "or give --trust-remote-code if the model brings its own code."
            ) from error
        raise
    cls = model_class(config, asked)
    known = asked or task_of(config)
    task = known or TASKS["feature-extraction"]
    feeds = input_of(cls, config, known)
    try:
        processor, tokenizer = _load_processor(recipe, folder, task, feeds)
    except RecipeError:
        if needs_processor:
            raise
        processor = tokenizer = None
    return Source(config, cls, task, feeds, processor, tokenizer, head_is_unknown=known is None)


def _adapter_file(recipe: Recipe, folder: str) -> Path | None:
    """The config of an adapter in a repository of the Hub, if it is one."""
    from transformers.utils import cached_file

    try:
        found = cached_file(
            folder,
            ADAPTER,
            revision=recipe.revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError):  # no such repository: the first error says so
        return None
    return None if found is None else Path(found)


def _adapter_error(recipe: Recipe, file: Path) -> RecipeError:
    """What to say of an adapter: it is a change of a model, and no model."""
    base = read_object(file).get("base_model_name_or_path")
    base = base if isinstance(base, str) else "its base model"
    return RecipeError(
        f"--model {recipe.model}: holds an adapter ({ADAPTER}), needed is a whole model, since an "
        "adapter would not follow the cut; merge it first: model = peft.PeftModel.from_pretrained("
        f"AutoModel….from_pretrained({base!r}), {recipe.model!r}).merge_and_unload(), then save "
        "model and tokenizer with save_pretrained(folder) and give that folder."
    )


def load_model(recipe: Recipe, source: Source, folder: str) -> tuple[PreTrainedModel, list[str]]:
    """Load the weights; also the names of weights that the checkpoint does not hold.

    Raises:
        RecipeError: The checkpoint cannot be loaded with that class or onto that device.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)  # missing weights are the same in every run and process
        model, info = _load(
            source.cls.from_pretrained,
            folder,
            what=f"--model {recipe.model}: its weights cannot be loaded",
            advice="check --task, --revision and --dtype, and that the files are whole.",
            config=source.config,
            dtype=recipe.dtype,
            output_loading_info=True,
            **_placement(recipe),
            **_hub_options(recipe),
        )
    _warn_of_unused(model, info["unexpected_keys"])
    if recipe.device_map is not None:
        return model, sorted(info["missing_keys"])
    device = recipe.device or best_device()
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"--device {device}: the model cannot be put there ({first_line(error)}); "
            "give another --device."
        ) from error
    return model, sorted(info["missing_keys"])


def _placement(recipe: Recipe) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that say where Accelerate puts weights."""
    if recipe.device_map is None:
        return {}
    pairs = (item.split("=") for item in recipe.max_memory)
    most = {int(name) if name.isdigit() else name: size for name, size in pairs}
    found = {"device_map": recipe.device_map, "offload_folder": recipe.offload_folder}
    return found | ({"max_memory": most} if most else {})


def prepare_tokenizer(source: Source) -> str | None:
    """Give a tokenizer without a pad token its end token; say so, or return None.

    Raises:
        RecipeError: There is no end token either.
    """
    tokenizer = source.tokenizer
    if tokenizer is None or tokenizer.pad_token is not None:
        return None
    if tokenizer.eos_token is None:
        raise RecipeError(
            f"{type(tokenizer).__name__}: has neither a pad nor an eos token, and batches need "
            "padding; set one with tokenizer.pad_token = ... and save it beside the model."
        )
    tokenizer.pad_token = tokenizer.eos_token
    if source.config.get_text_config().pad_token_id is None:
        source.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return f"{tokenizer.pad_token!r} (its eos token; it has no pad token)"


def resolve_max_length(recipe: Recipe, source: Source) -> int:
    """Tokens per example: the flag, checked against the positions, or what fits the default.

    Raises:
        RecipeError: ``--max-length`` exceeds the positions.
    """
    limit = _positions(source)
    if recipe.max_length is None:
        return min(DEFAULT_MAX_LENGTH, limit)
    if recipe.max_length > limit:
        raise RecipeError(
            f"--max-length {recipe.max_length}: the model has {limit} positions, so longer "
            f"sequences cannot run; give --max-length {limit} or less."
        )
    return recipe.max_length


def _positions(source: Source) -> int:
    """Positions of the model; of the decoder for speech, whose labels are the only text."""
    speech = source.input == "audio"
    config = source.config.get_text_config(decoder=speech)
    # T5 has no such attribute: its relative positions have no limit. Asked by name because config
    # classes share no base attribute for it.
    name = "max_target_positions" if speech else "max_position_embeddings"
    found = getattr(config, name, None)
    limit = found if isinstance(found, int) and found > 0 else _NO_LIMIT
    if config.model_type in _PADDED_POSITIONS:
        limit -= (config.pad_token_id or 0) + 1
    if source.tokenizer is not None and source.tokenizer.model_max_length < _NO_LIMIT:
        limit = min(limit, source.tokenizer.model_max_length)
    return limit


# Their position ids start after the padding index, so that many positions are never used.
_PADDED_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "longformer", "mpnet")


def _load_processor(recipe: Recipe, folder: str, task: Task, feeds: str) -> tuple[Any, Any | None]:
    import transformers

    options = _hub_options(recipe)
    if feeds == "text":
        tokenizer = _load(
            transformers.AutoTokenizer.from_pretrained,
            folder,
            what=f"--model {recipe.model}: has no tokenizer that can be loaded",
            advice="save one beside the model with tokenizer.save_pretrained(folder).",
            **options,
        )
        _check_vocabulary(tokenizer, recipe)
        return tokenizer, tokenizer
    names = {"image": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}
    name = "AutoProcessor" if feeds == "audio" and task.head is Head.SEQ2SEQ else names[feeds]
    processor = _load(
        lambda *args, **kwargs: getattr(transformers, name).from_pretrained(*args, **kwargs),
        folder,
        what=f"--model {recipe.model}: has no {name} that can be loaded",
        advice="save the model's processor beside it with processor.save_pretrained(folder).",
        **options,
    )
    if name != "AutoProcessor":
        return processor, None
    _check_vocabulary(processor.tokenizer, recipe)
    return processor, processor.tokenizer


def _check_vocabulary(tokenizer: Any, recipe: Recipe) -> None:
    """Transformers makes an empty tokenizer, without a word, where there is no file of one."""
    words = len(tokenizer) - len(tokenizer.all_special_ids)
    if words <= 0:
        raise RecipeError(
            f"--model {recipe.model}: has no tokenizer; {type(tokenizer).__name__} came without a "
            "vocabulary. Save one beside the model with tokenizer.save_pretrained(folder)."
        )


def _hub_options(recipe: Recipe) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": recipe.trust_remote_code}
    if recipe.revision:
        options["revision"] = recipe.revision
    return options


def _load(load: Callable[..., Any], folder: str, *, what: str, advice: str, **options: Any) -> Any:
    from safetensors import SafetensorError

    known = (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError)
    try:
        return load(folder, **options)
    except (*known, SafetensorError) as error:
        raise RecipeError(f"{what} ({first_line(error)}); {advice}") from error


def best_device() -> str:
    """The accelerator if there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# --- weights that the checkpoint lacks, or has too much -------------------------------------------


_SHOWN = 4
_ANY = (None, Head.BASE)
# Parts of a model that a task brings along, where no module of its own holds the body. A pooler is
# often drawn anew for a task.
_HEADS = frozenset(
    ["lm_head", "cls", "classifier", "score", "qa_outputs", "pooler", "proj_out", "embed_out"]
)
# Buffers that older versions saved and every version computes.
_COMPUTED = ("position_ids", "inv_freq", "masked_bias", "attn.bias", "token_type_ids")


def check_head(recipe: Recipe, source: Source, model: PreTrainedModel, missing: list[str]) -> None:
    """Check that a model came whole from its checkpoint, or that a new head was asked for.

    Args:
        recipe: `allow_new_head` allows what concerns the head alone.
        source: What was loaded.
        model: With its weights.
        missing: Names of weights that the checkpoint does not hold.

    Raises:
        RecipeError: Weights are random, or the head was trained for another task.
    """
    body = [name for name in missing if _is_of_body(name, model)]
    own = architecture_of(source.config)
    where = f"--model {recipe.model}: its checkpoint ({own or 'of no named class'})"
    if body:
        raise RecipeError(
            f"{where} has no weights for {listed(body)} of {type(model).__name__}, which are not "
            "its head's; they would be random. Check that its files are whole and its config.json "
            "is theirs, and --task."
        )
    if missing and recipe.recover_epochs and not recipe.dry_run:
        raise RecipeError(
            f"--recover-epochs {recipe.recover_epochs:g}: the checkpoint has no weights for "
            f"{listed(missing)}, so there is nothing to learn from it; fine-tune it first, or "
            "omit --recover-epochs."
        )
    if recipe.allow_new_head:
        return
    if missing:
        advice = "fine-tune it first, " + ("omit --task, " if recipe.task else "")
        raise RecipeError(
            f"{where} has no weights for {listed(missing)} of {type(model).__name__}; they would "
            f"be random, and scores and metrics would mean little. {advice.capitalize()}or give "
            "--allow-new-head to go on."
        )
    trained = task_of(source.config)
    is_another = own is not None and type(model).__name__ != own
    heads = (trained and trained.head, source.task.head)
    if recipe.task and is_another and heads[0] != heads[1] and not set(heads) & set(_ANY):
        raise RecipeError(
            f"{where} was trained for {trained and trained.name}, and its head has the form that "
            f"--task {recipe.task} needs but not the meaning; fine-tune it first, leave --task "
            "away, or give --allow-new-head to go on."
        )


def _warn_of_unused(model: PreTrainedModel, unexpected: Iterable[str]) -> None:
    """Warn of weights of the checkpoint that belong to the body, and that its class has no use for.

    Those of other heads are left out as a matter of course.
    """
    lost = [name for name in sorted(unexpected) if _is_of_body(name, model)]
    lost = [name for name in lost if not name.endswith(_COMPUTED)]
    if lost:
        warnings.warn(
            f"{type(model).__name__}: does not use {listed(lost)}, which the checkpoint holds; "
            "they are dropped. Check that config.json belongs to the weights.",
            GradNASWarning,
            stacklevel=2,
        )


def listed(names: Sequence[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")


def _is_of_body(name: str, model: PreTrainedModel) -> bool:
    """Whether a weight is not the head's, by the module that holds it."""
    parts = name.split(".")
    if parts[0] == model.base_model_prefix:
        parts = parts[1:]
    if set(parts) & _HEADS:
        return False
    return parts[0] in dict(model.base_model.named_children())
