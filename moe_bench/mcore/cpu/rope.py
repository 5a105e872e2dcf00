"""Rotary position embedding in a third of the passes over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings import rope_utils


def rope(
    t: torch.Tensor,
    freqs: torch.Tensor,
    transpose_output_memory: bool = False,  # noqa: ARG001 - Transformer Engine's signature
    interleaved: bool = False,
) -> torch.Tensor:
    """Megatron's own formula as Transformer Engine's fused kernel. t: [s, b, n, d]."""
    return rope_utils._apply_rotary_pos_emb_bshd(t, freqs, rotary_interleaved=interleaved)


def packed_rope(
    t: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    cp_size: int = 1,
    cp_rank: int = 0,
    interleaved: bool = False,
) -> torch.Tensor:
    """The same of packed sequences. t: [t, n, d]."""
    cp_group = parallel_state.get_context_parallel_group()
    assert (cp_group.size(), cp_group.rank()) == (cp_size, cp_rank), (
        "another context parallel group"
    )
    return rope_utils._apply_rotary_pos_emb_thd(
        t, cu_seqlens, freqs, rotary_interleaved=interleaved, cp_group=cp_group
    )


def rotating_in_place(upstream: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `_apply_rotary_pos_emb_bshd` for fp32 and halves, deferring to upstream's for anything else."""

    def apply(
        t: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        *positional: Any,
        mscale: float = 1.0,
        **options: Any,
    ) -> torch.Tensor:
        # MLA's interleaving is `multi_latent_attention` up to 0.18 and `mla_rotary_interleaved` since.
        plain = not (rotary_interleaved or positional) and set(options.values()) <= {False, None}
        if not plain or t.dtype != torch.float32 or freqs.shape[-1] != t.shape[-1]:
            return upstream(t, freqs, rotary_interleaved, *positional, mscale=mscale, **options)
        return _Rotate.apply(t, torch.cos(freqs) * mscale, torch.sin(freqs) * mscale)

    return apply


class _Rotate(torch.autograd.Function):
    """t * cos + rotate_half(t) * sin over the last dimension; cos and sin broadcast and carry no gradient."""

    @staticmethod
    def forward(
        ctx: Any, t: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(t, cosine, sine, direction=1.0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        half = sine.shape[-1] // 2
        # The transpose of the rotation takes each half's sine with the other half.
        swapped = torch.cat((sine[..., half:], sine[..., :half]), dim=-1)
        return _rotated(grad, cosine, swapped, direction=-1.0), None, None


def _rotated(
    t: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, *, direction: float
) -> torch.Tensor:
    """Return t * cosine + direction * rotate_half(t) * sine."""
    result = t * cosine
    first, second = t.chunk(2, dim=-1)
    result_first, result_second = result.chunk(2, dim=-1)
    sine_first, sine_second = sine.chunk(2, dim=-1)
    result_first.addcmul_(second, sine_first, value=-direction)
    result_second.addcmul_(first, sine_second, value=direction)
    return result
