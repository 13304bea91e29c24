"""What the snippets of README and docs take for granted: models, data and files, made tiny.

Every page shows code that begins with "your model, your data". A scene gives it both, offline.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as tf
from cli_cases import save_bert, save_llama, sentences, write_tsv
from torch.nn import functional
from torch.utils.data import DataLoader

import hf_gradnas
from hf_gradnas import hub, repair
from hf_gradnas.planning import make_plan
from hf_gradnas.structure import couplings

CLASSIFIER, DECODER = "my-finetuned-bert", "my-decoder"
EXAMPLES, BATCH = 16, 8
CLASSES = 2
Scene = dict[str, Any]


def write_files() -> None:
    """A fine-tuned classifier, and sentences with labels to score and to evaluate on."""
    save_bert(Path(CLASSIFIER), max_position_embeddings=64)
    write_tsv(Path("train.tsv"), EXAMPLES)
    write_tsv(Path("dev.tsv"), EXAMPLES)


def classifier_scene() -> Scene:
    """A BERT of two layers that tells good sentences from bad ones."""
    write_files()
    load = partial(tf.AutoModelForSequenceClassification.from_pretrained, CLASSIFIER)
    tokenizer = tf.AutoTokenizer.from_pretrained(CLASSIFIER)
    texts = tokenizer(sentences(EXAMPLES), padding="max_length", max_length=10, truncation=True)
    rows = [
        {**{key: torch.tensor(texts[key][row]) for key in texts}, "labels": torch.tensor(row % 2)}
        for row in range(EXAMPLES)
    ]
    return _scene(load, tokenizer, rows, folder=CLASSIFIER)


def decoder_scene() -> Scene:
    """A Llama of two layers with grouped queries."""
    save_llama(Path(DECODER))
    load = partial(tf.AutoModelForCausalLM.from_pretrained, DECODER)
    ids = torch.randint(7, 30, (EXAMPLES, 10), generator=torch.Generator().manual_seed(0))
    rows = [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids
    ]
    scene = _scene(load, tf.AutoTokenizer.from_pretrained(DECODER), rows, folder=DECODER)
    return {**scene, "decoder": scene["model"], "decoder_batches": scene["loader"]}


def convolution_scene() -> Scene:
    """A network of convolutions with images of two classes."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 64, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(64, 64, 3),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, CLASSES),
    )
    images = torch.randn(EXAMPLES, 3, 8, 8)
    labels = torch.arange(EXAMPLES) % CLASSES
    return {"model": network, "images": images, "loader": [(images, labels)], "F": functional}


def checkpoint_scene() -> Scene:
    """A decoder that was pruned and saved, each layer with its own widths."""
    scene = decoder_scene()
    pruner = hf_gradnas.GradNASPruner(scene["model"], layout="per_layer")
    pruner.prune(scene["loader"], {"params": "90%"})
    pruner.save_pretrained("smaller", scene["tokenizer"], report=False)
    return {}


def saved_classifier_scene() -> Scene:
    """A classifier that was pruned and saved."""
    scene = classifier_scene()
    pruner = hf_gradnas.GradNASPruner(scene["model"])
    pruner.prune(scene["loader"], {"flops": "60%"})
    pruner.save_pretrained("smaller", scene["tokenizer"], report=False)
    return {}


def scored_scene() -> Scene:
    """Scores of a classifier, and a plan, in files."""
    scene = classifier_scene()
    pruner = hf_gradnas.GradNASPruner(scene["model"])
    scores = pruner.score(scene["loader"], file="bert.scores.safetensors")
    make_plan(scores, {"flops": "60%"}).save("bert.plan.json")
    return {}


def quickstart_scene() -> Scene:
    """Files alone: the page says everything else itself."""
    write_files()
    return {}


def _scene(load: Callable[[], Any], tokenizer: Any, rows: list[Any], *, folder: str) -> Scene:
    loader = DataLoader(rows, batch_size=BATCH)
    batch = next(iter(loader))
    arguments = tf.TrainingArguments(
        output_dir="out",
        use_cpu=True,
        max_steps=12,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    return {
        "Accelerator": partial(accelerate.Accelerator, cpu=True),
        "AutoModelForCausalLM": tf.AutoModelForCausalLM,
        "AutoModelForSequenceClassification": tf.AutoModelForSequenceClassification,
        "GradNASPruner": hf_gradnas.GradNASPruner,
        "Scores": hf_gradnas.Scores,
        "Trainer": tf.Trainer,
        "accelerator": accelerate.Accelerator(cpu=True),
        "args": arguments,
        "batch": batch,
        "collator": tf.default_data_collator,
        "data": rows,
        "dataloader": loader,
        "dataset": rows,
        "evaluate": lambda model: model(**batch).loss.item(),
        "folder": folder,
        "fresh_model": load,
        "fully_shard": lambda model: model,  # shards need several processes
        "loader": loader,
        "model": load(),
        "name": folder,
        "recover": repair.recover,
        "teacher": load(attn_implementation="eager"),
        "tokenizer": tokenizer,
    }


# Pages that tell one story: their blocks run after one another, with the names of those before.
STORIES = {
    "quickstart.md": quickstart_scene,
    "concepts.md": classifier_scene,
    "scores.md": classifier_scene,
    "budgets.md": classifier_scene,
    "extending.md": decoder_scene,
}
# Blocks of the other pages run on their own. The first line that a block contains decides.
SCENES = {
    "import hf_gradnas.nas as mtp": convolution_scene,
    "from hf_gradnas.planning import": scored_scene,
    "from hf_gradnas.shards import": scored_scene,
    'AutoModelForSequenceClassification.from_pretrained("smaller")': saved_classifier_scene,
    'AutoModelForCausalLM.from_pretrained("smaller"': checkpoint_scene,
    "AutoModelForCausalLM.from_pretrained(name)": decoder_scene,
}


def scene_for(page: str, code: str) -> Scene:
    """Names and files that a block finds."""
    if page in STORIES:
        return STORIES[page]()
    found = (scene for line, scene in SCENES.items() if line in code)
    return next(found, classifier_scene)()


def keep_to_yourself(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have nothing leave the folder or outlive the test: no push, no cached code, no new rows."""
    signature = inspect.signature(hub.push)

    def push(*args: Any, **options: Any) -> hub.Pushed:
        given = signature.bind(*args, **options).arguments
        assert (Path(given["folder"]) / "config.json").is_file()
        return hub.Pushed("https://hub/" + given["repo_id"], "", is_new=True, has_changed=True)

    monkeypatch.chdir(folder)
    monkeypatch.setattr("hf_gradnas.pruner.push", push)
    monkeypatch.setattr(tf.dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.setattr(couplings, "HEAD_COUNTS", couplings.HEAD_COUNTS)
