"""Floating-point operations that training one token takes. Pure.

Three times the forward pass (the backward pass takes twice as much), two operations for each
weight a token meets (attention, router, chosen and shared experts, output layer), half the attention matrix because it
is causal, only the window where a layer has one, only the chosen keys in sparse attention, whose indexer scores them
all. Not counted: embedding look-up, norms, activations, recomputation, and the gated delta rule's state update.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_bench.config.run import Setting
from moe_bench.planner.architecture import Architecture, Experts, Indexer


def per_token(args: Mapping[str, Setting], *, with_mtp: bool = True) -> float:
    """FLOP to train on one token, forward and backward, at the run's --seq-length."""
    return of(Architecture.of(args), with_mtp=with_mtp)


def of(arch: Architecture, *, with_mtp: bool = True) -> float:
    """FLOP to train on one token of a sequence of `arch.seq_length`."""
    output = 2.0 * arch.vocab * arch.hidden
    forward = output + sum(layer(arch, index) for index in range(arch.layers))
    if with_mtp:
        module = output + 2.0 * 2 * arch.hidden**2 + layer(arch, arch.layers - 1)
        forward += arch.mtp_layers * module
    return 3 * forward


def layer(arch: Architecture, index: int) -> float:
    """Forward FLOP per token of one decoder layer."""
    return _mixing(arch, index) + _feed_forward(arch, index)


def _feed_forward(arch: Architecture, index: int) -> float:
    if arch.is_expert_layer[index] and arch.experts:
        experts: Experts = arch.experts
        router = 2.0 * arch.hidden * experts.count
        gate = 2.0 * arch.hidden if experts.shared_gate else 0.0
        routed = _mlp(arch, experts.topk * experts.width, experts.latent_width)
        latent = 2.0 * 2 * arch.hidden * experts.latent_width
        return router + gate + routed + latent + _mlp(arch, experts.shared_width)
    return _mlp(arch, arch.dense_width)


def _mlp(arch: Architecture, width: int, outer: int = 0) -> float:
    return 2.0 * (outer or arch.hidden) * width * (3 if arch.gated_unit else 2)


def _mixing(arch: Architecture, index: int) -> float:
    if arch.is_delta_layer[index] and arch.delta:
        return _delta(arch)
    if arch.latent:
        return _latent(arch, index)
    queries = arch.heads * arch.head_dim
    keys_values = 2 * arch.kv_groups * arch.head_dim
    projections = 2.0 * arch.hidden * (queries * (3 if arch.output_gate else 2) + keys_values)
    return projections + _scores(arch, index, arch.head_dim, arch.head_dim)


def _scores(arch: Architecture, index: int, qk_dim: int, v_dim: int) -> float:
    """Scores and weighted sum of one token against the tokens it sees, on average over a sequence."""
    length = arch.seq_length
    most = arch.window if arch.is_windowed_layer[index] else None
    if arch.indexer is not None:
        most = arch.indexer.topk
    seen = length / 2
    if most is not None and most < length:
        seen = most - most**2 / (2 * length)
    return 2.0 * seen * arch.heads * (qk_dim + v_dim)


def _latent(arch: Architecture, index: int) -> float:
    mla = arch.latent
    if mla is None:
        return 0.0
    head_dim = mla.qk_head_dim + mla.rotary_head_dim
    if mla.q_rank is None:
        queries = arch.hidden * arch.heads * head_dim
    else:
        queries = mla.q_rank * (arch.hidden + arch.heads * head_dim)
    keys_values = arch.hidden * (mla.kv_rank + mla.rotary_head_dim)
    keys_values += mla.kv_rank * arch.heads * (mla.qk_head_dim + mla.v_head_dim)
    out = arch.heads * mla.v_head_dim * arch.hidden
    found = 2.0 * (queries + keys_values + out) + _scores(arch, index, head_dim, mla.v_head_dim)
    indexer = arch.indexer_of(index)
    return found + (_indexer(arch, indexer) if indexer else 0.0)


def _indexer(arch: Architecture, indexer: Indexer) -> float:
    """Projections, and the scores of all keys."""
    channels = indexer.heads * indexer.head_dim
    projections = indexer.rank * channels + arch.hidden * (indexer.head_dim + indexer.heads)
    return 2.0 * (projections + arch.seq_length / 2 * channels)


def _delta(arch: Architecture) -> float:
    delta = arch.delta
    if delta is None:
        return 0.0
    keys = delta.key_heads * delta.key_head_dim
    values = delta.value_heads * delta.value_head_dim
    projected = 2 * keys + 2 * values + 2 * delta.value_heads
    convolution = (2 * keys + values) * delta.conv_kernel
    return 2.0 * (arch.hidden * (projected + values) + convolution)
