"""Megatron's zigzag split of a sequence over the context-parallel ranks, undone and redone.

The sequence is cut into 2 * cp chunks; rank r holds chunk r and chunk 2 * cp - 1 - r, so that under a causal mask
every rank has the same work (`get_batch_on_this_cp_rank` in megatron/core/utils.py, 0.19.2).
"""

from __future__ import annotations

from typing import Any

import torch


def own_chunks(cp_group: torch.distributed.ProcessGroup) -> tuple[int, int]:
    """Return the numbers of the two chunks that this rank holds, in the order it holds them."""
    return cp_group.rank(), 2 * cp_group.size() - 1 - cp_group.rank()


def packed_indices(
    cu_seqlens: torch.Tensor, total_tokens: int, cp_size: int, cp_rank: int
) -> torch.Tensor:
    """Return which tokens of sequences packed into one the rank holds; shape [total_tokens / cp_size].

    Transformer Engine's `thd_get_partitioned_indices` (its thd_partition_indices_kernel): each sequence is cut by itself,
    into 2 * cp_size chunks, which must be equal. cu_seqlens: where the sequences start, and total_tokens.
    """
    starts = cu_seqlens.long() // cp_size
    own = torch.arange(total_tokens // cp_size, device=cu_seqlens.device)
    sequence = (torch.searchsorted(starts, own, right=True) - 1).clamp(max=len(starts) - 2)
    half = (starts[sequence + 1] - starts[sequence]) // 2
    within = own - starts[sequence]
    chunks_before = torch.where(within < half, cp_rank, 2 * (cp_size - 1) - cp_rank)
    return starts[sequence] * cp_size + within + half * chunks_before


def gather_sequence(own: torch.Tensor, cp_group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Return the whole sequence in order from each rank's two chunks; both along dimension 0.

    Collective over cp_group, forward and backward: every member must call, in the same order.
    """
    return _GatherSequence.apply(own, cp_group)


class _GatherSequence(torch.autograd.Function):
    """All-gather forward; backward sums each chunk's gradient over the ranks onto its holder."""

    @staticmethod
    def forward(
        ctx: Any, own: torch.Tensor, cp_group: torch.distributed.ProcessGroup
    ) -> torch.Tensor:
        ctx.cp_group = cp_group
        parts = [
            torch.empty_like(own, memory_format=torch.contiguous_format)
            for _ in range(cp_group.size())
        ]
        torch.distributed.all_gather(parts, own.contiguous(), group=cp_group)
        first, second = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat((*first, *reversed(second)))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may share the original
        torch.distributed.all_reduce(grad, group=ctx.cp_group)
        chunks = grad.chunk(2 * ctx.cp_group.size())
        return torch.cat([chunks[number] for number in own_chunks(ctx.cp_group)]), None
