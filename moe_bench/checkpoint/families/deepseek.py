"""DeepSeek-V2, V2-Lite, V3, and what shares V3's architecture: Moonlight, Kimi-K2."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from moe_bench.checkpoint.families.blocks import (
    DENSE_MLP,
    EXPERT_BIAS,
    EXPERTS,
    MLA,
    MLA_DENSE_NORM,
    MLA_FLAGS,
    MLA_MOE_NORM,
    MLA_SIZES,
    MODEL,
    MTP,
    MTP_COPIES,
    ROUTER,
    shared_expert,
)
from moe_bench.checkpoint.family import Family, first_k_dense, group_scores

_SIZES = {
    **MLA_SIZES,
    "I": "intermediate_size",
    "F": "moe_intermediate_size",
    "E": "n_routed_experts | num_experts | num_local_experts",
    "X": "n_shared_experts | 0",
    "S": "F*X",
}
_NO_BIAS = {"attention_bias": "attention biases are not part of any published DeepSeek model"}
_NOTES = {
    "!q_lora_rank": "this model has no query compression: with --qk-layernorm Megatron-Core 0.19 gives it a query norm "
    "that it does not have; train it through this project's entry, which leaves it out (docs/convert.md, 'Norms that Megatron has no flag for')"
}
_FLAGS = {
    **MLA_FLAGS,
    "--ffn-hidden-size": "I",
    "--moe-shared-expert-intermediate-size": "S",
    "--moe-router-num-groups": "@n_group",
    "--moe-router-group-topk": "@topk_group",
    "--moe-router-topk-scaling-factor": "@routed_scaling_factor",
    "--moe-router-pre-softmax": "=",
}


def _v2_divergence(config: Mapping[str, Any]) -> str | None:
    limited = config.get("topk_method") == "group_limited_greedy"
    return group_scores(1, config) if limited else None


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    sizes=_SIZES,
    model=MODEL,
    attention=MLA,
    dense=(MLA_DENSE_NORM, *DENSE_MLP),
    moe=(MLA_MOE_NORM, ROUTER, *EXPERTS, *shared_expert("shared_experts", "n_shared_experts")),
    is_dense=first_k_dense,
    per_layer_keys=True,
    refuse=_NO_BIAS,
    notes=_NOTES,
    divergence=_v2_divergence,
    flags=_FLAGS,
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    sizes=_SIZES,
    model=MODEL,
    attention=MLA,
    dense=(MLA_DENSE_NORM, *DENSE_MLP),
    moe=(
        MLA_MOE_NORM,
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
    refuse=_NO_BIAS,
    notes=_NOTES,
    divergence=partial(group_scores, 2),
    flags={
        **_FLAGS,
        "--moe-router-score-function": "=sigmoid",
        "--moe-router-enable-expert-bias": "=",
        "--moe-router-dtype": "=fp32",
    },
)
