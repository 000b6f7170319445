"""Which layers are taken to read one tensor."""

from __future__ import annotations

import pytest

from lowrank_fast.nn.shared_input import sibling_groups


@pytest.mark.parametrize(
    ("parent", "leaves"),
    [
        ("decoder.block.0.layer.1.EncDecAttention", ("q", "k", "v")),
        ("model.decoder.layers.0.encoder_attn", ("q_proj", "k_proj", "v_proj")),
        ("bert.encoder.layer.0.crossattention.self", ("query", "key", "value")),
        ("transformer.h.0.cross_attn", ("q_proj", "k_proj", "v_proj")),
    ],
)
def test_the_query_of_cross_attention_reads_another_tensor_than_key_and_value(
    parent: str, leaves: tuple[str, ...]
) -> None:
    names = [f"{parent}.{leaf}" for leaf in leaves]
    assert sibling_groups(names) == [names[1:]]
    assert sibling_groups(names[::2]) == [], "q and v alone share nothing"


def test_self_attention_and_gates_share_their_input() -> None:
    attention = [f"model.encoder.layers.0.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
    gates = [f"model.encoder.layers.0.mlp.{leaf}" for leaf in ("gate_proj", "up_proj")]
    assert sibling_groups(attention + gates) == [attention, gates]
