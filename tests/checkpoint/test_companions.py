"""What stands beside the weights of the original comes along, or is named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from cli_cases import save_bert, save_llama, word_tokenizer, write_tsv
from huggingface_hub import constants
from safetensors.torch import load_file
from sentence_cases import as_repository, dense_weights, save_encoder, write_json

from hf_gradnas import GradNASPruner
from hf_gradnas.checkpoint.companions import (
    OLD_WEIGHTS,
    OUTSIDE,
    UNKNOWN,
    loader_of,
    read_companions,
)
from hf_gradnas.checkpoint.folders import body_folder, read_modules
from hf_gradnas.cli.app import main
from hf_gradnas.cli.prune import prune_from_options
from hf_gradnas.errors import GradNASWarning

BATCH = {"input_ids": torch.tensor([[2, 12, 13, 14, 3], [2, 15, 16, 17, 3]])}
SENTENCE_FILES = {
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
}
# Files that belong to no model that is known, or hold the weights of the original.
OLD = ("model.onnx", "onnx/model.onnx", "openvino/openvino_model.bin", "tf_model.h5", "x-q4.gguf")
STRANGE = ("train_script.py", "data_config.json", "code/extra.json")


def names_in(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def prune(source: str | Path, target: Path, cls: Any = tf.BertModel, **options: Any) -> Path:
    model = cls.from_pretrained(source, **options).eval()
    pruner = GradNASPruner(model)
    pruner.prune([BATCH], {"params": "90%"}, labels="model")
    return pruner.save_pretrained(target)


@pytest.mark.parametrize("body", ["", "0_Transformer"])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_sentence_encoder_stays_one(body: str, pickled: bool, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "encoder", body=body, pickled=pickled)
    out = prune(source / body, tmp_path / "out")
    assert names_in(out) >= SENTENCE_FILES
    assert not [name for name in names_in(out) if name.endswith(".bin")]
    modules = json.loads((out / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense", "3_Normalize"]
    assert json.loads((out / "sentence_bert_config.json").read_text()) == {"max_seq_length": 20}
    dense = load_file(out / "2_Dense" / "model.safetensors")
    assert all(torch.equal(dense[name], value) for name, value in dense_weights().items())
    document = json.loads((out / "gradnas.json").read_text())
    assert SENTENCE_FILES <= set(document["companions"]) <= set(document["files"])
    card = (out / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert "pipeline_tag: sentence-similarity" in card
    assert 'SentenceTransformer("out")' in card
    assert 'SentenceTransformer("out", trust_remote_code=True)' in card


def test_what_was_pruned_once_stays_one_when_pruned_again(tmp_path: Path) -> None:
    first = prune(save_encoder(tmp_path / "encoder"), tmp_path / "first")
    assert names_in(prune(first, tmp_path / "second")) >= SENTENCE_FILES


@pytest.mark.filterwarnings("default:Not copied")
def test_the_command_brings_them_along_and_says_how_to_load_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_encoder(tmp_path / "encoder", body="0_Transformer")
    (source / "notes.json").write_text("{}")
    flags = {"model": str(source), "output": str(tmp_path / "out"), "num_examples": 4}
    flags |= {"dataset": str(write_tsv(tmp_path / "d.tsv")), "target": {"params": "90%"}}
    flags |= {"report": False, "text_column": "text"}
    assert prune_from_options(flags) == 0
    assert names_in(tmp_path / "out") >= SENTENCE_FILES
    printed = capsys.readouterr()
    assert "from sentence_transformers import SentenceTransformer" in printed.out
    assert 'model = SentenceTransformer("' in printed.out
    assert "Not copied from the original (encoder): notes.json" in printed.err
    assert main(["inspect", "--model", str(source)]) == 0
    assert "BertModel" in capsys.readouterr().out


def test_a_repository_in_the_cache_is_read_as_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    source = save_encoder(tmp_path / "encoder")
    as_repository(source, cache, "some/encoder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    out = prune("some/encoder", tmp_path / "out", cache_dir=cache)
    assert names_in(out) >= SENTENCE_FILES
    assert "base_model: some/encoder" in (out / "README.md").read_text()


def test_another_head_is_no_sentence_encoder(tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "encoder", cls="BertForMaskedLM")
    labels = {"labels": BATCH["input_ids"]}
    model = tf.BertForTokenClassification.from_pretrained(source).eval()
    pruner = GradNASPruner(model)
    pruner.prune([{**BATCH, "labels": labels["labels"] % 2}], {"params": "90%"})
    with pytest.warns(GradNASWarning, match=r"modules.json, 1_Pooling/.*which the pruned class"):
        out = pruner.save_pretrained(tmp_path / "out")
    assert not SENTENCE_FILES & names_in(out)
    assert loader_of(out) is None
    assert "AutoModelForTokenClassification.from_pretrained" in (out / "README.md").read_text()


def test_a_cross_encoder_is_loaded_as_one_and_its_base_is_none(tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "encoder", cls="BertForSequenceClassification")
    options = {"model_type": "CrossEncoder"}
    write_json(source / "config_sentence_transformers.json", options)
    assert read_companions(source, tf.BertForSequenceClassification).sentence_class == (
        "CrossEncoder"
    )
    assert read_companions(source, tf.BertModel).sentence_class is None


def test_old_weights_and_strange_files_are_named_and_stay(tmp_path: Path) -> None:
    source = save_bert(tmp_path / "bert", "BertModel")
    for name in (
        *OLD,
        *STRANGE,
        "training_args.bin",
        "trainer_state.json",
        "runs/events",
        ".git/x",
    ):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x")
    found = read_companions(source, tf.BertModel).left_out
    assert found == {
        OLD_WEIGHTS: ("model.onnx", "onnx/", "openvino/", "tf_model.h5", "x-q4.gguf"),
        UNKNOWN: ("code/", "data_config.json", "train_script.py"),
    }
    with pytest.warns(GradNASWarning, match="Not copied from the original") as caught:
        out = prune(source, tmp_path / "out")
    assert str(tmp_path) not in str(caught[0].message)
    assert not {*OLD, *STRANGE, "training_args.bin"} & names_in(out)


def test_texts_come_along_where_nothing_newer_is_saved(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "llama")
    texts = ("chat_template.jinja", "additional_chat_templates/tool.jinja", "LICENSE.txt")
    for name in (*texts, "preprocessor_config.json"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("{}")
    model = tf.AutoModelForCausalLM.from_pretrained(source).eval()
    pruner = GradNASPruner(model)
    ids = torch.arange(12, 28).reshape(2, 8)
    pruner.prune([{"input_ids": ids, "labels": ids}], {"params": "90%"})
    alone = names_in(pruner.save_pretrained(tmp_path / "alone"))
    assert {*texts, "preprocessor_config.json", "tokenizer.json"} <= alone
    assert "generation_config.json" in alone
    newer = word_tokenizer(eos_token="</s>")
    beside = names_in(pruner.save_pretrained(tmp_path / "beside", newer))
    assert {"tokenizer.json", "preprocessor_config.json", "LICENSE.txt"} <= beside
    assert "chat_template.jinja" not in beside


def test_a_file_of_the_user_wins(tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "encoder")
    pruner = GradNASPruner(tf.BertModel.from_pretrained(source).eval())
    pruner.prune([BATCH], {"params": "90%"}, labels="model")
    own = {"1_Pooling/config.json": '{"mine": 1}'}
    out = pruner.save_pretrained(tmp_path / "out", files=own)
    assert json.loads((out / "1_Pooling" / "config.json").read_text()) == {"mine": 1}


def test_a_pickle_that_is_more_than_tensors_is_named(tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "encoder")
    (source / "2_Dense" / "model.safetensors").unlink()
    (source / "2_Dense" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    with pytest.warns(GradNASWarning, match=r"2_Dense/ \(cannot be read without running a pickle"):
        out = prune(source, tmp_path / "out")
    assert not list(Path.cwd().iterdir())
    assert "2_Dense/pytorch_model.bin" not in names_in(out)


@pytest.mark.parametrize("path", ["../outside", "/etc", "C:\\x", "a/../../b"])
def test_a_list_of_modules_cannot_lead_out_of_its_folder(path: str, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "encoder")
    modules = json.loads((source / "modules.json").read_text())
    modules[1]["path"] = path
    write_json(source / "modules.json", modules)
    assert read_modules(source) is None


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "home" / "key"
    secret.parent.mkdir()
    secret.write_text('{"key": "x1y2"}')
    source = save_encoder(tmp_path / "encoder")
    (source / "1_Pooling" / "config.json").rename(source / "1_Pooling" / "other.json")
    (source / "1_Pooling" / "config.json").symlink_to("other.json")  # inside: it is followed
    (source / "sentence_bert_config.json").unlink()
    for name in ("LICENSE", "sentence_bert_config.json", "2_Dense/notes.json"):
        (source / name).symlink_to(secret)
    (source / "3_Normalize").symlink_to(secret.parent)
    found = read_companions(source, tf.BertModel)
    assert not [name for name, content in found.files.items() if b"x1y2" in content]
    assert b"mean_tokens" in found.files["1_Pooling/config.json"]
    expected = ("2_Dense/", "3_Normalize", "LICENSE", "sentence_bert_config.json")
    assert found.left_out == {OUTSIDE: expected}


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"idx": 0}]', '{"a": 1}', "null"])
def test_a_list_of_modules_that_is_none_is_as_no_list(text: str, tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "encoder")
    (source / "modules.json").write_text(text)
    assert read_modules(source) is None
    assert body_folder(source) == source


def test_code_of_modules_comes_along(tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "encoder")
    modules = json.loads((source / "modules.json").read_text())
    modules[1]["type"] = "custom_pooling.Pooling"
    write_json(source / "modules.json", modules)
    (source / "custom_pooling.py").write_text("raise SystemExit")
    found = read_companions(source, tf.BertModel)
    assert "custom_pooling.py" in found.files
    assert not found.left_out


def test_several_bodies_are_named(tmp_path: Path) -> None:
    source = save_encoder(tmp_path / "encoder")
    save_bert(source / "1_Pooling", "BertModel")
    found = read_companions(source, tf.BertModel)
    assert found.sentence_class is None
    assert "modules.json" in next(iter(found.left_out.values()))


def test_a_model_from_nowhere_has_no_companions(tmp_path: Path) -> None:
    config = tf.BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32,
    )  # fmt: skip
    for name in ("", str(tmp_path / "gone"), "not there/at all"):
        config.name_or_path = name
        pruner = GradNASPruner(tf.BertModel(config).eval())
        pruner.prune([BATCH], {"params": "90%"}, labels="model")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = pruner.save_pretrained(tmp_path / f"out{len(name)}")
        assert "companions" not in json.loads((out / "gradnas.json").read_text())
