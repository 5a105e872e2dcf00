"""Qwen3-Next (80B-A3B): most layers attend through a gated delta net, the others by gated softmax attention.

Norms are centred on zero on both sides, but for the delta net's own output norm: Hugging Face centres that one on one.
"""

from __future__ import annotations

from moe_bench.checkpoint.families.blocks import (
    DENSE_MLP,
    EXPERTS,
    GQA_DENSE_NORM,
    GQA_FLAGS,
    GQA_MOE_NORM,
    GQA_SIZES,
    MODEL,
    QK_NORM,
    ROUTER,
    shared_expert,
)
from moe_bench.checkpoint.family import (
    Family,
    Part,
    Row,
    Share,
    View,
    linear_layer_types,
    one,
    sparse_step,
)

_QKVZ, _BA = "linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"
_CONV = "linear_attn.conv1d.weight"


def _part_of(key: str, name: str, shape: str, groups: str, first: str, whole: str) -> Row:
    return Row(key=key, parts=(Part(name, shape, share=Share(groups, first, whole)),))


_DELTA_NET = (
    one("self_attention.in_proj.layer_norm_weight", "input_layernorm.weight", "H"),
    # Hugging Face alternates by key head; Megatron stores six tensors, so that each is cut by tensor parallelism.
    _part_of("self_attention.in_proj.weight.query", _QKVZ, "K*M H", "K", "0", "M+M+Z+Z"),
    _part_of("self_attention.in_proj.weight.key", _QKVZ, "K*M H", "K", "M", "M+M+Z+Z"),
    _part_of("self_attention.in_proj.weight.value", _QKVZ, "Y*U H", "K", "M+M", "M+M+Z+Z"),
    _part_of("self_attention.in_proj.weight.z", _QKVZ, "Y*U H", "K", "M+M+Z", "M+M+Z+Z"),
    _part_of("self_attention.in_proj.weight.beta", _BA, "Y H", "K", "0", "B+B"),
    _part_of("self_attention.in_proj.weight.alpha", _BA, "Y H", "K", "B", "B+B"),
    _part_of("self_attention.conv1d.weight.query", _CONV, "K*M 1 T", "1", "0", "K*M+K*M+Y*U"),
    _part_of("self_attention.conv1d.weight.key", _CONV, "K*M 1 T", "1", "K*M", "K*M+K*M+Y*U"),
    _part_of("self_attention.conv1d.weight.value", _CONV, "Y*U 1 T", "1", "K*M+K*M", "K*M+K*M+Y*U"),
    one("self_attention.A_log", "linear_attn.A_log", "Y"),
    one("self_attention.dt_bias", "linear_attn.dt_bias", "Y"),
    Row(
        key="self_attention.out_norm.weight",
        parts=(Part("linear_attn.norm.weight", "U", View(less_one=True)),),
        dtype="F32",
    ),
    one("self_attention.out_proj.weight", "linear_attn.out_proj.weight", "H Y*U"),
)

_GATED_ATTENTION = (
    one("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "H"),
    Row(
        key="self_attention.linear_qkv.weight",
        parts=(
            Part("self_attn.q_proj.weight", "A*D H", share=Share("A", "0", "D+D")),
            Part("self_attn.q_proj.weight", "A*D H", share=Share("A", "D", "D+D")),
            Part("self_attn.k_proj.weight", "G*D H"),
            Part("self_attn.v_proj.weight", "G*D H"),
        ),
        groups="G",
    ),
    *QK_NORM,
    one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H A*D"),
)

QWEN3_NEXT = Family(
    name="qwen3_next",
    architectures=("Qwen3NextForCausalLM",),
    sizes={
        **GQA_SIZES,
        "I": "intermediate_size",
        "F": "moe_intermediate_size",
        "E": "num_experts | num_local_experts",
        "S": "shared_expert_intermediate_size",
        "K": "linear_num_key_heads",
        "M": "linear_key_head_dim",
        "Y": "linear_num_value_heads",
        "U": "linear_value_head_dim",
        "B": "Y/K",
        "Z": "Y*U/K",
        "T": "linear_conv_kernel_dim",
    },
    model=MODEL,
    attention=_GATED_ATTENTION,
    linear_attention=_DELTA_NET,
    dense=(GQA_DENSE_NORM, *DENSE_MLP),
    moe=(
        GQA_MOE_NORM,
        ROUTER,
        *EXPERTS,
        *shared_expert("shared_expert"),
        one("mlp.shared_experts.gate_weight", "mlp.shared_expert_gate.weight", "1 H"),
    ),
    mtp=(
        one("enorm.weight", "pre_fc_norm_embedding.weight", "H"),
        one("hnorm.weight", "pre_fc_norm_hidden.weight", "H"),
        one("eh_proj.weight", "fc.weight", "H 2*H"),
        one("final_layernorm.weight", "norm.weight", "H"),
    ),
    mtp_prefix="mtp.",
    is_dense=sparse_step,
    is_linear=linear_layer_types,
    local_spec=False,
    per_layer_keys=True,
    refuse={
        "attention_bias": "Qwen3-Next with attention biases has no public model to check against"
    },
    notes={
        "": "Megatron-Core 0.19 does not build multi-token prediction beside linear attention "
        "(training/models/gpt.py mtp_block_spec): train without --mtp-num-layers"
    },
    flags={
        **GQA_FLAGS,
        "--ffn-hidden-size": "I",
        "--qk-layernorm": "=",
        "--attention-output-gate": "=",
        "--apply-layernorm-1p": "=",
        "--moe-shared-expert-intermediate-size": "S",
        "--moe-shared-expert-gate": "=",
        "--moe-router-pre-softmax": "!norm_topk_prob",
        "--experimental-attention-variant": "=gated_delta_net",
        "--linear-conv-kernel-dim": "T",
        "--linear-key-head-dim": "M",
        "--linear-value-head-dim": "U",
        "--linear-num-key-heads": "K",
        "--linear-num-value-heads": "Y",
    },
)
