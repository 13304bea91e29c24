"""Which experts of a mixture can go: scores against published rules, on a model trained here.

    python examples/benchmarks/experts.py --seeds 0 1
    python examples/benchmarks/experts.py --text shakespeare.txt --text wiki.txt

A mixture (4 layers, 16 experts of which 2 run for a token) learns to predict the bytes of texts,
those of Python's own standard library by default. Then a share of its experts goes, without any
training: as many in every layer (``uniform``), or wherever the least is lost (``free``). The table
gives the perplexity on held-out text, as a multiple of the unpruned model's: the geometric mean
over the texts, and the worst of them.

Rules of others, per layer: ``frequency``, tokens per expert; ``reap``, the mean over an expert's
tokens of its weight times the norm of its output (Lasby et al. 2025, arXiv 2510.13999, equation 9);
``man``, the mean norm alone (arXiv 2606.15716). They say nothing of how layers compare.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from hf_gradnas import GradNASPruner
from hf_gradnas.routing import Routed, reading_neurons
from hf_gradnas.types import Axis, Kind, Plan

LENGTH = 128
BYTES = 256
RATIOS = (0.75, 0.5, 0.375)
OURS = ("tempered", "balanced", "fisher", "taylor")
Batch = dict[str, Tensor]
Values = Mapping[str, np.ndarray]


def texts_of(paths: Sequence[Path]) -> dict[str, tuple[Tensor, Tensor]]:
    """Bytes to learn from, and held-out bytes (the last tenth), by name of the text."""
    if not paths:
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        files = sorted(stdlib.glob("*.py"))
        joined = b"\n".join(file.read_bytes() for file in files)[:4_000_000]
        found = {"python": joined}
    else:
        found = {path.stem: path.read_bytes() for path in paths}
    tensors = {name: torch.tensor(list(data)) for name, data in found.items()}
    return {name: (x[: len(x) * 9 // 10], x[len(x) * 9 // 10 :]) for name, x in tensors.items()}


def batch_of(texts: Sequence[Tensor], count: int, generator: torch.Generator) -> Batch:
    """Random windows of the texts in turn, ``(count, LENGTH)``."""
    rows = []
    for number in range(count):
        text = texts[number % len(texts)]
        start = int(torch.randint(len(text) - LENGTH, (1,), generator=generator))
        rows.append(text[start : start + LENGTH])
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def mixture(seed: int) -> MixtralForCausalLM:
    """A mixture with random weights."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=BYTES,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=LENGTH,
        sliding_window=None,
        output_router_logits=True,  # with the loss that balances experts
        router_aux_loss_coef=0.01,
    )
    return MixtralForCausalLM(config)


def train(model: nn.Module, texts: Sequence[Tensor], *, seed: int, steps: int) -> None:
    """Let a model learn for so many steps of 16 windows."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        model(**batch_of(texts, 16, generator)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def perplexities(model: nn.Module, held_out: Mapping[str, Tensor]) -> dict[str, float]:
    """Perplexity per byte of each held-out text, on its first 32 windows of every tenth."""
    found = {}
    for name, text in held_out.items():
        rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)[:: max(len(text) // 32768, 1)]
        ids = rows[:48]
        found[name] = math.exp(float(model(input_ids=ids, labels=ids).loss))
    return found


@torch.no_grad()
def published(pruner: GradNASPruner, batches: Sequence[Batch]) -> dict[str, Values]:
    """Scores of the rules of others, per axis of experts."""
    model, axes = pruner.model, experts_of(pruner)
    modules = {model.get_submodule(axis.taps[0].module): axis for axis in axes}
    counts, norms, weighted = (
        {axis.name: torch.zeros(axis.size, dtype=torch.float64) for axis in axes} for _ in range(3)
    )
    choices: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        choices[module] = args[1], args[2].double()  # (tokens, chosen) each

    def read(module: nn.Module, x: Tensor, routed: Routed) -> Tensor:
        name, down = modules[module].name, module.get_parameter("down_proj")
        out = torch.stack([row @ down[e].T for row, e in zip(x, routed.experts, strict=True)])
        norm = out.norm(dim=1).double()  # (rows,)
        indices, weights = choices[module]
        gates = torch.zeros(routed.count, len(counts[name]), dtype=torch.float64)
        gate = gates.scatter_(1, indices, weights)[routed.tokens, routed.experts]
        counts[name].index_add_(0, routed.experts, torch.ones_like(norm))
        norms[name].index_add_(0, routed.experts, norm)
        weighted[name].index_add_(0, routed.experts, gate * norm)
        return x

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    reads = {m: (lambda x, routed, m=m: read(m, x, routed)) for m in modules}
    try:
        with reading_neurons(model, reads):
            for batch in batches:
                model(input_ids=batch["input_ids"])
    finally:
        for hook in hooks:
            hook.remove()
    tokens = {name: count.clamp(min=1) for name, count in counts.items()}
    return {
        "frequency": {name: count.numpy() for name, count in counts.items()},
        "man": {name: (norms[name] / tokens[name]).numpy() for name in norms},
        "reap": {name: (weighted[name] / tokens[name]).numpy() for name in weighted},
        "weighted norm": {name: weighted[name].numpy() for name in weighted},
    }


def experts_of(pruner: GradNASPruner) -> list[Axis]:
    """The axes of experts."""
    return [axis for axis in pruner.structure.axes if axis.kind is Kind.EXPERTS]


def plan_of(pruner: GradNASPruner, values: Values, ratio: float, *, free: bool) -> Plan:
    """The plan that keeps a share of the experts, those with the largest values."""
    axes = experts_of(pruner)
    kept = {axis.name: tuple(range(axis.size)) for axis in pruner.structure.axes}
    total = round(ratio * sum(axis.size for axis in axes))
    if free:
        order = {a.name: np.argsort(-values[a.name], kind="stable") for a in axes}
        stay = {a.name: list(order[a.name][: a.minimum]) for a in axes}
        rest = sorted(
            ((values[a.name][u], a.name, u) for a in axes for u in order[a.name][a.minimum :]),
            reverse=True,
        )
        for _, name, unit in rest[: total - sum(map(len, stay.values()))]:
            stay[name].append(unit)
    else:
        each = total // len(axes)
        stay = {a.name: list(np.argsort(-values[a.name], kind="stable")[:each]) for a in axes}
    for axis in axes:
        kept[axis.name] = tuple(sorted(int(unit) for unit in stay[axis.name]))
        inside = next(a for a in pruner.structure.axes if a.parent == axis.name)
        each = inside.size // axis.size
        kept[inside.name] = tuple(e * each + n for e in kept[axis.name] for n in range(each))
    return Plan(kept, {a.name: a.size for a in pruner.structure.axes}, "per_layer")


def main() -> None:
    """Train, score, prune, measure, and print a table for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, action="append", default=[], help="a text to learn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--draws", type=int, default=3, help="random choices of experts")
    args = parser.parse_args()
    console = Console(width=120)
    texts = texts_of(args.text)
    learned = [learn for learn, _ in texts.values()]
    held_out = {name: held for name, (_, held) in texts.items()}
    for seed in args.seeds:
        start = time.perf_counter()
        model = mixture(seed)
        train(model, learned, seed=seed, steps=args.steps)
        model.config.output_router_logits = False
        whole = perplexities(model, held_out)
        took = time.perf_counter() - start
        console.print(f"seed {seed}: trained in {took:.0f} s, perplexity {whole}")
        generator = torch.Generator().manual_seed(1000 + seed)
        batches = [batch_of(learned, 8, generator) for _ in range(args.examples // 8)]
        rules: dict[str, Values] = {}
        for method in OURS:
            pruner = GradNASPruner(model, layout="per_layer", score=method)
            pruner.discover(batches[0])
            rules[method] = pruner.score(batches).values
        rules |= published(pruner, batches)
        for draw in range(args.draws):
            drawn = np.random.default_rng(draw)
            rules[f"random {draw}"] = {a.name: drawn.random(a.size) for a in experts_of(pruner)}
        table = Table(title=f"seed {seed}: perplexity, multiples of the unpruned")
        for title in ("rule", *(f"{w} {r:.1%}" for w in ("uniform", "free") for r in RATIOS)):
            table.add_column(title)
        for name, values in rules.items():
            cells = []
            for free in (False, True):
                for ratio in RATIOS:
                    plan = plan_of(pruner, values, ratio, free=free)
                    with pruner.masked(plan):
                        found = perplexities(model, held_out)
                    ratios = [found[text] / whole[text] for text in found]
                    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                    cells.append(f"{mean:.3f} ({max(ratios):.2f})")
            table.add_row(name, *cells)
        console.print(table)


if __name__ == "__main__":
    main()
