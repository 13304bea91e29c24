"""Areas of files: data, plans, scores, resume files, recipes, and what is beside a checkpoint."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
from cli_cases import save_bert, sentences
from fuzzing import ODD_NUMBERS, Case, damaged, spoilt
from safetensors import safe_open
from safetensors.numpy import save_file

from hf_gradnas import GradNASPruner, Plan, Scores
from hf_gradnas.cli import verify
from hf_gradnas.config.recipe import Recipe
from hf_gradnas.config.recipe_files import build_recipe
from hf_gradnas.data.columns import choose_columns
from hf_gradnas.data.datasets import open_dataset
from hf_gradnas.data.examples import Feed, make_loader
from hf_gradnas.data.feeds import encode
from hf_gradnas.data.loading import open_source
from hf_gradnas.errors import CheckpointError
from hf_gradnas.jobs.early import resolve_paths
from hf_gradnas.surgery.modeling_gradnas import RecordError

HEADS = {
    "class": "BertForSequenceClassification",
    "tokens": "BertForTokenClassification",
    "span": "BertForQuestionAnswering",
    "masked": "BertForMaskedLM",
}


# --- data -----------------------------------------------------------------------------------------


class DataFiles:
    """Data files for small BERTs: read, encoded and batched as for scoring."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources, self.models = {}, {}
        for head, cls in HEADS.items():
            where = save_bert(folder / head, cls)
            recipe = Recipe(model=str(where))
            self.sources[head] = open_source(recipe, str(where))
            self.models[head] = self.sources[head].cls.from_pretrained(where)

    def data_file(self, draw: random.Random) -> Case:
        head = draw.choice(list(HEADS))
        suffix = draw.choice((".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet"))
        name, content, is_nonsense = _data(suffix, head, draw)
        file = self.folder / f"data{suffix}"
        file.write_bytes(content)
        text = draw.choice(
            (None, None, None, "text", "label", "text,label", "text,text,text", "id")
        )
        recipe = Recipe(model="x", text_column=text, num_examples=draw.choice((1, 5, 512)))
        labelled = draw.random() < 0.8
        what = f"{head} {suffix} {name}, --text-column {text}, labelled {labelled}"
        use = lambda: self._use(file, head, recipe, labelled)  # noqa: E731
        return Case(
            what,
            use,
            is_nonsense and labelled and text is None and recipe.num_examples > 3,
            folder=self.folder,
        )

    def _use(self, file: Path, head: str, recipe: Recipe, labelled: bool) -> None:
        source, model = self.sources[head], self.models[head]
        rows = open_dataset(str(file), split="train", seed=0)
        columns = choose_columns(
            rows, recipe, head=source.task.head, feeds="text", labelled=labelled
        )
        feed = Feed(rows, columns, source, 16, labelled=labelled, limit=recipe.num_examples)
        for batch in make_loader(encode(feed), source, model, batch_size=4):
            assert batch["input_ids"].shape[1] <= 16
            assert all(torch.isfinite(v.double()).all() for v in batch.values())
            if "labels" in batch:
                size = 48 if head == "masked" else 2
                kept = batch["labels"][batch["labels"] != -100]
                assert ((kept >= 0) & (kept < size)).all(), kept


TEXT_COLUMNS = (*[None] * 12, "text", "label", "text,label", "text,text,text", "id")
LABELS_OF_NONSENSE = (1.7, -1, 2, 99, float("nan"), float("inf"), 2**62, None, [3], [[0], [1]], {}, {"a": 1}, "maybe")  # fmt: skip


def _records(head: str, draw: random.Random) -> list[dict[str, Any]]:
    texts = sentences(8)
    if head in ("class", "masked"):
        return [{"text": text, "label": i % 2, "id": i} for i, text in enumerate(texts)]
    if head == "tokens":
        return [
            {"tokens": t.split(), "ner_tags": [i % 2] * len(t.split())} for i, t in enumerate(texts)
        ]
    return [
        {"question": "is it good", "context": t, "answers": {"text": [t[:3]], "answer_start": [0]}}
        for t in texts
    ]


def _data(suffix: str, head: str, draw: random.Random) -> tuple[str, bytes, bool]:
    records = _records(head, draw)
    name, is_nonsense = "good", False
    kind = draw.choice(("bytes", "label", "value", "value", "shape", "special", "good"))
    if kind == "label" and head == "class" and suffix != ".txt":
        value = draw.choice(LABELS_OF_NONSENSE)
        flat = suffix in (".csv", ".tsv")
        places = draw.choice(("one", "all"))
        for record in records[3:4] if places == "one" else records:
            record["label"] = str(value) if flat and value is not None else value
        name, is_nonsense = f"label {value!r} in {places}", value is not None or not flat
    elif kind == "value":
        spoilt_records, name = spoilt(records, draw)
        records = [r for r in spoilt_records if isinstance(r, dict)] or [{"text": "a"}]
    elif kind == "shape":
        name, records = draw.choice((
            ("no row", []), ("one row", records[:1]), ("an empty object", [{}]),
            ("an empty key", [{"": "a", "label": 1}]), ("an empty text", [{"text": "", "label": 1}]),
            ("a long text", [{"text": "a " * 100_000, "label": 0}]),
            ("NUL in a text", [{"text": "a\x00b", "label": 0}]),
            ("a lone surrogate", [{"text": "a\ud800", "label": 0}]),
            ("large integers", [{"text": "a", "label": 2**70}]),
            ("large ids", [{"text": "a", "label": 0, "id": 2**70}]),
            ("deep list", [{"text": "a", "label": _deep(draw.choice((40, 400, 3000)))}]),
            ("words and labels of unequal number", [{"tokens": ["a", "b"], "ner_tags": [0]}]),
            ("no words", [{"tokens": [], "ner_tags": []}]),
            ("null in words", [{"tokens": ["a", None], "ner_tags": [0, 1]}]),
            ("answers before the text", [{"question": "a", "context": "b c", "answers": {"text": ["b"], "answer_start": [-5]}}]),
            ("answers behind the text", [{"question": "a", "context": "b c", "answers": {"text": ["b"], "answer_start": [500]}}]),
            ("answers of words", [{"question": "a", "context": "b c", "answers": {"text": ["b"], "answer_start": ["x"]}}]),
            ("answers of nothing", [{"question": "a", "context": "b c", "answers": None}]),
            ("null question", [{"question": None, "context": "b c", "answers": {"text": ["b"], "answer_start": [0]}}]),
        ))  # fmt: skip
    content = _written(suffix, records)
    if kind == "special":
        name, content = draw.choice(_SPECIALS.get(suffix, _SPECIALS[".txt"]))
    elif kind == "bytes":
        content, name = damaged(content, draw)
    return name, content, is_nonsense


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


_SPECIALS: dict[str, tuple[tuple[str, bytes], ...]] = {
    ".csv": (
        ("cell over 131,072 characters", b"text,label\n" + b"a " * 70_000 + b",1\nb,0\n"),
        ("quote that never ends", b'text,label\n"a,1\nb,0\n'),
        ("integers above 64 bits", b"text,label\na,99999999999999999999\nb,1\n"),
        ("ids above 64 bits", b"id,text,label\n99999999999999999999,a,0\n1,b,1\n"),
        ("same columns", b"text,text,label\na,b,1\n"),
        ("NUL", b"text,label\na\x00,1\n"),
        ("UTF-16", "text,label\na,1\n".encode("utf-16")),
        ("BOM", b"\xef\xbb\xbftext,label\na,1\nb,0\n"),
        ("mixed encodings", "text,label\né,1\n".encode() + "é,0\n".encode("latin-1")),
        ("CR only", b"text,label\ra,1\rb,0\r"),
        ("unicode digits", "text,label\na,١\nb,٠\n".encode()),
        ("underscores", b"text,label\na,1_0\nb,0\n"),
    ),
    ".tsv": (
        ("cell over 131,072 characters", b"text\tlabel\n" + b"a " * 70_000 + b"\t1\nb\t0\n"),
        ("NUL", b"text\tlabel\na\x00\t1\n"),
        ("tabs only", b"\t\t\n\t\t\n"),
        ("same columns", b"text\ttext\na\tb\n"),
    ),
    ".json": (
        ("deep lists", b"[" * 100_000),
        ("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        ("same key twice", b'[{"text": "a", "label": 0, "label": 1}]'),
        ("NaN", b'[{"text": "a", "label": NaN}]'),
        ("BOM", b'\xef\xbb\xbf[{"text": "a", "label": 1}]'),
        ("a number", b"3"),
        ("null", b"null"),
        ("data of numbers", b'{"data": [1, 2]}'),
        ("very long integer", b'[{"text": "a", "label": ' + b"9" * 5000 + b"}]"),
    ),
    ".jsonl": (
        ("deep lists", b"[" * 100_000 + b"\n"),
        ("same key twice", b'{"text": "a", "text": "b", "label": 1}\n'),
        ("BOM", b'\xef\xbb\xbf{"text": "a", "label": 1}\n'),
        ("integers above 64 bits", b'{"text": "a", "label": 99999999999999999999}\n'),
        ("mixed kinds", b'{"text": "a"}\n"b"\n3\n'),
    ),
    ".txt": (
        ("NUL", b"a\x00b\n"),
        ("BOM", b"\xef\xbb\xbfa film\n"),
        ("UTF-16", "a film\n".encode("utf-16")),
        ("blank", b" \n\t\n"),
        ("binary", bytes(range(256))),
    ),
    ".parquet": (("no parquet", b"PAR1PAR1"), ("nothing", b""), ("text", b"text,label\na,1\n")),
}


def _written(suffix: str, records: list[dict[str, Any]]) -> bytes:
    if suffix in (".csv", ".tsv"):
        names = list(records[0]) if records else ["text", "label"]
        sep = "," if suffix == ".csv" else "\t"
        lines = [sep.join(names)]
        lines += [sep.join(str(r.get(name, "")) for name in names) for r in records]
        return "\n".join(lines).encode("utf-8", "replace")
    if suffix == ".json":
        return json.dumps(records).encode()
    if suffix == ".jsonl":
        return "\n".join(json.dumps(r) for r in records).encode()
    if suffix == ".txt":
        return "\n".join(str(r.get("text", "a film")) for r in records).encode("utf-8", "replace")
    sink = pyarrow.BufferOutputStream()
    try:
        table = pyarrow.Table.from_pylist(records)
        pyarrow.parquet.write_table(table, sink)
    except (pyarrow.ArrowException, OverflowError, ValueError, TypeError, RecursionError):
        return b"PAR1"
    return sink.getvalue().to_pybytes()


# --- plans, scores and resume files ---------------------------------------------------------------


class Pruning:
    """A small BERT with its plan, scores and resume file."""

    def __init__(self, folder: Path, model: Any, inputs: Any) -> None:
        batches = [inputs]
        self.folder, self.batches = folder, batches
        self.pruner = GradNASPruner(model, layout="per_layer")
        self.model = model
        self.file = folder / "scores.safetensors"
        self.pruner.score(batches, file=self.file)
        self.scores = self.pruner.scores
        self.good = self.file.read_bytes()
        self.plan = self.pruner.plan({"params": "90%"})

    def plan_file(self, draw: random.Random) -> Case:
        document = self.plan.to_dict()
        is_nonsense = False
        if draw.random() < 0.3:
            content, what = damaged(json.dumps(document).encode(), draw)
        else:
            document, what = spoilt(document, draw)
            content = json.dumps(document).encode()
        file = self.folder / "plan.json"
        file.write_bytes(content)

        def use() -> None:
            plan = Plan.load(file)
            with self.pruner.masked(plan):
                pass
            for units in plan.kept.values():
                assert all(type(unit) is int for unit in units)

        return Case(f"plan: {what}", use, is_nonsense, model=self.model, folder=self.folder)

    def plan_object(self, draw: random.Random) -> Case:
        values = {
            name: getattr(self.plan, name) for name in ("kept", "sizes", "layout", "costs", "steps")
        }
        key = draw.choice(list(values))
        odd = draw.choice((*ODD_NUMBERS, np.float64(1.0), np.array([0]), {1: 2}, "stock", "auto"))
        if key in ("kept", "sizes", "costs", "steps") and draw.random() < 0.7:
            name = draw.choice(list(values[key]) or ["x"])
            if key == "kept":
                odd = draw.choice(((odd,), [odd], odd, (0, 0), (1, 0), (0, 10**9), (-1,)))
            values[key] = {**values[key], name: odd}
        else:
            values[key] = odd
        is_nonsense = key == "kept" and any(isinstance(odd, t) for t in (float, str, bool))

        def use() -> None:
            with self.pruner.masked(Plan(**values)):
                pass

        return Case(f"Plan({key}: {odd!r:.80})", use, is_nonsense, model=self.model)

    def scores_file(self, draw: random.Random) -> Case:
        content, what = self._scores(draw)
        file = self.folder / "other.safetensors"
        file.write_bytes(content)

        def use() -> None:
            scores = Scores.load(file)
            self.pruner.use_scores(scores)
            try:
                plan = self.pruner.plan({"params": "90%"})
                assert all(np.isfinite(v).all() for v in scores.values.values())
                assert plan.costs["params"] <= plan.budgets[0].limit
            finally:
                self.pruner.use_scores(self.scores)

        return Case(
            f"scores: {what}", use, "nonsense" in what, model=self.model, folder=self.folder
        )

    def resume_file(self, draw: random.Random) -> Case:
        content, what = self._scores(draw)

        def use() -> None:
            file = self.folder / "resume.safetensors"
            file.write_bytes(content)
            try:
                found = self.pruner.score(self.batches, file=file)
                for name, values in found.values.items():
                    assert np.allclose(values, self.scores.values[name]), "other scores"
            finally:
                file.unlink()

        return Case(f"resume: {what}", use, model=self.model, folder=self.folder)

    def _scores(self, draw: random.Random) -> tuple[bytes, str]:
        if draw.random() < 0.35:
            return damaged(self.good, draw)
        file = self.folder / "spoilt.safetensors"
        tensors = {name: values.copy() for name, values in self.scores.values.items()}
        with safe_open(self.file, framework="numpy") as opened:
            metadata = dict(opened.metadata())
        name = draw.choice(list(tensors))
        kind = draw.choice(("values", "shape", "metadata", "metadata", "settings", "missing"))
        if kind == "values":
            value = draw.choice((float("nan"), float("inf"), -1.0))
            tensors[name][0] = value
            what = f"nonsense {value} in {name}"
        elif kind == "shape":
            odd: Any = draw.choice((
                tensors[name][:-1], tensors[name][None], tensors[name].astype(np.int64),
                tensors[name].astype(np.float32), tensors[name] > 0, np.zeros(0), np.zeros(()),
            ))  # fmt: skip
            tensors[name] = np.ascontiguousarray(odd)
            what = f"{name} of {odd.dtype} {odd.shape}"
        elif kind == "missing":
            del tensors[name]
            what = f"without {name}"
        elif kind == "settings":
            settings, what = spoilt(json.loads(metadata["settings"]), draw)
            metadata["settings"] = draw.choice((json.dumps(settings), "[" * 50_000, "null", "3"))
            what = f"settings {what}, {metadata['settings'][:10]}"
        else:
            key = draw.choice(list(metadata))
            odd_text = draw.choice(
                ("", "x", "-1", "1.5", "nan", "true", "9" * 30, "null", "\x1b[31m")
            )
            if draw.random() < 0.3:
                del metadata[key]
                odd_text = "removed"
            else:
                metadata[key] = odd_text
            what = f"metadata {key} = {odd_text!r}"
        save_file(tensors, file, metadata=metadata)
        content = file.read_bytes()
        file.unlink()
        return content, what


# --- recipes --------------------------------------------------------------------------------------


class Recipes:
    """Recipes as YAML files, `--set` values and flags."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def recipe(self, draw: random.Random) -> Case:
        values = {"model": "bert", "target": {"flops": "60%"}, "exclude": ["*"], "seed": 1}
        settings: list[str] = []
        file = self.folder / "recipe.yaml"
        kind = draw.choice(("bytes", "value", "set", "text"))
        key = draw.choice(list(Recipe.model_fields))
        odd = draw.choice(ODD_NUMBERS[:-1])
        content = yaml.safe_dump(values).encode()
        if kind == "bytes":
            content, what = damaged(content, draw)
        elif kind == "value":
            content, what = yaml.safe_dump({**values, key: odd}).encode(), f"{key}: {odd!r}"
        elif kind == "text":
            what = draw.choice((
                "[" * 2000, "a: " * 3000, "&a [*a]", "model: &a {b: *a}", "!!python/object:os.system x",
                "model: bert\nmodel: gpt2", "- model", "? [1]\n: 2", "1: 2", "true: 1", "model: 2001-01-01",
                "target: {flops: 60%, flops: 50%}\nmodel: bert", "\t", "%YAML 9", "--- a\n--- b", "model: \x07",
                "{" * 2000, "training: {stages: -1}\nmodel: bert", "training: {stages: 1.5}\nmodel: bert",
                "training: {start_ratio: .nan}\nmodel: bert", "training: []\nmodel: bert",
                "model: bert\nseed: " + "9" * 5000, "model: bert\ntarget: {1: 2}",
                "model: bert\ntarget: {flops: true}", "model: bert\nnum_examples: 1.0",
                "model: bert\nnum_examples: '8'", "model: bert\nshuffle: 'yes'", "model: bert\nseed: true",
            ))  # fmt: skip
            content = what.encode()
        else:
            entry = draw.choice(("", "", ".x", ".flops", ".", ".a.b"))
            text = draw.choice(
                ("1", "", "[" * 2000, "{a: 1}", "!!x y", "&a [*a]", ": :", "nan", "'")
            )
            settings = [f"{key}{entry}={text}", draw.choice(("seed=1", "=", "a", "", "\x00=1"))]
            what = str(settings)[:120]
        file.write_bytes(content)

        def use() -> None:
            recipe = build_recipe({}, settings=settings, file=str(file))
            resolve_paths(recipe)
            Recipe.model_validate(recipe.model_dump(mode="json"))

        return Case(f"recipe: {what[:150]!r}", use, folder=self.folder)


# --- what is beside a checkpoint ------------------------------------------------------------------


class Checkpoint:
    """A pruned checkpoint whose documents are damaged, and verified or loaded again."""

    def __init__(self, folder: Path, model: Any, batches: list[Any]) -> None:
        self.folder = folder
        pruner = GradNASPruner(model, layout="per_layer")
        pruner.prune(batches, {"params": "90%"})
        self.saved = pruner.save_pretrained(folder / "saved")
        self.originals = {
            name: (self.saved / name).read_bytes() for name in ("gradnas.json", "config.json")
        }

    def document(self, draw: random.Random) -> Case:
        name = draw.choice(list(self.originals))
        if draw.random() < 0.4:
            content, what = damaged(self.originals[name], draw)
        else:
            document, what = spoilt(json.loads(self.originals[name]), draw)
            content = json.dumps(document).encode()

        def use() -> None:
            (self.saved / name).write_bytes(content)
            try:
                code = self._verify()
                assert code in (0, 1, 2)
                if code == 2:
                    raise CheckpointError("refused by the command, with a message")
            finally:
                (self.saved / name).write_bytes(self.originals[name])

        return Case(f"{name}: {what}", use)

    def _verify(self) -> int:
        reference = json.loads(self.originals["gradnas.json"])["reference"]
        result = {"device": "cpu", "wrong": {}, "output": reference["output"], "module": ""}
        result["is_offloaded"] = False
        with mock.patch.object(verify, "replay", return_value=result):
            return verify.verify_from_options(str(self.saved), quiet=True)

    def record(self, draw: random.Random) -> Case:
        """The record in config.json, read by the file that travels with the checkpoint."""
        document, what = spoilt(json.loads(self.originals["config.json"])["gradnas"], draw)
        copy = self.folder / "copy"

        def use() -> None:
            from transformers import AutoModelForSequenceClassification

            shutil.copytree(self.saved, copy, dirs_exist_ok=True)
            whole = json.loads(self.originals["config.json"])
            whole["gradnas"] = document
            (copy / "config.json").write_text(json.dumps(whole), encoding="utf-8")
            try:
                AutoModelForSequenceClassification.from_pretrained(copy)
            except RecordError as error:  # of the file that stands alone, and can import nothing
                raise CheckpointError(str(error)) from error
            except RuntimeError as error:
                if "ignore_mismatched_sizes" not in str(error):
                    raise
                raise CheckpointError("the sizes differ, says Transformers") from error
            finally:
                shutil.rmtree(copy)

        return Case(f"record: {what}", use)
