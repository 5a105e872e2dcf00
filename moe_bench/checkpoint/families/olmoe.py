"""OLMoE-1B-7B.

Its query and key norms span all heads at once. Megatron-Core 0.19's own attention norms each head; the weights are
stored under the usual keys with their true width, by which this project's training entry knows to build the wide norm.
"""

from __future__ import annotations

from moe_bench.checkpoint.families.blocks import (
    EXPERTS,
    GQA,
    GQA_FLAGS,
    GQA_MOE_NORM,
    GQA_SIZES,
    MODEL,
    ROUTER,
)
from moe_bench.checkpoint.family import Family, one

OLMOE = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    sizes={**GQA_SIZES, "F": "intermediate_size", "E": "num_experts | num_local_experts"},
    model=MODEL,
    attention=(
        *GQA,
        one("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "A*D"),
        one("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "G*D"),
    ),
    moe=(GQA_MOE_NORM, ROUTER, *EXPERTS),
    refuse={
        "attention_bias": "OLMoE with attention biases has no public model to check against",
        "clip_qkv": "Megatron has no clipping of queries, keys and values",
    },
    notes={
        "": "its query and key norms span all heads, where Megatron-Core 0.19 norms each head: train it through this "
        "project's entry, which builds such norms (docs/convert.md, 'Norms that Megatron has no flag for')"
    },
    flags={
        **GQA_FLAGS,
        "--ffn-hidden-size": "F",
        "--qk-layernorm": "=",
        "--moe-router-pre-softmax": "!norm_topk_prob",
    },
)
