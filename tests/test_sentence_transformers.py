"""Models of sentence-transformers, by the library itself: pruned as one, saved as one, loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
from cli_cases import BERT_TOKENS, save_bert, sentences, word_tokenizer
from sentence_cases import save_encoder
from torch import nn

import hf_gradnas
from hf_gradnas import GradNASCallback, GradNASPruner
from hf_gradnas.errors import DataError, PlanError, StructureError
from hf_gradnas.running.wrappers import body_of, sentence_class, split_features

TEXTS = sentences(6)
BUDGET = {"params": "90%"}
st = pytest.importorskip("sentence_transformers")


def tokens(count: int = 4) -> dict[str, torch.Tensor]:
    tokenizer = word_tokenizer(**BERT_TOKENS)
    return dict(tokenizer(sentences(count), padding=True, return_tensors="pt"))


def prune(model: Any, **options: Any) -> GradNASPruner:
    pruner = GradNASPruner(model, **options)
    pruner.prune([tokens()], BUDGET, labels="model")
    return pruner


@pytest.mark.parametrize("layout", ["stock", "per_layer"])
def test_a_pruned_folder_loads_as_what_it_was(layout: str, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "encoder", pickled=layout == "stock")
    before = st.SentenceTransformer(str(source), device="cpu")
    body = tf.BertModel.from_pretrained(source).eval()
    out = prune(body, layout=layout).save_pretrained(tmp_path / "out")
    after = st.SentenceTransformer(str(out), device="cpu")
    assert [type(m) for m in after] == [type(m) for m in before]
    assert after.max_seq_length == before.max_seq_length == 20
    assert after.prompts["query"] == "find: "
    assert torch.equal(after[2].linear.weight, before[2].linear.weight)
    found = after.encode(TEXTS, convert_to_tensor=True)
    assert (found.norm(dim=1) - 1).abs().max() < 1e-6
    inner = after[0].model
    assert sum(p.numel() for p in inner.parameters()) == sum(p.numel() for p in body.parameters())


def test_a_whole_model_is_pruned_in_place_and_saved_as_it_is_now(tmp_path: Path) -> None:
    model = st.SentenceTransformer(str(save_encoder(tmp_path / "encoder")), device="cpu")
    whole = sum(p.numel() for p in model.parameters())
    pruner = prune(model)
    assert pruner.model is model.transformers_model
    assert sum(p.numel() for p in model.parameters()) < whole
    model.max_seq_length = 11  # what was changed after loading is saved
    model.prompts["document"] = "read: "
    expected = model.encode(TEXTS, convert_to_tensor=True)
    out = pruner.save_pretrained(tmp_path / "out")
    again = st.SentenceTransformer(str(out), device="cpu")
    assert (again.max_seq_length, again.prompts["document"]) == (11, "read: ")
    assert torch.allclose(again.encode(TEXTS, convert_to_tensor=True), expected, atol=1e-6)
    assert 'SentenceTransformer("out")' in (out / "README.md").read_text()
    files = json.loads((out / "gradnas.json").read_text())["files"]
    assert {"modules.json", "2_Dense/model.safetensors"} <= set(files)


@pytest.mark.parametrize("kind", ["SparseEncoder", "CrossEncoder"])
def test_other_classes_of_the_library(kind: str, tmp_path: Path) -> None:
    cls = {"SparseEncoder": "BertForMaskedLM", "CrossEncoder": "BertForSequenceClassification"}
    options = {"num_labels": 1} if kind == "CrossEncoder" else {}
    folder = save_bert(tmp_path / "bert", cls[kind], **options)
    model = getattr(st, kind)(str(folder), device="cpu")
    assert sentence_class(model) == kind
    pruner = prune(model)

    def outputs(of: Any) -> torch.Tensor:
        if kind == "CrossEncoder":
            return of.predict([("a film", "the book")], convert_to_tensor=True)
        return of.encode(TEXTS, convert_to_tensor=True).to_dense()

    out = pruner.save_pretrained(tmp_path / "out")
    again = getattr(st, kind)(str(out), device="cpu")
    assert torch.allclose(outputs(again), outputs(model), atol=1e-6)
    # The folder is a companion of the next one, whichever way it is loaded.
    inner = getattr(tf, cls[kind]).from_pretrained(out).eval()
    second = prune(inner).save_pretrained(tmp_path / "second")
    assert f'{kind}("second")' in (second / "README.md").read_text()
    assert outputs(getattr(st, kind)(str(second), device="cpu")).isfinite().all()


def test_a_model_without_one_body_is_refused(tmp_path: Path) -> None:
    model = st.SentenceTransformer(modules=[nn.Identity()], device="cpu")
    with pytest.raises(StructureError, match="with one Transformers model is needed, found none"):
        GradNASPruner(model)
    first = st.SentenceTransformer(str(save_encoder(tmp_path / "encoder")), device="cpu")
    model = st.SentenceTransformer(modules=[first[0], nn.ModuleList([first[0].model])])
    assert body_of(model)[1] is model
    second = tf.BertModel(first[0].model.config)
    model = st.SentenceTransformer(modules=[first[0], nn.ModuleList([second])], device="cpu")
    with pytest.raises(StructureError, match="found BertModel, BertModel; pass the Transformers"):
        GradNASPruner(model)


def make_trainer(folder: Path, callback: GradNASCallback, **options: Any) -> Any:
    """A trainer of pairs of texts, which the library's contrastive loss compares."""
    model = st.SentenceTransformer(str(save_encoder(folder / "encoder")), device="cpu")
    texts = sentences(8)
    data = datasets.Dataset.from_dict({"anchor": texts, "positive": [f"the {t}" for t in texts]})
    settings = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "max_steps": 6}
    settings |= {"per_device_train_batch_size": 4, "save_strategy": "no", "seed": 1}
    arguments = st.SentenceTransformerTrainingArguments(str(folder / "run"), **settings)
    loss = st.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    options = {"loss": loss, "train_dataset": data, "callbacks": [callback], **options}
    return st.SentenceTransformerTrainer(model, arguments, **options)


@pytest.mark.parametrize("when", ["end", "begin", "gradual"])
def test_a_trainer_of_the_library_prunes_while_it_trains(when: str, tmp_path: Path) -> None:
    callback = GradNASCallback(BUDGET, when=when, labels="model", stages=2)
    trainer = make_trainer(tmp_path, callback)
    if when == "begin":
        callback.attach(trainer)
    trainer.train()
    model = trainer.model
    assert callback.scores.metadata["examples"] == "16"
    assert sum(p.numel() for p in model[0].model.parameters()) == callback.plan.costs["params"]
    again = st.SentenceTransformer(str(callback.directory), device="cpu")
    assert [type(module) for module in again] == [type(module) for module in model]
    model.eval()
    found, expected = (m.encode(TEXTS, convert_to_tensor=True) for m in (again, model))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"labels": "data"},
            "labels='data': the trainer trains a SentenceTransformer around a BertModel",
        ),
        ({"scores_from": "training"}, "scores_from='training': the trainer trains a Sentence"),
    ],
)
def test_scores_that_need_the_loss_are_refused_before_the_first_step(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, GradNASCallback(BUDGET, **options))
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(PlanError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_several_data_sets_are_refused_before_the_first_step(tmp_path: Path) -> None:
    data = {
        "one": datasets.Dataset.from_dict({"a": TEXTS, "b": TEXTS}),
        "two": datasets.Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS}),
    }
    callback = GradNASCallback(BUDGET, labels="model")
    trainer = make_trainer(tmp_path, callback, train_dataset=datasets.DatasetDict(data))
    with pytest.raises(DataError, match="on several data sets, whose columns may differ"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_batches_of_the_inner_model_are_scored_with_their_own_labels(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert", "BertForSequenceClassification", num_labels=1)
    model = st.CrossEncoder(str(folder), device="cpu")
    batch = {**tokens(), "labels": torch.tensor([0.0, 1.0, 0.5, 0.2])}
    pruner = GradNASPruner(model)
    pruner.prune([batch], BUDGET)
    assert pruner.scores.metadata["labels"] == "data"


def test_columns_of_a_trainer_become_batches() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    batch = {
        "dataset_name": "x", "anchor_input_ids": ids, "anchor_attention_mask": ids,
        "positive_input_ids": ids * 2, "positive_modality": "text", "label": torch.zeros(2),
    }  # fmt: skip
    found = list(split_features(batch))
    assert [sorted(part) for part in found] == [["attention_mask", "input_ids"], ["input_ids"]]
    assert torch.equal(found[1]["input_ids"], ids * 2)


def test_the_package_never_imports_the_library() -> None:
    for file in Path(hf_gradnas.__file__).parent.rglob("*.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [
            line for line in lines if re.match(r"\s*(import|from) sentence_transformers", line)
        ]
        assert not found, file
