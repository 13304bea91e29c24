"""Pruned checkpoints in the tools that people use them with: the real ones, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from cli_cases import save_bert, save_llama
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from hf_gradnas import GradNASPruner

CLASSES = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}
SAVERS = {"bert": save_bert, "llama": save_llama}
CASES = [("bert", "per_layer"), ("llama", "per_layer"), ("llama", "stock")]
# Of the tools, not of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.leaves_state,
]


def batch_of(family: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(7, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Folders of pruned checkpoints with their tokenizers, by family and layout."""
    found = {}
    for family, layout in CASES:
        torch.manual_seed(0)
        folder = SAVERS[family](tmp_path_factory.mktemp("whole") / family)
        model = CLASSES[family].from_pretrained(folder)
        batch = batch_of(family)
        labels = torch.tensor([0, 1, 0, 1]) if family == "bert" else batch["input_ids"]
        pruner = GradNASPruner(model, layout=layout)
        pruner.prune([{**batch, "labels": labels}], {"flops": "70%"})
        target = tmp_path_factory.mktemp("pruned") / f"{family}-{layout}"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found[family, layout] = pruner.save_pretrained(target, tokenizer, report=False)
    return found


@pytest.fixture(params=CASES, ids=["-".join(case) for case in CASES])
def case(request: pytest.FixtureRequest, pruned: dict[tuple[str, str], Path]) -> tuple[str, Path]:
    """Family and folder of a pruned checkpoint."""
    return request.param[0], pruned[request.param]


def loaded(family: str, folder: Path) -> Any:
    return CLASSES[family].from_pretrained(folder).eval()


class Logits(nn.Module):
    """A model with plain arguments and one plain output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, return_dict=True
        ).logits


def test_pipeline(case: tuple[str, Path]) -> None:
    family, folder = case
    task = {"bert": "text-classification", "llama": "text-generation"}[family]
    run = pipeline(task, model=str(folder), device="cpu")
    found = run("the film was", **({} if family == "bert" else {"max_new_tokens": 3}))[0]
    if family == "bert":
        batch = AutoTokenizer.from_pretrained(folder)("the film was", return_tensors="pt")
        expected = loaded(family, folder)(**batch).logits.softmax(-1).max()
        assert found["score"] == pytest.approx(expected.item(), abs=1e-6)
    else:
        assert found["generated_text"].startswith("the film was")


@pytest.mark.long
def test_onnx_runtime_gives_the_same_outputs(case: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = case
    model, batch = loaded(family, folder), batch_of(family)
    if family == "llama":
        model.config.use_cache = False
    program = torch.onnx.export(
        Logits(model).eval(),
        tuple(batch.values()),
        input_names=list(batch),
        output_names=["logits"],
        dynamo=True,
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {name: column.numpy() for name, column in batch.items()})[0]
    expected = model(**batch).logits.detach().numpy()
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="it cannot compile this BERT")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_torch_compile(backend: str, pruned: dict[tuple[str, str], Path]) -> None:
    model, batch = loaded("bert", pruned["bert", "per_layer"]), batch_of("bert")
    expected = model(**batch).logits
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend=backend)(**batch).logits
    assert (found - expected).abs().max() < 1e-5


def test_peft_adapters_are_trained_saved_and_merged(case: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = case
    batch = batch_of(family)
    targets = {"bert": ["query", "value", "intermediate.dense"], "llama": ["q_proj", "down_proj"]}
    model = get_peft_model(loaded(family, folder), LoraConfig(r=2, target_modules=targets[family]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    labels = torch.tensor([0, 1, 0, 1]) if family == "bert" else batch["input_ids"]
    for _ in range(2):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = model.eval()(**batch).logits
    assert (expected - loaded(family, folder)(**batch).logits).abs().max() > 1e-6
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded(family, folder), tmp_path / "adapter").eval()
    assert (again(**batch).logits - expected).abs().max() < 1e-6
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert (loaded(family, tmp_path / "merged")(**batch).logits - expected).abs().max() < 1e-5


def test_lm_eval_on_a_local_task(pruned: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    rows = [{"text": "the film was", "choices": ["good", "bad"], "label": n % 2} for n in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {
        "task": "films",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "label",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    folder = pruned["llama", "stock"]
    model = HFLM(
        pretrained=loaded("llama", folder), tokenizer=AutoTokenizer.from_pretrained(folder)
    )
    tasks = TaskManager(include_defaults=False)  # its own are thousands of files
    found = simple_evaluate(model, tasks=[task], task_manager=tasks, bootstrap_iters=0)
    assert found["results"]["films"]["acc,none"] == 0.5  # one answer for six equal questions
