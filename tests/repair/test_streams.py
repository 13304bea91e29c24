"""Where outputs of readers are seen: factors on the way are the model's own, not the batch's."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
import transformers
import zoo
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_gradnas import Plan
from hf_gradnas.masks import masked
from hf_gradnas.repair.closeness import divergences
from hf_gradnas.repair.least_squares import find_repair
from hf_gradnas.repair.readers import Reader
from hf_gradnas.repair.repairs import Repair, repaired
from hf_gradnas.repair.streams import find_readers
from hf_gradnas.types import Axis
from hf_gradnas.verification import find_structure

VOCAB, WIDTH, NEURONS = 50, 16, 24


class Config(PreTrainedConfig):
    """Of a model with factors on its residual branches."""

    model_type = "factors"

    def __init__(self, factor: str = "none", **kwargs) -> None:
        self.factor = factor
        super().__init__(**kwargs)


class Normed(nn.Linear):
    """Computes with other weights than it holds."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.norm(dim=1, keepdim=True)
        return nn.functional.linear(x, weight, self.bias)


class Ffn(nn.Module):
    """Two layers, and one that is added up."""

    def __init__(self, factor: str) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)
        self.also, self.factor = nn.Linear(WIDTH, NEURONS), factor

    def forward(self, x: Tensor) -> Tensor:
        layers = [self.up, self.also]
        if self.factor == "ordered" and x.sum() > 0:  # an order that depends on the batch
            layers.reverse()
        first, second = (layer(x) for layer in layers)
        return self.down(torch.relu(first + second))


class Block(nn.Module):
    """A residual branch times a factor."""

    def __init__(self, factor: str) -> None:
        super().__init__()
        self.ffn, self.norm, self.factor = Ffn(factor), nn.LayerNorm(WIDTH), factor
        self.gate = nn.Linear(WIDTH, 1 if factor == "switched" else WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("mix", torch.eye(9).to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.factor == "sparse":
            x = torch.stack([torch.sparse.mm(self.mix, example) for example in x])
        if self.factor == "flat":  # as a router does: one row per token
            rows = self.norm(x).flatten(0, 1)
            return x + (self.ffn(rows) * torch.sigmoid(self.gate(rows))).view_as(x)
        y = self.ffn(self.norm(x))
        if self.factor == "scaled":
            y = y * self.scale
        elif self.factor in (
            "gated",
            "switched",
        ):  # squeeze and excite: of each example, per feature or at all
            y = y * torch.sigmoid(3 * self.gate(x.mean(1, keepdim=True)))
        return x + y


class Factors(PreTrainedModel):
    """Embeddings, residual blocks, and a head."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(config.factor) for _ in range(3)])
        kind = Normed if config.factor == "normed" else nn.Linear
        self.head = kind(WIDTH, VOCAB if config.factor == "embedded" else 4)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: object) -> SequenceClassifierOutput:
        x = self.embed(input_ids)
        if self.config.factor == "embedded":  # by the weight of the head, as no name tells
            x = nn.functional.embedding(input_ids, self.head.weight)
        for block in self.blocks:
            x = block(x)
        return SequenceClassifierOutput(logits=self.head(x.mean(1)))


def build(factor: str) -> Factors:
    """A model whose blocks matter."""
    model = Factors(Config(factor)).double().eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.35 * torch.randn(parameter.shape, generator=draw))
    return model


def batches_of(size: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(0, VOCAB, (size, 9), generator=draw)} for _ in range(20)]


def half(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[tuple[Axis, ...], Plan]:
    """Its axes, and the plan that keeps the first half of each."""
    axes = find_structure(model, batch).axes
    kept = {axis.name: tuple(range(-(-axis.size // 2))) for axis in axes}
    return axes, Plan(kept, {axis.name: axis.size for axis in axes}, layout="per_layer")


def measured(
    model: PreTrainedModel, axes: tuple[Axis, ...], plan: Plan, repair: Repair, batches: list
) -> float:
    """Divergence on held-out batches of the masked model with the new weights."""

    def trial():
        return repaired(model, repair, masked(model, axes, plan.kept))

    (found,) = divergences(model, batches[4::5], [trial])
    return found


KINDS = ["none", "scaled", "gated", "switched", "sparse", "normed", "ordered", "flat", "embedded"]


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("factor", KINDS)
def test_what_is_said_of_a_repair_holds_in_the_model(factor: str, size: int) -> None:
    with zoo.float64_throughout():
        model, batches = build(factor), batches_of(size)
        axes, plan = half(model, batches[0])
        repair = find_repair(model, axes, plan, batches)
        assert repair.kl_after < 0.5 * repair.kl_before
        found = measured(model, axes, plan, repair, batches)
    assert found == pytest.approx(repair.kl_after, rel=1e-7)


def test_a_weight_that_other_code_reads_too_is_left_alone() -> None:
    with zoo.float64_throughout():
        model, batches = build("embedded"), batches_of(4)
        axes, plan = half(model, batches[0])
        repair = find_repair(model, axes, plan, batches)
        assert repair.is_accepted
        assert not any(name.startswith("head.") for name in repair.tensors)
        for block in model.blocks:  # also where it is a layer that loses inputs
            block.ffn.register_forward_pre_hook(
                lambda ffn, args: (args[0] + ffn.down.weight.sum(1),)
            )
        found = find_repair(model, axes, plan, batches)
    reasons = {site.module: site.reason for site in found.sites}
    for number in range(3):
        assert reasons[f"blocks.{number}.ffn.down"] == "its weight is read by other code too"


def test_padding_is_left_out_of_rows_of_tokens_too() -> None:
    with zoo.float64_throughout():
        model, batches = build("flat"), batches_of(4)
        mask = torch.ones_like(batches[0]["input_ids"])
        mask[1:3, 5:] = 0
        padded = [{**batch, "attention_mask": mask} for batch in batches]
        axes, plan = half(model, batches[0])
        repair = find_repair(model, axes, plan, padded)
    rows = {site.module: site.rows for site in repair.sites}
    assert [rows[f"blocks.{n}.ffn.down"] for n in range(3)] == [20 * int(mask.sum())] * 3


def test_what_a_factor_of_zero_takes_away_is_left_alone() -> None:
    with zoo.float64_throughout():
        model, batches = build("scaled"), batches_of(4)
        before = {}
        with torch.no_grad():
            for number, block in enumerate(model.blocks):
                block.scale[:4], block.scale[4] = 0, 1e-9
                before[f"blocks.{number}.ffn.down.weight"] = block.ffn.down.weight.clone()
        axes, plan = half(model, batches[0])
        repair = find_repair(model, axes, plan, batches)
        found = measured(model, axes, plan, repair, batches)
    assert found == pytest.approx(repair.kl_after, rel=1e-7)
    assert repair.kl_after < 0.5 * repair.kl_before
    for name, weight in before.items():
        assert torch.equal(repair.tensors[name][:5], weight[:5])
        assert not torch.equal(repair.tensors[name], weight)


def test_errors_are_those_of_the_stream() -> None:
    """A small factor on a branch makes the error of the stream no larger."""
    with zoo.float64_throughout():
        model, batches = build("scaled"), batches_of(4)
        with torch.no_grad():
            for block in model.blocks:
                block.scale.fill_(0.1)
        axes, plan = half(model, batches[0])
        repair = find_repair(model, axes, plan, batches)
        streams: list[Tensor] = []
        note = model.blocks[1].norm.register_forward_hook(lambda _, args, __: streams.append(*args))
        with note, torch.no_grad():
            for batch in batches[4::5]:
                model(**batch)
                with masked(model, axes, plan.kept):
                    model(**batch)
    pairs = list(zip(streams[::2], streams[1::2], strict=True))
    missing = sum(float((wanted - found).square().sum()) for wanted, found in pairs)
    energy = sum(float(wanted.square().sum()) for wanted, _ in pairs)
    (site,) = (site for site in repair.sites if site.module == "blocks.0.ffn.down")
    assert site.error_before == pytest.approx(missing / energy, rel=1e-9)


@pytest.mark.parametrize("weight", [0.0, 1e-9])
def test_a_norm_may_switch_channels_off(weight: float) -> None:
    with zoo.float64_throughout():
        model, batch = zoo.build("resnet")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.data[0] = weight
        axes, plan = half(model, batch)
        repair = find_repair(model, axes, plan, [batch] * 5)
        found = measured(model, axes, plan, repair, [batch] * 5)
    assert repair.is_accepted
    assert found == pytest.approx(repair.kl_after, rel=1e-6, abs=1e-12)


def test_a_norm_of_the_batchs_own_statistics_is_no_factor() -> None:
    with zoo.float64_throughout():
        model, batch = zoo.build("resnet")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        axes, plan = half(model, batch)
        repair = find_repair(model, axes, plan, [batch] * 5)
        found = measured(model, axes, plan, repair, [batch] * 5)
    assert repair.is_accepted
    assert found == pytest.approx(repair.kl_after, rel=1e-6, abs=1e-12)


def test_the_trace_keeps_no_activations():
    config = transformers.LlamaConfig(**{**zoo.GROUPED, "num_hidden_layers": 8})
    model = transformers.LlamaForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(3, config.vocab_size, (2, 40))}
    axes = find_structure(model, batch).axes
    kept = {axis.name: tuple(range(axis.size))[1:] for axis in axes if "mlp" in axis.name}
    made, alive = [], []

    def note(module, args, output):
        made.append(StorageWeakRef(output.untyped_storage()))
        alive.append(sum(not storage.expired() for storage in made))

    with ExitStack() as stack:
        for layer in model.model.layers:
            for module in (layer.input_layernorm, layer.post_attention_layernorm):
                stack.callback(module.register_forward_hook(note).remove)
        found = find_readers(model, axes, kept, batch, examples=2)
    readers = [reader for gate in found.gates for reader in gate.readers]
    assert sum(isinstance(reader, Reader) for reader in readers) == 8
    assert max(alive) <= 3, alive
