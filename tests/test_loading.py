"""Every family, both layouts, every way of loading, in fresh processes: the same logits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from places import SUPPORT
from safetensors.torch import save_file

from hf_gradnas import GradNASPruner

SCRIPT = SUPPORT / "family_process.py"
FORKED = SUPPORT / "forked.py"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One pruned checkpoint per family and layout, and some that lost whole layers."""
    root = tmp_path_factory.mktemp("checkpoints")
    stock = [*zoo.FAMILIES, "resnet", "wav2vec2"]
    for family in [*zoo.FAMILIES, *zoo.CONV_FAMILIES]:
        for layout, budget in (("stock", "85%"), ("per_layer", "60%")):
            if layout == "stock" and family not in stock:
                continue
            save(root / f"{family}-{layout}", family, layout, budget)
    for family in ("bert", "llama", "bart", "t5"):
        for layout in ("stock", "per_layer"):
            inner = {f"*:{kind}": None for kind in ("heads", "kv_groups", "neurons")}
            options = {"layers": True, "rules": inner}
            save(root / f"{family}-layers-{layout}", family, layout, "85%", **options)
    zoo.BUILT.clear()
    return root


def save(folder: Path, family: str, layout: str, budget: str, **options: Any) -> None:
    """Prune a family, and save it beside a batch and what it puts out."""
    model, inputs = zoo.build(family, dtype=torch.float32)
    pruner = GradNASPruner(model, layout=layout, score="random", **options)
    pruner.prune([inputs], {"params": budget}, repair="none")
    pruner.save_pretrained(folder, report=False)
    with torch.no_grad():
        logits = model(**inputs).logits
    save_file(
        {k: v.contiguous() for k, v in {**inputs, "logits": logits}.items()},
        folder / "expected.safetensors",
    )


def test_every_family_loads_in_fresh_processes(checkpoints: Path, tmp_path: Path) -> None:
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
