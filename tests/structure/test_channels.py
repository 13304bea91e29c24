"""Channels of networks: what is found, what is refused, and that cutting is the same as zeroing."""

import contextlib
import copy
import re
from dataclasses import replace

import conv_families
import networks
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations

from hf_gradnas.errors import DataError, StructureError
from hf_gradnas.structure.channels import read_channels
from hf_gradnas.structure.discovery import discover, read_forward
from hf_gradnas.structure.places import move_axis
from hf_gradnas.types import Attribute, Kind, Refusal, Slice, Tap

EXACT = {"rtol": 0.0, "atol": 1e-10}


def found_in(model, *args, taken=(), **kwargs):
    """Channels, as if nobody had looked for heads and neurons but those of `taken`."""
    return read_channels(read_forward(model, args, kwargs), taken, frozenset())


def found_otherwise(model, inputs):
    return [
        move_axis(axis, place.scope)
        for place in discover(model, (), inputs).places
        for axis in place.template.versions[0]
    ]


def tensor_at(model, name):
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


@torch.no_grad()
def zeroed(model, axis, lost):
    model = copy.deepcopy(model)
    for s in axis.slices:
        tensor_at(model, s.tensor).index_fill_(s.dim, torch.tensor(s.rows(lost)), 0.0)
    return model


@torch.no_grad()
def sliced(model, axis, lost):
    """The cut by hand: every named row goes, then every size is read from the tensors."""
    model = copy.deepcopy(model)
    gone = {}
    for s in axis.slices:
        gone.setdefault((s.tensor, s.dim), set()).update(s.rows(lost))
    for (name, dim), rows in gone.items():
        tensor = tensor_at(model, name)
        stay = torch.tensor([row for row in range(tensor.shape[dim]) if row not in rows])
        tensor.data = tensor.data.index_select(dim, stay)
    for attribute in axis.attributes:
        module = model.get_submodule(attribute.module)
        old = getattr(module, attribute.name)
        by = attribute.factor * len(lost)
        new = (old[0] - by, *old[1:]) if isinstance(old, tuple) else old - by
        setattr(module, attribute.name, new)
    for module in model.modules():
        read_sizes(module)
    return model


def read_sizes(module):
    tensors = {**module._parameters, **module._buffers}
    weight = tensors.get("weight")
    if isinstance(module, _ConvNd) and weight is not None:
        sides = [weight.shape[0], weight.shape[1] * module.groups]
        module.in_channels, module.out_channels = sides if module.transposed else sides[::-1]
    elif isinstance(module, _NormBase):
        one = weight if weight is not None else tensors.get("running_mean")
        module.num_features = module.num_features if one is None else len(one)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = len(weight)
    elif isinstance(module, nn.LayerNorm) and weight is not None:
        module.normalized_shape = tuple(weight.shape)
    elif type(module).__name__ == "Conv1D":
        module.nf = weight.shape[1]


def tensors_of(output):
    return output["masks"] if type(output) is dict else getattr(output, "logits", output)


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_axes_of_free_form_networks(name):
    model, args = networks.build(name)
    axes, refusals = found_in(model, *args)
    expected = networks.NETWORKS[name].axes
    assert {axis.module: axis.size for axis in axes} == expected
    assert [axis.module for axis in axes] == list(expected)  # in running order
    assert not refusals
    for axis in axes:
        assert (axis.name, axis.kind) == (f"{axis.module}:channels", Kind.CHANNELS)
        assert (axis.minimum, axis.removal) == (1, None)
        assert axis.taps[0].module == axis.module
        assert axis.width == sum(tap.width for tap in axis.taps if tap.module == axis.module)
        own = {*dict(model.named_parameters()), *dict(model.named_buffers())}
        assert {s.tensor for s in axis.slices} <= own


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_cutting_is_zeroing(name):
    model, args = networks.build(name)
    axes, _ = found_in(model, *args)
    whole = tensors_of(model(*args))
    for axis in axes:
        lost = [0, 2] if axis.size > 3 else [1]
        cut = tensors_of(sliced(model, axis, lost)(*args))
        assert cut.shape == whole.shape
        if not networks.NETWORKS[name].across:
            torch.testing.assert_close(cut, tensors_of(zeroed(model, axis, lost)(*args)), **EXACT)
            assert (cut - whole).abs().max() > 1e-6


@pytest.mark.parametrize("name", sorted(conv_families.FAMILIES.keys() - conv_families.ATTENTIVE))
@torch.no_grad()
def test_cutting_is_zeroing_in_convolutional_families(name):
    model, inputs, expected = conv_families.build(name)
    axes, refusals = found_in(model, **inputs)
    assert [(axis.module, axis.size) for axis in axes] == list(expected.items())
    assert not refusals
    for axis in axes[:: max(1, len(axes) // 5)]:
        lost = [axis.size - 1]
        cut = sliced(model, axis, lost)(**inputs).logits
        if "convnext" not in name:  # its norms span channels
            torch.testing.assert_close(cut, zeroed(model, axis, lost)(**inputs).logits, **EXACT)


@pytest.mark.parametrize("name", conv_families.ATTENTIVE)
def test_feature_extractors_beside_attention(name):
    model, inputs, expected = conv_families.build(name)
    axes, refusals = found_in(model, **inputs, taken=found_otherwise(model, inputs))
    assert {axis.module: axis.size for axis in axes} == expected
    stream = ("feature_projection.projection", "patch_embeddings.proj")
    for refusal in refusals:
        inside = ".attention." in refusal.module
        assert inside or refusal.module.endswith(stream)
        reason = "inside an attention" if inside else "the residual stream of attention layers"
        assert reason in refusal.reason
    for axis in axes:
        cut = sliced(model, axis, [0])(**inputs).logits
        if "group" in name and not axis.norms:
            expected = zeroed(model, axis, [0])(**inputs).logits
            torch.testing.assert_close(cut, expected, **EXACT)


def test_a_taken_axis_is_left_out_silently():
    model, args = networks.build("conv2d")
    axes, _ = found_in(model, *args)
    rest, refusals = found_in(model, *args, taken=axes[1:2])
    assert [axis.name for axis in rest] == [axes[0].name, axes[2].name]
    assert not refusals


def test_what_stands_inside_an_attention_is_refused():
    model, inputs, _ = conv_families.build("wav2vec2 group")
    heads = [replace(axis, slices=()) for axis in found_otherwise(model, inputs)]
    _, refusals = found_in(model, **inputs, taken=heads)
    inside = [r.module for r in refusals if re.search("inside an attention, whose heads", r.reason)]
    assert [path.rpartition(".")[2] for path in inside] == ["q_proj"]


def only(name):
    model, args = networks.build(name)
    axes, _ = found_in(model, *args)
    return {axis.module: axis for axis in axes}


def test_slices_and_taps_of_a_residual_stream():
    axis = only("residual")["stem.0"]
    assert axis.taps == tuple(Tap(path, "output", 1) for path in ("stem.0", "first.2", "second.2"))
    assert axis.norms == (Tap("stem.1", "output", 1),)
    assert set(axis.slices) == {
        *(Slice(f"{path}.weight", 0) for path in ("stem.0", "stem.1", "first.2", "second.2")),
        *(Slice(f"{path}.bias", 0) for path in ("stem.0", "stem.1", "first.2", "second.2")),
        *(Slice(f"stem.1.running_{name}", 0) for name in ("mean", "var")),
        *(Slice(f"{path}.weight", 1) for path in ("first.0", "second.0", "head")),
    }


def test_flatten_gives_columns_in_blocks():
    assert Slice("6.weight", 1, width=4, offset=0, stride=4) in only("conv2d")["4"].slices
    assert Slice("6.weight", 1, width=3, offset=0, stride=3) in only("conv1d")["4"].slices
    assert Slice("6.weight", 1, width=8, offset=0, stride=8) in only("conv3d")["3"].slices


def test_concatenation_gives_offsets_and_counts_groups_down():
    axis = only("concatenation")["right"]
    assert Slice("head.weight", 1, offset=4) in axis.slices
    assert Slice("norm.running_mean", 0, offset=4) in axis.slices
    assert axis.taps == (Tap("right", "output", 1), Tap("depthwise", "output", 1, offset=4))
    assert axis.norms == (Tap("norm", "output", 1, offset=4),)
    assert axis.attributes == (Attribute("depthwise", "groups", "right:channels", value=10),)


def test_a_depthwise_multiplier_gives_blocks_of_rows():
    axis = only("multiplier")["0"]
    assert Slice("1.weight", 0, width=2, stride=2) in axis.slices
    assert not [s for s in axis.slices if (s.tensor, s.dim) == ("1.weight", 1)]
    assert Slice("5.weight", 1, width=32, stride=32) in axis.slices
    assert axis.taps == (Tap("0", "output", 1), Tap("1", "output", 1, width=2, stride=2))
    assert axis.attributes == (Attribute("1", "groups", "0:channels"),)


def test_groups_give_one_slice_each():
    axes = only("grouped")
    assert [s for s in axes["0"].slices if s.tensor == "0.weight"] == [
        Slice("0.weight", 0, offset=0),
        Slice("0.weight", 0, offset=4),
    ]
    assert Slice("2.weight", 1) in axes["0"].slices
    assert axes["2"].taps == (Tap("2", "output", 1), Tap("2", "output", 1, offset=6))
    assert axes["2"].width == 2
    assert not axes["2"].attributes
    assert [t.offset for t in only("group norm")["0"].norms] == [0, 4]


@pytest.mark.parametrize(
    ("name", "attribute"),
    [
        ("batch norm without statistics", "num_features"),
        ("instance norm 1d", "num_features"),
        ("group norm of one group", "num_channels"),
        ("group norm per channel", "num_groups"),
    ],
)
def test_sizes_that_no_tensor_has_are_attributes(name, attribute):
    assert only(name)["0"].attributes == (Attribute("1", attribute, "0:channels"),)


def test_a_layer_norm_without_parameters_has_its_shape_as_attribute():
    assert only("layer norm")["3"].attributes == (Attribute("4", "normalized_shape", "3:channels"),)
    assert only("layer norm")["0"].attributes == ()


def test_dimension_of_norms_and_taps():
    assert only("conv1d")["6"].norms == (Tap("7", "output", 1),)  # BatchNorm1d after a Linear
    assert only("conv1d")["6"].taps == (Tap("6", "output", -1),)
    assert only("layer norm")["0"].norms == (Tap("1", "output", -1),)
    assert only("layer norm of a line")["0"].norms == (Tap("1", "output", 1),)
    assert only("layer norm of an image")["0"].norms == (Tap("1", "output", 1),)
    assert only("sigmoid")["0"].norms == (Tap("1", "output", -1),)  # not 0 where its input is 0
    assert only("gate of linears")["conv"].taps[1] == Tap("gate.2", "output", -1)
    model, inputs, _ = conv_families.build("convnextv2")
    axes = {axis.module: axis for axis in found_in(model, **inputs)[0]}
    stem = axes["convnextv2.embeddings.patch_embeddings"]
    assert stem.norms[0] == Tap("convnextv2.embeddings.layernorm", "output", 1)
    assert stem.norms[1].dim == -1
    grn = axes["convnextv2.encoder.stages.0.layers.0.pwconv1"]
    assert grn.norms == (Tap("convnextv2.encoder.stages.0.layers.0.grn", "output", -1),)
    assert Slice("convnextv2.encoder.stages.0.layers.0.grn.weight", 3) in grn.slices


def test_a_shared_parameter_is_named_once():
    axis = only("shared")["first"]
    assert not [s for s in axis.slices if s.tensor == "second.weight"]
    assert [tap.module for tap in axis.taps] == ["first", "second"]


class Wired(nn.Module):
    """Layers by name, and a forward that is given."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.wiring = forward
        for name, layer in layers.items():
            self.register_parameter(name, layer) if isinstance(
                layer, nn.Parameter
            ) else self.add_module(name, layer)

    def forward(self, *args):
        return self.wiring(self, *args)


def conv(inputs, outputs, **kwargs):
    return nn.Conv2d(inputs, outputs, 1, **kwargs)


def attend(model, x):
    x = model.up(x)
    return model.head(model.attention(x, x, x)[0])


def features(model, x):
    x = model.conv(x)
    return {"features": x, "logits": model.head(x)}


IMAGE, TOKENS = (2, 3, 4, 4), (2, 5, 4)
REFUSED = {
    "output that others read": (
        lambda: Wired(features, conv=conv(3, 8), head=conv(8, 2)),
        IMAGE,
        ("conv", "part of the model's output"),
    ),
    "residual of the input": (
        lambda: Wired(lambda m, x: m.head(x + m.conv(x)), conv=conv(3, 3), head=conv(3, 2)),
        IMAGE,
        ("conv", "meet values that no layer makes"),
    ),
    "half of the channels": (
        lambda: Wired(
            lambda m, x: m.head(m.conv(x)[:, :4] + m.other(x)),
            conv=conv(3, 8),
            other=conv(3, 4),
            head=conv(4, 2),
        ),
        IMAGE,
        ("conv", "only some of them meet the channels of other layers"),
    ),
    "halves to different layers": (
        lambda: Wired(
            lambda m, x: m.left(m.conv(x)[:, :4]) + m.right(m.conv(x)[:, 4:]),
            conv=conv(3, 8),
            left=conv(4, 2),
            right=conv(4, 2),
        ),
        IMAGE,
        ("conv", "own different numbers of entries of left.weight"),
    ),
    "irregular order": (
        lambda: Wired(
            lambda m, x: m.head(
                torch.cat([y := m.conv(x), torch.cat([y[:, 4:5], y[:, :4], y[:, 5:]], 1)], 1)
            ),
            conv=conv(3, 8),
            head=conv(16, 2),
        ),
        IMAGE,
        ("conv", "follow no regular pattern"),
    ),
    "indexing": (
        lambda: Wired(
            lambda m, x: m.head(m.conv(x)[:, [3, 1, 2]]), conv=conv(3, 8), head=conv(3, 2)
        ),
        IMAGE,
        ("conv", "own different numbers of entries of head.weight"),
    ),
    "products": (
        lambda: Wired(
            lambda m, x: m.head(m.q(x) @ m.k(x).transpose(1, 2)),
            q=nn.Linear(4, 6),
            k=nn.Linear(4, 6),
            head=nn.Linear(5, 2),
        ),
        TOKENS,
        ("q", "all of them meet in one sum or product"),
    ),
    "two dimensions": (
        lambda: Wired(
            lambda m, x: m.head(m.left(x)[:, :, None] * m.right(x)[:, None]),
            left=nn.Linear(4, 6),
            right=nn.Linear(4, 5),
            head=nn.Linear(5, 2),
        ),
        (2, 4),
        ("right", "meet other channels along another dimension"),
    ),
    "weight norm": (
        lambda: nn.Sequential(
            conv(3, 6), parametrizations.weight_norm(conv(6, 8)), conv(8, 4), conv(4, 2)
        ),
        IMAGE,
        ("0", "is computed"),
        ("1", "is computed"),
    ),
    "attention of torch": (
        lambda: Wired(
            attend,
            up=nn.Linear(4, 8),
            attention=nn.MultiheadAttention(8, 2, batch_first=True),
            head=nn.Linear(8, 2),
        ),
        TOKENS,
        ("up", r"attention \(MultiheadAttention\) holds some of them"),
    ),
    "lstm": (
        lambda: Wired(
            lambda m, x: m.head(m.lstm(m.up(x))[0]),
            up=nn.Linear(4, 6),
            lstm=nn.LSTM(6, 5, batch_first=True),
            head=nn.Linear(5, 2),
        ),
        TOKENS,
        ("up", "LSTM|Rnn"),
        ("lstm", "LSTM|Rnn"),
    ),
    "gru": (
        lambda: Wired(
            lambda m, x: m.head(m.gru(m.up(x))[0]),
            up=nn.Linear(4, 6),
            gru=nn.GRU(6, 5, batch_first=True),
            head=nn.Linear(5, 2),
        ),
        TOKENS,
        ("up", "GRU|Rnn"),
        ("gru", "GRU|Rnn"),
    ),
    "norm over another size": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 1),
            nn.Unflatten(1, (1, 8)),
            nn.LayerNorm([1, 8, 4], elementwise_affine=False),
            nn.Flatten(1, 2),
            nn.Conv1d(8, 2, 1),
        ),
        (2, 3, 4),
        ("0", "dimensions|repeats their number within"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name):
    make, shape, *expected = REFUSED[name]
    model = make().double().eval()
    axes, refusals = found_in(model, torch.randn(shape, dtype=torch.float64))
    assert [refusal.module for refusal in refusals] == [module for module, _ in expected]
    for refusal, (_, reason) in zip(refusals, expected, strict=True):
        assert refusal.kind == "channels"
        assert re.search(reason, refusal.reason)
    refused = {refusal.module for refusal in refusals}
    assert not refused & {axis.module for axis in axes}


def test_an_embedding_refuses_what_it_is_added_to():
    model = Wired(
        lambda m, x, ids: m.head(m.up(x) + m.table(ids)),
        up=nn.Linear(4, 6),
        table=nn.Embedding(9, 6),
        head=nn.Linear(6, 2),
    )
    axes, refusals = found_in(model, torch.randn(TOKENS), torch.zeros(2, 5, dtype=torch.long))
    assert not axes
    assert refusals == (Refusal("up", "channels", "an embedding table makes them"),)


def test_inputs_that_need_no_gradient():
    model = Wired(
        lambda m, ids: m.head(torch.relu(m.up(ids.float()))),
        up=nn.Linear(4, 6),
        head=nn.Linear(6, 2),
    )
    axes, refusals = found_in(model, torch.zeros(2, 4, dtype=torch.long))
    assert [(axis.module, axis.size) for axis in axes] == [("up", 6)]
    assert not refusals


def test_channels_that_are_padded_are_followed_by_measuring():
    model = Wired(
        lambda m, x: m.head(nn.functional.pad(m.conv(x), (0, 0, 0, 0, 0, 4))),
        conv=conv(3, 4),
        head=conv(8, 2),
    )
    model, args = model.double().eval(), (torch.randn(IMAGE, dtype=torch.float64),)
    (axis,), refusals = found_in(model, *args)
    assert not refusals
    assert Slice("head.weight", 1) in axis.slices
    cut = sliced(model, axis, [1])(*args)
    torch.testing.assert_close(cut, zeroed(model, axis, [1])(*args), **EXACT)


def test_the_last_layer_and_single_channels_are_silent():
    model = nn.Sequential(conv(3, 1), conv(1, 4))
    assert found_in(model, torch.randn(IMAGE)) == ((), ())


def state_of(model):
    return [
        (path, module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    ] + [(path, p.requires_grad, p.grad) for path, p in model.named_parameters()]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails):
    model, args = networks.build("conv2d")
    model[1].train()
    model[0].weight.requires_grad_(False)
    before, tensors = state_of(model), copy.deepcopy(model.state_dict())
    with pytest.raises(DataError) if fails else contextlib.nullcontext():
        assert found_in(model, *(() if fails else args))[0]
    assert state_of(model) == before
    torch.testing.assert_close(model.state_dict(), tensors, rtol=0.0, atol=0.0)


def test_a_forward_that_fails_is_an_error_with_the_first_line():
    def broken(model, x):
        raise RuntimeError("no such shape\nsecond line")

    model = Wired(broken, up=nn.Linear(2, 2))
    with pytest.raises(DataError, match=r"Wired cannot run a batch of .*: no such shape; check"):
        found_in(model, torch.zeros(1, 2))


def test_a_forward_without_a_graph_is_an_error():
    model = Wired(torch.no_grad()(lambda m, x: m.up(x)), up=nn.Linear(2, 2))
    with pytest.raises(StructureError, match="Wired: no tensor that its forward"):
        found_in(model, torch.zeros(1, 2))


def test_running_out_of_memory_is_no_refusal():
    def full(model, x):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        found_in(Wired(full, up=nn.Linear(2, 2)), torch.zeros(1, 2))
