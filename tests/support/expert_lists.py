"""Mixtures whose experts are modules of a list, as classes of remote code write them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
import zoo
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

WIDTH, NEURONS, EXPERTS, CHOSEN, VOCAB = 32, 24, 6, 2, 50
STYLES = ("loop", "sorted", "repeated")


class ListConfig(transformers.PreTrainedConfig):
    model_type = "list_mixture"


class Expert(nn.Module):
    def __init__(self, neurons: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, neurons, bias=False)
        self.w2 = nn.Linear(neurons, WIDTH)
        self.w3 = nn.Linear(WIDTH, neurons)
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x)) * self.scale


class Block(nn.Module):
    """A softmax over the chosen, and a loop over experts; each takes rows and adds to them."""

    def __init__(self, config: ListConfig) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.gate = nn.Linear(WIDTH, self.num_experts, bias=False)
        self.experts = nn.ModuleList(
            Expert(config.intermediate_size) for _ in range(self.num_experts)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, WIDTH)
        weights = self.gate(x).softmax(-1)
        weights, chosen = torch.topk(weights, CHOSEN, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return self.summed(x, weights, chosen).view(hidden.shape)

    def summed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        mask = nn.functional.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        for number in range(self.num_experts):
            place, rows = torch.where(mask[number])
            if rows.numel():
                state = x[None, rows].reshape(-1, WIDTH)
                out = self.experts[number](x=state) * weights[rows, place, None]
                total.index_add_(0, rows, out)
        return total


class SortedBlock(Block):
    """Sigmoids with a correction of the choice; rows are sorted by expert, and split."""

    def __init__(self, config: ListConfig) -> None:
        super().__init__(config)
        self.e_score_correction_bias = nn.Parameter(torch.zeros(self.num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, WIDTH)
        scores = self.gate(x).sigmoid()
        chosen = torch.topk(scores + self.e_score_correction_bias, CHOSEN, dim=-1).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return self.summed(x, weights, chosen).view(hidden.shape)

    def summed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        counts = chosen.new_zeros(len(chosen), len(self.experts)).scatter_(1, chosen, 1).sum(0)
        order = chosen.view(-1).argsort()
        ordered, found, start = x[order // chosen.shape[1]], [], 0
        for expert, count in zip(self.experts, counts.tolist(), strict=True):
            if count:
                found.append(expert(ordered[start : start + count]))
            start += count
        together = torch.cat(found)
        outputs = torch.empty_like(together).index_copy(0, order, together)
        return (outputs.view(*chosen.shape, -1) * weights[..., None]).sum(1)


class RepeatedBlock(Block):
    """Every token is there once for each expert that it chooses."""

    def summed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        x, flat = x.repeat_interleave(CHOSEN, dim=0), chosen.view(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = torch.where(flat == number)[0]
            if rows.numel():
                out = out.index_copy(0, rows, expert(x[rows]))
        return (out.view(*chosen.shape, -1) * weights[..., None]).sum(1)


class TupleExpert(Expert):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class TupleBlock(Block):
    """Experts put out more than a tensor."""

    def __init__(self, config: ListConfig) -> None:
        super().__init__(config)
        self.experts = nn.ModuleList(TupleExpert(config.intermediate_size) for _ in self.experts)

    def summed(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            if rows.numel():
                total = total.index_add(0, rows, expert(x[rows])[0] * weights[rows, place, None])
        return total


class Gate(nn.Module):
    """A router with a weight of its own, that chooses two of three groups first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.n_routed_experts, self.n_group, self.topk_group = size, 3, 2
        self.weight = nn.Parameter(torch.empty(size, WIDTH))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = nn.functional.linear(x.float(), self.weight.float()).sigmoid()
        tried = scores + self.e_score_correction_bias
        grouped = tried.view(len(x), self.n_group, -1)
        best = grouped.topk(2, dim=-1)[0].sum(-1).topk(self.topk_group, dim=-1, sorted=False)[1]
        mask = torch.zeros(len(x), self.n_group).to(tried).scatter_(1, best, 1)
        tried = grouped.masked_fill(mask[..., None] == 0, float("-inf")).flatten(1)
        chosen = tried.topk(CHOSEN, dim=-1, sorted=False)[1]
        weights = scores.gather(1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), chosen


class GroupedBlock(Block):
    def __init__(self, config: ListConfig) -> None:
        super().__init__(config)
        self.gate = Gate(self.num_experts)

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.view(-1, WIDTH)
        return SortedBlock.summed(self, x, *self.gate(x)).view(hidden.shape)


BLOCKS = {
    "loop": Block,
    "sorted": SortedBlock,
    "repeated": RepeatedBlock,
    "grouped": GroupedBlock,
    "tuples": TupleBlock,
}


class ListMixture(transformers.PreTrainedModel):
    config_class = ListConfig

    def __init__(self, config: ListConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(
            BLOCKS[config.style](config) for _ in range(config.num_hidden_layers)
        )
        self.head = nn.Linear(WIDTH, VOCAB)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(nn.functional.layer_norm(x, (WIDTH,)))
        logits = self.head(x)
        loss = (
            None
            if labels is None
            else nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )
        return CausalLMOutput(loss=loss, logits=logits)


def build(
    style: str, *, dtype: torch.dtype = torch.float64, **config: Any
) -> tuple[transformers.PreTrainedModel, dict[str, Tensor]]:
    """A model of one style, or Switch Transformers (``"switch"``), and a batch."""
    if style == "switch":
        model, inputs = zoo.build("switch", dtype=dtype, **config)
        for module in model.modules():
            if vars(module).get("dtype") is torch.float32:  # a router computes in this one
                module.dtype = dtype  # type: ignore[assignment]
        return model, inputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"num_local_experts": EXPERTS, "intermediate_size": NEURONS, "num_hidden_layers": 2}
        model = ListMixture(ListConfig(style=style, **{**sizes, **config}))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = (0.3 * noise + (parameter.ndim == 1)).to(dtype)
    ids = torch.arange(12 * zoo.BATCH).view(zoo.BATCH, 12) * 7 % VOCAB
    return model.to(dtype).eval(), {"input_ids": ids, "labels": ids}
