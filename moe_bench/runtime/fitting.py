"""The changes to Megatron's layers that the checkpoint to be loaded asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moe_bench.checkpoint.attention_norms import has_no_query_norm, has_norms_across_heads

if TYPE_CHECKING:
    from moe_bench.mcore.patches import Patch


def fitting(argv: Sequence[str]) -> Iterator[tuple[Patch, str]]:
    """Each change and what to say of it; none without --load, or for a model that Megatron's flags describe."""
    from moe_bench.mcore import patches  # noqa: PLC0415 - known only where Megatron is

    if has_no_query_norm(argv):
        yield (
            patches.NO_PHANTOM_QUERY_NORM,
            "the checkpoint has no query norm (linear_q_proj.layer_norm_weight), so the layers are built without one",
        )
    if has_norms_across_heads(argv):
        yield (
            patches.NORMS_ACROSS_HEADS,
            "the checkpoint norms queries and keys over all heads at once, and so do the layers",
        )
