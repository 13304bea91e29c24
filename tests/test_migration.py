"""Every block of the migration page runs; those of ModelOpt with nothing but another import."""

import re

import pytest
import torch
from places import ROOT
from transformers import GPTJConfig, GPTJForQuestionAnswering

from hf_gradnas import nas

PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(py|python)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
IMPORTS = re.compile(r"modelopt\.torch\.(prune|nas|opt)\b")
SEARCH = nas.GradientBinarySearcher


def run(language, monkeypatch, folder):
    """Run the blocks of a language in order, the set-up block before them."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(SEARCH, "SETUP_GRADIENT_FUNC", dict(SEARCH.SETUP_GRADIENT_FUNC))
    torch.manual_seed(0)
    space = {"__name__": "migration"}
    for index, (found, code) in enumerate(BLOCKS):
        if index == 0 or found == language:
            changed = IMPORTS.sub("hf_gradnas.nas", code)
            assert (changed != code) is (found == "py")
            exec(compile(changed, f"block {index} of docs/migration.md", "exec"), space)
    return space


def test_every_block_of_ours_runs(monkeypatch, tmp_path, capsys):
    space = run("python", monkeypatch, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {
        "smaller",
        "search.safetensors",
        "model.safetensors",
    }
    sizes = space["history"]["best"]["config"]
    assert sizes.keys() == {"0.up.out_features", "1.up.out_features"}
    assert "bert.encoder.layer.0.attention.num_attention_heads" in capsys.readouterr().out


def test_every_block_of_modelopt_runs_with_another_import(monkeypatch, tmp_path):
    space = run("py", monkeypatch, tmp_path)
    assert "modelopt" not in space
    assert (tmp_path / "model.pth").exists()
    assert set(space["history"]["best"]) >= {"config", "constraints", "score"}


def test_the_references_call_for_gptj_works_and_saves(tmp_path):
    config = GPTJConfig(
        n_embd=32,
        n_layer=2,
        n_head=4,
        rotary_dim=4,
        n_positions=16,
        vocab_size=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = GPTJForQuestionAnswering(config)
    ids = torch.randint(0, 64, (4, 12))
    batch = {"input_ids": ids, "start_positions": ids[:, 0] % 12, "end_positions": ids[:, 1] % 12}
    rules = {"nn.Linear": {"*": {"feature_divisor": 8}}, "hf.GPTJAttention": {"*": {}}}
    model, history = nas.prune(
        model,
        [("gradnas", rules)],
        {"flops": "85%"},
        (torch.ones(1, 12, dtype=torch.long),),
        {
            "data_loader": [batch],
            "collect_func": lambda given: (given,),
            "loss_func": lambda output, given: output.loss,
            "verbose": False,
        },
    )
    assert model.training
    assert {name.rpartition(".")[2] for name in history["best"]["config"]} == {
        "num_attention_heads",
        "out_features",
    }
    model.eval().save_pretrained(tmp_path)
    loaded = GPTJForQuestionAnswering.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).start_logits, model(ids).start_logits)


def test_before_and_after_stand_side_by_side():
    languages = [language for language, _ in BLOCKS]
    assert languages.count("py") == PAGE.count("<tr><th>before</th><th>after</th></tr>") == 4
    for index, language in enumerate(languages):
        if language == "py":
            assert languages[index + 1] == "python"


@pytest.mark.parametrize("name", ["GradNASConfig", "GradientBinarySearcher", "named_hparams"])
def test_names_on_the_page_are_public(name):
    assert name in PAGE
    assert name in nas.__all__


def test_links_lead_to_files():
    docs = ROOT / "docs"
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE)
    assert targets
    assert [target for target in targets if not (docs / target).exists()] == []
