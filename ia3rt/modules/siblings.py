"""What layers are called that stand beside each other: by that a layer's role is known, and never by a model's name.

The second MLP matrix is scaled at its input, the key and value projections (or the projection that fuses them with the
query) at their output (Liu et al. 2022). Mixers without attention (Mamba, LFM2's convolutions, Qwen3-Next) have their
keys, values and gates in one first projection, and their second matrix is the last one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from ia3rt.adapters.site import Side

_Table: TypeAlias = "tuple[tuple[frozenset[str], frozenset[str]], ...]"
"""Siblings, and which of them wear a vector. A name with a dot goes on into a sibling."""

_OUTPUT_SITES: _Table = (
    (frozenset({"q_proj", "k_proj", "v_proj"}), frozenset({"k_proj", "v_proj"})),
    (frozenset({"qkv_proj", "o_proj"}), frozenset({"qkv_proj"})),
    (frozenset({"qkv_proj", "out_proj"}), frozenset({"qkv_proj"})),
    (frozenset({"c_attn", "c_proj"}), frozenset({"c_attn"})),
    (frozenset({"query_key_value", "dense"}), frozenset({"query_key_value"})),
    (frozenset({"q", "k", "v", "o"}), frozenset({"k", "v"})),
    (frozenset({"query", "key", "value"}), frozenset({"key", "value"})),
    (frozenset({"query_global", "key_global", "value_global"}), frozenset({"key_global", "value_global"})),
    (frozenset({"query_key", "value"}), frozenset({"query_key", "value"})),
    (frozenset({"query_proj", "key_proj", "value_proj"}), frozenset({"key_proj", "value_proj"})),
    (frozenset({"q_lin", "k_lin", "v_lin"}), frozenset({"k_lin", "v_lin"})),
    (frozenset({"q_head", "k_head", "v_head"}), frozenset({"k_head", "v_head"})),
    (frozenset({"linear_q", "linear_k", "linear_v"}), frozenset({"linear_k", "linear_v"})),
    (frozenset({"Wq", "Wk", "Wv"}), frozenset({"Wk", "Wv"})),
    (frozenset({"to_q", "to_k", "to_v"}), frozenset({"to_k", "to_v"})),
    (frozenset({"add_k_proj", "add_v_proj"}), frozenset({"add_k_proj", "add_v_proj"})),
    (frozenset({"Wqkv", "Wo"}), frozenset({"Wqkv"})),
    (frozenset({"Wqkv", "out_proj"}), frozenset({"Wqkv"})),
    (frozenset({"qkv", "proj"}), frozenset({"qkv"})),
    (frozenset({"qkv", "projection"}), frozenset({"qkv"})),
    (frozenset({"attention.qkv", "output.dense"}), frozenset({"attention.qkv"})),
    (frozenset({"self.in_proj", "output.dense"}), frozenset({"self.in_proj"})),
    (frozenset({"kv_a_proj_with_mqa", "kv_b_proj"}), frozenset({"kv_b_proj"})),
    (frozenset({"in_proj", "out_proj"}), frozenset({"in_proj"})),
    (frozenset({"in_proj_qkv", "out_proj"}), frozenset({"in_proj_qkv"})),
    (frozenset({"in_proj_qkvz", "out_proj"}), frozenset({"in_proj_qkvz"})),
    (
        frozenset({"attention.key", "attention.value", "attention.receptance"}),
        frozenset({"attention.key", "attention.value"}),
    ),
)
_INPUT_SITES: _Table = (
    (frozenset({"up_proj", "down_proj"}), frozenset({"down_proj"})),
    (frozenset({"gate_up_proj", "down_proj"}), frozenset({"down_proj"})),
    (frozenset({"c_fc", "c_proj"}), frozenset({"c_proj"})),
    (frozenset({"dense_h_to_4h", "dense_4h_to_h"}), frozenset({"dense_4h_to_h"})),
    (frozenset({"fc1", "fc2"}), frozenset({"fc2"})),
    (frozenset({"fc_in", "fc_out"}), frozenset({"fc_out"})),
    (frozenset({"wi", "wo"}), frozenset({"wo"})),
    (frozenset({"wi_0", "wi_1", "wo"}), frozenset({"wo"})),
    (frozenset({"Wi", "Wo"}), frozenset({"Wo"})),
    (frozenset({"w1", "w2", "w3"}), frozenset({"w2"})),
    (frozenset({"lin1", "lin2"}), frozenset({"lin2"})),
    (frozenset({"pwconv1", "pwconv2"}), frozenset({"pwconv2"})),
    (frozenset({"ffn", "ffn_output"}), frozenset({"ffn_output"})),
    (frozenset({"intermediate", "output"}), frozenset({"output"})),
    (frozenset({"input_linear", "output_linear"}), frozenset({"output_linear"})),
    (frozenset({"intermediate_dense", "output_dense"}), frozenset({"output_dense"})),
    (frozenset({"proj_mlp", "proj_out"}), frozenset({"proj_out"})),
    (frozenset({"in_proj", "out_proj"}), frozenset({"out_proj"})),
    (frozenset({"in_proj_qkv", "out_proj"}), frozenset({"out_proj"})),
    (frozenset({"in_proj_qkvz", "out_proj"}), frozenset({"out_proj"})),
    (frozenset({"intermediate.dense", "output.dense"}), frozenset({"output.dense"})),
    (frozenset({"intermediate_query.dense", "output_query.dense"}), frozenset({"output_query.dense"})),
    (frozenset({"lang_inter.dense", "lang_output.dense"}), frozenset({"lang_output.dense"})),
    (frozenset({"visn_inter.dense", "visn_output.dense"}), frozenset({"visn_output.dense"})),
    (frozenset({"dense.dense", "output.dense"}), frozenset({"output.dense"})),
    (frozenset({"mlp.dense1", "mlp.dense2"}), frozenset({"mlp.dense2"})),
    (frozenset({"ff.layer_1", "ff.layer_2"}), frozenset({"ff.layer_2"})),
    (frozenset({"ffn.linear_1", "ffn.linear_2"}), frozenset({"ffn.linear_2"})),
    (frozenset({"ffn.0", "ffn.2"}), frozenset({"ffn.2"})),
    (frozenset({"net.0.proj", "net.2"}), frozenset({"net.2"})),
    (
        frozenset({"feed_forward.key", "feed_forward.value", "feed_forward.receptance"}),
        frozenset({"feed_forward.value"}),
    ),
)
_SIDES: tuple[tuple[Side, _Table], ...] = (("out", _OUTPUT_SITES), ("in", _INPUT_SITES))
_PARTS = 1 + max(name.count(".") for _, table in _SIDES for siblings, _ in table for name in siblings)


def sides_within(parents: Iterable[str], linear: Iterable[str]) -> dict[str, Side]:
    """The layers that wear a vector, with the side on which they do.

    Args:
        parents: the paths of the modules in which they are looked for.
        linear: the paths of all linear layers.
    """
    names: dict[str, set[str]] = {}  # of the layers in a module, as many parts of a path as the tables have
    for path in linear:
        name, parent = "", path
        for _ in range(_PARTS if path else 0):
            parent, _, last = parent.rpartition(".")
            name = f"{last}.{name}" if name else last
            names.setdefault(parent, set()).add(name)
            if not parent:
                break
    found: dict[str, Side] = {}
    for parent in parents:
        if parent not in names:
            continue
        for side, table in _SIDES:
            for siblings, wearers in table:
                if siblings <= names[parent]:
                    found.update((f"{parent}.{name}" if parent else name, side) for name in wearers)
    return found
