"""Tiny folders of sentence-transformers, made by hand: the library is not needed for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from cli_cases import save_bert
from safetensors.torch import save_file
from torch import Tensor

HIDDEN = 16
CLASS_OF = {"Transformer": "Transformer", "Pooling": "Pooling", "Dense": "Dense"}


def write_json(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def save_encoder(
    folder: Path, *, body: str = "", pickled: bool = False, cls: str = "BertModel"
) -> Path:
    """A BERT with mean pooling, a dense layer, and norms of one.

    Args:
        folder: Where.
        body: Folder of the Transformers model, ``0_Transformer`` in old versions.
        pickled: Write the dense layer as a pickle, as old versions did.
        cls: Class of the Transformers model.
    """
    save_bert(folder / body, cls)
    names = [(body, "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]
    names.append(("3_Normalize", "Normalize"))  # a folder that git does not keep: it is empty
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(names)
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / body / "sentence_bert_config.json", {"max_seq_length": 20})
    prompts = {"query": "find: "}
    write_json(folder / "config_sentence_transformers.json", {"prompts": prompts})
    pooling = {"word_embedding_dimension": HIDDEN, "pooling_mode_mean_tokens": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    activation = "torch.nn.modules.linear.Identity"
    dense = {"in_features": HIDDEN, "out_features": 8, "bias": True}
    write_json(folder / "2_Dense" / "config.json", {**dense, "activation_function": activation})
    if pickled:
        torch.save(dense_weights(), folder / "2_Dense" / "pytorch_model.bin")  # noqa: TID251
    else:
        save_file(dense_weights(), folder / "2_Dense" / "model.safetensors")
    (folder / "README.md").write_text(
        "---\nlibrary_name: sentence-transformers\npipeline_tag: sentence-similarity\n"
        "language: en\nlicense: mit\ntags: [sentence-similarity]\n---\n# It\n"
    )
    return folder


def dense_weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(8, HIDDEN, generator=draw)
    return {"linear.weight": weight, "linear.bias": torch.randn(8, generator=draw)}


def as_repository(folder: Path, cache: Path, name: str) -> Path:
    """The same in the cache of the Hub, under a repository's name."""
    commit = "a" * 40
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit
