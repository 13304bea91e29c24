"""Tasks, classes, tokenizers and lengths."""

import json
import shutil

import pytest
import transformers as tf
from cli_cases import save_bert, save_llama, save_t5, save_vit, save_whisper

from hf_gradnas.config.recipe import Recipe
from hf_gradnas.data.loading import (
    check_head,
    load_model,
    open_source,
    prepare_tokenizer,
    resolve_max_length,
)
from hf_gradnas.data.tasks import ALIASES, TASKS, Head, input_of, model_class, named_task, task_of
from hf_gradnas.errors import GradNASWarning, RecipeError

ARCHITECTURES = {
    "BertForMaskedLM": (tf.BertConfig, "fill-mask", "text"),
    "BertForSequenceClassification": (tf.BertConfig, "text-classification", "text"),
    "BertForTokenClassification": (tf.BertConfig, "token-classification", "text"),
    "BertForQuestionAnswering": (tf.BertConfig, "question-answering", "text"),
    "GPT2LMHeadModel": (tf.GPT2Config, "text-generation", "text"),
    "T5ForConditionalGeneration": (tf.T5Config, "text2text-generation", "text"),
    "BartForConditionalGeneration": (tf.BartConfig, "text2text-generation", "text"),
    "WhisperForConditionalGeneration": (tf.WhisperConfig, "automatic-speech-recognition", "audio"),
    "ViTForImageClassification": (tf.ViTConfig, "image-classification", "image"),
    "BertModel": (tf.BertConfig, None, "text"),
    "ViTModel": (tf.ViTConfig, None, "image"),
    "ElectraForPreTraining": (tf.ElectraConfig, None, "text"),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_class_is_the_checkpoints_own(name):
    config_class, task, feeds = ARCHITECTURES[name]
    config = config_class(architectures=[name])
    found = task_of(config)
    assert (found and found.name) == task
    cls = model_class(config, None)
    assert cls.__name__ == name
    assert input_of(cls, config, found) == feeds


@pytest.mark.parametrize("name", [*TASKS, *ALIASES])
def test_every_class_of_the_table_exists(name):
    for auto, table in named_task(name).classes:
        assert hasattr(tf, auto)
        assert not table or hasattr(tf, f"MODEL_FOR_{table}_MAPPING")


def test_a_task_chooses_its_auto_class():
    config = tf.BertConfig(architectures=["BertForMaskedLM"])
    cls = model_class(config, named_task("ner"))
    assert cls is tf.AutoModelForTokenClassification
    assert input_of(tf.AutoModel, tf.ViTConfig(), named_task("feature-extraction")) == "image"


def test_classes_of_remote_code_go_through_the_auto_class():
    config = tf.BertConfig(architectures=["MyLM"])
    config.auto_map = {"AutoModelForCausalLM": "code.MyLM"}
    assert task_of(config) is TASKS["text-generation"]
    assert model_class(config, None) is tf.AutoModelForCausalLM


def test_a_model_of_a_newer_transformers_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "tomorrow"}', encoding="utf-8")
    said = rf"this Transformers \({tf.__version__}\) does not know the model_type .*upgrade it"
    with pytest.raises(RecipeError, match=said):
        open_source(Recipe(model=str(tmp_path)), str(tmp_path))


def test_unknown_tasks_and_classes_are_refused():
    with pytest.raises(RecipeError, match=r"--task text-clasification: .*'text-classification'"):
        named_task("text-clasification")
    with pytest.raises(RecipeError, match="no such class for model type 'vit'"):
        model_class(tf.ViTConfig(), named_task("text-generation"))
    with pytest.raises(RecipeError, match=r"config.architectures is None.*give --task"):
        model_class(tf.BertConfig(), None)
    odd = type("Odd", (tf.BertModel,), {"main_input_name": "bbox_values"})
    with pytest.raises(RecipeError, match="its main input is 'bbox_values'"):
        input_of(odd, tf.BertConfig(), None)


def _recipe(**values):
    return Recipe(model="m", **values)


def test_weights_that_are_missing_are_named(tmp_path):
    recipe = _recipe(task="token-classification", dtype="bfloat16", device="cpu")
    source = open_source(recipe, str(save_bert(tmp_path)))
    assert source.task.head is Head.TOKENS
    model, missing = load_model(recipe, source, str(tmp_path))
    assert missing == []  # its classifier has the size of the sequence classifier's
    assert model.dtype.itemsize == 2
    recipe = _recipe(task="fill-mask")
    _, missing = load_model(recipe, open_source(recipe, str(tmp_path)), str(tmp_path))
    assert any("cls.predictions" in name for name in missing)


def test_a_device_that_is_not_there_is_refused(tmp_path):
    recipe = _recipe(device="nonsense")
    source = open_source(recipe, str(save_bert(tmp_path)))
    with pytest.raises(RecipeError, match="--device nonsense: the model cannot be put there"):
        load_model(recipe, source, str(tmp_path))


def test_models_and_weights_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"--model m: cannot be loaded.*config.json"):
        open_source(_recipe(), str(tmp_path))
    save_bert(tmp_path)
    source = open_source(_recipe(), str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="--model m: its weights cannot be loaded"):
        load_model(_recipe(), source, str(tmp_path))


def test_weights_that_are_damaged_are_refused(tmp_path):
    save_bert(tmp_path)
    source = open_source(_recipe(), str(tmp_path))
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RecipeError, match=r"weights cannot be loaded .* the files are whole"):
        load_model(_recipe(), source, str(tmp_path))


@pytest.mark.parametrize("name", ["./nothing", "../nothing", "/nothing/here"])
def test_a_path_that_is_not_there_is_not_taken_for_an_id(name):
    with pytest.raises(RecipeError, match="there is no such folder"):
        open_source(Recipe(model=name), name)


def test_a_missing_tokenizer_is_refused(tmp_path):
    save_bert(tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(RecipeError, match=r"has no tokenizer; .*without a vocabulary"):
        open_source(_recipe(), str(tmp_path))


def test_a_missing_processor_is_refused(tmp_path):
    save_vit(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(RecipeError, match="has no AutoImageProcessor"):
        open_source(_recipe(), str(tmp_path))


def test_the_end_token_pads_where_there_is_no_other(tmp_path):
    source = open_source(_recipe(), str(save_llama(tmp_path)))
    assert "'</s>'" in prepare_tokenizer(source)
    assert source.tokenizer.pad_token == "</s>"
    assert source.config.pad_token_id == 5
    assert prepare_tokenizer(source) is None
    source.tokenizer.pad_token = source.tokenizer.eos_token = None
    with pytest.raises(RecipeError, match="neither a pad nor an eos token"):
        prepare_tokenizer(source)


def test_lengths_stay_within_the_positions(tmp_path):
    source = open_source(_recipe(), str(save_bert(tmp_path / "bert")))
    assert resolve_max_length(_recipe(), source) == 40
    assert resolve_max_length(_recipe(max_length=8), source) == 8
    with pytest.raises(RecipeError, match="--max-length 41: the model has 40 positions"):
        resolve_max_length(_recipe(max_length=41), source)
    source.tokenizer.model_max_length = 30
    assert resolve_max_length(_recipe(), source) == 30
    t5 = open_source(_recipe(), str(save_t5(tmp_path / "t5")))
    assert resolve_max_length(_recipe(max_length=4000), t5) == 4000
    whisper = open_source(_recipe(), str(save_whisper(tmp_path / "whisper")))
    assert resolve_max_length(_recipe(), whisper) == 20


def test_positions_before_the_padding_index_do_not_count(tmp_path):
    save_bert(tmp_path)
    source = open_source(_recipe(), str(tmp_path))
    roberta = tf.RobertaConfig(max_position_embeddings=42, pad_token_id=1)
    shutil.rmtree(tmp_path)
    object.__setattr__(source, "config", roberta)
    assert resolve_max_length(_recipe(), source) == 40


def _check(folder, **values):
    recipe = Recipe(model=str(folder), device="cpu", **values)
    source = open_source(recipe, str(folder))
    model, missing = load_model(recipe, source, str(folder))
    check_head(recipe, source, model, missing)
    return missing


def _edit(folder, **values):
    file = folder / "config.json"
    content = {**json.loads(file.read_text(encoding="utf-8")), **values}
    file.write_text(json.dumps(content), encoding="utf-8")


OTHER = {
    "a classifier of a base": ("BertModel", "text-classification", "classifier.bias"),
    "a classifier of a language model": ("BertForMaskedLM", "sentiment-analysis", "bert.pooler"),
    "words of a classifier": ("BertForSequenceClassification", "fill-mask", "cls.predictions"),
    "answers of a classifier": ("BertForSequenceClassification", "question-answering", "qa_out"),
    "a pooler": ("BertForMaskedLM", "feature-extraction", "pooler.dense"),
    "classes of words": ("BertForSequenceClassification", "ner", "trained for text-classification"),
    "next words of words": ("BertForMaskedLM", "causal-lm", "was trained for fill-mask"),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_head_of_another_task_stops_unless_asked_for(case, tmp_path):
    cls, task, named = OTHER[case]
    save_bert(tmp_path, cls)
    with pytest.raises(RecipeError, match=rf"\({cls}\) .*{named}.*--allow-new-head"):
        _check(tmp_path, task=task)
    _check(tmp_path, task=task, allow_new_head=True)
    assert _check(tmp_path) == []


def test_the_same_task_in_other_words_is_no_new_head(tmp_path):
    save_bert(tmp_path / "bert", "BertForMaskedLM")
    assert _check(tmp_path / "bert", task="masked-lm") == []
    save_bert(tmp_path / "pooled", "BertForSequenceClassification")
    assert _check(tmp_path / "pooled", task="feature-extraction") == []
    assert _check(save_t5(tmp_path / "t5"), task="translation") == []


def test_a_checkpoint_of_two_heads_serves_the_one_that_its_config_names(tmp_path):
    save_bert(tmp_path, "BertForPreTraining")  # as bert-base-uncased on the Hub
    _edit(tmp_path, architectures=["BertForMaskedLM"])
    assert _check(tmp_path) == []


def test_a_body_without_weights_is_never_accepted(tmp_path):
    save_bert(tmp_path)
    _edit(tmp_path, num_hidden_layers=3)
    for values in ({}, {"allow_new_head": True}):
        with pytest.raises(RecipeError, match=r"for bert\.encoder\.layer\.2.*not its head"):
            _check(tmp_path, **values)


def test_weights_that_are_dropped_are_told(tmp_path):
    save_bert(tmp_path)
    _edit(tmp_path, num_hidden_layers=1)
    with pytest.warns(GradNASWarning, match=r"does not use bert\.encoder\.layer\.1.*dropped"):
        _check(tmp_path)
    with pytest.warns(GradNASWarning, match=r"BertModel: does not use .*encoder\.layer\.1"):
        _check(tmp_path, task="feature-extraction")
