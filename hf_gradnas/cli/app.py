"""The console script: parses, shows errors without a traceback, returns an exit code.

Exit codes: 0 done, 1 pruning or verification failed, 2 bad input, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Optional, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ..config.plans import Plans
from ..config.recipe import NOT_FLAGS, Recipe
from ..config.sweep import Sweep
from .file_commands import EXIT_CODES, JSON, add_file_commands

app = typer.Typer(
    name="hf-gradnas",
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"hf_gradnas {version('hf_gradnas')}")
        raise typer.Exit


@app.callback()
def _describe(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            help="Show the version and exit.",
            callback=_show_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Prune Hugging Face models with gradient scores."""


def prune_command(**options: Any) -> int:
    """Prune a model to a budget: score, plan, cut, save.

    For example: hf-gradnas prune --model bert-base-uncased --target flops=50%
    """
    from .prune import prune_from_options

    recipe, settings = options.pop("recipe"), options.pop("settings") or []
    flags = {name: bool(options.pop(name)) for name in _PRUNE_FLAGS}
    code = prune_from_options(given_flags(options), settings=settings, file=recipe, **flags)
    raise typer.Exit(code)


def score_command(**options: Any) -> int:
    """Score a model: a file from which plans for any budget are made, without the model.

    For example: hf-gradnas score --model bert-base-uncased --output bert.scores.safetensors
    """
    from .score import score_from_options

    raise typer.Exit(score_from_options(given_flags(options)))


def plan_command(**options: Any) -> int:
    """Plan what stays within a budget, from scores alone: no model is loaded.

    For example: hf-gradnas plan bert.scores.safetensors --target flops=60% --output plan.json
    """
    from .plan import plan_from_options

    file = options.pop("file")
    own = {name: options.pop(name) for name in Plans.model_fields}
    raise typer.Exit(plan_from_options(file, given_flags(options), given_flags(own)))


def repair_command(**options: Any) -> int:
    """Find new weights for a plan by least squares, layer by layer, for apply --repair.

    For example: hf-gradnas repair plan.json ./llama-70b --dataset train.jsonl --device-map auto
    --max-memory cpu=30GiB --offload-folder away --output llama.repair.safetensors
    """
    from .repair import repair_from_options

    file, checkpoint = options.pop("plan"), options.pop("checkpoint")
    raise typer.Exit(repair_from_options(file, checkpoint, given_flags(options)))


def inspect_command(**options: Any) -> int:
    """Show what can be pruned in a model, what is refused and why, and how far budgets reach.

    Needs no data: the model runs on random input. For example:
    hf-gradnas inspect --model bert-base-uncased
    With --no-weights not even a download: --model deepseek-ai/DeepSeek-V3 --no-weights
    """
    from .inspect import inspect_from_options

    flags = {name: bool(options.pop(name)) for name in _INSPECT_FLAGS}
    raise typer.Exit(inspect_from_options(given_flags(options), **flags))


def sweep_command(**options: Any) -> int:
    """Measure what is left of a model at many budgets, by many scores: one scoring, nothing is cut.

    For example: hf-gradnas sweep --model bert-base-uncased --targets flops=80%,60%,40%
    --score fisher,taylor --seeds 0,1,2
    """
    from .sweep import sweep_from_options

    own = {name: options.pop(name) for name in Sweep.model_fields}
    raise typer.Exit(sweep_from_options(given_flags(options), given_flags(own)))


# --- options, made from the fields of `Recipe`: one source of names and help ----------------------


def with_recipe_options(command: Callable[..., int]) -> Callable[..., int]:
    """Give `command` one keyword option per field of `Recipe`, plus ``--recipe`` and ``--set``.

    The command receives every option as a keyword; those not given are None or empty. Values stay
    strings: `Recipe` validates them, in one place.
    """
    parameters = [
        _parameter("recipe", str, "--recipe", "YAML file or name of a shipped recipe.", "FILE"),
        _parameter(
            "settings",
            list[str],
            "--set",
            "Set any option of the recipe; weaker than a flag, stronger than the file. Repeatable.",
            "KEY=VALUE",
        ),
    ]
    for name, field in Recipe.model_fields.items():
        if name not in NOT_FLAGS:
            parameters.append(_field_parameter(name, field))
    parameters += [_flag_parameter(name, text) for name, text in _PRUNE_FLAGS.items()]
    return _with_parameters(command, parameters)


def with_options(
    command: Callable[..., int],
    fields: Mapping[str, str | None],
    flags: Mapping[str, str],
    own: Mapping[str, FieldInfo] | None = None,
    arguments: Mapping[str, tuple[str, str]] | None = None,
    output: str = "",
) -> Callable[..., int]:
    """Give `command` the options of some fields of `Recipe`, and options of its own.

    Args:
        command: Receives every option as a keyword, as in `with_recipe_options`.
        fields: Names of fields; a text takes the place of the field's own description.
        flags: Help text per flag without a value; ``as_json`` is ``--json``.
        own: Fields of other settings, by name.
        arguments: Name and help text of what comes without a flag, by keyword.
        output: What ``--output`` names, where it is no folder.
    """
    parameters = [_argument(name, *said) for name, said in (arguments or {}).items()]
    parameters += [_field_parameter(name, field) for name, field in (own or {}).items()]
    for name, text in fields.items():
        field = Recipe.model_fields[name]
        metavar = output if name == "output" else ""
        parameters.append(_field_parameter(name, field, description=text, metavar=metavar))
    parameters += [_flag_parameter(name, text) for name, text in flags.items()]
    return _with_parameters(command, parameters)


def _with_parameters(
    command: Callable[..., int], parameters: list[inspect.Parameter]
) -> Callable[..., int]:
    if any(item.name == "model" for item in parameters):
        own = _argument("argument", "MODEL", "The same as --model.", is_needed=False)
        parameters = [own, *parameters]
    # Typer reads both; neither can be written by hand without a second list of options.
    vars(command)["__signature__"] = inspect.Signature(parameters)
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    return command


def given_flags(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were on the command line, by field name, as `Recipe` reads them.

    Raises:
        typer.BadParameter: There are two models, one of them without ``--model``.
    """
    argument = options.pop("argument", None)
    if argument is not None and options["model"] is not None:
        raise typer.BadParameter(
            f"MODEL: {argument!r} is one model, and --model {options['model']!r} another; give one."
        )
    if argument is not None:
        options["model"] = argument
    return {
        name: value
        for name, value in options.items()
        if value is not None and value not in ([], ())
    }


def _field_parameter(
    name: str, field: FieldInfo, *, description: str | None = None, metavar: str = ""
) -> inspect.Parameter:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    flag = "--" + name.replace("_", "-")
    kind: Any = str
    if field.annotation is bool:
        kind = bool
        flag += f"/--no-{flag[2:]}" if field.default else ""
    elif get_origin(field.annotation) in (dict, tuple):
        kind = list[str]
    help_text = description or str(field.description)
    choices = _choices(field.annotation)
    if choices:
        help_text += f" One of {', '.join(choices)}."
    if field.default not in (None, PydanticUndefined, ()) and kind is not bool and not description:
        help_text += f" Default: {field.default}."
    if kind is bool and field.default and not description:
        help_text += " Default: yes."
    metavar = metavar or str(extra.get("metavar") or ("CHOICE" if choices else "INTEGER"))
    return _parameter(
        name, kind, flag, help_text, "" if kind is bool else metavar, panel=str(extra["panel"])
    )


def _flag_parameter(name: str, text: str) -> inspect.Parameter:
    """A flag without a value; ``as_json`` is ``--json``."""
    flag = "--" + name.removeprefix("as_").replace("_", "-")
    panel = "Output" if name in _OUTPUT_FLAGS else "Model"
    return _parameter(name, bool, flag, text, "", panel=panel)


def _choices(annotation: Any) -> tuple[str, ...]:
    """Choices of a Literal, also inside ``X | None``."""
    for part in (annotation, *get_args(annotation)):
        if get_origin(part) is Literal:
            return get_args(part)
    return ()


def _argument(
    name: str, metavar: str, description: str, *, is_needed: bool = True
) -> inspect.Parameter:
    kind: Any = str if is_needed else Optional[str]  # noqa: UP045 - a runtime value
    annotation = Annotated[kind, typer.Argument(metavar=metavar, help=description)]
    default = inspect.Parameter.empty if is_needed else None
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _parameter(
    name: str,
    kind: Any,
    flag: str,
    description: str,
    metavar: str,
    *,
    panel: str = "Recipe",
) -> inspect.Parameter:
    option = typer.Option(
        flag,
        help=description,
        metavar=metavar,
        rich_help_panel=panel,
        show_default=False,
    )
    annotation = Annotated[Optional[kind], option]  # noqa: UP045 - `kind` is a runtime value
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


_INSPECTED: dict[str, str | None] = {
    "model": "Hub id or folder of the model.",
    **dict.fromkeys(("task", "revision", "trust_remote_code", "device", "dtype")),
    "dataset": "Data to take the input from, in the forms of prune. Default: random input.",
    **dict.fromkeys(("split", "text_column", "label_column", "target_column")),
    **dict.fromkeys(("image_column", "audio_column", "max_length", "flops_length")),
    **dict.fromkeys(("layout", "axes", "exclude", "min_units", "multiple", "seed")),
}
_INSPECT_FLAGS = {
    "no_weights": "Load no weights: the config says enough, in seconds whatever the size.",
    "as_json": JSON,
    "quiet": "Print no warnings and no progress.",
}
_PRUNE_FLAGS = {
    "as_json": "Write one JSON object to standard output, and nothing else: what is left, what it "
    "is worth, where it is, and all warnings; nothing if it fails.",
    "quiet": "Print errors and the last line only.",
}
_OUTPUT_FLAGS = frozenset(["as_json", "quiet"])

_SWEPT: dict[str, str | None] = {
    "model": "Hub id or folder of the model.",
    **dict.fromkeys(("task", "revision", "trust_remote_code", "allow_new_head", "device", "dtype")),
    **dict.fromkeys(("device_map", "max_memory", "offload_folder")),
    **dict.fromkeys(("dataset", "split", "text_column", "label_column", "target_column")),
    **dict.fromkeys(("image_column", "audio_column", "num_examples", "shuffle", "batch_size")),
    **dict.fromkeys(("max_length", "labels", "label_map", "checkpointing")),
    **dict.fromkeys(("eval_dataset", "eval_split", "eval_num_examples", "flops_length")),
    **dict.fromkeys(("latency_table", "latency_batch_size", "latency_phase")),
    **dict.fromkeys(("search", "layout", "repair", "axes", "exclude", "min_units", "multiple")),
    "seed": None,
    "output": "Folder of the results: sweep.json, .csv, .md, .png, .svg, and the scores. What is "
    "in it already is not measured again. Default: ./<last part of model>-sweep.",
    "overwrite": "Replace the model that hf_gradnas saved in <output>/pruned.",
    "report": "Write report/ beside the model of --save. Default: yes.",
}

_OF_DATA = ("dataset", "split", "text_column", "label_column", "target_column", "image_column")
_SCORED: dict[str, str | None] = {
    "model": "Hub id or folder of the model.",
    **dict.fromkeys(("task", "revision", "trust_remote_code", "allow_new_head", "device", "dtype")),
    **dict.fromkeys(("device_map", "max_memory", "offload_folder")),
    **dict.fromkeys((*_OF_DATA, "audio_column", "num_examples", "shuffle", "batch_size")),
    **dict.fromkeys(("checkpointing", "max_length", "labels", "label_map")),
    "eval": "Hold out the examples that prune would measure on, so that the scores are those of "
    "prune. Default: yes.",
    "eval_num_examples": "Hold out so many.",
    "flops_length": None,
    "score": "How heads and neurons are scored; auto is for prune alone. Default: tempered.",
    "axes": "layers: look for whole layers, too, which plan --axes layers needs. All other kinds "
    "are scored in any case.",
    "seed": None,
    "output": "File of the scores, also of partial ones to resume from. Default: ./<last part of "
    "model>-gradnas.scores.safetensors.",
}
_PLANNED: dict[str, str | None] = {
    "target": None,
    "score": "Which of the scores in the file, where there are several. Default: the first.",
    **dict.fromkeys(("search", "layout", "axes", "exclude", "min_units", "multiple")),
    "latency_table": "Table that latency_ms is read from, as prune measures and saves it.",
    "output": "File of the plan, or folder of several. Default: the name of the scores with "
    ".plan.json, or .plans.",
}
_FILE = {"file": ("SCORES", "File of hf-gradnas score.")}
_PLAN_OF = {
    "plan": ("PLAN", "File of hf-gradnas plan."),
    "checkpoint": ("CHECKPOINT", "Hub id or folder of the whole model."),
}
_NOT_REPAIRED = ("model", "checkpointing", "flops_length", "score", "axes")
_REPAIRED: dict[str, str | None] = {
    **{name: text for name, text in _SCORED.items() if name not in _NOT_REPAIRED},
    "offload_folder": "Where --device-map keeps weights that a checkpoint's own files cannot "
    "serve, and where batches wait that do not fit into memory.",
    "eval": "Leave out the examples that prune would measure on, so that the repair is that of "
    "prune. Default: yes.",
    "output": "File of the repair. Default: the name of the plan with .repair.safetensors.",
}

app.command("prune", epilog=EXIT_CODES.format(one="pruning or verification failed"))(
    with_recipe_options(prune_command)
)
app.command("score", epilog=EXIT_CODES.format(one="out of memory"))(
    with_options(score_command, _SCORED, {}, output="FILE")
)
app.command("plan", epilog="Exit codes: 0 done, 2 bad input, 130 interrupted.")(
    with_options(plan_command, _PLANNED, {}, Plans.model_fields, _FILE, output="PATH")
)
app.command("repair", epilog=EXIT_CODES.format(one="out of memory"))(
    with_options(repair_command, _REPAIRED, {}, arguments=_PLAN_OF, output="FILE")
)
app.command("inspect", epilog=EXIT_CODES.format(one="nothing in it can be pruned"))(
    with_options(inspect_command, _INSPECTED, _INSPECT_FLAGS)
)
app.command("sweep", epilog=EXIT_CODES.format(one="the model of --save could not be saved"))(
    with_options(sweep_command, _SWEPT, {}, Sweep.model_fields)
)
add_file_commands(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: Arguments after the program's name; ``None`` takes those of the process.
    """
    from .stopping import run_stoppable

    arguments = None if argv is None else list(argv)
    return run_stoppable(lambda: app(args=arguments, prog_name="hf-gradnas"))
