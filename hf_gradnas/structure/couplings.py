"""What a probe cannot see, as data: names of attributes that repeat a size.

A row is used only where its value fits (an attribute named here that holds another number is left
alone), and the proof (`hf_gradnas.verification`) decides whether it was right.
"""

from __future__ import annotations

HEAD_COUNTS = frozenset(
    "num_heads num_attention_heads n_heads n_head nhead num_q_heads num_query_heads".split()
)
KV_COUNTS = frozenset("num_key_value_heads num_kv_heads n_kv_heads kv_heads".split())
EXPERT_COUNTS = tuple(
    "num_experts num_local_experts n_routed_experts num_routed_experts moe_num_experts "
    "total_experts n_experts out_features".split()
)
EXPERT_GROUPS = ("num_group", "n_group", "num_expert_group")
CHOSEN_GROUPS = ("topk_group", "num_limited_groups")
HEADS_PER_GROUP = frozenset("num_key_value_groups n_rep".split())
WIDTHS = frozenset("all_head_size inner_dim attn_dim split_size q_dim attention_dim".split())
"""Attributes that hold heads x head size; of other names only where the proof fails without."""
MODEL_WIDTHS = frozenset("embed_dim hidden_size d_model dim embed_size".split())
"""Attributes that may hold heads x head size or the width of the model; tried only when the proof
fails without them."""
CONFIG_COUNTS = {
    "heads": ("num_attention_heads", "num_heads", "n_head", "n_heads"),
    "kv_groups": ("num_key_value_heads", "num_kv_heads"),
}
"""Config values that some forwards read; overridden per module only when the proof needs it."""

CROSS_ARGUMENTS = ("key_value_states", "encoder_hidden_states")
