"""The inspect command: what it finds, that its numbers are those of pruning, what it refuses."""

import json
import subprocess
import sys

import datasets
import pytest
import torch
import transformers as tf
from cli_cases import save_bert, save_llama, save_t5, save_vit, save_whisper, write_tsv

from hf_gradnas import GradNASPruner
from hf_gradnas.cli.app import main
from hf_gradnas.cli.inspect import inspect_recipe
from hf_gradnas.config.limits import format_amount
from hf_gradnas.config.recipe_files import build_recipe
from hf_gradnas.errors import BudgetError, GradNASWarning
from hf_gradnas.report.layers import merge_layers


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line holds the path of a temporary folder, however long."""
    monkeypatch.setattr("hf_gradnas.cli.show._PLAIN_WIDTH", 400)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes the folder of a model once."""
    made, root = {}, tmp_path_factory.mktemp("models")

    def folder(name):
        if name not in made:
            made[name] = MODELS[name](root / name)
        return made[name]

    return folder


def _base_bert(folder):
    return save_bert(folder, "BertModel")


def _t5_base(folder):
    tf.T5Model(tf.T5Config.from_pretrained(save_t5(folder))).save_pretrained(folder)
    return folder


def _gpt2(folder):
    """A classifier without a tokenizer, and with an end token outside of its vocabulary."""
    config = tf.GPT2Config(vocab_size=48, n_embd=8, n_layer=1, n_head=2, n_positions=20)
    config.eos_token_id = config.bos_token_id = 50256
    tf.GPT2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def _speech(folder):
    config = tf.Wav2Vec2Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(50, 20),
        conv_kernel=(50, 20),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
    )
    tf.Wav2Vec2ForSequenceClassification(config).save_pretrained(folder)
    tf.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def _empty(folder):
    return save_bert(folder, num_hidden_layers=0)


MODELS = {
    "bert": save_bert,
    "base_bert": _base_bert,
    "empty": _empty,
    "gpt2": _gpt2,
    "llama": save_llama,
    "speech": _speech,
    "t5": save_t5,
    "t5_base": _t5_base,
    "vit": save_vit,
    "whisper": save_whisper,
}


@pytest.fixture
def inspect(capsys):
    """Runs the command; returns its exit code, standard output and standard error."""

    def run(*arguments):
        capsys.readouterr()
        code = main(["inspect", *map(str, arguments)])
        shown = capsys.readouterr()
        assert "\x1b" not in shown.out + shown.err
        return code, shown.out, shown.err

    return run


@pytest.fixture
def answer(inspect, folders):
    """The JSON object of a model."""

    def run(name, *arguments):
        code, out, err = inspect("--model", folders(name), "--json", *arguments)
        assert (code, err) == (0, "")
        return json.loads(out)

    return run


# --- what it finds --------------------------------------------------------------------------------


def test_a_bert_in_tables(inspect, folders):
    code, out, err = inspect("--model", folders("bert"))
    assert (code, err) == (0, "")
    for said in (
        "BertForSequenceClassification",
        "input: random text",
        "bert.encoder.layer.{0-1}.attention heads 4 4",
        "bert.encoder.layer.{0-1} neurons 32 1",
        "Layout per_layer: the unmodified class cannot express fewer heads",
        "cost now lowest per_layer lowest stock",
        "FLOPs are counted for 40 tokens",
    ):
        assert said in " ".join(out.split())


@pytest.mark.filterwarnings("always::hf_gradnas.errors.GradNASWarning")
def test_a_kernel_that_nothing_is_proved_with_is_named(inspect, folders, monkeypatch):
    monkeypatch.setattr("hf_gradnas.running.kernels.TESTED", ("eager",))
    code, out, err = inspect("--model", folders("bert"), "--json")
    assert code == 0
    assert json.loads(out)["class"] == "BertForSequenceClassification"
    assert "Attention runs sdpa: what can go is proved with eager" in " ".join(err.split())


def test_numbers_are_those_of_pruning(answer, folders):
    """Costs and lowest budgets against the facade, both layouts, and units against a cut."""
    ids = torch.arange(1, 41).reshape(1, 40)
    found = answer("bert")
    assert found["layout"]["stock_possible"]
    for layout in ("per_layer", "stock"):
        model = tf.BertForSequenceClassification.from_pretrained(folders("bert"))
        pruner = GradNASPruner(model, layout=layout)
        pruner.discover({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert found["totals"] == pruner.totals
        for cost, lowest in found["lowest"][layout].items():
            with pytest.warns(GradNASWarning, match="near the lowest that can be reached"):
                assert pruner.check({cost: lowest["amount"] + 1e-6})
            with pytest.raises(BudgetError, match="cannot be reached"):
                pruner.check({cost: lowest["amount"] - 1})
            assert lowest["ratio"] == lowest["amount"] / found["totals"][cost]
    heads, neurons = found["axes"][0], found["axes"][1]
    # Queries, keys, values and output of 4 columns on 16, three biases; rows, a bias, a column.
    assert heads["cost_per_unit"]["params"] == 4 * 4 * 16 + 3 * 4
    assert neurons["cost_per_unit"] == {
        "flops": 2 * 2 * 40 * 16,
        "params": 16 + 1 + 16,
        "memory": 4 * (16 + 1 + 16),
    }
    assert heads["cost_per_unit"]["flops"] == 2 * 40 * 4 * (4 * 16 + 2 * 40)
    assert [axis["units"] for axis in found["axes"]] == [4, 32, 4, 32]
    assert "derives the head size" in heads["not_in_stock"]
    assert neurons["not_in_stock"] is None


def test_groups_and_the_length_of_flops(answer):
    short, long = (answer("llama", "--flops-length", length) for length in (8, 16))
    assert short["layout"]["chosen"] == "stock"
    assert (short["flops_length"], long["flops_length"]) == (8, 16)
    assert long["totals"]["flops"] > 2 * short["totals"]["flops"]
    assert long["totals"]["params"] == short["totals"]["params"]
    heads = next(axis for axis in short["axes"] if axis["kind"] == "heads")
    assert heads["parent"].endswith(":kv_groups")
    assert all(axis["proved"] for axis in short["axes"])


def test_what_is_refused_is_said_with_the_reason(answer, inspect, folders):
    refused = answer("whisper")["refused"]
    assert [(r["module"], r["kind"], r["proved"]) for r in refused] == [
        ("model.encoder.conv2", "channels", False)
    ]
    assert "residual stream" in refused[0]["reason"]
    code, out, _ = inspect("--model", folders("whisper"))
    assert code == 0
    assert "Seen but not pruned" in out


def test_channels_that_the_stock_class_cannot_express(tmp_path, inspect):
    config = tf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], image_size=16)
    tf.ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    code, out, _ = inspect("--model", tmp_path / "resnet", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["lowest"]["stock"] is None
    assert not found["layout"]["stock_possible"]
    assert {axis["kind"] for axis in found["axes"]} == {"channels"}
    code, out, _ = inspect("--model", tmp_path / "resnet")
    assert "Layout stock is not possible: " in out
    assert "FLOPs are counted" not in out
    code, _, err = inspect("--model", tmp_path / "resnet", "--layout", "stock")
    assert code == 2
    assert "leaves nothing to prune" in err


@pytest.mark.parametrize("name", ["gpt2", "speech", "t5", "t5_base", "vit"])
def test_random_input_fits_every_kind_of_model(answer, name):
    found = answer(name)
    assert {"heads", "neurons"} <= {axis["kind"] for axis in found["axes"]}
    assert (found["flops_length"] is None) == (name in ("speech", "vit"))
    kinds = {"speech": "audio", "vit": "image"}
    assert found["input"] == f"random {kinds.get(name, 'text')}"
    if name.startswith("t5"):
        assert len(found["axes"]) == 10


# --- without weights ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_without_weights_all_is_said_that_is_said_with_them(answer, name):
    assert answer(name, "--no-weights") == answer(name)


def test_without_weights_a_config_is_enough(tmp_path, inspect, folders):
    """A mixture of billions of parameters."""
    config = tf.Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=64,
        moe_intermediate_size=512,
    )
    config.save_pretrained(tmp_path)
    code, out, err = inspect("--model", tmp_path, "--no-weights", "--flops-length", "8")
    assert (code, err) == (0, "")
    said = " ".join(out.split())
    assert "model.layers.{0-23}.self_attn heads 16 64" in said
    assert "model.layers.{0-23}.mlp experts 64 1" in said
    with torch.device("meta"):
        model = tf.Qwen3MoeForCausalLM(config)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number > 2e9
    assert f"params {format_amount(number)}" in said
    code, _, err = inspect("--model", tmp_path)
    assert code == 2
    assert "holds none" in err


def test_rules_reach_layers_that_are_not_run(answer):
    found = answer("llama", "--no-weights", "--exclude", "*layers.1*")
    assert {axis["kept_by_rules"] for axis in found["axes"] if "layers.1" in axis["name"]} == {True}


def test_without_weights_nothing_is_loaded_or_read(inspect, folders, monkeypatch):
    monkeypatch.setattr("hf_gradnas.data.loading.load_model", None)
    assert inspect("--model", folders("bert"), "--no-weights")[0] == 0
    for option, value in (("--dataset", "x.tsv"), ("--device", "cpu")):
        (folders("bert") / "x.tsv").write_text("text\tlabel\na\t0\n", encoding="utf-8")
        given = folders("bert") / value if option == "--dataset" else value
        code, _, err = inspect("--model", folders("bert"), "--no-weights", option, given)
        assert code == 2
        assert "--no-weights runs a small model on random input" in err


def test_without_weights_nothing_to_prune_has_its_code(inspect, folders):
    code, _, err = inspect("--model", folders("empty"), "--no-weights")
    assert code == 1
    assert "found nothing to prune" in err


def test_layers_with_equal_rows_are_one_row():
    rows = [
        ("a.0.b", "x", "1"),
        ("a.1.b", "x", "1"),
        ("a.3.b", "x", "1"),
        ("a.1.c", "x", "2"),
        ("", "y", ""),
    ]
    assert merge_layers(rows) == [
        ("a.{0-1,3}.b", "x", "1"),
        ("a.1.c", "x", "2"),
        ("", "y", ""),
    ]
    twice = [(f"s.{i}.b.{j}", "x") for i in range(2) for j in range(3)]
    assert merge_layers(twice) == [("s.{0-1}.b.{0-2}", "x")]


# --- options --------------------------------------------------------------------------------------


def test_rules_limit_what_can_be_reached(answer):
    free = answer("bert")
    kept = answer("bert", "--exclude", "*.layer.0*")
    some = answer("bert", "--min-units", "2")
    assert [axis["kept_by_rules"] for axis in kept["axes"]] == [True, True, False, False]
    for layout, costs in free["lowest"].items():
        for cost, lowest in costs.items():
            assert kept["lowest"][layout][cost]["amount"] > lowest["amount"]
            assert some["lowest"][layout][cost]["amount"] >= lowest["amount"]
    assert (
        some["lowest"]["per_layer"]["flops"]["amount"]
        > free["lowest"]["per_layer"]["flops"]["amount"]
    )


def test_a_data_set_stands_in_for_random_input(answer, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    tsv = write_tsv(tmp_path / "train.tsv")
    found = answer("bert", "--dataset", tsv, "--flops-length", "12")
    assert (found["input"], found["flops_length"]) == (str(tsv), 12)
    drawn = answer("bert", "--flops-length", "12", "--seed", "3")
    assert found["totals"] == drawn["totals"]
    assert found["axes"] == drawn["axes"]


def test_weights_that_are_missing_are_said_unless_quiet(inspect, folders):
    asked = ("--model", folders("base_bert"), "--task", "text-classification")
    code, out, err = inspect(*asked)
    assert code == 0
    assert "Warning: the checkpoint has no weights for classifier.bias" in err
    code, out, err = inspect(*asked, "--quiet", "--json")
    assert (code, err) == (0, "")
    assert "no weights" in json.loads(out)["notes"][0]


def test_an_image_model_without_a_processor_says_its_size(tmp_path, inspect):
    folder = save_vit(tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    assert inspect("--model", folder)[0] == 0


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model: is missing"),
        (("--model", "quickstart"), "is trained by prune only"),
        (("--model", "./nowhere"), "there is no such folder"),
        (("--model", "x", "--layout", "odd"), "--layout: "),
        (("--modle", "x"), "--model"),
    ],
)
def test_bad_input_is_explained(inspect, arguments, message):
    code, out, err = inspect(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_options_that_do_not_fit_the_model_are_explained(inspect, folders):
    bert = folders("bert")
    for arguments, message in (
        (("--exclude", "nothing.*"), "matches no axis"),
        (("--max-length", "99"), "has 40 positions"),
        (("--task", "automatic-speech-recognition"), "no such class"),
    ):
        code, out, err = inspect("--model", bert, *arguments, "--json")
        assert (code, out) == (2, "")
        assert message in err


def test_a_model_with_nothing_to_prune_has_its_own_code(inspect, folders):
    code, out, err = inspect("--model", folders("empty"))
    assert (code, out) == (1, "")
    assert "Error: " in err


def test_audio_needs_a_feature_extractor(inspect, folders, tmp_path):
    whisper = folders("whisper")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((whisper / file).read_bytes())
    code, _, err = inspect("--model", tmp_path)
    assert code == 2
    assert "takes audio, but the folder has no feature extractor" in err


def test_an_interruption_has_its_own_code(inspect, folders, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_gradnas.cli.inspect.inspect_recipe", interrupt)
    code, _, err = inspect("--model", folders("bert"))
    assert code == 130
    assert "interrupted" in err


def test_the_model_is_left_as_it_was(folders):
    recipe = build_recipe({"model": str(folders("bert"))})
    first, second = inspect_recipe(recipe), inspect_recipe(recipe)
    assert first.prunable.structure == second.prunable.structure
    assert first.lowest == second.lowest


# --- the command line -----------------------------------------------------------------------------


def test_help_is_quick_and_names_the_exit_codes():
    code = (
        "import sys\n"
        "from hf_gradnas.cli.app import main\n"
        "assert main(['inspect', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy.random', 'accelerate'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    words = " ".join(done.stdout.split())
    assert "0 done, 1 nothing in it can be pruned, 2 bad input, 130 interrupted" in words
    assert "--min-units" in words
    assert "--target " not in words


@pytest.mark.parametrize("name", ["inspect", "verify"])
def test_the_modules_run_the_commands(name):
    line = [sys.executable, "-m", f"hf_gradnas.{name}"]
    done = subprocess.run([*line, "--help"], check=True, capture_output=True, text=True)
    assert f"hf-gradnas {name}" in done.stdout
    bad = subprocess.run([*line, "--nonsense"], check=False, capture_output=True, text=True)
    assert bad.returncode == 2
    assert "Traceback" not in bad.stderr
