"""The Hub command of the README, word for word, against a Hub cache that the test fills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cli_cases
from places import ROOT
from transformers import AutoModelForMaskedLM

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
