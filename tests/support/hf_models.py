"""Random Hugging Face models of awkward shapes, written without torch: the names and shapes are spelt out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moe_bench.checkpoint.arithmetic import to_bfloat16
from moe_bench.checkpoint.safetensors import build_header

Tensors = dict[str, tuple[str, np.ndarray]]
"""Name -> (dtype, bits)."""

GQA = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 37,
    "rms_norm_eps": 1e-5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    **GQA,
    "architectures": ["MixtralForCausalLM"],
    "intermediate_size": 20,
    "num_local_experts": 3,
}
QWEN3 = {
    **GQA,
    "architectures": ["Qwen3MoeForCausalLM"],
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "num_experts": 5,
    "norm_topk_prob": True,
}
QWEN2 = {
    **QWEN3,
    "architectures": ["Qwen2MoeForCausalLM"],
    "shared_expert_intermediate_size": 28,
    "tie_word_embeddings": True,
}
OLMOE = {**GQA, "architectures": ["OlmoeForCausalLM"], "intermediate_size": 12, "num_experts": 5}
GPT_OSS = {**MIXTRAL, "architectures": ["GptOssForCausalLM"], "swiglu_limit": 7.0}
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 3,
    "vocab_size": 37,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
    "intermediate_size": 36,
    "moe_intermediate_size": 10,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "q_lora_rank": 14,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}
DEEPSEEK_V2 = {
    **DEEPSEEK_V3,
    "architectures": ["DeepseekV2ForCausalLM"],
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
}
DEEPSEEK_V2_LITE = {**DEEPSEEK_V2, "q_lora_rank": None}
MOONLIGHT = {
    **DEEPSEEK_V3,
    "q_lora_rank": None,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
}
GLM = {
    **GQA,
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "use_qk_norm": True,
    "intermediate_size": 40,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "partial_rotary_factor": 0.5,
}
QWEN3_NEXT = {
    **QWEN3,
    "architectures": ["Qwen3NextForCausalLM"],
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 28,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 4,
    "linear_num_value_heads": 6,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 3,
    "partial_rotary_factor": 0.25,
}
GPT_OSS_MXFP4 = {
    **GPT_OSS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "quantization_config": {"quant_method": "mxfp4"},
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": MIXTRAL,
    "qwen2_moe tied": QWEN2,
    "qwen3_moe": QWEN3,
    "qwen3_moe with a dense layer": {**QWEN3, "mlp_only_layers": [1]},
    "qwen3_next with MTP": QWEN3_NEXT,
    "olmoe": OLMOE,
    "gpt_oss": GPT_OSS,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v2_lite": DEEPSEEK_V2_LITE,
    "deepseek_v3 with MTP": DEEPSEEK_V3,
    "moonlight": MOONLIGHT,
    "glm4_moe with MTP": GLM,
}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model that `config` describes, as its published checkpoint names them."""
    c = dict(config)
    kind = c["architectures"][0]
    H, V, L = c["hidden_size"], c["vocab_size"], c["num_hidden_layers"]
    found = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (V, H)
    mtp = c.get("num_nextn_predict_layers") or 0
    for layer in range(L + mtp):
        p = f"model.layers.{layer}."
        found |= {p + "input_layernorm.weight": (H,), p + "post_attention_layernorm.weight": (H,)}
        if kind == "Qwen3NextForCausalLM" and (layer + 1) % c["full_attention_interval"]:
            found |= {p + "linear_attn." + n: s for n, s in _delta_net(c).items()}
        else:
            found |= {p + "self_attn." + n: s for n, s in _attention(c, kind).items()}
        found |= {p + n: s for n, s in _mlp(c, kind, layer).items()}
        if layer >= L:
            found |= {p + n + ".weight": (H,) for n in ("enorm", "hnorm", "shared_head.norm")}
            found |= {p + "eh_proj.weight": (H, 2 * H), p + "embed_tokens.weight": (V, H)}
            found[p + "shared_head.head.weight"] = (V, H)
    if kind == "Qwen3NextForCausalLM":
        p = "mtp.layers.0."
        found |= {p + "input_layernorm.weight": (H,), p + "post_attention_layernorm.weight": (H,)}
        found |= {p + "self_attn." + n: s for n, s in _attention(c, kind).items()}
        found |= {p + n: s for n, s in _mlp(c, kind, 0).items()}
        norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
        found |= {f"mtp.{n}.weight": (H,) for n in norms} | {"mtp.fc.weight": (H, 2 * H)}
    return found


def _delta_net(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    heads = c["linear_num_value_heads"]
    values = heads * c["linear_value_head_dim"]
    return {
        "in_proj_qkvz.weight": (2 * keys + 2 * values, c["hidden_size"]),
        "in_proj_ba.weight": (2 * heads, c["hidden_size"]),
        "conv1d.weight": (2 * keys + values, 1, c["linear_conv_kernel_dim"]),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (c["linear_value_head_dim"],),
        "out_proj.weight": (c["hidden_size"], values),
    }


def _attention(c: dict[str, Any], kind: str) -> dict[str, tuple[int, ...]]:
    H, A = c["hidden_size"], c["num_attention_heads"]
    if kind.startswith("Deepseek"):
        q, kv, n, r, v = (
            c[k]
            for k in (
                "q_lora_rank",
                "kv_lora_rank",
                "qk_nope_head_dim",
                "qk_rope_head_dim",
                "v_head_dim",
            )
        )
        query = {
            "q_a_proj.weight": (q, H),
            "q_a_layernorm.weight": (q,),
            "q_b_proj.weight": (A * (n + r), q),
        }
        return (query if q else {"q_proj.weight": (A * (n + r), H)}) | {
            "kv_a_proj_with_mqa.weight": (kv + r, H),
            "kv_a_layernorm.weight": (kv,),
            "kv_b_proj.weight": (A * (n + v), kv),
            "o_proj.weight": (H, A * v),
        }
    G, D = c["num_key_value_heads"], c["head_dim"]
    gated = 2 if kind == "Qwen3NextForCausalLM" else 1
    found: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (gated * A * D, H),
        "k_proj.weight": (G * D, H),
        "v_proj.weight": (G * D, H),
        "o_proj.weight": (H, A * D),
    }
    if kind in ("Qwen2MoeForCausalLM", "Glm4MoeForCausalLM", "GptOssForCausalLM"):
        found |= {"q_proj.bias": (A * D,), "k_proj.bias": (G * D,), "v_proj.bias": (G * D,)}
    if kind in ("Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "Glm4MoeForCausalLM"):
        found |= {"q_norm.weight": (D,), "k_norm.weight": (D,)}
    if kind == "OlmoeForCausalLM":
        found |= {"q_norm.weight": (A * D,), "k_norm.weight": (G * D,)}
    if kind == "GptOssForCausalLM":
        found |= {"o_proj.bias": (H,), "sinks": (A,)}
    return found


def _mlp(c: dict[str, Any], kind: str, layer: int) -> dict[str, tuple[int, ...]]:
    H = c["hidden_size"]
    E = c.get("num_local_experts") or c.get("num_experts") or c.get("n_routed_experts")
    F = c.get("moe_intermediate_size") or c["intermediate_size"]
    if layer < c.get("first_k_dense_replace", 0) or layer in c.get("mlp_only_layers", ()):
        return _gated("mlp.", c["intermediate_size"], H)
    if kind == "GptOssForCausalLM":
        return {
            "mlp.router.weight": (E, H),
            "mlp.router.bias": (E,),
            "mlp.experts.gate_up_proj": (E, H, 2 * F),
            "mlp.experts.gate_up_proj_bias": (E, 2 * F),
            "mlp.experts.down_proj": (E, F, H),
            "mlp.experts.down_proj_bias": (E, H),
        }
    if kind == "MixtralForCausalLM":
        p = "block_sparse_moe."
        found = {p + "gate.weight": (E, H)}
        for e in range(E):
            found |= {f"{p}experts.{e}.w1.weight": (F, H), f"{p}experts.{e}.w3.weight": (F, H)}
            found[f"{p}experts.{e}.w2.weight"] = (H, F)
        return found
    found = {"mlp.gate.weight": (E, H)}
    for e in range(E):
        found |= _gated(f"mlp.experts.{e}.", F, H)
    if kind in ("DeepseekV3ForCausalLM", "Glm4MoeForCausalLM"):
        found["mlp.gate.e_score_correction_bias"] = (E,)
    if c.get("n_shared_experts"):
        found |= _gated("mlp.shared_experts.", F * c["n_shared_experts"], H)
    if kind in ("Qwen2MoeForCausalLM", "Qwen3NextForCausalLM"):
        found |= _gated("mlp.shared_expert.", c["shared_expert_intermediate_size"], H)
        found["mlp.shared_expert_gate.weight"] = (1, H)
    return found


def _gated(prefix: str, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        prefix + "gate_proj.weight": (width, hidden),
        prefix + "up_proj.weight": (width, hidden),
        prefix + "down_proj.weight": (hidden, width),
    }


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> Tensors:
    """bfloat16 weights, float32 expert biases; an MTP layer's copies equal what they copy."""
    chance = np.random.default_rng(seed)
    tensors: Tensors = {}
    for name, shape in shapes(config).items():
        values = chance.standard_normal(shape, dtype=np.float32)
        if name.endswith("e_score_correction_bias"):
            tensors[name] = ("F32", values.view(np.uint32))
        else:
            tensors[name] = ("BF16", to_bfloat16(values))
    for name in tensors:
        if name.endswith(".shared_head.head.weight"):
            tensors[name] = tensors["lm_head.weight"]
        if name.startswith("model.layers.") and name.endswith(".embed_tokens.weight"):
            tensors[name] = tensors["model.embed_tokens.weight"]
    return tensors


def quantize(tensors: Tensors, block: int, seed: int = 1) -> Tensors:
    """The projections as random FP8 blocks with their scales, as DeepSeek-V3 is published."""
    chance = np.random.default_rng(seed)
    out: Tensors = {}
    for name, (dtype, bits) in tensors.items():
        if "_proj" in name and bits.ndim == 2 and "eh_proj" not in name:
            codes = chance.integers(0, 256, bits.shape, dtype=np.uint8)
            codes[codes & 0x7F == 0x7F] = 0x38
            grid = tuple(-(-size // block) for size in bits.shape)
            scales = chance.uniform(1e-4, 1e-2, grid).astype(np.float32)
            out[name] = ("F8_E4M3", codes)
            out[name + "_scale_inv"] = ("F32", scales.view(np.uint32))
        else:
            out[name] = (dtype, bits)
    return out


def pack_experts(tensors: Tensors, seed: int = 2) -> Tensors:
    """The experts' projections as random MXFP4 codes and scales, as gpt-oss is published."""
    chance = np.random.default_rng(seed)
    out: Tensors = {}
    for name, (dtype, bits) in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = bits.shape
            grid = (experts, rows, columns // 32)
            out[name + "_blocks"] = ("U8", chance.integers(0, 256, (*grid, 16), dtype=np.uint8))
            out[name + "_scales"] = ("U8", chance.integers(115, 126, grid, dtype=np.uint8))
        else:
            out[name] = (dtype, bits)
    return out


def write_model(
    folder: Path, config: Mapping[str, Any], tensors: Tensors, *, shards: int = 2
) -> Path:
    """config.json, a tokenizer file, the shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"not": "re-serialised",   "spaces":1}')
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = (
            f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        )
        write_file(folder / file, {name: tensors[name] for name in names[i::shards]})
        weight_map |= dict.fromkeys(names[i::shards], file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_file(path: Path, tensors: Tensors) -> None:
    """One safetensors file."""
    header, _ = build_header([(n, dtype, bits.shape) for n, (dtype, bits) in tensors.items()])
    path.write_bytes(header + b"".join(bits.tobytes() for _, bits in tensors.values()))


def make_model(folder: Path, config: Mapping[str, Any], **more: Any) -> Path:
    """A random model of this configuration."""
    return write_model(folder, config, random_tensors(config), **more)
