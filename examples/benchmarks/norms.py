"""What heads cost under a norm that spans them all, against heads under none.

    python examples/benchmarks/norms.py --text shakespeare.txt

OLMo 2 norms queries and keys over all heads: where heads go, the statistics of those that stay take
the place of those of all. It and a Llama of the same sizes learn the bytes of a text; then heads
go, masked and repaired. The table gives the perplexity on held-out text as a multiple of the
unpruned model's, and the root of the mean square of what stays over that of all.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from experts import BYTES, LENGTH, batch_of, perplexities, texts_of, train
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from hf_gradnas import GradNASPruner
from hf_gradnas.types import Axis, Kind, Plan

SIZES = {
    "vocab_size": BYTES,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": LENGTH,
}
MODELS = {"olmo2": (Olmo2Config, Olmo2ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}


def perplexity(model: nn.Module, held_out: Mapping[str, Tensor]) -> float:
    """Geometric mean over the texts."""
    found = perplexities(model, held_out).values()
    return math.exp(sum(map(math.log, found)) / len(found))


def budget_of(pruner: GradNASPruner, share: float) -> dict[str, float]:
    """The parameters that are left when so large a share of those of the heads is."""
    cost = pruner.costs["params"]
    heads = sum(cost.per_unit[a.name] * a.size for a in heads_of(pruner))
    return {"params": pruner.totals["params"] - (1 - share) * heads}


def heads_of(pruner: GradNASPruner) -> list[Axis]:
    """Axes of heads."""
    return [axis for axis in pruner.structure.axes if axis.kind is Kind.HEADS]


def ratios(model: nn.Module, axes: Sequence[Axis], plan: Plan, batch: Mapping) -> Iterator[float]:
    """Root mean square of the heads that stay over that of all, per norm whose layer loses some."""
    for axis in axes:
        kept = plan.kept[axis.name]
        for tap in axis.norms if 0 < len(kept) < axis.size else ():
            given: list[Tensor] = []
            hook = model.get_submodule(tap.module).register_forward_hook(
                lambda module, args, output, given=given: given.append(args[0])
            )
            with hook, torch.no_grad():
                model(**batch)
            x = given[0]  # (batch, length, heads · width)
            rows = [row for unit in kept for row in tap.rows([unit])]
            yield float((x[..., rows].square().mean(-1) / x.square().mean(-1)).sqrt().mean())


def main() -> None:
    """Train, prune and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kept", type=float, nargs="+", default=[0.75, 0.5])
    args = parser.parse_args()
    texts = texts_of(args.text)
    learned = [front for front, _ in texts.values()]
    held_out = {name: end for name, (_, end) in texts.items()}
    table = Table("model", "seed", "perplexity", "heads kept", "masked", "repaired", "rms of kept")
    for seed in args.seeds:
        for name, (config, cls) in MODELS.items():
            torch.manual_seed(seed)
            model = cls(config(**SIZES))
            train(model, learned, seed=seed, steps=args.steps)
            whole = perplexity(model, held_out)
            generator = torch.Generator().manual_seed(seed + 1)
            batches = [batch_of(learned, 8, generator) for _ in range(16)]
            pruner = GradNASPruner(model, rules={"*:neurons": None}, layout="per_layer")
            pruner.score(batches)
            for share in args.kept:
                plan = pruner.plan(budget_of(pruner, share))
                found = []
                for repair in (None, pruner.repair(plan, batches)):
                    with pruner.masked(plan, repair):
                        found.append(f"{perplexity(model, held_out) / whole:.3f}")
                changes = [*ratios(model, heads_of(pruner), plan, batches[0])]
                rms = f"{min(changes):.2f} to {max(changes):.2f}" if changes else "-"
                table.add_row(name, str(seed), f"{whole:.2f}", f"{share:.0%}", *found, rms)
    Console().print(table)


if __name__ == "__main__":
    main()
