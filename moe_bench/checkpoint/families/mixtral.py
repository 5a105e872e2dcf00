"""Mixtral (8x7B, 8x22B)."""

from __future__ import annotations

from moe_bench.checkpoint.families.blocks import GQA, GQA_FLAGS, GQA_MOE_NORM, GQA_SIZES, MODEL
from moe_bench.checkpoint.family import Family, Part, Row, one

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    sizes={**GQA_SIZES, "F": "intermediate_size", "E": "num_local_experts | num_experts"},
    model=MODEL,
    attention=GQA,
    moe=(
        GQA_MOE_NORM,
        one("mlp.router.weight", "block_sparse_moe.gate.weight", "E H"),
        Row(
            key="mlp.experts.experts.linear_fc1.weight",
            parts=(
                Part("block_sparse_moe.experts.{e}.w1.weight", "F H"),
                Part("block_sparse_moe.experts.{e}.w3.weight", "F H"),
            ),
            experts=True,
        ),
        one(
            "mlp.experts.experts.linear_fc2.weight",
            "block_sparse_moe.experts.{e}.w2.weight",
            "H F",
            experts=True,
        ),
    ),
    flags={**GQA_FLAGS, "--ffn-hidden-size": "F"},
)
