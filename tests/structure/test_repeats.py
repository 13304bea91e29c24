"""Equal layers are passed over, and what is found is the same as if all had run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_gradnas.structure import discovery
from hf_gradnas.structure.discovery import Discovery, discover
from hf_gradnas.structure.repeats import Repeat, equal_layers
from hf_gradnas.types import Slice

DEEP = {
    "bert": {"num_hidden_layers": 5},
    "llama": {"num_hidden_layers": 5},
    "gemma2": {"num_hidden_layers": 6},
    "t5": {"num_layers": 5, "num_decoder_layers": 5},
    "whisper": {"encoder_layers": 4, "decoder_layers": 5},
    "mixtral": {"num_hidden_layers": 4},
    "dots1": {"num_hidden_layers": 4},
}


def _as_data(found: Discovery) -> dict[str, Any]:
    places = [
        (place.scope, place.tied, [asdict(axis) for v in place.template.versions for axis in v])
        for place in found.places
    ]
    names = [id(place.template) for place in found.places]
    return {
        "places": places,
        "templates": [names.index(name) for name in names],
        "channels": [asdict(axis) for axis in found.channels],
        "refusals": [*found.refusals, *found.channel_refusals],
        "reasons": list(found.reasons.items()),
    }


def _of_all(model: nn.Module, inputs: dict[str, Any], patch: pytest.MonkeyPatch) -> Discovery:
    """What is found when every layer runs."""
    with patch.context() as inside:
        inside.setattr(discovery, "equal_layers", lambda model: [])
        return discover(model, (), inputs)


def _calls(layers: nn.ModuleList, run: Callable[[], Any]) -> list[int]:
    """How often something inside of each layer runs."""
    counts = [0] * len(layers)

    def count(place: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[place] += 1

        return hook

    hooks = [
        next(layer.children()).register_forward_hook(count(n)) for n, layer in enumerate(layers)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize("family", list(DEEP))
def test_what_is_found_is_the_same_as_if_all_layers_had_run(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = zoo.build(family, **DEEP[family])
    assert equal_layers(model)
    assert _as_data(discover(model, (), inputs)) == _as_data(_of_all(model, inputs, monkeypatch))


def test_only_the_first_two_of_equal_layers_run() -> None:
    model, inputs = zoo.build("llama", num_hidden_layers=5)
    counts = _calls(model.model.layers, lambda: discover(model, (), inputs))
    assert counts == [1, 1, 0, 0, 0]


def test_layers_that_alternate_run_twice_each() -> None:
    model, inputs = zoo.build("gemma2", num_hidden_layers=7)
    counts = _calls(model.model.layers, lambda: discover(model, (), inputs))
    assert counts == [1, 1, 1, 1, 0, 0, 0]


def test_a_layer_with_other_attributes_runs() -> None:
    model, inputs = zoo.build("llama", num_hidden_layers=5)
    model.model.layers[3].self_attn.scaling = 0.5
    counts = _calls(model.model.layers, lambda: discover(model, (), inputs))
    assert counts == [1, 1, 0, 1, 0]


def test_layers_that_share_a_parameter_run() -> None:
    model, _ = zoo.build("bert", num_hidden_layers=4)
    layers = model.bert.encoder.layer
    layers[3].intermediate.dense.weight = layers[2].intermediate.dense.weight
    assert equal_layers(model) == []


def test_the_classes_of_layers_are_put_back() -> None:
    model, inputs = zoo.build("llama", num_hidden_layers=5)
    kinds = {path: type(module) for path, module in model.named_modules()}
    discover(model, (), inputs)
    assert {path: type(module) for path, module in model.named_modules()} == kinds
    with pytest.raises(Exception, match="cannot run a batch"):
        discover(model, (), {"input_ids": torch.full((2, 4), zoo.VOCAB)})
    assert {path: type(module) for path, module in model.named_modules()} == kinds


class _Layer(nn.Module):
    def __init__(self, number: int, *, adds: bool) -> None:
        super().__init__()
        self.number, self.adds = number, adds
        self.up, self.down = nn.Linear(8, 12).double(), nn.Linear(12, 8).double()

    def forward(self, x: Tensor, more: Tensor | None = None, seen: list | None = None) -> Tensor:
        if seen is not None:
            seen.append(x)
        y = self.down(torch.relu(self.up(x if more is None else x + more)))
        return x + y if self.adds else y


class _Stack(PreTrainedModel):
    """Five layers, run in the way that a subclass says."""

    config_class = PreTrainedConfig
    adds = True

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8).double()
        self.layers = nn.ModuleList(_Layer(n, adds=self.adds) for n in range(5))

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.first(x))


class _WithoutStream(_Stack):
    adds = False


class _ReadAtTheEnd(_Stack):
    """The stream is read, and no output: it is an axis of channels through all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3).double()

    def run(self, x: Tensor) -> Tensor:
        return self.last(super().run(x))


class _Twice(_Stack):
    def run(self, x: Tensor) -> Tensor:
        return super().run(super().run(x))


class _OtherArguments(_Stack):
    def run(self, x: Tensor) -> Tensor:
        for layer, part in zip(self.layers, x.new_ones(5, 8), strict=True):
            x = layer(x, part)
        return x


class _Leaving(_Stack):
    def run(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, seen=seen)
        return x + seen[3]


@pytest.mark.parametrize(
    "kind", [_Stack, _WithoutStream, _ReadAtTheEnd, _Twice, _OtherArguments, _Leaving]
)
def test_where_layers_are_no_repeats_all_run(
    kind: type[_Stack], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = kind().eval(), {"x": torch.randn(2, 4, dtype=torch.float64)}
    found: list[Discovery] = []
    counts = _calls(model.layers, lambda: found.append(discover(model, (), inputs)))
    assert (0 in counts) == (kind is _Stack)
    assert _as_data(found[0]) == _as_data(_of_all(model, inputs, monkeypatch))


def test_names_move_with_their_layer() -> None:
    repeat = Repeat("layers.10", "layers.1", 0, 0)
    assert repeat.moved("layers.1.up.weight") == "layers.10.up.weight"
    assert repeat.moved("layers.11.up and layers.1 and x.layers.1") == (
        "layers.11.up and layers.10 and x.layers.1"
    )
    assert repeat.moved((Slice("layers.1.up.weight", 0),)) == (Slice("layers.10.up.weight", 0),)
