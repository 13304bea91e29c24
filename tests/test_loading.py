"""Every family, both layouts, every way of loading, in fresh processes: the same logits."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from families import CORE, spread
from places import SUPPORT
from safetensors.torch import save_file
from transformers import AutoModel, RfDetrDinov2Backbone, RfDetrDinov2Config

from hf_gradnas import GradNASPruner, Plan
from hf_gradnas.checkpoint.save import loading_snippet
from hf_gradnas.costs.flops import count_flops
from hf_gradnas.types import Kind

SCRIPT = SUPPORT / "family_process.py"
FORKED = SUPPORT / "forked.py"


LAYOUTS = {"stock": "88%", "per_layer": "60%"}
MORE = [(f, "per_layer") for f in zoo.CONV_FAMILIES] + [("resnet", "stock"), ("wav2vec2", "stock")]
MORE += [("switch", "per_layer"), ("switch", "stock")]
"""Saved beside those that the first test makes: families of convolutions, experts in lists."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pruned checkpoints are, one per family and layout; the first test writes most."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.leaves_state
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", spread(sorted(zoo.FAMILIES)))
def test_every_family_prunes_to_its_budget_and_loads_again(
    family: str, layout: str, checkpoints: Path
) -> None:
    model, inputs = zoo.build(family, dtype=torch.float32)
    whole = model.num_parameters()
    pruner = GradNASPruner(model, layout=layout)
    pruner.discover(inputs)
    attentions = {a.name for a in pruner.structure.axes if a.kind is Kind.HEADS}
    plan = save(checkpoints / f"{family}-{layout}", pruner, inputs, LAYOUTS[layout])
    assert plan.layout == layout
    assert model.num_parameters() == plan.costs["params"] <= plan.budgets[0].limit < whole
    flops = count_flops(model, pruner.prunable.sample)[0]
    assert abs(flops - plan.costs["flops"]) <= 1e-3 * flops
    if layout == "per_layer":
        assert any(len(plan.kept[name]) < plan.sizes[name] for name in attentions)
    folder = checkpoints / f"{family}-{layout}"
    again = type(model).from_pretrained(folder, attn_implementation="eager").eval()
    expected, found = logits_of(model, inputs), logits_of(again, inputs)
    assert (expected - found).abs().max() <= 1e-5
    assert type(again).__name__ == zoo.FAMILIES[family].model
    assert (vars(again.config).get("gradnas") is None) == (layout == "stock")


def logits_of(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def save(folder: Path, pruner: GradNASPruner, inputs: dict[str, Any], budget: str) -> Plan:
    """Prune a model, and save it beside a batch and what it puts out."""
    plan = pruner.prune([inputs], {"params": budget})
    pruner.save_pretrained(folder, report=False)
    tensors = {**inputs, "logits": logits_of(pruner.model, inputs)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "expected.safetensors")
    return plan


def save_the_rest(root: Path, families: Collection[str]) -> None:
    """Checkpoints that are not there yet, and some that lost whole layers."""
    cases = [*((f, layout) for f in zoo.FAMILIES for layout in LAYOUTS), *MORE]
    cases = [(family, layout) for family, layout in cases if family in families]
    for family, layout in cases:
        if not (root / f"{family}-{layout}").exists():
            model, inputs = zoo.build(family, dtype=torch.float32)
            pruner = GradNASPruner(model, layout=layout, score="random")
            save(root / f"{family}-{layout}", pruner, inputs, LAYOUTS[layout])
    inner = {f"*:{kind}": None for kind in ("heads", "kv_groups", "neurons")}
    for family in ("bert", "llama", "bart", "t5"):
        for layout in LAYOUTS:
            model, inputs = zoo.build(family, dtype=torch.float32)
            pruner = GradNASPruner(model, layout=layout, score="random", layers=True, rules=inner)
            save(root / f"{family}-layers-{layout}", pruner, inputs, "85%")
    zoo.BUILT.clear()


@pytest.mark.parametrize(
    "families",
    [
        pytest.param(CORE, id="core"),
        pytest.param([*zoo.FAMILIES, *zoo.CONV_FAMILIES], id="all", marks=pytest.mark.long),
    ],
)
def test_every_family_loads_in_fresh_processes(
    families: Collection[str], checkpoints: Path, tmp_path: Path
) -> None:
    save_the_rest(checkpoints, families)
    first, second = ([SCRIPT, route, checkpoints] for route in ("shim", "import"))
    done = subprocess.run(
        [sys.executable, "-I", FORKED, *first, "--", *second],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_backbone_loads_from_a_folder(tmp_path: Path) -> None:
    """`AutoBackbone` takes ids of the Hub only: `AutoModel` builds what no other class builds."""
    config = RfDetrDinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    model = RfDetrDinov2Backbone(config).eval()
    pruner = GradNASPruner(model, layout="per_layer", score="random")
    pruner.prune([batch], {"params": "80%"}, repair="none")
    pruner.save_pretrained(tmp_path / "pruned", report=False)
    assert model.config.auto_map["AutoModel"].endswith(".RfDetrDinov2Backbone")
    said = loading_snippet(model, "per_layer", "pruned").splitlines()
    assert said[0].endswith('# or AutoModel.from_pretrained("pruned", trust_remote_code=True)')
    assert said[2] == 'model = RfDetrDinov2Backbone.from_pretrained("pruned")'
    loaded = AutoModel.from_pretrained(tmp_path / "pruned", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**batch).feature_maps, model(**batch).feature_maps, rtol=0, atol=1e-6
        )
