"""The model card, in Markdown, and with it every file of a report, as bytes by path.

The card says what a user of the pruned model has to know. The caller writes the files beside the
model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import yaml

from .._redaction import sayable, shareable, visible
from ..config.limits import format_share
from ..types import COSTS, USUAL, Plan, Scores
from .headline import headline
from .layers import merge_layers
from .metadata import CARD, Origin, card_data, data_name, final_metrics
from .page import PICTURE, make_page
from .plots import draw_picture
from .sentences import (
    SHARES,
    UNMEASURED,
    code,
    fenced,
    plain,
    say_prediction,
    say_repair,
    say_skipped,
    say_stock,
    what_was_lost,
)
from .summary import (
    Summary,
    costs_table,
    kinds_table,
    latency_table,
    metrics_table,
    plan_csv,
    plan_rows,
    plan_table,
    repair_table,
)

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


PROJECT = "hf_gradnas"
BUNDLED = "bundled text"
FOLDER, PAGE = "report", "index.html"
_ROWS_SHOWN = 40
_REFUSALS_SHOWN = 12
# What loads a model by its name, as the lines of `save.loading_snippet` have it.
_LOADERS = (
    "from_pretrained",
    "SentenceTransformer",
    "SparseEncoder",
    "CrossEncoder",
    "MultiVectorEncoder",
)
_LOADED = re.compile(rf'(?:{"|".join(_LOADERS)})\(("(?:[^"\\\n]|\\.)*")')
_MODEL_NAME = re.compile(r"^- name: .*$(?=\n  results:)", re.MULTILINE)
_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
_HEADER = re.compile(r"\A---\n.*?^---\n", re.DOTALL | re.MULTILINE)


def make_card(
    summary: Summary,
    origin: Origin,
    *,
    auto_class: str | None,
    loading: str,
    library: str = "transformers",
    picture: str | None = None,
) -> ModelCard:
    """The card, ready to be written as ``README.md``.

    Args:
        summary: What was done.
        origin: The original, and its card.
        auto_class: Name of the auto class that builds the model.
        loading: Python lines that load the model.
        library: Name of the library that they load it with, as the Hub has it.
        picture: Path of the picture, relative to the card, in the folder of the report; None:
            there is none.
    """
    from huggingface_hub import ModelCard  # noqa: PLC0415 - takes long to import

    header = card_data(summary, origin, auto_class=auto_class, library=library).to_yaml()
    sections = (
        _opening(summary, origin, has_report=picture is not None),
        _loading(summary, loading, library),
        _what_was_cut(summary, picture),
        _costs(summary),
        _quality(summary),
        _how(summary),
        _limits(summary),
    )
    body = "\n\n".join(part for section in sections for part in section)
    return ModelCard(sayable(f"---\n{header}\n---\n\n{body}\n"))


def address(card: str, repo_id: str) -> str:
    """A card of `make_card` as it reads in a repository, which takes the place of the folder.

    Args:
        card: Text of the card. Lines that its owner has changed, and cards of others, stay.
        repo_id: ``user/name``.

    Returns:
        The card whose title and results have the repository's name, and whose Python lines load
        from there.
    """
    header = _HEADER.match(card)
    title = _TITLE.search(card, header.end() if header else 0)
    literal = next(
        (found[1] for found in _LOADED.finditer(card) if title and _names(found, title)), None
    )
    if title is None or literal is None:
        return card
    name = repo_id.rpartition("/")[2]
    head = _MODEL_NAME.sub(f"- name: {name}", card[: title.start()])
    body = card[title.end() :]
    for call in _LOADERS:
        body = body.replace(f"{call}({literal}", f'{call}("{repo_id}"')
    return f"{head}# {name}{body}"


def _names(loaded: re.Match[str], title: re.Match[str]) -> bool:
    """Whether a line that loads a model names the one that a title names."""
    try:
        return visible(plain(json.loads(loaded[1]))) == title[1]
    except ValueError:  # its owner has changed it
        return False


def _opening(summary: Summary, origin: Origin, *, has_report: bool) -> Iterator[str]:
    base = plain(origin.base_model or "")
    if base and origin.is_hub:
        base = f"[{base}](https://huggingface.co/{base})"
    kept = " and ".join(
        f"{format_share(cost.kept_ratio, digits=1)} of its {COSTS.get(cost.name, cost.name)}"
        for cost in summary.costs
        if cost.name in USUAL or cost.limit is not None
    )
    yield f"# {plain(summary.name)}"
    yield f"**{plain(headline(summary))}.**"
    yield (
        f"{base or 'A model'} ({code(summary.model)}) after structured pruning: whole attention "
        f"heads, neurons or channels were removed, and {kept} are left. It runs at that size on "
        "any hardware, without sparse kernels or masks."
    )
    if has_report:
        yield f"All of it on one page: [{FOLDER}/{PAGE}]({FOLDER}/{PAGE})."


def _loading(summary: Summary, loading: str, library: str) -> Iterator[str]:
    tool = "Plain Transformers" if library == "transformers" else library
    yield "## How to load it"
    lines = [
        line.split("  #")[0] if line.startswith("import ") else line for line in loading.split("\n")
    ]
    yield fenced("python", "\n".join(lines))
    if summary.layout == "per_layer":
        yield (
            f"The layout is `per_layer`: each layer has its own width. {tool} loads it "
            f"after `import {PROJECT}`, or without {PROJECT} through the code in this repository:"
        )
        lines = [line for line in lines if not line.startswith("import ")]
        without = "\n".join(lines).rstrip(")") + ", trust_remote_code=True)"
        yield fenced("python", without)
        if summary.instead:
            yield say_stock(summary.instead)
    else:
        yield (
            "The layout is `stock`: all layers have the same width, and "
            f"{tool[0].lower()}{tool[1:]} loads it as it loads the original."
        )


def _what_was_cut(summary: Summary, picture: str | None) -> Iterator[str]:
    yield "## What was cut"
    yield kinds_table(summary)
    if picture:
        yield f"![{PICTURE}]({picture})"
    table = plan_table(summary)
    rows = len(merge_layers(plan_rows(summary)))
    if rows <= _ROWS_SHOWN:
        yield table
    else:
        count = f"{rows} rows"
        yield f"<details>\n<summary>Every module ({count})</summary>\n\n{table}\n\n</details>"
    if summary.refusals:
        named = [
            f"{code(item.module)} ({item.kind})" for item in summary.refusals[:_REFUSALS_SHOWN]
        ]
        more = len(summary.refusals) - len(named)
        rest = f" and {more} more" if more else ""
        yield f"Seen but not pruned: {', '.join(named)}{rest}."


def _costs(summary: Summary) -> Iterator[str]:
    yield "## Cost before and after"
    yield costs_table(summary)
    length = summary.recipe.get("flops_length")
    yield "FLOPs are those of one forward of one input" + (
        f" of {length} tokens." if length else "."
    )
    if summary.latencies:
        order = "both models in turn" if summary.in_turn else "one model after the other"
        yield f"Median time of a forward, measured on {plain(summary.machine)}, {order}:"
        yield latency_table(summary)
    if summary.skipped:
        yield say_skipped(summary.skipped)


def _quality(summary: Summary) -> Iterator[str]:
    yield "## Quality"
    if summary.metrics:
        yield _measured_on(summary)
        yield metrics_table(summary)
        lost = what_was_lost(summary.metrics.get("before", {}), final_metrics(summary))
        if lost:
            yield f"Note that {lost}."
    else:
        yield UNMEASURED
    predicted = say_prediction(
        summary.loss_increase, summary.loss_unit, summary.loss_before, score=summary.score
    )
    without = "repair or training" if summary.repair else "training"
    yield f"{predicted} That is before any {without}."
    if summary.repair:
        yield say_repair(summary.repair)
    if summary.repair.get("is_accepted"):
        yield repair_table(summary)


def _measured_on(summary: Summary) -> str:
    found = summary.evaluation
    if not found:
        data = summary.recipe.get("eval_dataset") or summary.recipe.get("dataset")
        return f"Measured on {plain(data_name(data))}:" if data else "Measured:"
    said = f"Measured on {found['examples']:,} examples"
    name = plain(data_name(found["dataset"]))
    said += f" held out from the calibration data ({name})" if found["held_out"] else f" of {name}"
    if found["held_out"] and not found["dataset"].startswith(BUNDLED):
        said += ", which the original may have been trained on"
    if found.get("scored_too"):
        said += ", which was scored on too, so that the figures flatter it"
    if found.get("scores_given"):
        said += "; whether the given scores were made with them is not known"
    if found.get("labels") == "whole model":
        said += (
            ", labelled by the whole model's own predictions: agreement is how often the pruned "
            "model predicts the same"
        )
    if any(name in found for found in summary.metrics.values() for name in SHARES):
        said += ". ± is one standard error from the number of examples"
    return f"{said}:"


def _how(summary: Summary) -> Iterator[str]:
    yield "## How it was made"
    found = summary.calibration
    said = [f"Scores: `{summary.score}`", f"search: `{summary.search}`"]
    if "examples" in found:
        said.append(f"scored on {found['examples']} examples")
    if "dataset" in found:
        said.append(f"data: {plain(data_name(found['dataset']))}")
    if "labels" in found:
        said.append(f"labels: {plain(found['labels'])}")
    yield "; ".join(said) + "."
    if summary.recovery:
        steps, examples = summary.recovery.get("steps"), summary.recovery.get("examples")
        yield (
            f"After the cut it was trained for {steps} steps on {examples} examples, with the "
            "original as its teacher."
        )
    if summary.command:
        yield fenced("bash", summary.command)
    if summary.recipe:
        text = yaml.safe_dump(dict(summary.recipe), sort_keys=False, allow_unicode=True).rstrip()
        yield "All options; `hf-gradnas prune --recipe recipe.yaml` runs them again:"
        yield fenced("yaml", text)
    if summary.versions:
        said = [f"{package} {version}" for package, version in summary.versions.items()]
        yield f"Versions: {', '.join(said)}. The kept units are listed in `gradnas.json`."


def _limits(summary: Summary) -> Iterator[str]:
    yield "## Limits"
    limits = [
        "What was cut was chosen on the calibration data above; other domains, languages and tasks "
        "can lose more than the numbers here say.",
        "Biases, license and intended uses are those of the original.",
    ]
    if str(summary.calibration.get("dataset", "")).startswith(BUNDLED):
        limits.append(
            f"It was calibrated on the prose that comes with {PROJECT}, no text of the model's own "
            "kind; with such text a better choice of what to cut is likely."
        )
    if not summary.recovery:
        limits.append(
            "It was not trained after the cut here; fine-tuning usually recovers quality."
        )
    if summary.layout == "per_layer":
        limits.append(
            "Tools that read one width for all layers from the config (such as vLLM's own Llama) "
            "do not take a `per_layer` checkpoint."
        )
    yield "\n".join(f"- {limit}" for limit in limits)


# --- every file of a report -----------------------------------------------------------------------


def report_files(
    summary: Summary,
    plan: Plan,
    scores: Scores | None,
    origin: Origin,
    *,
    auto_class: str | None,
    loading: str,
    library: str = "transformers",
    pictures: bool = True,
) -> dict[str, str | bytes]:
    """The card as ``README.md``, and the report in `FOLDER`.

    Args:
        summary: What was done.
        plan: What was cut.
        scores: What it was chosen by; None: not known, so that there is no picture of them.
        origin: The original, and its card.
        auto_class: Name of the auto class that builds the model.
        loading: Python lines that load the model.
        library: Name of the library that they load it with, as the Hub has it.
        pictures: Whether to make more than the card.

    Returns:
        Content by path relative to the model's folder.
    """
    name, content = draw_picture(summary, plan, scores) if pictures else (None, b"")
    card = make_card(
        summary,
        origin,
        auto_class=auto_class,
        loading=loading,
        library=library,
        picture=name and f"{FOLDER}/{name}",
    )
    files: dict[str, str | bytes] = {CARD: sayable(str(card))}
    if name is not None:
        told = {"headline": headline(summary), **summary.to_dict()}
        files[f"{FOLDER}/{PAGE}"] = make_page(summary, plan, content, loading=loading)
        files[f"{FOLDER}/{name}"] = content
        files[f"{FOLDER}/summary.json"] = json.dumps(shareable(told), indent=1) + "\n"
        files[f"{FOLDER}/plan.md"] = sayable(_tables(summary))
        files[f"{FOLDER}/plan.csv"] = sayable(plan_csv(summary))
    return files


def _tables(summary: Summary) -> str:
    """All tables under each other."""
    parts = [f"# {plain(summary.name)}", plain(headline(summary)), "## Costs", costs_table(summary)]
    if summary.latencies:
        parts += [f"## Latency ({plain(summary.machine)})", latency_table(summary)]
    parts += [say_skipped(summary.skipped)] if summary.skipped else []
    if summary.metrics:
        parts += ["## Metrics", metrics_table(summary)]
    parts += ["## Plan", kinds_table(summary), plan_table(summary)]
    return "\n\n".join(parts) + "\n"
