"""GLM-4.5 and GLM-4.5-Air."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from moe_bench.checkpoint.families.blocks import (
    DENSE_MLP,
    EXPERT_BIAS,
    EXPERTS,
    GQA,
    GQA_DENSE_NORM,
    GQA_FLAGS,
    GQA_MOE_NORM,
    GQA_SIZES,
    MODEL,
    MTP,
    MTP_COPIES,
    QK_NORM,
    QKV_BIAS,
    ROUTER,
    shared_expert,
)
from moe_bench.checkpoint.family import Family, first_k_dense, group_scores

GLM4_MOE = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    sizes={
        **GQA_SIZES,
        "I": "intermediate_size",
        "F": "moe_intermediate_size",
        "E": "n_routed_experts | num_experts | num_local_experts",
        "X": "n_shared_experts | 0",
        "S": "F*X",
    },
    model=MODEL,
    attention=(
        *GQA,
        replace(QKV_BIAS, when="attention_bias"),
        *(replace(row, when="use_qk_norm") for row in QK_NORM),
    ),
    dense=(GQA_DENSE_NORM, *DENSE_MLP),
    moe=(
        GQA_MOE_NORM,
        ROUTER,
        EXPERT_BIAS,
        *EXPERTS,
        *shared_expert("shared_experts", "n_shared_experts"),
    ),
    mtp=MTP,
    mtp_layers="num_nextn_predict_layers",
    copies=MTP_COPIES,
    is_dense=first_k_dense,
    per_layer_keys=True,
    divergence=partial(group_scores, 2),
    flags={
        **GQA_FLAGS,
        "--ffn-hidden-size": "I",
        "--add-qkv-bias": "?attention_bias",
        "--qk-layernorm": "?use_qk_norm",
        "--moe-shared-expert-intermediate-size": "S",
        "--moe-router-score-function": "=sigmoid",
        "--moe-router-enable-expert-bias": "=",
        "--moe-router-dtype": "=fp32",
        "--moe-router-pre-softmax": "=",
        "--moe-router-num-groups": "@n_group",
        "--moe-router-group-topk": "@topk_group",
        "--moe-router-topk-scaling-factor": "@routed_scaling_factor",
    },
)
