"""The card, read back by the Hub's own client, says what was done."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard
from report_cases import EVALUATED, LOADING, make_case

from hf_gradnas.report.card import address, make_card, report_files
from hf_gradnas.report.metadata import Origin, data_name, hub_dataset, pipeline_tag

ORIGIN = Origin("user/large", {}, is_hub=True)


def read_back(tmp_path, summary, origin=ORIGIN, **options):
    options = {"auto_class": "AutoModelForCausalLM", "loading": LOADING, **options}
    (tmp_path / "README.md").write_text(str(make_card(summary, origin, **options)), "utf-8")
    return ModelCard.load(tmp_path / "README.md")


def test_the_header_reads_back(tmp_path):
    card = read_back(tmp_path, make_case(**EVALUATED)[-1], picture="report/scores.png")
    data = card.data
    assert (data.base_model, data.library_name) == ("user/large", "transformers")
    assert data.tags == ["pruned", "structured-pruning", "gradnas"]
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["owner/words"]
    assert data.model_name == "small"
    found = {result.metric_type: result for result in data.eval_results}
    assert {name: result.metric_value for name, result in found.items()} == {
        "perplexity": 7.4,
        "loss": 2.0,
    }
    result = found["loss"]
    assert (result.dataset_type, result.dataset_config, result.dataset_split) == (
        "owner/tests",
        "fr",
        "test",
    )
    assert result.task_type == "text-generation"


def test_the_body_tells_all(tmp_path):
    text = read_back(tmp_path, make_case(**EVALUATED)[-1], picture="report/scores.png").text
    for said in (
        "# small",
        "[user/large](https://huggingface.co/user/large)",
        "48.0% of its FLOPs",
        "**Kept 48.0% of the FLOPs and 22.6% of the parameters; perplexity 2.7 → 7.4; ",
        "](report/index.html)",
        "](report/scores.png)",
        "| `model.layers.2.mlp` | neurons |",
        "| 8 | 30.0 ms | 10.0 ms | 3.00 × |",
        "| perplexity | 2.7000 | 7.4000 |",
        "one input of 16 tokens",
        "scored on 64 examples",
        EVALUATED["command"],
        "`lm_head` (neurons)",
        "## Limits",
    ):
        assert said in text, said
    block = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(block) == EVALUATED["recipe"]


def test_the_last_state_counts(tmp_path):
    metrics = {**EVALUATED["metrics"], "recovered": {"examples": 10, "loss": 1.5}}
    summary = make_case(**{**EVALUATED, "metrics": metrics, "recovery": {"steps": 7}})[-1]
    card = read_back(tmp_path, summary)
    assert [result.metric_value for result in card.data.eval_results] == [1.5]
    assert "trained for 7 steps" in card.text
    assert "It was not trained" not in card.text


def test_without_a_command_the_card_is_small_but_whole(tmp_path):
    card = read_back(tmp_path, make_case()[-1], Origin())
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "structured-pruning", "gradnas"],
    }
    said = "**Kept 48.0% of the FLOPs and 22.6% of the parameters.**"
    assert card.text.strip().startswith(f"# small\n\n{said}\n\nA model (`LlamaForCausalLM`)")
    for missing in ("```yaml", "```bash", ".png", "index.html", "Median time", "None"):
        assert missing not in card.text
    assert "Nothing was measured" in card.text


def test_what_the_original_says_is_passed_on(tmp_path):
    said = {
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
        "language": ["en", "de"],
        "tags": ["pruned", "code"],
        "datasets": "owner/first",
        "model-index": [{"name": "old", "results": []}],
        "pipeline_tag": "fill-mask",
    }
    card = read_back(tmp_path, make_case(**EVALUATED)[-1], Origin("user/large", said, is_hub=True))
    data = card.data
    assert (data.license, data.license_name, data.language) == ("other", "own", ["en", "de"])
    assert data.license_link == "https://huggingface.co/user/large/blob/main/LICENSE"
    assert data.tags == ["pruned", "code", "structured-pruning", "gradnas"]
    assert data.datasets == ["owner/first", "owner/words"]
    assert data.pipeline_tag == "text-generation"  # the class knows better
    local = read_back(tmp_path, make_case()[-1], Origin("large", said))
    assert local.data.license_link is None  # that file is not here


def test_loading_fits_the_layout(tmp_path):
    loading = "import hf_gradnas  # or so\nfrom t import M\nmodel = M.from_pretrained('small')"
    text = read_back(tmp_path, make_case()[-1], loading=loading).text
    assert "import hf_gradnas\nfrom t import M\n" in text
    assert "model = M.from_pretrained('small', trust_remote_code=True)" in text
    assert "vLLM" in text
    stock = read_back(tmp_path, make_case(layout="stock")[-1]).text
    assert LOADING in stock
    assert "trust_remote_code" not in stock
    assert "hf_gradnas" not in stock


def test_a_long_plan_is_folded(tmp_path):
    text = read_back(tmp_path, make_case(80)[-1]).text
    assert "<summary>Every module (41 rows)</summary>" in text
    assert "<details>" not in read_back(tmp_path, make_case(6)[-1]).text


def test_paths_of_data_are_no_hub_ids(tmp_path):
    assert hub_dataset("owner/name:sst2") == ("owner/name", "sst2")
    assert hub_dataset("imdb") == ("imdb", None)
    for path in (str(tmp_path), "data.csv", "./data", "/data/x", "a/b/c", None, "bundled text"):
        assert hub_dataset(path) is None
    assert data_name("/home/me/sst2.tsv") == "sst2"
    assert data_name("owner/name:sst2") == "owner/name:sst2"


def test_the_tag_is_the_most_telling_one():
    classifier = "AutoModelForSequenceClassification"
    assert pipeline_tag("sentiment-analysis", classifier, None) == "text-classification"
    assert pipeline_tag(None, classifier, "fill-mask") == "text-classification"
    assert pipeline_tag("summarization", "AutoModelForSeq2SeqLM", None) == "summarization"
    assert pipeline_tag(None, "AutoModelForSeq2SeqLM", "translation") == "translation"
    assert pipeline_tag(None, "AutoModel", "sentence-similarity") == "sentence-similarity"
    detector = "AutoModelForObjectDetection"
    assert pipeline_tag("feature-extraction", detector, None) == "object-detection"
    assert pipeline_tag(None, "AutoModelForSeq2SeqLM", None) == "text2text-generation"
    assert pipeline_tag(None, None, None) is None


def test_files_are_the_card_and_one_folder():
    plan, _, scores, summary = make_case(**EVALUATED)
    options = {"auto_class": None, "loading": LOADING}
    files = report_files(summary, plan, scores, ORIGIN, **options)
    assert set(files) == {"README.md"} | {
        f"report/{name}"
        for name in (
            "index.html",
            "scores.png",
            "summary.json",
            "plan.md",
            "plan.csv",
        )
    }
    assert json.loads(files["report/summary.json"])["headline"].startswith(
        "Kept 48.0% of the FLOPs"
    )
    assert "## Latency (cpu, 1 thread)" in files["report/plan.md"]
    bare = report_files(summary, plan, scores, ORIGIN, **options, pictures=False)
    assert set(bare) == {"README.md"}
    assert ".png" not in bare["README.md"]
    unscored = report_files(summary, plan, None, ORIGIN, **options)
    assert "report/scores.png" not in unscored
    assert "report/widths.png" in unscored
    assert "scores.png" not in unscored["README.md"]
    assert "report/widths.png" in unscored["README.md"]


@pytest.mark.parametrize("layout", ["stock", "per_layer"])
def test_a_pushed_card_names_its_repository(tmp_path, layout):
    summary = make_case(layout=layout, **EVALUATED)[-1]
    before = str(make_card(summary, ORIGIN, auto_class=None, loading=LOADING))
    after = address(before, "user/tiny")
    changed = [
        (old, new)
        for old, new in zip(before.splitlines(), after.splitlines(), strict=True)
        if old != new
    ]
    name, title, *loads = changed
    assert name == ("- name: small", "- name: tiny")
    assert title == ("# small", "# tiny")
    assert len(loads) == (1 if layout == "stock" else 2)
    assert all(new == old.replace('"small"', '"user/tiny"') != old for old, new in loads)
    assert ModelCard(after).data.model_name == "tiny"
    assert address(after, "user/tiny") == after


@pytest.mark.parametrize(
    "card", ["", "# small\n", "---\n# small\n---\n", '# mine\nx.from_pretrained("small")\n']
)
def test_a_card_of_others_stays(card):
    assert address(card, "user/tiny") == card
