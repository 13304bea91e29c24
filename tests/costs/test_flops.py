"""FLOPs that are counted by shapes alone are those of a real forward."""

from collections import Counter
from types import MethodType

import pytest
import torch
import transformers
import zoo
from torch import nn

from hf_gradnas.batches.longest import flops_inputs
from hf_gradnas.costs import flops
from hf_gradnas.costs.flops import _count_as_it_is, count_flops, head_dim, heads_of
from hf_gradnas.running.unloaded import unloaded
from hf_gradnas.structure.trace import trace_forward


def inputs_of(model, batch, length=None):
    return flops_inputs(batch, length, decoder=bool(model.config.is_encoder_decoder))


def by_place(trace):
    macs = Counter()
    for event in trace.events:
        heads = heads_of(event) if event.parameter is None else 0
        macs[event.module, event.parameter, heads] += event.macs
    return macs


def refuse_to_run(*args):
    raise AssertionError("the model itself ran")


LOOPS = {"dbrx", "jetmoe"}  # Experts one by one, each with the tokens that are its own.


@pytest.mark.parametrize("name", [*zoo.FAMILIES, *zoo.MIXTURES])
def test_shapes_tell_the_same_integers_as_a_forward(name, monkeypatch):
    model, batch = zoo.build(name, dtype=torch.float32)
    inputs = inputs_of(model, batch)
    real_flops, real = _count_as_it_is(model, inputs, ())
    if name not in LOOPS:
        monkeypatch.setattr(flops, "_count_as_it_is", refuse_to_run)
    counted, trace = count_flops(model, inputs)
    assert counted == real_flops
    assert by_place(trace) == by_place(real)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "mixtral"])
def test_of_equal_layers_three_run_and_all_are_counted(name, monkeypatch):
    deeper = {"n_layer": 7} if name == "gpt2" else {"num_hidden_layers": 7}
    model, batch = zoo.build(name, dtype=torch.float32, **deeper)
    inputs = inputs_of(model, batch)
    real_flops, real = _count_as_it_is(model, inputs, ())
    ran = []

    def note(twin, *args, **kwargs):
        trace = trace_forward(twin, *args, **kwargs)
        ran.append({event.module for event in trace.events})
        return trace

    monkeypatch.setattr(flops, "trace_forward", note)
    counted, trace = count_flops(model, inputs)
    (modules,) = ran
    assert {int(n) for m in modules for n in m.split(".") if n.isdigit()} == {0, 1, 6}
    assert counted == real_flops
    assert by_place(trace) == by_place(real)


def test_layers_that_only_seem_equal_are_all_counted(monkeypatch):
    model, batch = zoo.build("llama", dtype=torch.float32, num_hidden_layers=6)
    mlp = transformers.models.llama.modeling_llama.LlamaMLP
    plain, twin = mlp.forward, unloaded(model)
    last = {model.model.layers[5].mlp, twin.model.layers[5].mlp}
    monkeypatch.setattr(
        mlp, "forward", lambda self, x: plain(self, plain(self, x) if self in last else x)
    )
    inputs = inputs_of(model, batch)
    real = _count_as_it_is(model, inputs, ())[0]
    monkeypatch.setattr(flops, "unloaded", lambda _: twin)
    assert count_flops(model, inputs)[0] == real


def test_the_longest_contexts_are_counted_without_a_forward(monkeypatch):
    longest = 131_072
    model, batch = zoo.build("llama", dtype=torch.float32, max_position_embeddings=longest)
    at = {n: _count_as_it_is(model, inputs_of(model, batch, n), ())[0] for n in (16, 32, 48)}
    monkeypatch.setattr(flops, "_count_as_it_is", refuse_to_run)
    counted, _ = count_flops(model, inputs_of(model, batch, longest))
    a, b, c = at[16], at[32], at[48]
    steps = (longest - 16) // 16
    assert counted == a + steps * (b - a) + steps * (steps - 1) // 2 * (c - 2 * b + a)


class Reads(nn.Module):
    """Attention over tokens whose forward asks for a value of its weights."""

    def __init__(self, window=1):
        super().__init__()
        self.embedding, self.window = nn.Embedding(10, 8), window
        self.linear = nn.Linear(8, 8)

    def forward(self, input_ids):
        assert self.linear.weight.sum().item() != 0
        x = self.linear(self.embedding(input_ids))
        x = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % self.window))
        x = x.view(1, -1, 2, 4).transpose(1, 2)
        return x @ x.transpose(-1, -2)


@pytest.fixture
def short_is_long(monkeypatch):
    monkeypatch.setattr(flops, "LONG", 20)
    monkeypatch.setattr(flops, "STEP", 4)


def test_a_long_forward_that_needs_values_follows_from_shorter_ones(monkeypatch, short_is_long):
    model, inputs = Reads(), {"input_ids": torch.arange(55)[None] % 10}
    real_flops, real = _count_as_it_is(model, inputs, ())
    lengths = []

    def note(model, inputs, args):
        lengths.append(inputs["input_ids"].shape[1])
        return _count_as_it_is(model, inputs, args)

    monkeypatch.setattr(flops, "_count_as_it_is", note)
    counted, trace = count_flops(model, inputs)
    assert lengths == [7, 11, 15, 19]
    assert counted == real_flops
    assert by_place(trace) == by_place(real)
    assert {head_dim(event) for event in trace.events if event.parameter is None} == {1}


def test_where_flops_grow_by_steps_the_whole_length_runs(short_is_long):
    model, inputs = Reads(window=10), {"input_ids": torch.arange(55)[None] % 10}
    assert count_flops(model, inputs)[0] == _count_as_it_is(model, inputs, ())[0]


class Remembers(nn.Module):
    """A forward that keeps what it computed."""

    def __init__(self):
        super().__init__()
        self.linear, self.kept, self.seen = nn.Linear(4, 4), {}, []
        self.register_buffer("last", torch.zeros(4), persistent=False)
        self.plain = torch.ones(4)

    def forward(self, x):
        x = self.linear(x) * self.plain
        self.kept["x"], self.last, self.plain = x, x, x
        self.seen.append(x)
        return x


def test_nothing_of_a_forward_stays_in_the_model():
    model = Remembers().train()
    held = dict(vars(model))
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert count_flops(model, {"x": torch.zeros(1, 4)})[0] == 2 * 4 * 4
    assert (model.kept, model.seen, model.training) == ({}, [], True)
    assert vars(model).keys() == held.keys()
    assert model.plain is held["plain"]
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[name] is tensor for name, tensor in tensors.items())


def test_shared_weights_are_shared_in_the_copy():
    model, _ = zoo.build("bert", dtype=torch.float32)
    model.classifier.weight = model.bert.pooler.dense.weight
    twin = unloaded(model)
    assert twin.classifier.weight is twin.bert.pooler.dense.weight
    assert all(tensor.is_meta for tensor in [*twin.parameters(), *twin.buffers()])
    assert twin.config is model.config
    assert not any(module.training for module in twin.modules())


class Packed(torch.Tensor):
    """Weights whose shape says nothing, as quantizers have them."""


def test_weights_that_are_no_plain_tensors_run_as_they_are(monkeypatch):
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(model.weight.detach().as_subclass(Packed), requires_grad=False)
    monkeypatch.setattr(flops, "unloaded", refuse_to_run)
    assert count_flops(model, {}, args=(torch.zeros(1, 4),))[0] == 2 * 4 * 4


def test_a_forward_that_holds_the_model_runs_as_it_is(monkeypatch):
    """That of a copy would run the model, in modules that nobody watches (TRL's SFTTrainer)."""
    model, _ = zoo.build("llama", dtype=torch.float32)
    ids = {"input_ids": torch.ones(1, 8, dtype=torch.long)}
    known, trace = count_flops(model, ids)
    inner = model.forward
    model.forward = MethodType(lambda self, *args, **kwargs: inner(*args, **kwargs), model)
    monkeypatch.setattr(flops, "unloaded", refuse_to_run)
    counted, held = count_flops(model, ids)
    assert (counted, by_place(held)) == (known, by_place(trace))


class Built(nn.Module):
    """Attention by PyTorch's own kernel, called by place, by name, or by a module of PyTorch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.heads = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        x = self.linear(x)
        attend = nn.functional.scaled_dot_product_attention
        attend(x, x, value=x)
        attend(x, key=x, value=x)
        return self.heads(x[0], x[0], x[0], need_weights=False)


def test_fused_attention_is_not_counted_as_on_a_cpu():
    x = {"x": torch.zeros(1, 2, 3, 4)}
    counted = count_flops(Built(), x)[0]
    assert counted == _count_as_it_is(Built(), x, ())[0] == 5 * 2 * 6 * 4 * 4


def test_recurrent_networks_run_as_they_are(monkeypatch):
    monkeypatch.setattr(flops, "unloaded", refuse_to_run)
    model, x = nn.LSTM(4, 4), torch.zeros(2, 1, 4)
    assert count_flops(model, {}, args=(x,))[0] == _count_as_it_is(model, {}, (x,))[0]
