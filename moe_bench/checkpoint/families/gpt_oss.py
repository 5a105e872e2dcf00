"""gpt-oss-20b and gpt-oss-120b, as published (experts in MXFP4) and in bfloat16.

One tensor holds all experts of a layer, and gate and up rows alternate. MXFP4 codes lie in rows of the matrix; the
bfloat16 form that transformers writes is transposed.
"""

from __future__ import annotations

from moe_bench.checkpoint.families.blocks import (
    COMMON_FLAGS,
    GQA,
    GQA_MOE_NORM,
    GQA_SIZES,
    MODEL,
    QKV_BIAS,
)
from moe_bench.checkpoint.family import Family, Part, Row, View, one

_GATE, _UP = View(transpose=True, start=0, step=2), View(transpose=True, start=1, step=2)
_PACKED = View(packed=True)
_PACKED_GATE, _PACKED_UP = View(start=0, step=2, packed=True), View(start=1, step=2, packed=True)
_FLAGS = {
    flag: rule
    for flag, rule in COMMON_FLAGS.items()
    if flag not in ("--disable-bias-linear", "--swiglu")
}

GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    sizes={**GQA_SIZES, "F": "intermediate_size", "E": "num_local_experts | num_experts"},
    model=MODEL,
    attention=(
        *GQA,
        QKV_BIAS,
        one("self_attention.linear_proj.bias", "self_attn.o_proj.bias", "H"),
        one("self_attention.core_attention.softmax_offset", "self_attn.sinks", "A"),
    ),
    moe=(
        GQA_MOE_NORM,
        one("mlp.router.weight", "mlp.router.weight", "E H"),
        one("mlp.router.bias", "mlp.router.bias", "E"),
        Row(
            key="mlp.experts.experts.linear_fc1.weight",
            parts=(
                Part("mlp.experts.gate_up_proj", "F H", _GATE),
                Part("mlp.experts.gate_up_proj", "F H", _UP),
            ),
            experts=True,
            when="!quantization_config",
        ),
        Row(
            key="mlp.experts.experts.linear_fc1.weight",
            parts=(
                Part("mlp.experts.gate_up_proj_blocks", "F H", _PACKED_GATE),
                Part("mlp.experts.gate_up_proj_blocks", "F H", _PACKED_UP),
            ),
            experts=True,
            when="quantization_config",
        ),
        Row(
            key="mlp.experts.experts.linear_fc1.bias",
            parts=(
                Part("mlp.experts.gate_up_proj_bias", "F", _GATE),
                Part("mlp.experts.gate_up_proj_bias", "F", _UP),
            ),
            experts=True,
        ),
        Row(
            key="mlp.experts.experts.linear_fc2.weight",
            parts=(Part("mlp.experts.down_proj", "H F", View(transpose=True)),),
            experts=True,
            when="!quantization_config",
        ),
        Row(
            key="mlp.experts.experts.linear_fc2.weight",
            parts=(Part("mlp.experts.down_proj_blocks", "H F", _PACKED),),
            experts=True,
            when="quantization_config",
        ),
        one("mlp.experts.experts.linear_fc2.bias", "mlp.experts.down_proj_bias", "H", experts=True),
    ),
    flags={
        **_FLAGS,
        "--group-query-attention": "=",
        "--num-query-groups": "G",
        "--kv-channels": "D",
        "--ffn-hidden-size": "F",
        "--add-qkv-bias": "=",
        "--quick-geglu": "=",
        "--glu-linear-offset": "=1.0",
        "--activation-func-clamp-value": "@swiglu_limit",
        "--softmax-type": "=learnable",
    },
)
