"""Small GPT models over the reference layers, for the tests beside this file. Import under the CPU embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import (
    experimental_attention_variant_module_specs as variants,
    gpt_layer_specs as specs,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

VOCABULARY = 64
SEQUENCE = 16

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "use_cpu_initialization": True,
    "init_method_std": 0.2,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "bias_activation_fusion": False,
    "gradient_accumulation_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_grouped_gemm": True,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
    "pipeline_dtype": torch.float32,
}


def start_groups(tp: int = 1, cp: int = 1, ep: int = 1, etp: int | None = None) -> None:
    """Lay the ranks out anew and seed Megatron's random streams. A layout's groups are made once."""
    layout = (tp, cp, ep, etp)
    mpu.destroy_model_parallel()
    if layout in _layouts:
        vars(mpu).update(_layouts[layout])
    else:
        mpu.initialize_model_parallel(
            tp,
            1,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
        )
        # Megatron drops its groups and never ends them: made anew for each case, they and their threads would pile up.
        _layouts[layout] = {name: value for name, value in vars(mpu).items() if name.isupper()}
    model_parallel_cuda_manual_seed(7, force_reset_rng=True)
    torch.manual_seed(7)


_layouts: dict[tuple[int, int, int, int | None], dict[str, Any]] = {}
"""Megatron's global groups of each layout (megatron/core/parallel_state.py, 0.19.2: its names in capitals)."""


def config(**changes: Any) -> TransformerConfig:
    """The base configuration with changes, laid out as the current groups."""
    tp = mpu.get_tensor_model_parallel_world_size()
    layout = {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "context_parallel_size": mpu.get_context_parallel_world_size(),
        "expert_model_parallel_size": mpu.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": mpu.get_expert_tensor_parallel_world_size(),
    }
    kind = MLATransformerConfig if changes.get("multi_latent_attention") else TransformerConfig
    return kind(**{**BASE, **layout, **changes})


def model(settings: TransformerConfig, **options: Any) -> GPTModel:
    """A GPT model of that configuration; its initial weights do not depend on TP, CP, EP or ETP."""
    torch.manual_seed(11)
    if settings.experimental_attention_variant is not None:
        spec = variants.get_transformer_block_with_experimental_attention_variant_spec(settings)
    else:
        spec = specs.get_gpt_decoder_block_spec(settings, use_transformer_engine=False)
    mtp = None
    if settings.mtp_num_layers:
        mtp = specs.get_gpt_mtp_block_spec(settings, spec, use_transformer_engine=False)
    position = "none" if settings.multi_latent_attention else "rope"
    return GPTModel(
        config=settings,
        transformer_layer_spec=spec,
        mtp_block_spec=mtp,
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        share_embeddings_and_output_weights=False,
        **{"position_embedding_type": position, **options},
    )


def tokens() -> torch.Tensor:
    """Two sequences with their next tokens: [2, SEQUENCE + 1]."""
    return torch.randint(
        0, VOCABULARY, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(3)
    )


def own_of_sequence(whole: torch.Tensor) -> torch.Tensor:
    """This context-parallel rank's two chunks of dimension 1."""
    size, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    chunks = whole.chunk(2 * size, dim=1)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=1) if size > 1 else whole


def loss_and_gradients(gpt: GPTModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss over the whole sequences and this rank's gradients, reduced as Megatron reduces them."""
    batch = tokens()
    positions = torch.arange(SEQUENCE).expand(2, -1)
    inputs, labels, positions = (
        own_of_sequence(t).contiguous() for t in (batch[:, :-1], batch[:, 1:], positions)
    )
    gpt.zero_grad()
    losses = gpt(inputs, positions, None, labels=labels)
    losses.sum().backward()
    total = losses.detach().sum()
    cp_group = mpu.get_context_parallel_group()
    dist.all_reduce(total, group=cp_group)
    gradients = {}
    for name, parameter in gpt.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if getattr(parameter, "sequence_parallel", False):
            dist.all_reduce(gradient, group=mpu.get_tensor_model_parallel_group())
        if getattr(parameter, "allreduce", True):
            dist.all_reduce(gradient, group=cp_group)
        gradients[name] = gradient
    return total, gradients


def own_part(whole: torch.Tensor, parameter: torch.nn.Parameter, *, expert: bool) -> torch.Tensor:
    """The part of the one-rank tensor that this rank's parameter holds."""
    if expert and whole.dim() > 1 and whole.shape[0] == 4:  # stacked experts or their biases
        whole = whole.chunk(mpu.get_expert_model_parallel_world_size())[
            mpu.get_expert_model_parallel_rank()
        ]
    if whole.shape == parameter.shape:
        return whole
    size = (
        mpu.get_expert_tensor_parallel_world_size()
        if expert
        else mpu.get_tensor_model_parallel_world_size()
    )
    rank = mpu.get_expert_tensor_parallel_rank() if expert else mpu.get_tensor_model_parallel_rank()
    axis, stride = parameter.partition_dim, parameter.partition_stride
    return torch.cat(whole.chunk(size * stride, dim=axis)[rank::size], dim=axis)
