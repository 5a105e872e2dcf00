"""Tiny random models of awkward shapes, written by transformers, with its own logits on random tokens.

usage: make_hf_models.py OUT                       OUT/NAME/{config.json, *.safetensors}, OUT/NAME.{tokens,logits}.pt
       make_hf_models.py {MODEL TOKENS LOGITS}...  logits of models that were not made here
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
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
    Qwen3NextConfig,
)
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

COMMON = {
    "hidden_size": 48,
    "num_hidden_layers": 6,
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


def yarn(**more: object) -> dict[str, object]:
    """RoPE as DeepSeek and gpt-oss publish it: long periods are stretched, and so the attention's temperature."""
    base = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "beta_fast": 32.0}
    return {**base, "beta_slow": 1.0, "original_max_position_embeddings": 4096, **more}


GPT_OSS = {
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "rope_parameters": yarn(factor=32.0, rope_theta=150000.0, truncate=False),
}


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
            **MLA,
            first_k_dense_replace=1,
            q_lora_rank=18,
            num_experts_per_tok=2,
            rope_parameters=yarn(mscale=0.707, mscale_all_dim=0.707),
        ),
        "dsv3": DeepseekV3Config(
            **MLA,
            **GROUPS,
            first_k_dense_replace=3,
            q_lora_rank=18,
            rope_parameters=yarn(mscale=1.0, mscale_all_dim=1.0),
        ),
        "dsv3_top1": DeepseekV3Config(
            **MLA, **{**GROUPS, "num_experts_per_tok": 1}, first_k_dense_replace=3, q_lora_rank=18
        ),
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
        "gpt_oss": GptOssConfig(**COMMON, **GPT_OSS, intermediate_size=28),
        "gpt_oss_mxfp4": GptOssConfig(
            **{**COMMON, "hidden_size": 64}, **GPT_OSS, intermediate_size=96
        ),
        "qwen3_next": Qwen3NextConfig(
            **COMMON,
            head_dim=16,
            intermediate_size=88,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            num_experts=4,
            num_experts_per_tok=2,
            linear_num_key_heads=2,
            linear_key_head_dim=12,
            linear_num_value_heads=4,
            linear_value_head_dim=10,
            full_attention_interval=3,
        ),
        "olmoe": OlmoeConfig(**COMMON, intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    }


def make(
    name: str,
    config: PreTrainedConfig,
    out: Path,
    *,
    dtype: str = "float32",
    folder: Path | None = None,
) -> None:
    """Save the model and its logits; every parameter is far from its initial value, so that a swap shows.

    With `folder` the model alone goes there.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype), attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(_centre(config, parameter_name) + _spread(parameter_name) * noise)
        for buffer_name, buffer in model.named_buffers():
            if "e_score" in buffer_name:
                buffer.copy_(0.1 * torch.randn_like(buffer))
    if "mxfp4" in name:
        save_mxfp4(model, folder or out / name)
    else:
        model.save_pretrained(folder or out / name, max_shard_size="150KB")
    if folder is not None:
        return
    model.eval()
    tokens = torch.randint(0, config.vocab_size, (2, 16))
    with torch.no_grad():
        torch.save(model(tokens).logits, out / f"{name}.logits.pt")
    torch.save(tokens, out / f"{name}.tokens.pt")


def _centre(config: PreTrainedConfig, name: str) -> float:
    """Where a norm scales by one: Qwen3-Next's norms are centred on zero, but for the delta net's own.

    A slow decay keeps transformers' own two forms of the delta rule (in chunks, token by token) within 3.5e-6.
    """
    if name.endswith("A_log"):
        return -3.0
    from_one = config.model_type != "qwen3_next" or "linear_attn.norm" in name
    return 1.0 if "norm" in name and from_one else 0.0


def _spread(name: str) -> float:
    if name.endswith(("A_log", "dt_bias")):
        return 0.7
    if "conv1d" in name:
        return 0.5  # else the delta net would normalise values of 1e-5, which are mostly rounding
    return 0.2 if "norm" in name else 0.08


def save_mxfp4(model: torch.nn.Module, folder: Path) -> None:
    """Give the experts random MXFP4 weights, as transformers reads them, and save the codes and scales."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, parameter in model.state_dict().items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = parameter
            continue
        experts, columns, rows = parameter.shape
        grid = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*grid, 16), dtype=torch.uint8)
        scales = torch.randint(121, 124, grid, dtype=torch.uint8)
        tensors[name + "_blocks"], tensors[name + "_scales"] = blocks, scales
        with torch.no_grad():
            parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read(folder: str, tokens: str, logits: str) -> None:
    """Load a model as any user would, and save its logits."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        torch.save(model.eval()(torch.load(tokens, weights_only=True)).logits, logits)


if __name__ == "__main__" and len(sys.argv) > 2:
    for words in itertools.batched(sys.argv[1:], 3):
        read(*words)
elif __name__ == "__main__":
    for model_name, model_config in configs().items():
        make(model_name, model_config, Path(sys.argv[1]))
