"""Qwen2-MoE (Qwen2-57B-A14B, Qwen1.5-MoE) and Qwen3-MoE (30B-A3B, 235B-A22B)."""

from __future__ import annotations

from moe_bench.checkpoint.families.blocks import (
    DENSE_MLP,
    EXPERTS,
    GQA,
    GQA_DENSE_NORM,
    GQA_FLAGS,
    GQA_MOE_NORM,
    GQA_SIZES,
    MODEL,
    QK_NORM,
    QKV_BIAS,
    ROUTER,
    shared_expert,
)
from moe_bench.checkpoint.family import Family, one, sparse_step

_SIZES = {
    **GQA_SIZES,
    "I": "intermediate_size",
    "F": "moe_intermediate_size",
    "E": "num_experts | num_local_experts",
}

QWEN2_MOE = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    sizes={**_SIZES, "S": "shared_expert_intermediate_size"},
    model=MODEL,
    attention=(*GQA, QKV_BIAS),
    dense=(GQA_DENSE_NORM, *DENSE_MLP),
    moe=(
        GQA_MOE_NORM,
        ROUTER,
        *EXPERTS,
        *shared_expert("shared_expert"),
        one("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "1 H"),
    ),
    is_dense=sparse_step,
    flags={
        **GQA_FLAGS,
        "--ffn-hidden-size": "I",
        "--add-qkv-bias": "=",
        "--moe-shared-expert-intermediate-size": "S",
        "--moe-shared-expert-gate": "=",
        "--moe-router-pre-softmax": "!norm_topk_prob",
    },
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    sizes=_SIZES,
    model=MODEL,
    attention=(*GQA, *QK_NORM),
    dense=(GQA_DENSE_NORM, *DENSE_MLP),
    moe=(GQA_MOE_NORM, ROUTER, *EXPERTS),
    is_dense=sparse_step,
    refuse={
        "attention_bias": "Qwen3-MoE with attention biases has no public model to check against"
    },
    flags={
        **GQA_FLAGS,
        "--ffn-hidden-size": "I",
        "--qk-layernorm": "=",
        "--moe-router-pre-softmax": "!norm_topk_prob",
    },
)
