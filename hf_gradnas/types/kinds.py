"""What the units of an axis can be: one row per kind says all that distinguishes it.

A new kind is a row here and the rules by which `hf_gradnas.structure` finds it. Everything else
reads the row, or what slices and taps say of themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

Mask = Literal["multiply", "exclude", "bypass"]
"""How a unit is masked: its values are multiplied, it is excluded before a router chooses, or what
goes into it goes on in place of what comes out (a whole layer)."""


class Kind(str, Enum):
    """What the units of an axis are. Compares and formats as its value."""

    HEADS = "heads"
    KV_GROUPS = "kv_groups"
    NEURONS = "neurons"
    CHANNELS = "channels"
    EXPERTS = "experts"
    LAYERS = "layers"

    __str__ = str.__str__


@dataclass(frozen=True, slots=True)
class KindRow:
    """What distinguishes one kind of unit.

    Attributes:
        singular: A unit in messages.
        plural: Several of them in messages.
        title: Name in pictures.
        minimum: Fewest units that can stay, however well a cut to fewer is proved.
        multiples: Hardware-friendly widths of an axis, best first; empty where any will do.
        holds_smallest: Whether the smallest multiple holds even where its step costs too much.
        served: Multiples of a model that generates, best first: what servers and quantisers take
            in blocks. The smallest holds even where its step costs too much.
        counts_values: Whether people count the values that units hold (`Axis.per_unit`), rather
            than the units.
        parent: Kind of the axes that units of this kind may be nested in.
        attends: Whether a unit runs products between activations, of which no weight knows.
        is_routed: Whether a router chooses units for each token. Where they run for these tokens
            only (`Axis.is_chosen`), fewer units cost as much time.
        is_few: Whether there are so few units that every count can be tried.
        is_asked_for: Whether axes of this kind are only looked for where they are asked for.
        mask: How a unit is masked.
        counts_each: Whether a config counts nested units of this kind in one unit of their parent,
            rather than all of them.
        config_names: Names of config values that may count the units, in the order of trial.
        any_number: Whether any number of a config may count them, since they have no name there.
        width_key: Config value that holds the width of a unit, which otherwise follows from others.
        reference_name: What the reference calls the number of units of a module; empty where it
            names a layer's outputs.
    """

    singular: str
    plural: str
    title: str
    minimum: int = 0
    multiples: tuple[int, ...] = ()
    holds_smallest: bool = False
    served: tuple[int, ...] = ()
    counts_values: bool = False
    parent: Kind | None = None
    attends: bool = False
    is_routed: bool = False
    is_few: bool = False
    is_asked_for: bool = False
    mask: Mask = "multiply"
    counts_each: bool = False
    config_names: tuple[str, ...] = ()
    any_number: bool = False
    width_key: str = ""
    reference_name: str = ""


KINDS: Mapping[Kind, KindRow] = {
    Kind.HEADS: KindRow(
        "head",
        "heads",
        "heads",
        parent=Kind.KV_GROUPS,
        attends=True,
        is_few=True,
        config_names=(
            "num_attention_heads",
            "num_heads",
            "n_head",
            "n_heads",
            "num_encoder_heads",
            "encoder_attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_heads",
            "decoder_attention_heads",
            "num_decoder_attention_heads",
        ),
        width_key="head_dim",
        reference_name="num_attention_heads",
    ),
    Kind.KV_GROUPS: KindRow(
        "KV group",
        "KV groups",
        "key/value groups",
        is_few=True,
        config_names=(
            "num_key_value_heads",
            "num_kv_heads",
            "n_kv_heads",
            "kv_n_heads",
            "multi_query_group_num",
            "decoder_num_key_value_heads",
            "encoder_num_key_value_heads",
        ),
        reference_name="num_key_value_heads",
    ),
    Kind.NEURONS: KindRow(
        "neuron",
        "neurons",
        "neurons",
        multiples=(64, 32, 16, 8),
        holds_smallest=True,
        served=(128, 64, 32),
        parent=Kind.EXPERTS,
        counts_each=True,
        config_names=(
            "moe_intermediate_size",
            "intermediate_size",
            "ffn_dim",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "d_ff",
            "n_inner",
            "hidden_dim",
            "mlp_dim",
            "ffn_hidden_size",
            "feed_forward_size",
            "feedforward_dim",
            "dim_feedforward",
            "d_inner",
            "dff",
            "inner_dim",
            "encoder_intermediate_size",
            "decoder_intermediate_size",
            "shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
            "moe_ffn_hidden_size",
            "expert_intermediate_size",
            "moe_intermediate_dim",
        ),
    ),
    Kind.CHANNELS: KindRow(
        "channel",
        "channels",
        "channels",
        minimum=1,
        multiples=(32, 16, 8),
        counts_values=True,
        any_number=True,
    ),
    Kind.EXPERTS: KindRow(
        "expert",
        "experts",
        "experts",
        minimum=1,
        is_routed=True,
        mask="exclude",
        config_names=(
            "num_local_experts",
            "num_experts",
            "n_routed_experts",
            "num_routed_experts",
            "moe_num_experts",
            "moe_num_primary_experts",
            "num_moe_experts",
        ),
    ),
    Kind.LAYERS: KindRow(
        "layer",
        "layers",
        "layers",
        is_asked_for=True,
        mask="bypass",
        config_names=(
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "num_encoder_layers",
            "encoder_layers",
            "num_decoder_layers",
            "decoder_layers",
            "depth",
        ),
    ),
}
"""Names of config values that are aliases of one value do no harm."""
PARENTS = frozenset(row.parent for row in KINDS.values() if row.parent is not None)
"""Kinds that others may be nested in."""
