"""Rows that several families share."""

from __future__ import annotations

from moe_bench.checkpoint.family import Part, Row, gate_up, one, qkv

MODEL = (
    one("embedding.word_embeddings.weight", "model.embed_tokens.weight", "V H"),
    one("decoder.final_layernorm.weight", "model.norm.weight", "H"),
    one("output_layer.weight", "lm_head.weight", "V H", when="!tie_word_embeddings"),
)

GQA = (
    one("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", "H"),
    qkv("self_attention.linear_qkv.weight", "self_attn.{q,k,v}_proj.weight", "H"),
    one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H A*D"),
)

QKV_BIAS = qkv("self_attention.linear_qkv.bias", "self_attn.{q,k,v}_proj.bias", "")

QK_NORM = (
    one("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "D"),
    one("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "D"),
)

GQA_DENSE_NORM = one("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight", "H")
"""Norm before a dense MLP beside grouped-query attention."""

GQA_MOE_NORM = one(
    "pre_mlp_layernorm.weight",
    "post_attention_layernorm.weight",
    "H",
    local="mlp.linear_fc1.layer_norm_weight",
)
"""Norm before experts beside grouped-query attention: the local spec's key map renames it too."""

MLA = (
    one("input_layernorm.weight", "input_layernorm.weight", "H"),
    one(
        "self_attention.linear_q_proj.weight",
        "self_attn.q_proj.weight",
        "A*K H",
        when="!q_lora_rank",
    ),
    one(
        "self_attention.linear_q_down_proj.weight",
        "self_attn.q_a_proj.weight",
        "Q H",
        when="q_lora_rank",
    ),
    one(
        "self_attention.linear_q_up_proj.layer_norm_weight",
        "self_attn.q_a_layernorm.weight",
        "Q",
        local="self_attention.q_layernorm.weight",
        when="q_lora_rank",
    ),
    one(
        "self_attention.linear_q_up_proj.weight",
        "self_attn.q_b_proj.weight",
        "A*K Q",
        when="q_lora_rank",
    ),
    one(
        "self_attention.linear_kv_down_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "C+R H"
    ),
    one(
        "self_attention.linear_kv_up_proj.layer_norm_weight",
        "self_attn.kv_a_layernorm.weight",
        "C",
        local="self_attention.kv_layernorm.weight",
    ),
    one("self_attention.linear_kv_up_proj.weight", "self_attn.kv_b_proj.weight", "A*N+A*W C"),
    one("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "H A*W"),
)
"""Multi-head latent attention. No RoPE permutation either way: Megatron de-interleaves at run time, as HF does."""

MLA_DENSE_NORM = one(
    "mlp.linear_fc1.layer_norm_weight",
    "post_attention_layernorm.weight",
    "H",
    local="pre_mlp_layernorm.weight",
)
MLA_MOE_NORM = one("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "H")

DENSE_MLP = (
    gate_up("mlp.linear_fc1.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "I H"),
    one("mlp.linear_fc2.weight", "mlp.down_proj.weight", "H I"),
)

ROUTER = one("mlp.router.weight", "mlp.gate.weight", "E H")

EXPERT_BIAS = one("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias", "E", dtype="F32")
"""Float32 always: Megatron updates it by steps that bfloat16 would round away."""

EXPERTS = (
    Row(
        key="mlp.experts.experts.linear_fc1.weight",
        parts=(
            Part("mlp.experts.{e}.gate_proj.weight", "F H"),
            Part("mlp.experts.{e}.up_proj.weight", "F H"),
        ),
        experts=True,
    ),
    one(
        "mlp.experts.experts.linear_fc2.weight",
        "mlp.experts.{e}.down_proj.weight",
        "H F",
        experts=True,
    ),
)


def shared_expert(name: str, when: str | None = None) -> tuple[Row, ...]:
    """The rows of a shared expert (several side by side are one wide MLP of S columns)."""
    return (
        gate_up(
            "mlp.shared_experts.linear_fc1.weight",
            f"mlp.{name}.gate_proj.weight",
            f"mlp.{name}.up_proj.weight",
            "S H",
            when=when,
        ),
        one(
            "mlp.shared_experts.linear_fc2.weight", f"mlp.{name}.down_proj.weight", "H S", when=when
        ),
    )


MTP = (
    one("enorm.weight", "enorm.weight", "H"),
    one("hnorm.weight", "hnorm.weight", "H"),
    one("eh_proj.weight", "eh_proj.weight", "H 2*H"),
    one("final_layernorm.weight", "shared_head.norm.weight", "H"),
)
"""Beside the MTP layer's own transformer layer. eh_proj joins in the same order on both sides."""

MTP_COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}

GQA_SIZES = {
    "L": "num_hidden_layers",
    "H": "hidden_size",
    "V": "vocab_size",
    "A": "num_attention_heads",
    "G": "num_key_value_heads | A",
    "D": "head_dim | H/A",
}

MLA_SIZES = {
    "L": "num_hidden_layers",
    "H": "hidden_size",
    "V": "vocab_size",
    "A": "num_attention_heads",
    "Q": "q_lora_rank | 0",
    "C": "kv_lora_rank",
    "N": "qk_nope_head_dim",
    "R": "qk_rope_head_dim",
    "W": "v_head_dim",
    "K": "N+R",
}

COMMON_FLAGS = {
    "--num-layers": "L",
    "--hidden-size": "H",
    "--num-attention-heads": "A",
    "--normalization": "=RMSNorm",
    "--norm-epsilon": "@rms_norm_eps",
    "--swiglu": "=",
    "--disable-bias-linear": "=",
    "--position-embedding-type": "=rope",
    "--max-position-embeddings": "@max_position_embeddings",
    "--untie-embeddings-and-output-weights": "!tie_word_embeddings",
    "--num-experts": "E",
    "--moe-ffn-hidden-size": "F",
    "--moe-router-topk": "@num_experts_per_tok",
    "--moe-router-load-balancing-type": "=none",
    "--moe-aux-loss-coeff": "=0",
    "--attention-dropout": "=0.0",
    "--hidden-dropout": "=0.0",
}
GQA_FLAGS = {
    **COMMON_FLAGS,
    "--group-query-attention": "=",
    "--num-query-groups": "G",
    "--kv-channels": "D",
}
MLA_FLAGS = {
    **COMMON_FLAGS,
    "--multi-latent-attention": "=",
    "--q-lora-rank": "@q_lora_rank",
    "--kv-lora-rank": "C",
    "--qk-head-dim": "N",
    "--qk-pos-emb-head-dim": "R",
    "--v-head-dim": "W",
    "--qk-layernorm": "=",
}
