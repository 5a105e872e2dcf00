"""What the layer tests build and on which layouts: data only, so that pytest can list the cases without torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

GQA: dict[str, Any] = {"num_query_groups": 2, "kv_channels": 8, "qk_layernorm": True}
MLA: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rope_type": "rope",
    "qk_layernorm": True,
}
SPARSE_MLA: dict[str, Any] = {
    **MLA,
    "experimental_attention_variant": "dsa",
    "dsa_indexer_n_heads": 4,
    "dsa_indexer_head_dim": 16,
    "dsa_indexer_topk": 64,
    "dsa_indexer_loss_coeff": 0.0,
    "cp_comm_type": "allgather",
}
"""Attends to every key: no choice hangs on a rounding."""
GATED_DELTA_NET = "gated delta net"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gqa": GQA,
    "mla": MLA,
    "mla without query compression": {**MLA, "q_lora_rank": None},
    "sparse attention": SPARSE_MLA,
    "experts one after the other": {**GQA, "moe_grouped_gemm": False},
    "shared expert": {**GQA, "moe_shared_expert_intermediate_size": 24},
    "latent experts": {
        **GQA,
        "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 24,
    },
    "biases in experts": {**GQA, "add_bias_linear": True},
    "sinks and window": {
        **GQA,
        "softmax_type": "learnable",
        "window_size": (5, 0),
        "window_attn_skip_freq": 2,
    },
    "sigmoid router in groups": {
        **GQA,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_dtype": "fp32",
    },
    "all-gather dispatcher": {**GQA, "moe_token_dispatcher_type": "allgather"},
    "layer norm around zero": {
        **GQA,
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
    },
    GATED_DELTA_NET: {
        "num_query_groups": 2,
        "kv_channels": 8,
        "qk_layernorm": True,
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": 2,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "attention_output_gate": True,
        "moe_shared_expert_intermediate_size": 24,
        "moe_shared_expert_gate": True,
        "layernorm_zero_centered_gamma": True,
    },
}
LAYOUTS: dict[str, dict[str, int]] = {
    "TP2 with sequence parallel": {"tp": 2, "etp": 1},
    "TP2 and ETP2": {"tp": 2, "etp": 2},
    "CP2": {"cp": 2},
    "EP2": {"ep": 2},
    "TP2 and EP2": {"tp": 2, "etp": 1, "ep": 2},
}


def cases() -> list[tuple[str, str]]:
    """Every architecture on every layout that Megatron allows it."""
    refused = {("biases in experts", "TP2 and ETP2")}  # "Bias in Moe is only supported when ETP==1"
    every = [(architecture, layout) for architecture in ARCHITECTURES for layout in LAYOUTS]
    return [case for case in every if case not in refused]


def functions_of(file: str) -> list[str]:
    """Names of the cases in a file beside this one: its functions that take and return nothing."""
    source = (Path(__file__).parent / file).read_text()
    return re.findall(r"^def (\w+)\(\) -> None:", source, flags=re.MULTILINE)


FEATURES = functions_of("layer_features.py")
ROUTING = functions_of("router_features.py")
PROPERTIES = functions_of("layer_layouts.py")
