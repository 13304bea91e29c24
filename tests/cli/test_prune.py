"""The prune command from end to end on tiny models: what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cli_cases
import numpy as np
import pytest
import torch
import transformers as tf
import yaml
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
    write_tsv,
    write_wave,
)
from places import ROOT
from transformers import AutoModelForMaskedLM

from hf_gradnas import GradNASPruner
from hf_gradnas.data.examples import Collator
from hf_gradnas.types import Scores

TINY = ["--num-examples", "8", "--batch-size", "4", "--no-report"]  # pictures take seconds
PLAIN = [*TINY, "--repair", "none"]  # for what a repair does not touch


@pytest.fixture
def dev(tmp_path):
    return write_tsv(tmp_path / "dev.tsv")


def test_checkpointing_changes_no_score(prune, bert, tsv, tmp_path):
    options = ("--model", bert, "--dataset", tsv, "--dry-run", *TINY)
    assert prune(*options, "--save-scores", "plain.safetensors")[0] == 0
    code, out, _ = prune(*options, "--save-scores", "again.safetensors", "--checkpointing")
    assert code == 0
    assert "layers run again in the backward" in out
    plain, again = Scores.load("plain.safetensors"), Scores.load("again.safetensors")
    assert all(np.array_equal(plain.values[name], again.values[name]) for name in plain.values)


def test_one_object_for_machines(prune, bert, tsv, tmp_path):
    code, out, err = prune(bert, "--dataset", tsv, "--output", tmp_path / "small", "--json", *PLAIN)
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert told["folder"] == str(tmp_path / "small")
    assert told["budget"]["flops"]["ratio"] == pytest.approx(0.6)
    assert told["kept"]["flops"] <= 0.6
    assert told["metric"]["name"] == "accuracy"
    assert told["metrics"]["before"]["accuracy"] == told["metric"]["before"]
    assert told["headline"].startswith("Kept ")
    assert (told["speedup"], told["warnings"]) == (None, [])


def test_quiet_says_the_last_line_only(prune, bert, tsv):
    code, out, err = prune(bert, "--dataset", tsv, "--dry-run", "--quiet", *PLAIN)
    assert (code, err) == (0, "")
    assert re.fullmatch(
        r"Kept \S+% of the FLOPs and \S+% of the parameters; accuracy \S+ → \S+; no model was "
        r"written\n",
        out,
    )
    code, out, err = prune(bert, "--dataset", "nothing.tsv", "--json", "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")


def test_a_classifier_with_evaluation(prune, bert, tsv, dev, tmp_path):
    code, out, err = prune(
        "--model", bert, "--dataset", tsv, "--eval-dataset", dev, "--target", "flops=70%", *TINY
    )
    assert (code, err) == (0, "")
    for said in ("no header in train.tsv", "text = text, label = label", "layer.0", "Costs (per_"):
        assert said in out
    assert "flops=70%" in out
    assert re.search(r"accuracy +\d\.\d+ +\d\.\d+", out)
    output = tmp_path / "bert-gradnas"
    document = json.loads((output / "gradnas.json").read_text(encoding="utf-8"))
    assert set(document["metrics"]["before"]) == {"examples", "loss", "accuracy"}
    assert document["metrics"]["after"]["examples"] == 24
    recipe = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    assert (recipe["max_length"], recipe["labels"], recipe["output"]) == (
        40,
        "data",
        "./bert-gradnas",
    )
    assert Scores.load(tmp_path / "bert-gradnas.scores.safetensors").values
    model = tf.AutoModelForSequenceClassification.from_pretrained(output)
    assert model(**tf.AutoTokenizer.from_pretrained(output)("a film", return_tensors="pt"))
    assert "from_pretrained(" in out


def test_the_saved_recipe_gives_the_same_model(prune, bert, tsv, tmp_path):
    assert prune("--model", bert, "--dataset", tsv, *TINY)[0] == 0
    recipe = tmp_path / "bert-gradnas" / "recipe.yaml"
    assert prune("--recipe", recipe, "--output", "again", "--set", "save_scores=s")[0] == 0
    plans = [
        json.loads((tmp_path / name / "gradnas.json").read_text(encoding="utf-8"))["plan"]
        for name in ("bert-gradnas", "again")
    ]
    assert plans[0] == plans[1]


def test_weights_in_several_files(prune, bert, tsv):
    options = ("--model", bert, "--dataset", tsv, "--repair", "none", "--no-report", *TINY)
    code, _, err = prune(*options, "--max-shard-size", "5XB", "--output", "out")
    assert code == 2
    assert "max_shard_size='5XB': is no size" in err
    assert prune(*options, "--max-shard-size", "10KB", "--output", "out")[0] == 0
    assert len(list(Path("out").glob("model-*.safetensors"))) > 1


def test_words_as_labels_need_names(prune, bert, tsv, tmp_path, monkeypatch):
    words = tsv.read_text(encoding="utf-8").replace("\t0", "\tyes").replace("\t1", "\tno")
    (tmp_path / "words.tsv").write_text(words, encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("hf_gradnas.jobs.preparation.load_model", _never)
        for files in (["words.tsv"], [tsv, "--eval-dataset", "words.tsv"]):
            code, _, err = prune("--model", bert, "--dataset", *files, *PLAIN)
            assert code == 2
            assert "the 2 labels no, yes, and the model has 2 outputs, LABEL_0, LABEL_1" in err
    assert sorted(tmp_path.rglob("*")) == before
    files = ["--dataset", tsv, "--eval-dataset", tsv]
    plain = prune("--model", bert, *files, "--output", "plain", *PLAIN)
    files = ["--dataset", "words.tsv", "--eval-dataset", "words.tsv", "--label-map", "no=1,yes=0"]
    code, out, _ = prune("--model", bert, *files, "--output", "words", *PLAIN)
    assert (plain[0], code) == (0, 0)
    assert "Note: labels by --label-map." in out
    documents = [
        json.loads((tmp_path / n / "gradnas.json").read_text()) for n in ("plain", "words")
    ]
    assert documents[0]["metrics"] == documents[1]["metrics"]
    recipe = yaml.safe_load((tmp_path / "words/recipe.yaml").read_text(encoding="utf-8"))
    assert recipe["label_map"] == {"no": 1, "yes": 0}
    assert prune("--recipe", "words/recipe.yaml", "--output", "again")[0] == 0


def test_a_link_gives_its_own_name_to_the_output(prune, bert, tsv, tmp_path):
    (tmp_path / "mine").symlink_to(bert, target_is_directory=True)
    code, out, _ = prune("--model", "./mine", "--dataset", tsv, *PLAIN)
    assert code == 0
    assert "Saved: ./mine-gradnas" in out


def test_scores_serve_every_budget_without_scoring(prune, bert, tsv, monkeypatch):
    code, out, _ = prune("--model", bert, "--dataset", tsv, "--dry-run", *TINY)
    assert code == 0
    assert "no model was cut or written" in out
    batches = []
    plain = Collator.__call__
    monkeypatch.setattr(
        Collator, "__call__", lambda self, rows: (batches.append(1), plain(self, rows))[1]
    )
    again = ["--scores", "bert-gradnas.scores.safetensors", "--target", "params=90%", "--no-eval"]
    code, out, _ = prune("--model", bert, "--dataset", tsv, *again, *PLAIN)
    assert code == 0
    assert len(batches) == 1  # the one that discovery looks at
    assert "Scored" not in out


def test_a_dry_run_evaluates_and_writes_only_scores_and_repair(prune, bert, tsv, tmp_path):
    before = set(tmp_path.iterdir())
    code, out, _ = prune(
        "--model", bert, "--dataset", tsv, "--eval-dataset", tsv, "--dry-run", *TINY
    )
    assert code == 0
    assert "after (masked)" in out
    assert {path.name for path in set(tmp_path.iterdir()) - before} == {
        "bert-gradnas.scores.safetensors",
        "bert-gradnas.repair.safetensors",
    }


def test_exclude_min_units_and_multiple_are_rules(prune, bert, tsv, tmp_path):
    limits = ["--exclude", "*.layer.0.*", "--exclude", "*.layer.0", "--min-units", "1"]
    limits += ["--multiple", "neurons=5,heads=2"]
    code, _, _ = prune("--model", bert, "--dataset", tsv, "--target", "flops=75%", *limits, *PLAIN)
    assert code == 0
    document = json.loads((tmp_path / "bert-gradnas/gradnas.json").read_text(encoding="utf-8"))
    kept, sizes = document["plan"]["kept"], document["plan"]["sizes"]
    assert all(len(kept[name]) == sizes[name] for name in kept if "layer.0" in name)
    assert all(kept.values())
    steps = {"neurons": 5, "heads": 2}
    counts = {name: len(units) for name, units in kept.items()}
    assert all(
        n % steps[name.rpartition(":")[2]] == 0 or n == sizes[name] for name, n in counts.items()
    )
    assert counts != sizes
    for multiple, code, message in (("999", 2, "no width"), ("heads=1,heads=2", 2, "given twice")):
        told = ("--model", bert, "--dataset", tsv, "--multiple", multiple, "--output", "other")
        found, _, err = prune(*told, *PLAIN)
        assert (found, message in err) == (code, True)
    found, _, err = prune(*told[:4], "--multiple", "8", "--axes", "heads", *PLAIN)
    assert (found, "--axes heads keeps all neurons" in err) == (2, True)


def test_a_language_model_in_stock_layout(prune, tmp_path):
    text = write_text(tmp_path / "text.txt")
    llama = save_llama(tmp_path / "llama")
    code, out, err = prune(
        *("--model", llama, "--dataset", text, "--max-length", "16"),
        *("--eval-dataset", write_text(tmp_path / "held.txt"), "--eval-num-examples", "3"),
        *("--layout", "stock", "--target", "flops=80%", *TINY),
    )
    assert (code, err) == (0, "")
    assert "Measured on 3 examples of held.txt." in out
    assert re.search(r"perplexity +\d+\.\d+ +\d+\.\d+", out)
    assert "it has no pad token" in out
    assert "import hf_gradnas" not in out
    probe = (
        "import sys, transformers as tf\n"
        "model = tf.AutoModelForCausalLM.from_pretrained('llama-gradnas')\n"
        "assert 'hf_gradnas' not in sys.modules\n"
        "model.generate(tf.AutoTokenizer.from_pretrained('llama-gradnas')('a', "
        "return_tensors='pt').input_ids, max_new_tokens=3)\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True)


BUNDLED = {
    "masked": ("BertForMaskedLM", "data: as the head"),
    "classifier": ("BertForSequenceClassification", "model: sampled"),
    "tokens": ("BertForTokenClassification", "model: sampled"),
    "span": ("BertForQuestionAnswering", "model: sampled"),
    "base": ("BertModel", "model: sampled"),
}


@pytest.mark.parametrize("case", BUNDLED)
def test_the_bundled_text_is_enough_for_every_head(case, prune, tmp_path):
    cls, said = BUNDLED[case]
    save_bert(tmp_path / "org" / case, cls)
    code, out, err = prune("--model", tmp_path / "org" / case, "--target", "flops=80%", *TINY)
    assert code == 0
    assert err.startswith(
        "Warning: no --dataset was given, so the model is scored and repaired on the bundled"
    )
    assert err.count("\n") == 1
    assert said in out
    assert "bundled text" in out
    loaded = getattr(tf, cls).from_pretrained(tmp_path / f"{case}-gradnas")
    assert type(loaded).__name__.endswith(cls)


def test_a_sequence_model_with_and_without_targets(prune, tmp_path):
    t5 = save_t5(tmp_path / "t5")
    records = [{"document": text, "summary": " ".join(text.split()[:3])} for text in sentences(8)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", records)
    text = write_text(tmp_path / "text.txt")
    for data, output in ((pairs, "one"), (text, "two")):
        code, out, err = prune(
            *("--model", t5, "--dataset", data, "--output", output, "--max-length", "12"),
            *("--target", "flops=80%", "--no-eval", *TINY),
        )
        assert (code, err) == (0, "")
        assert re.search(r"--task +text2text-generation", out)
    assert "decoder" in out


def test_images_from_a_folder(prune, tmp_path):
    vit = save_vit(tmp_path / "vit")
    images = write_images(tmp_path / "animals")
    code, out, err = prune(
        *("--model", vit, "--dataset", images, "--eval-dataset", images),
        *("--label-map", "cat=0", "--label-map", "dog=1", "--target", "flops=80%", *TINY),
    )
    assert (code, err) == (0, "")
    assert "image = image" in out
    assert "--max-length" not in out
    assert (tmp_path / "vit-gradnas" / "preprocessor_config.json").is_file()


def test_speech_from_files(prune, tmp_path):
    whisper = save_whisper(tmp_path / "whisper")
    records = []
    for index, text in enumerate(sentences(4)):
        write_wave(tmp_path / f"{index}.wav", rate=8000, hertz=200 * (index + 1))
        records.append({"audio": f"{index}.wav", "text": text})
    data = write_jsonl(tmp_path / "speech.jsonl", records)
    dev = write_jsonl(tmp_path / "dev.jsonl", records)
    code, out, err = prune(
        *("--model", whisper, "--dataset", data, "--eval-dataset", dev),
        *("--target", "flops=90%", *TINY),
    )
    assert (code, err) == (0, "")
    assert "perplexity" in out
    assert tf.AutoProcessor.from_pretrained(tmp_path / "whisper-gradnas")


def test_pruning_again_composes(prune, bert, tsv, tmp_path):
    assert prune("--model", bert, "--dataset", tsv, "--target", "flops=80%", *TINY)[0] == 0
    code, _, err = prune(
        *("--model", "bert-gradnas", "--dataset", tsv, "--target", "flops=80%", *TINY)
    )
    assert (code, err) == (0, "")
    small = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert-gradnas-gradnas")
    large = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert-gradnas")
    assert small.num_parameters() < large.num_parameters()


def test_random_weights_stop_unless_asked_for(prune, tmp_path, monkeypatch):
    base = save_bert(tmp_path / "base", "BertModel")
    command = ["--model", base, "--task", "text-classification", *PLAIN]
    before = sorted(tmp_path.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("hf_gradnas.pruner.GradNASPruner.discover", _never)
        code, _, err = prune(*command)
    assert code == 2
    assert "(BertModel) has no weights for classifier.bias, classifier.weight of BertFor" in err
    assert "omit --task, or give --allow-new-head" in err
    assert sorted(tmp_path.rglob("*")) == before
    code, _, err = prune(*command, "--allow-new-head")
    assert code == 0
    assert "the checkpoint has no weights for classifier" in err


@pytest.mark.parametrize(("stopped_by", "expected"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interruption_keeps_the_scores_and_resumes(
    prune, bert, tsv, monkeypatch, tmp_path, stopped_by, expected
):
    plain = Collator.__call__
    seen = []

    def interrupted(self, rows):
        seen.append(1)
        if len(seen) == 4:  # after discovery and two batches
            signal.raise_signal(getattr(signal, stopped_by))
        return plain(self, rows)

    command = ["--model", bert, "--dataset", tsv, "--num-examples", "12", "--batch-size", "4"]
    command += ["--no-eval", "--no-report", "--repair", "none"]
    with monkeypatch.context() as patch:
        patch.setattr(Collator, "__call__", interrupted)
        code, _, err = prune(*command)
    assert code == expected
    assert "the scores so far are in ./bert-gradnas.scores.safetensors" in err.replace(
        "in bert", "in ./bert"
    )
    assert not (tmp_path / "bert-gradnas").exists()
    partial = Scores.load(tmp_path / "bert-gradnas.scores.safetensors")
    assert prune(*command)[0] == 0
    resumed = Scores.load(tmp_path / "bert-gradnas.scores.safetensors")
    assert prune(*command, "--output", "whole")[0] == 0
    whole = Scores.load(tmp_path / "whole.scores.safetensors")
    for name, values in whole.values.items():
        torch.testing.assert_close(torch.tensor(resumed.values[name]), torch.tensor(values))
    assert any((partial.values[name] != whole.values[name]).any() for name in whole.values)


def test_an_interruption_after_scoring_says_where_the_scores_are(prune, bert, tsv, monkeypatch):
    monkeypatch.setattr("hf_gradnas.pruner.GradNASPruner.plan", _interrupt)
    code, _, err = prune("--model", bert, "--dataset", tsv, *TINY)
    assert code == 130
    assert "no model was written; the scores so far are in " in err
    assert "the same command goes on from there." in err


def test_an_early_interruption_says_that_nothing_was_written(prune, bert, monkeypatch):
    monkeypatch.setattr("hf_gradnas.jobs.preparation.open_source", _interrupt)
    code, _, err = prune("--model", bert)
    assert code == 130
    assert "no model was written" in err


def _interrupt(*_, **__):
    raise KeyboardInterrupt


def test_failing_to_cut_is_another_code(prune, bert, tsv, tmp_path, monkeypatch):
    from hf_gradnas.errors import CheckpointError
    from hf_gradnas.pruner import GradNASPruner

    def fail(*_, **__):
        raise CheckpointError("disk full")

    monkeypatch.setattr(GradNASPruner, "save_pretrained", fail)
    code, _, err = prune("--model", bert, "--dataset", tsv, *TINY)
    assert code == 1
    assert err.strip() == "Error: disk full"


def test_running_out_of_memory_is_explained(prune, bert, tsv, monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr("hf_gradnas.pruner.GradNASPruner.discover", fail)
    code, _, err = prune("--model", bert, "--dataset", tsv, *TINY)
    assert code == 1
    assert "--batch-size" in err


def _never(*_, **__):
    raise AssertionError("an expensive step was reached")


EARLY = {
    "unreadable target": (["--target", "flops=lots"], "budget flops='lots': not a finite number"),
    "over 100 %": (["--target", "flops=120%"], "at most 100 %"),
    "a bare share": (["--target", "flops=0.5"], "write '50%'"),
    "unknown cost": (["--target", "flop=50%"], "unknown cost 'flop'.*did you mean 'flops'"),
    "unknown task": (["--task", "classification"], "--task classification: unknown task"),
    "no scores": (["--scores", "x.safetensors"], "--scores x.safetensors: there is no such file"),
    "damaged scores": (["--scores", "train.tsv"], "train.tsv cannot be read"),
    "nowhere for scores": (["--save-scores", "no/where.safetensors"], "is not a folder that can"),
    "nowhere for the output": (["--output", "no/such/out"], "--output no/such/out: .* is not a"),
    "two limits": (["--target", "flops=9%", "--target", "flops=8%"], "'flops' is limited twice"),
    "the model itself": (["--output", "bert", "--overwrite"], "is the folder of the model itself"),
    "too long": (["--max-length", "41"], "--max-length 41: the model has 40 positions"),
    "no such label": (["--label-column", "y"], "no column 'y'; its columns are text, label"),
    "no such text": (["--text-column", "y"], "no column 'y'.*--text-column"),
    "no data": (["--dataset", "./none.tsv"], "there is no such file or folder"),
    "no eval split": (["--eval-dataset", "./none.tsv"], "there is no such file or folder"),
    "no model": (["--model", "./nobody"], "--model ./nobody: there is no such folder"),
}


@pytest.mark.parametrize("case", EARLY)
def test_bad_input_is_refused_before_the_weights_are_read(case, prune, bert, tsv, monkeypatch):
    arguments, message = EARLY[case]
    monkeypatch.setattr("hf_gradnas.jobs.preparation.load_model", _never)
    code, _, err = prune("--model", bert, "--dataset", tsv, *arguments)
    assert code == 2
    assert re.search(message, err, re.DOTALL), err
    assert "Traceback" not in err


def test_a_label_column_that_is_missing_names_the_others(prune, bert, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_gradnas.jobs.preparation.load_model", _never)
    data = write_jsonl(tmp_path / "a.jsonl", [{"text": "good", "note": "x"}])
    code, _, err = prune("--model", bert, "--dataset", data)
    assert code == 2
    assert "its columns are text, note" in err
    assert "--labels model" in err


def test_labels_of_data_need_data(prune, bert, monkeypatch):
    monkeypatch.setattr("hf_gradnas.jobs.preparation.load_model", _never)
    code, _, err = prune("--model", bert, "--labels", "data")
    assert code == 2
    assert "--labels data: found no --dataset" in err
    assert prune("--model", bert, "--eval-split", "test")[0] == 2


def test_an_output_that_exists_is_kept_unless_overwritten(prune, bert, tsv, tmp_path):
    command = ["--model", bert, "--dataset", tsv, *PLAIN]
    assert prune(*command)[0] == 0
    kept = (tmp_path / "bert-gradnas" / "gradnas.json").read_bytes()
    code, _, err = prune(*command, "--target", "flops=80%")
    assert code == 2
    assert "--overwrite" in err
    assert (tmp_path / "bert-gradnas" / "gradnas.json").read_bytes() == kept
    code, out, _ = prune(*command, "--target", "flops=80%", "--overwrite", "--trust-remote-code")
    assert code == 0
    shown = " ".join(out.split())
    assert "--overwrite yes, what is in the output is replaced given" in shown
    assert "--trust-remote-code yes, code of the model is run given" in shown
    for name in ("recipe.yaml", "gradnas.json", "README.md"):
        text = (tmp_path / "bert-gradnas" / name).read_text(encoding="utf-8")
        assert not re.search("overwrite|trust_remote_code:|--trust", text), name
    assert (tmp_path / "bert-gradnas" / "gradnas.json").read_bytes() != kept


@pytest.mark.parametrize("feeds", ["image", "audio"])
def test_a_model_that_text_cannot_feed_names_the_flags(feeds, prune, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_gradnas.jobs.preparation.load_model", _never)
    save = {"image": save_vit, "audio": save_whisper}[feeds]
    code, _, err = prune("--model", save(tmp_path / "m"))
    assert code == 2
    assert f"give --dataset with --{feeds}-column" in err


def test_a_budget_out_of_reach_says_what_can_be_reached(prune, bert, tsv, monkeypatch):
    monkeypatch.setattr("hf_gradnas.pruner.GradNASPruner.score", _never)
    code, _, err = prune("--model", bert, "--dataset", tsv, "--target", "params=1%", *TINY)
    assert code == 2
    assert "%" in err


def test_a_glob_that_matches_nothing_is_refused(prune, bert, tsv, monkeypatch):
    monkeypatch.setattr("hf_gradnas.pruner.GradNASPruner.score", _never)
    code, _, err = prune("--model", bert, "--dataset", tsv, "--exclude", "*.layers.*", *TINY)
    assert code == 2
    assert "matches no axis" in err


def test_scores_of_another_model_or_kind_are_refused(prune, bert, tsv, tmp_path, monkeypatch):
    other = save_bert(tmp_path / "other", intermediate_size=48)
    assert prune("--model", other, "--dataset", tsv, "--dry-run", *PLAIN)[0] == 0
    scores = ["--scores", "other-gradnas.scores.safetensors"]
    code, _, err = prune("--model", bert, "--dataset", tsv, *scores, *PLAIN)
    assert code == 2
    assert "model" in err
    code, _, err = prune("--model", bert, "--dataset", tsv, *scores, "--score", "taylor")
    assert code == 2
    assert "holds 'tempered' scores, but --score taylor" in err


def test_the_score_is_chosen_on_rows_held_out(prune, bert, tsv, tmp_path):
    code, out, err = prune(
        "--model", bert, "--dataset", tsv, "--score", "auto", "--target", "flops=70%", *PLAIN
    )
    assert (code, err) == (0, "")
    found = json.loads((tmp_path / "bert-gradnas/gradnas.json").read_text(encoding="utf-8"))
    plan = found["plan"]
    assert plan["tried"].keys() == {"tempered", "fisher"}
    assert plan["score"] == min(plan["tried"], key=plan["tried"].get)
    assert found["scores"]["method"] == plan["score"]
    assert found["recipe"]["score"] == "auto"
    assert f"score='auto': {plan['score']} is taken; KL to the original" in out
    file = "bert-gradnas.scores.safetensors"
    assert Scores.load(file).methods == ("tempered", "fisher")
    given = ["--scores", file, "--dry-run", "--dataset", tsv, "--model", bert, *PLAIN]
    code, out, _ = prune(*given, "--score", "auto")
    assert code == 0
    assert "score='auto': tempered is taken untried" in out
    code, out, _ = prune(*given, "--score", "fisher")
    assert code == 0
    code, _, err = prune(*given, "--score", "taylor")
    assert code == 2
    assert "holds 'tempered' and 'fisher' scores, but --score taylor" in err


def test_a_loss_that_is_not_finite_names_the_batch(prune, bert, tsv):
    model = tf.BertForSequenceClassification.from_pretrained(bert)
    with torch.no_grad():
        model.classifier.bias.fill_(float("inf"))
    model.save_pretrained(bert)
    code, _, err = prune("--model", bert, "--dataset", tsv, *TINY)
    assert code == 2
    assert re.search("[Bb]atch 0", err)
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    model.save_pretrained(bert)
    code, _, err = prune("--model", bert, "--dataset", tsv, *TINY)
    assert code == 2
    assert "classifier.bias: holds NaN" in err


def test_a_headless_model_cannot_be_evaluated(prune, tmp_path, tsv):
    base = save_bert(tmp_path / "base", "BertModel")
    code, _, err = prune("--model", base, "--eval-dataset", tsv, *TINY)
    assert code == 2
    assert "has no head whose loss could be measured" in err


def test_what_cannot_be_saved_is_refused_before_scoring(prune, bert, tsv, tmp_path):
    model = tf.BertForSequenceClassification.from_pretrained(bert)
    torch.nn.init.constant_(model.bert.pooler.dense.bias, float("nan"))
    model.save_pretrained(bert)
    code, _, err = prune("--model", bert, "--dataset", tsv, "--output", "out", *TINY)
    assert code == 2
    assert "bert.pooler.dense.bias: holds NaN" in " ".join(err.split())
    assert not list(tmp_path.glob("out*"))


def test_labels_in_another_order_are_warned_of(prune, bert, tsv, tmp_path):
    model = tf.BertForSequenceClassification.from_pretrained(bert)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([9.0, -9.0]))  # always the first label
    model.save_pretrained(bert)
    rows = ("\t".join((line.split("\t")[0], "1")) for line in tsv.read_text().splitlines())
    (tmp_path / "ones.tsv").write_text("\n".join(rows), encoding="utf-8")
    files = ["--dataset", tsv, "--eval-dataset", "ones.tsv"]
    code, _, err = prune("--model", bert, *files, "--dry-run", *PLAIN)
    assert code == 0
    assert "the accuracy of the unpruned model is 0.0% on 24 examples" in err
    assert "--label-map" in err


def test_options_that_this_model_does_not_read_are_refused(prune, bert, tsv, monkeypatch):
    monkeypatch.setattr("hf_gradnas.jobs.preparation.load_model", _never)
    for option in ("--target-column", "--image-column", "--audio-column"):
        code, _, err = prune("--model", bert, "--dataset", tsv, option, "text")
        assert code == 2
        assert f"{option} text: has no effect here" in err


def test_examples_are_scored_in_order_of_length(prune, bert, tsv, monkeypatch):
    options = ["--model", bert, "--dataset", tsv, "--no-eval", "--dry-run", "--target", "flops=80%"]
    options += ["--num-examples", "10", "--batch-size", "4", "--repair", "none"]
    widths, discovered = [], []
    collate, discover = Collator.__call__, GradNASPruner.discover

    def note(self, examples):
        batch = collate(self, examples)
        widths.append(batch["input_ids"].shape[1])
        return batch

    def note_sample(self, batch, **given):
        discovered.append(batch["input_ids"])
        return discover(self, batch, **given)

    monkeypatch.setattr(Collator, "__call__", note)
    monkeypatch.setattr(GradNASPruner, "discover", note_sample)
    assert prune(*options, "--save-scores", "ordered.safetensors")[0] == 0
    first, *scored = widths[:4]  # the sample, then three batches of scoring
    assert scored == sorted(scored, reverse=True)
    assert len(set(scored)) > 1
    assert discovered[0].shape == (4, first)  # the first rows of the file
    monkeypatch.setattr("hf_gradnas.batches.steps.by_length", lambda loader, *_: loader)
    assert prune(*options, "--save-scores", "plain.safetensors")[0] == 0
    assert torch.equal(*discovered)
    ordered, plain = (Scores.load(f"{name}.safetensors") for name in ("ordered", "plain"))
    assert ordered.metadata["examples"] == plain.metadata["examples"] == "10"
    for name, values in plain.values.items():
        assert ordered.values[name] == pytest.approx(values, rel=1e-3, abs=1e-5 * values.max())


COMMAND = "python -m hf_gradnas.prune --model bert-base-uncased"


def test_bert_base_uncased(tmp_path: Path) -> None:
    readme = ROOT / "README.md"
    assert f"\n{COMMAND}\n" in readme.read_text(encoding="utf-8")
    repository = tmp_path / "hub" / "models--bert-base-uncased"
    cli_cases.save_bert(repository / "snapshots" / ("0" * 40), "BertForMaskedLM")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, *COMMAND.split()[1:]],
        cwd=tmp_path / "work",
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for said in (
        "BertForMaskedLM",
        "flops=60%",
        "bert-base-uncased-gradnas",
        "tempered",
        "bundled",
    ):
        assert said in done.stdout
    folder = tmp_path / "work" / "bert-base-uncased-gradnas"
    plan = json.loads((folder / "gradnas.json").read_text())["plan"]
    assert plan["costs"]["flops"] <= plan["budgets"][0]["limit"]
    assert (tmp_path / "work" / "bert-base-uncased-gradnas.scores.safetensors").is_file()
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert type(model).__name__ == "BertForMaskedLM"
