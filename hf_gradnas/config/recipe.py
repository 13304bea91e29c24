"""The recipe: every option of a pruning run, in one place.

The command line, `--set`, YAML files and the `recipe.yaml` that is saved beside a pruned model all
come from the fields of `Recipe`; their descriptions are the only help text. Knows values and files,
knows neither models nor data sets.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from .defaults import DEFAULT_SCORE, MAX_SHARD_SIZE, Score
from .inputs import Inputs, named
from .strict import Settings, read_multiples, read_targets

FORMAT = 1
"""Version of recipe files that is read and written."""
QUICKSTART = "quickstart"
"""Name of the model that the prune command trains on the spot."""

_Extra = dict[str, Any]
_PLAN: _Extra = {"panel": "Scores and plan"}
_RECOVERY: _Extra = {"panel": "Recovery"}
_OUTPUT: _Extra = {"panel": "Output"}
NOT_FLAGS = ("format_version", "training")
BY_FLAG_ONLY = {
    "trust_remote_code": "it runs code that comes with the model",
    "overwrite": "it replaces what is in the output folder",
    "push_to_hub": "it publishes the result",
}
"""Options that no recipe file switches on, and none keeps, with the reason."""


def _default_target() -> dict[str, float | str]:
    return {"flops": "60%"}


class Training(Settings):
    """How `GradNASCallback` prunes while a model trains; see there."""

    when: Literal["begin", "gradual", "end"] = "end"
    schedule: Literal["cubic", "linear"] = "cubic"
    start_ratio: float = 0.1
    end_ratio: float = 0.7
    stages: int = 10
    mask: Literal["soft", "hard"] = "soft"
    scores_from: Literal["private", "training"] = "private"


class Recipe(Inputs):
    """All options of ``hf-gradnas prune``."""

    target: dict[str, float | str] = Field(
        default_factory=_default_target,
        min_length=1,
        description="Budget to keep to: flops, params, memory, kv_cache, active_params or "
        "latency_ms, as a share of the original (60%) or a number (66e6, 1.2G, 500MB). Repeatable; "
        "all hold at once. Default: flops=60%.",
        json_schema_extra=named(_PLAN, "NAME=VALUE"),
    )
    flops_length: int | None = Field(
        default=None,
        ge=1,
        description="Sequence length at which flops are counted. Default: --max-length.",
        json_schema_extra=_PLAN,
    )
    latency_table: str | None = Field(
        default=None,
        description="Table that latency_ms is read from, measured for this model on the machine "
        "that it will run on. Default: measured here, and saved in <output>.latency.json.",
        json_schema_extra=named(_PLAN, "FILE"),
    )
    latency_batch_size: int = Field(
        default=1,
        ge=1,
        description="Examples at once for which latency_ms is measured, of --flops-length tokens.",
        json_schema_extra=_PLAN,
    )
    latency_phase: Literal["prefill", "decode"] = Field(
        default="prefill",
        description="prefill times a forward of all tokens, decode one of the next token.",
        json_schema_extra=_PLAN,
    )
    score: Score = Field(
        default=DEFAULT_SCORE,
        description="How heads and neurons are scored. auto tries tempered and fisher, and takes "
        "the plan that is closest to the original on held-out calibration data.",
        json_schema_extra=_PLAN,
    )
    search: Literal["lagrangian", "binary"] = Field(
        default="lagrangian", description="How the plan is found.", json_schema_extra=_PLAN
    )
    layout: Literal["auto", "stock", "per_layer"] = Field(
        default="auto",
        description="stock keeps one width for all layers and loads in plain Transformers, "
        "per_layer gives each layer its own, auto is stock where that loses no kind of axis.",
        json_schema_extra=_PLAN,
    )
    repair: Literal["auto", "weights", "swap", "none"] = Field(
        default="auto",
        description="weights fits the layers that read what is pruned, and those after them, anew, "
        "by least squares on the calibration data and without training, and keeps the new weights "
        "where they bring the predictions closer to the original's on held-out batches; swap "
        "also tries other neurons at the same widths, in twice the time; auto is swap for language "
        "models, else weights; none leaves all as they are.",
        json_schema_extra=_PLAN,
    )
    scores: str | None = Field(
        default=None,
        description="Use these complete scores instead of scoring.",
        json_schema_extra=named(_PLAN, "FILE"),
    )
    save_scores: str | None = Field(
        default=None,
        description="Where the scores go, also partial ones to resume from. "
        "Default: <output>.scores.safetensors.",
        json_schema_extra=named(_PLAN, "FILE"),
    )
    checkpointing: bool = Field(
        default=False,
        description="Run each layer again in the backward of scoring instead of keeping its "
        "activations: less memory and a quarter more time, the same scores.",
        json_schema_extra=_PLAN,
    )
    axes: tuple[Literal["heads", "neurons", "experts", "channels", "layers"], ...] = Field(
        default=(),
        description="Kinds of units that may go, such as heads,neurons; heads with their KV "
        "groups. Default: all that are found but whole layers.",
        json_schema_extra=named(_PLAN, "KIND"),
    )
    exclude: tuple[str, ...] = Field(
        default=(),
        description="Glob over module paths, or names such as '*:experts', that stay untouched. "
        "Repeatable.",
        json_schema_extra=named(_PLAN, "GLOB"),
    )
    min_units: int = Field(
        default=0,
        ge=0,
        description="Fewest heads or neurons that every axis keeps; 0 may remove them all.",
        json_schema_extra=_PLAN,
    )
    multiple: dict[
        Literal["neurons", "heads", "kv_groups", "experts", "channels"], Annotated[int, Field(ge=1)]
    ] = Field(
        default_factory=dict,
        description="What kept units are a multiple of, unless all stay: one number for neurons, "
        "or KIND=N,KIND=N. Default: from the cost, and for models that generate at least 32 "
        "neurons where the full width is one, which quantisers need.",
        json_schema_extra=named(_PLAN, "N|KIND=N"),
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of everything that is drawn at random.",
        json_schema_extra=_PLAN,
    )

    recover_epochs: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Train the pruned model for so many epochs of --dataset, with the original as "
        "its teacher; 0 does not. The original is loaded a second time for it.",
        json_schema_extra=named(_RECOVERY, "NUMBER"),
    )
    recover_num_examples: int | None = Field(
        default=None,
        ge=1,
        description="Recover on the first N examples only. Default: on all of the split.",
        json_schema_extra=_RECOVERY,
    )
    recover_batch_size: int = Field(
        default=32,
        ge=1,
        description="Examples per training step and process.",
        json_schema_extra=_RECOVERY,
    )
    recover_learning_rate: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Highest learning rate of recovery. Default: 1e-4, or 1e-3 with LoRA.",
        json_schema_extra=named(_RECOVERY, "NUMBER"),
    )
    recover_temperature: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=False,
        description="Softens the predictions of both models where they are compared; above 1, "
        "unlikely answers of the teacher count for more.",
        json_schema_extra=named(_RECOVERY, "NUMBER"),
    )
    recover_alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the teacher's predictions in the loss; the rest is that of the "
        "labels. Data without labels is learnt from the teacher alone.",
        json_schema_extra=named(_RECOVERY, "NUMBER"),
    )
    recover_hidden_weight: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Weight of the difference between the hidden states of the two models; 0 does "
        "not compare them.",
        json_schema_extra=named(_RECOVERY, "NUMBER"),
    )
    recover_lora_rank: int | None = Field(
        default=None,
        ge=1,
        description="Train adapters of this rank with PEFT, merged at the end, instead of all "
        "weights.",
        json_schema_extra=_RECOVERY,
    )

    training: Training | None = Field(
        default=None,
        description="For GradNASCallback.from_recipe, not for the command: when, schedule, "
        "start_ratio, end_ratio, stages, mask, scores_from.",
        json_schema_extra=named({"panel": "Training"}, "MAPPING"),
    )

    output: str | None = Field(
        default=None,
        description="Folder of the pruned model. Default: ./<last part of model>-gradnas.",
        json_schema_extra=named(_OUTPUT, "FOLDER"),
    )
    dry_run: bool = Field(
        default=False,
        description="Score and plan, but cut and save no model.",
        json_schema_extra=_OUTPUT,
    )
    overwrite: bool = Field(
        default=False,
        description="Replace what hf_gradnas wrote to the output folder. Not from a recipe file.",
        json_schema_extra=_OUTPUT,
    )
    report: bool = Field(
        default=True,
        description="Write a page, a picture and tables of scores, widths, costs and latencies to "
        "report/.",
        json_schema_extra=_OUTPUT,
    )
    max_shard_size: str = Field(
        default=MAX_SHARD_SIZE,
        description="Largest file of weights, such as 5GB.",
        json_schema_extra=named(_OUTPUT, "SIZE"),
    )
    latency: Literal["auto", "off"] = Field(
        default="auto",
        description="auto times forwards before and after the cut where a report is written: batch "
        "size 1, and 8 if all takes at most a tenth of the run so far. off times none.",
        json_schema_extra=_OUTPUT,
    )
    push_to_hub: str | None = Field(
        default=None,
        description="Repository of the Hub to push the result to; made if it is not there. Not "
        "from a recipe file.",
        json_schema_extra=named(_OUTPUT, "USER/NAME"),
    )
    private: bool = Field(
        default=False, description="Make the repository private.", json_schema_extra=_OUTPUT
    )

    @field_validator("target", mode="before")
    @classmethod
    def _read_targets(cls, value: Any) -> Any:
        return read_targets(value)

    @field_validator("multiple", mode="before")
    @classmethod
    def _read_multiples(cls, value: Any) -> Any:
        return read_multiples(value)

    @field_validator("axes", mode="before")
    @classmethod
    def _read_kinds(cls, value: Any) -> Any:
        given = (value,) if isinstance(value, str) else value
        if not isinstance(given, list | tuple):
            return given
        parts = [str(part).split(",") for part in given]
        return tuple(kind.strip() for part in parts for kind in part)

    @field_validator("exclude", mode="before")
    @classmethod
    def _read_globs(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def rules(self) -> dict[str, dict[str, int] | None]:
        """`min_units`, `multiple`, `axes` and `exclude` as rules of the pruner: None keeps."""
        rules: dict[str, dict[str, int] | None] = {}
        least = {"min": self.min_units} if self.min_units else {}
        if least:
            rules["*"] = least
        for kind, number in self.multiple.items():
            rules[f"*:{kind}"] = {**least, "multiple": number}
        if self.axes:
            from .limits import whole_kinds  # noqa: PLC0415 - numpy, which --help needs not

            rules.update(whole_kinds(self.axes))
        rules.update(dict.fromkeys(self.exclude))
        return rules
