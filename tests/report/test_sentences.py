"""Names and texts end nothing that they are in; what a repair says of itself."""

from __future__ import annotations

import ast
import re
import shlex
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from report_cases import EVALUATED, make_case

from hf_gradnas._redaction import visible
from hf_gradnas.repair import Repair, Site
from hf_gradnas.report import say_repair
from hf_gradnas.report.card import address, make_card, report_files
from hf_gradnas.report.metadata import Origin
from hf_gradnas.report.sentences import code, fenced, in_one_line, plain, python_string
from hf_gradnas.types import Refusal

ORIGIN = Origin("user/large", {}, is_hub=True)


def test_texts_stay_what_they_are():
    assert plain("a_b-c.d e") == in_one_line(" a_b-c.d\ne") == "a_b-c.d e"
    assert plain("[a](b) `c` <d>") == "\\[a\\](b) \\`c\\` \\<d\\>"
    assert (code("a.b"), code("a`b"), code("`a``")) == ("`a.b`", "``a`b``", "``` `a`` ```")
    assert fenced("bash", "a") == "```bash\na\n```"
    assert fenced("", "````") == "`````\n````\n`````"
    for text in ('a"b', "a\\b", "a\nb", "ü\u202e", "\udcff", "\x9b"):
        assert ast.literal_eval(python_string(text)) == text


HOSTILE = "a\"b'\n```\n# c | `d` [e](f) <g> \x1b[2J \u202e"


@pytest.mark.parametrize("layout", ["stock", "per_layer"])
def test_no_name_breaks_out_of_the_card(layout):
    told = {
        "recipe": {"model": "m", "dataset": f"/data/{HOSTILE}", "text_column": HOSTILE},
        "calibration": {"dataset": f"/data/{HOSTILE}", "examples": 3, "labels": HOSTILE},
        "metrics": {"before": {HOSTILE: 1.0}, HOSTILE: {"loss": 1.0}},
        "command": shlex.join(["hf-gradnas", "prune", "--model", HOSTILE]),
    }
    plan, _, _, summary = make_case(layout=layout, **{**EVALUATED, **told})
    refused = (Refusal(HOSTILE, "neurons", "no reason"),)
    summary = replace(summary, name=in_one_line(HOSTILE), machine=HOSTILE, refusals=refused)
    loading = f"from transformers import M\nmodel = M.from_pretrained({python_string(HOSTILE)})"
    options = {"auto_class": None, "loading": loading, "pictures": False}
    (text,) = report_files(summary, plan, None, Origin(HOSTILE), **options).values()
    assert not set("\x1b\u202e") & set(text)
    card = ModelCard(text)
    assert card.data.base_model is None
    headings = [line for line in _outside_fences(card.text) if line.startswith("#")]
    assert headings[0].startswith("# a\"b' \\`\\`\\` # c | \\`d\\` \\[e\\](f) \\<g\\>")
    assert headings[1:] == [f"## {name}" for name in SECTIONS]
    blocks = _fences(card.text)
    for lines in blocks["python"]:
        (call,) = [n for n in ast.walk(ast.parse(lines)) if isinstance(n, ast.Call)]
        assert call.args[0].value == HOSTILE
    assert shlex.split(blocks["bash"][0])[-1] == visible(HOSTILE)
    assert yaml.safe_load(blocks["yaml"][0])["text_column"] == HOSTILE
    for line in _outside_fences(card.text):
        if line.startswith("|"):
            assert len(re.split(r"(?<!\\)\|", line)) in (5, 6, 7, 8)


SECTIONS = (
    "How to load it", "What was cut", "Cost before and after", "Quality", "How it was made",
    "Limits",
)  # fmt: skip


def _fences(text):
    """Blocks of code by language, as CommonMark reads them."""
    found, fence, block = {}, None, []
    for line in text.split("\n"):
        opened = re.fullmatch(r"(`{3,})(\w*)", line)
        if fence is None and opened:
            fence, language, block = opened[1], opened[2], []
        elif fence is not None and line.startswith(fence) and not line.strip("`"):
            found.setdefault(language, []).append("\n".join(block))
            fence = None
        elif fence is not None:
            block.append(line)
    assert fence is None
    return found


def _outside_fences(text):
    inside = {line for blocks in _fences(text).values() for b in blocks for line in b.split("\n")}
    return [line for line in text.split("\n") if line not in inside]


def test_a_pushed_card_of_such_a_name_names_its_repository():
    name = in_one_line(HOSTILE)
    summary = replace(make_case(**EVALUATED)[-1], name=name)
    loading = f"from transformers import M\nmodel = M.from_pretrained({python_string(name)})"
    card = str(make_card(summary, ORIGIN, auto_class=None, loading=loading))
    after = ModelCard(address(card, "user/tiny"))
    assert after.data.model_name == "tiny"
    assert "\n# tiny\n" in str(after)
    assert str(after).count('from_pretrained("user/tiny"') == 2
    assert 'a\\"b' not in str(after)


def record(*sites: Site, tensors: dict | None = None, **values: float) -> dict:
    return Repair(tensors or {}, sites, "plan", "model", examples=512, **values).record()


def test_a_repair_that_was_accepted_says_how_far_the_divergence_fell():
    sites = (Site("a", 9, 3), Site("b", 9, 3), Site("c", 9, 0, reason="nothing is left of it"))
    found = record(*sites, tensors={"a.weight": 0}, kl_before=0.29912, kl_after=0.05141)
    assert say_repair(found) == (
        "Repaired 2 of 3 layers by least squares on 512 examples, without training: the KL "
        "divergence from the original's predictions fell from 0.2991 to 0.05141 nats per label, "
        "on held-out batches."
    )


def test_one_that_was_not_says_so():
    found = record(Site("a", 9, 3), kl_before=0.1, kl_after=0.2)
    assert say_repair(found) == (
        "Not repaired: new weights by least squares on 512 examples did not lower the KL "
        "divergence from the original's predictions (0.1 before, 0.2 with new weights), so the "
        "weights are as they were."
    )
    assert "predictions, so the weights" in say_repair(record(Site("a", 9, 3)))


def test_nothing_to_repair():
    assert say_repair(record()) == "Not repaired: no layer reads what is pruned."
