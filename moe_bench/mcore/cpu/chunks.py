"""Putting the tokens that arrived from other ranks in the order of the local experts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def leaving_sorted_chunks(upstream: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's `sort_chunks_by_idxs` that hands back its arguments where every chunk is in its place already."""

    @functools.wraps(upstream)
    def sort_chunks_by_idxs(
        tokens: torch.Tensor,
        split_sizes: torch.Tensor,
        sorted_idxs: torch.Tensor,
        probs: torch.Tensor | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if sorted_idxs.tolist() == list(range(len(sorted_idxs))):
            return tokens, probs
        return upstream(tokens, split_sizes, sorted_idxs, probs, **options)

    return sort_chunks_by_idxs
