"""How many parameters a model has. Exact: equals what Megatron builds. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_bench.config.run import Setting
from moe_bench.planner.architecture import (
    Architecture,
    DeltaAttention,
    Experts,
    Indexer,
    LatentAttention,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamCount:
    """Numbers of parameters."""

    total: int
    """All but the multi-token prediction modules, as model cards count."""
    active: int
    """Those one token passes through: `total` less the experts it was not sent to. Both embeddings count."""
    mtp: int
    """Parameters of the multi-token prediction modules."""


def count(args: Mapping[str, Setting]) -> ParamCount:
    """Of a run's flags. Raises ArgumentsError where a needed flag is missing."""
    return of(Architecture.of(args))


def of(arch: Architecture) -> ParamCount:
    """Of a model's sizes."""
    embeddings = arch.vocab * arch.hidden * (1 if arch.tied else 2)
    layers = [layer(arch, index) for index in range(arch.layers)]
    total = embeddings + sum(layers) + arch.hidden
    idle = sum(idle_experts(arch, index) for index in range(arch.layers))
    return ParamCount(total=total, active=total - idle, mtp=arch.mtp_layers * mtp_module(arch))


def layer(arch: Architecture, index: int) -> int:
    """One decoder layer with its two norms."""
    return attention(arch, index) + feed_forward(arch, index) + 2 * arch.hidden


def mtp_module(arch: Architecture) -> int:
    """Two norms, the projection of 2h to h, a layer like the last one, a final norm; embeddings are shared.

    (DeepSeek-V3, arXiv:2412.19437, section 2.2)
    """
    return 3 * arch.hidden + 2 * arch.hidden**2 + layer(arch, arch.layers - 1)


def attention(arch: Architecture, index: int) -> int:
    """The mixing part of a layer, without the norm before it."""
    if arch.is_delta_layer[index] and arch.delta:
        return _delta(arch, arch.delta)
    if arch.latent:
        indexer = arch.indexer_of(index)
        return _latent(arch, arch.latent) + (_indexer(arch, indexer) if indexer else 0)
    return _softmax(arch)


def feed_forward(arch: Architecture, index: int) -> int:
    """The feed-forward part of a layer, without the norm before it."""
    if arch.is_expert_layer[index] and arch.experts:
        return _expert_layer(arch, arch.experts)
    return mlp(arch, arch.dense_width)


def idle_experts(arch: Architecture, index: int) -> int:
    """Parameters of the experts that a token of this layer is not sent to."""
    if not (arch.is_expert_layer[index] and arch.experts):
        return 0
    return (arch.experts.count - arch.experts.topk) * _expert(arch, arch.experts)


def mlp(arch: Architecture, width: int, outer: int = 0) -> int:
    """In (and gate), out, and their biases. `outer`: channels that go in and come out, where not all."""
    outer = outer or arch.hidden
    inner = width * (2 if arch.gated_unit else 1)
    bias = inner + outer if arch.linear_bias else 0
    return outer * (inner + width) + bias


def _expert(arch: Architecture, experts: Experts) -> int:
    return mlp(arch, experts.width, experts.latent_width)


def _softmax(arch: Architecture) -> int:
    queries = arch.heads * arch.head_dim
    keys_values = 2 * arch.kv_groups * arch.head_dim
    projected = queries * (2 if arch.output_gate else 1) + keys_values
    found = arch.hidden * (projected + queries)
    found += projected if arch.qkv_bias else 0
    found += arch.hidden if arch.linear_bias else 0
    found += 2 * arch.head_dim if arch.qk_norm else 0
    found += arch.heads if arch.sinks else 0
    return found


def _latent(arch: Architecture, mla: LatentAttention) -> int:
    head_dim = mla.qk_head_dim + mla.rotary_head_dim
    if mla.q_rank is None:
        # Megatron-Core 0.19 norms the layer's input once more here (core/transformer/mla_qk_norm_config.py).
        queries = arch.hidden * arch.heads * head_dim + (arch.hidden if arch.qk_norm else 0)
    else:
        norm = mla.q_rank if arch.qk_norm else 0
        queries = arch.hidden * mla.q_rank + norm + mla.q_rank * arch.heads * head_dim
    down = arch.hidden * (mla.kv_rank + mla.rotary_head_dim) + (mla.kv_rank if arch.qk_norm else 0)
    up = mla.kv_rank * arch.heads * (mla.qk_head_dim + mla.v_head_dim)
    out = arch.heads * mla.v_head_dim * arch.hidden
    return queries + down + up + out + (arch.hidden if arch.linear_bias else 0)


def _indexer(arch: Architecture, indexer: Indexer) -> int:
    """Queries of the compressed queries, keys with a LayerNorm, and a weight for each head."""
    queries, keys = indexer.rank * indexer.heads, arch.hidden + 2
    return indexer.head_dim * (queries + keys) + arch.hidden * indexer.heads


def _delta(arch: Architecture, delta: DeltaAttention) -> int:
    keys = delta.key_heads * delta.key_head_dim
    values = delta.value_heads * delta.value_head_dim
    projected = 2 * keys + 2 * values + 2 * delta.value_heads
    convolution = (2 * keys + values) * delta.conv_kernel
    decay = 2 * delta.value_heads
    return (
        arch.hidden * projected + convolution + decay + delta.value_head_dim + values * arch.hidden
    )


def _expert_layer(arch: Architecture, experts: Experts) -> int:
    router = experts.count * arch.hidden + (experts.count if arch.linear_bias else 0)
    shared = mlp(arch, experts.shared_width) if experts.shared_width else 0
    gate = arch.hidden if experts.shared_gate else 0
    latent = 2 * arch.hidden * experts.latent_width
    if latent and arch.linear_bias:
        latent += experts.latent_width + arch.hidden
    return router + experts.count * _expert(arch, experts) + latent + shared + gate
