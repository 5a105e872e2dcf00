"""Tiny random models of awkward shapes, written by transformers, with its own logits on random tokens.

usage: make_hf_models.py OUT                  OUT/NAME/{config.json, *.safetensors}, OUT/NAME.{tokens,logits}.pt
       make_hf_models.py MODEL TOKENS LOGITS  logits of a model that was not made here
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

COMMON = {
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 203,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MLA = {
    **COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 88,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
# Megatron scores a group by its top (topk // topk_group) experts, transformers always by its top 2: they agree at 2.
GROUPS = {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}


def configs() -> dict[str, PreTrainedConfig]:
    """Name -> configuration."""
    return {
        "mixtral": MixtralConfig(
            **COMMON, intermediate_size=56, num_local_experts=4, num_experts_per_tok=2
        ),
        "qwen3": Qwen3MoeConfig(
            **COMMON,
            head_dim=16,
            intermediate_size=88,
            moe_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
        "qwen2": Qwen2MoeConfig(
            **{**COMMON, "tie_word_embeddings": True},
            intermediate_size=88,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_experts=4,
            num_experts_per_tok=2,
        ),
        "dsv2lite": DeepseekV2Config(
            **MLA, first_k_dense_replace=1, q_lora_rank=None, num_experts_per_tok=2
        ),
        "dsv2": DeepseekV2Config(
            **MLA, first_k_dense_replace=1, q_lora_rank=18, num_experts_per_tok=2
        ),
        "dsv3": DeepseekV3Config(**MLA, **GROUPS, first_k_dense_replace=3, q_lora_rank=18),
        "moonlight": DeepseekV3Config(
            **MLA,
            **{**GROUPS, "n_group": 1},
            first_k_dense_replace=1,
            q_lora_rank=None,
            num_nextn_predict_layers=0,
        ),
        "glm": Glm4MoeConfig(
            **COMMON,
            **{**GROUPS, "n_group": 1},
            head_dim=16,
            intermediate_size=88,
            moe_intermediate_size=24,
            n_routed_experts=4,
            n_shared_experts=1,
            first_k_dense_replace=1,
            attention_bias=True,
            use_qk_norm=True,
            partial_rotary_factor=0.5,
        ),
        "gpt_oss": GptOssConfig(
            **COMMON,
            head_dim=16,
            intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=8,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "olmoe": OlmoeConfig(**COMMON, intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    }


def make(name: str, config: PreTrainedConfig, out: Path) -> None:
    """Save the model and its logits; every parameter is far from its initial value, so that a swap shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * noise if "norm" in parameter_name else 0.08 * noise)
        for buffer_name, buffer in model.named_buffers():
            if "e_score" in buffer_name:
                buffer.copy_(0.1 * torch.randn_like(buffer))
    model.eval().save_pretrained(out / name, max_shard_size="150KB")
    tokens = torch.randint(0, config.vocab_size, (2, 16))
    with torch.no_grad():
        torch.save(model(tokens).logits, out / f"{name}.logits.pt")
    torch.save(tokens, out / f"{name}.tokens.pt")


def read(folder: str, tokens: str, logits: str) -> None:
    """Load a model as any user would, and save its logits."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        torch.save(model.eval()(torch.load(tokens, weights_only=True)).logits, logits)


if __name__ == "__main__" and len(sys.argv) == 4:
    read(*sys.argv[1:])
elif __name__ == "__main__":
    for model_name, model_config in configs().items():
        make(model_name, model_config, Path(sys.argv[1]))
