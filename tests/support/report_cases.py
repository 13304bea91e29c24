"""A small plan with scores, as data, for the tests of the report."""

import numpy as np

from hf_gradnas.report import summarise
from hf_gradnas.types import (
    Axis,
    Budget,
    CostModel,
    Kind,
    Plan,
    Prunable,
    Refusal,
    Scores,
    Structure,
    Tap,
)

LOADING = """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("small")"""


def axis(module: str, kind: str, size: int) -> Axis:
    return Axis(f"{module}:{kind}", module, Kind(kind), size, (), (Tap(module, "input", -1),))


def make_case(layers: int = 3, layout: str = "per_layer", **document):
    """Plan, structure and scores of a decoder, and their summary."""
    draw = np.random.default_rng(0)
    axes = []
    for layer in range(layers):
        axes.append(axis(f"model.layers.{layer}.self_attn", "kv_groups", 4))
        axes.append(axis(f"model.layers.{layer}.mlp", "neurons", 1000))
    values = {a.name: draw.lognormal(size=a.size) for a in axes}
    kept = {
        a.name: tuple(sorted(np.argsort(-values[a.name])[: a.size // (i + 2)].tolist()))
        for i, a in enumerate(axes)
    }
    plan = Plan(
        kept,
        {a.name: a.size for a in axes},
        layout,
        budgets=(Budget("flops", 50.0, 100.0),),
        costs={"flops": 48.0},
        loss_increase=0.25,
        search="lagrangian",
        score="fisher",
    )
    costs = {"params": CostModel("params", 10.0, dict.fromkeys(kept, 2.0))}
    full = costs["params"].of(plan.sizes)
    structure = Structure(tuple(axes), (Refusal("lm_head", "neurons", "no reason"),))
    summary = summarise(
        plan,
        Prunable(structure, costs, {}),
        document={"totals": {"flops": 100.0, "params": full}, **document},
        name="small",
        model="LlamaForCausalLM",
        base_model="user/large",
        versions={"torch": "2"},
    )
    return plan, structure, Scores(values), summary


EVALUATED = {
    "metrics": {
        "before": {"examples": 10, "loss": 1.0, "perplexity": 2.7},
        "after": {"examples": 10, "loss": 2.0, "perplexity": 7.4},
    },
    "latency": {
        "machine": "cpu, 1 thread",
        "in_turn": True,
        "batches": [
            {"batch_size": 1, "before_ms": 4.0, "after_ms": 2.0},
            {"batch_size": 8, "before_ms": 30.0, "after_ms": 10.0},
        ],
    },
    "calibration": {"dataset": "owner/words:en", "examples": 64, "labels": "data"},
    "recipe": {
        "model": "user/large",
        "task": "text-generation",
        "dataset": "owner/words:en",
        "eval_dataset": "owner/tests:fr",
        "eval_split": "test",
        "flops_length": 16,
    },
    "command": "hf-gradnas prune --model user/large",
}
