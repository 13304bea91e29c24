"""The examples run, on tiny models and files, and leave a checkpoint that loads."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from cli_cases import (
    save_bert,
    save_llama,
    save_t5,
    save_vit,
    save_whisper,
    sentences,
    write_images,
    write_jsonl,
    write_text,
    write_wave,
)
from places import EXAMPLES
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
)

pytestmark = pytest.mark.leaves_state  # training leaves a model in train mode


@pytest.fixture(autouse=True)
def own_folder(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def run(name: str, monkeypatch: pytest.MonkeyPatch, *switches: str, **options: object) -> None:
    """The example as a script with these options."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    monkeypatch.setattr(sys, "argv", [name, *switches, *flags])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("when", ["gradual", "end"])
def test_text_classification(when: str, tmp_path: Path, monkeypatch, capsys) -> None:
    for name in ("train", "dev"):
        rows = [f"the film was {word}\t{label}" for label, word in enumerate(["bad", "good"])] * 8
        (tmp_path / f"{name}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    files = {"model": save_bert(tmp_path / "bert"), "train": "train.tsv", "dev": "dev.tsv"}
    run("text_classification.py", monkeypatch, **files, when=when, max_steps=4, batch_size=4)
    assert "sst2-pruned/pruned" in capsys.readouterr().out
    plan = json.loads(Path("sst2-pruned/pruned/gradnas.json").read_text())["plan"]
    assert plan["costs"]["flops"] <= 0.5 * plan["budgets"][0]["total"]
    AutoModelForSequenceClassification.from_pretrained("sst2-pruned/pruned")


def test_language_modeling(tmp_path: Path, monkeypatch, capsys) -> None:
    text = write_text(tmp_path / "text.txt")
    options = {"model": save_llama(tmp_path / "llama"), "train": text, "dev": text, "length": 8}
    run("language_modeling.py", monkeypatch, **options, max_steps=4, batch_size=4)
    assert "perplexity" in capsys.readouterr().out
    AutoModelForCausalLM.from_pretrained("language-model-pruned/pruned")


@pytest.mark.parametrize("name", ["text_classification.py", "language_modeling.py"])
def test_a_file_to_train_on_needs_one_to_measure_on(name: str, monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        run(name, monkeypatch, train="train.tsv")
    assert "--train needs --dev" in capsys.readouterr().err


def test_data_of_the_hub_takes_one_flag(tmp_path: Path, monkeypatch, capsys) -> None:
    def load(name: str, config: str) -> datasets.DatasetDict:
        asked.append((name, config))
        text = {"text": sentences(40), "sentence": sentences(40), "label": [0, 1] * 20}
        columns = {"nyu-mll/glue": ["sentence", "label"], "Salesforce/wikitext": ["text"]}[name]
        split = datasets.Dataset.from_dict({column: text[column] for column in columns})
        return datasets.DatasetDict(train=split, validation=split)

    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(datasets, "load_dataset", load)
    short = {"max_steps": 2, "batch_size": 4, "when": "end"}
    for name, model, own in (
        ("text_classification.py", save_bert(tmp_path / "bert"), {}),
        ("language_modeling.py", save_llama(tmp_path / "llama"), {"length": 8}),
    ):
        run(name, monkeypatch, "--hub", model=model, **short, **own)
    assert asked == [("nyu-mll/glue", "sst2"), ("Salesforce/wikitext", "wikitext-2-raw-v1")]
    capsys.readouterr()


def test_image_classification(tmp_path: Path, monkeypatch, capsys) -> None:
    images = write_images(tmp_path / "images", 8)
    options = {"model": save_vit(tmp_path / "vit"), "data": images, "flops": "80%"}
    run("image_classification.py", monkeypatch, **options)
    assert "of the predictions as before" in capsys.readouterr().out
    AutoModelForImageClassification.from_pretrained("vit-pruned")


def test_summarization(tmp_path: Path, monkeypatch, capsys) -> None:
    texts = sentences(12)
    records = [{"article": text, "highlights": text.split()[0]} for text in texts]
    options = {
        "model": save_t5(tmp_path / "t5"),
        "train": write_jsonl(tmp_path / "a.jsonl", records),
    }
    run("summarization.py", monkeypatch, **options, prefix="", params="80%")
    assert "recovered; saved in" in capsys.readouterr().out
    AutoModelForSeq2SeqLM.from_pretrained("t5-pruned")


def test_speech_recognition(tmp_path: Path, monkeypatch, capsys) -> None:
    sounds = [write_wave(tmp_path / f"{n}.wav", hertz=200 * n) for n in range(1, 5)]
    records = [
        {"audio": str(file), "text": text} for file, text in zip(sounds, sentences(4), strict=True)
    ]
    data = write_jsonl(tmp_path / "speech.jsonl", records)
    options = {"model": save_whisper(tmp_path / "whisper"), "data": data, "params": "85%"}
    run("speech_recognition.py", monkeypatch, **options)
    assert "of the parameters are kept" in capsys.readouterr().out
    AutoModelForSpeechSeq2Seq.from_pretrained("whisper-pruned")


@pytest.mark.long
def test_distributed_scoring(tmp_path: Path) -> None:
    settings = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(EXAMPLES / "distributed_scoring.sh"), "quickstart"]
    done = subprocess.run(command, check=False, capture_output=True, env=settings, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Quickstart: training") == 1
    for folder in ("distributed", "distributed-40"):
        AutoModelForCausalLM.from_pretrained(folder)
