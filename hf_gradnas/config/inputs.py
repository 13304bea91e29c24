"""What a pruning run is fed: the model, the data that calibrate it, and those that measure it.

The first half of the recipe's options; see `config.recipe` for the others.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, field_validator

from .strict import Settings, read_label_map

_Extra = dict[str, Any]
_MODEL: _Extra = {"panel": "Model"}
_DATA: _Extra = {"panel": "Calibration data"}
_EVAL: _Extra = {"panel": "Evaluation"}


def named(panel: _Extra, metavar: str) -> _Extra:
    """The panel of an option, and the word for its value."""
    return {**panel, "metavar": metavar}


class Inputs(Settings):
    """Options of ``hf-gradnas prune`` that say what is read."""

    format_version: Literal[1] = Field(default=1, description="Version of this file format.")

    model: str = Field(
        description="Hub id or folder of the model; 'quickstart' trains a small one on the spot.",
        json_schema_extra=named(_MODEL, "ID|FOLDER"),
    )
    task: str | None = Field(
        default=None,
        description="What the model is for, e.g. text-classification, fill-mask, text-generation, "
        "summarization, image-classification. Default: from config.architectures.",
        json_schema_extra=named(_MODEL, "TASK"),
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of the model on the Hub.",
        json_schema_extra=named(_MODEL, "REVISION"),
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run model code that comes with the checkpoint. Not from a recipe file.",
        json_schema_extra=_MODEL,
    )
    allow_new_head: bool = Field(
        default=False,
        description="Go on with a head of --task that the checkpoint has no weights for, so that "
        "they are random, or that was trained for another task.",
        json_schema_extra=_MODEL,
    )
    device: str | None = Field(
        default=None,
        description="Where to run, e.g. cpu, cuda, cuda:1, mps. Default: the accelerator if any.",
        json_schema_extra=named(_MODEL, "DEVICE"),
    )
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = Field(
        default=None,
        description="Let Accelerate spread the weights over all devices, instead of --device; what "
        "does not fit stays on the CPU or a disk, and is loaded layer by layer.",
        json_schema_extra=_MODEL,
    )
    max_memory: tuple[str, ...] = Field(
        default=(),
        description="Most memory of a device with --device-map, such as cpu=8GiB or 0=20GiB, 0 "
        "being the first accelerator. Repeatable.",
        json_schema_extra=named(_MODEL, "DEVICE=SIZE"),
    )
    offload_folder: str | None = Field(
        default=None,
        description="Where --device-map keeps weights that a checkpoint's own files cannot serve.",
        json_schema_extra=named(_MODEL, "FOLDER"),
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number type of the weights; auto is that of the checkpoint.",
        json_schema_extra=_MODEL,
    )

    dataset: str | None = Field(
        default=None,
        description="Hub id (config after a colon, nyu-mll/glue:sst2) or a csv, tsv, json, jsonl, "
        "txt or parquet file or a folder. Default: the public-domain prose in this package.",
        json_schema_extra=named(_DATA, "ID|PATH"),
    )
    split: str = Field(
        default="train",
        description="Split of the data set to calibrate on.",
        json_schema_extra=named(_DATA, "NAME"),
    )
    text_column: str | None = Field(
        default=None,
        description="Column with the text; two columns of a pair are given as A,B.",
        json_schema_extra=named(_DATA, "NAME"),
    )
    label_column: str | None = Field(
        default=None,
        description="Column with the label.",
        json_schema_extra=named(_DATA, "NAME"),
    )
    target_column: str | None = Field(
        default=None,
        description="Column with the text to generate: summary, translation, transcript.",
        json_schema_extra=named(_DATA, "NAME"),
    )
    image_column: str | None = Field(
        default=None,
        description="Column with the image, or with the path of one.",
        json_schema_extra=named(_DATA, "NAME"),
    )
    audio_column: str | None = Field(
        default=None,
        description="Column with the audio, or with the path of a file.",
        json_schema_extra=named(_DATA, "NAME"),
    )
    num_examples: int = Field(
        default=512,
        ge=1,
        description="Examples to calibrate on: the first ones in file order unless --shuffle.",
        json_schema_extra=_DATA,
    )
    shuffle: bool = Field(
        default=False,
        description="Draw the examples at random (with --seed) instead of taking the first.",
        json_schema_extra=_DATA,
    )
    batch_size: int = Field(
        default=16, ge=1, description="Examples per batch.", json_schema_extra=_DATA
    )
    max_length: int | None = Field(
        default=None,
        ge=2,
        description="Tokens per example. Default: 128, or the model's positions if fewer.",
        json_schema_extra=_DATA,
    )
    labels: Literal["data", "model"] | None = Field(
        default=None,
        description="Labels from the data, or sampled from the model's own prediction. Default: "
        "data where the data or the kind of head has them, else model.",
        json_schema_extra=_DATA,
    )
    label_map: dict[str, int] = Field(
        default_factory=dict,
        description="The model's number of each label of the data, positive=1,negative=0, where "
        "neither the model's own names (label2id) nor the data say it. Repeatable.",
        json_schema_extra=named(_DATA, "NAME=NUMBER"),
    )

    eval: bool = Field(
        default=True,
        description="Measure loss and accuracy or perplexity before and after; without "
        "--eval-dataset on examples that are held out from the calibration data.",
        json_schema_extra=_EVAL,
    )
    eval_dataset: str | None = Field(
        default=None,
        description="Data set to measure loss and accuracy or perplexity on, before and after; "
        "same forms as --dataset. Default: examples held out from the calibration data.",
        json_schema_extra=named(_EVAL, "ID|PATH"),
    )
    eval_split: str | None = Field(
        default=None,
        description="Split to evaluate on, of --eval-dataset or else of --dataset.",
        json_schema_extra=named(_EVAL, "NAME"),
    )
    eval_num_examples: int | None = Field(
        default=None,
        ge=1,
        description="Evaluate on the first N examples only, or hold out so many. Default: all, or "
        "one held out for every four that are scored.",
        json_schema_extra=_EVAL,
    )

    @field_validator("max_memory")
    @classmethod
    def _check_max_memory(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            if not re.fullmatch(r"(\d+|[a-z]+)=\d+(\.\d+)?[KMGT]i?B", item):
                raise ValueError(f"{item!r} is not of the form DEVICE=SIZE, e.g. cpu=8GiB, 0=20GiB")
        return value

    @field_validator("label_map", mode="before")
    @classmethod
    def _read_label_map(cls, value: Any) -> Any:
        return read_label_map(value)
