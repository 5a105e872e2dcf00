"""Which tokens an expert at its capacity turns away."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def dropping_the_latest(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `apply_router_token_dropping` whose policy "position" keeps the earliest tokens, as on a GPU.

    It takes the top k of a map of zeros and ones (megatron/core/transformer/moe/moe_utils.py, 0.19.2). Among equals
    CUDA's top-k takes the first; a CPU's takes any.
    """

    @functools.wraps(upstream)
    def apply_router_token_dropping(
        routing_probs: torch.Tensor,
        routing_map: torch.Tensor,
        *args: Any,
        drop_policy: str = "probs",
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if drop_policy != "position":
            return upstream(routing_probs, routing_map, *args, drop_policy=drop_policy, **options)
        num_tokens = len(routing_map)
        earliest = torch.arange(num_tokens, 0, -1, dtype=torch.float64)[:, None]
        order = (
            routing_map * (num_tokens + 1) + earliest
        )  # no two alike: the routed first, by position
        _, kept = upstream(order, routing_map, *args, drop_policy="probs", **options)
        return routing_probs * kept, kept

    return apply_router_token_dropping
