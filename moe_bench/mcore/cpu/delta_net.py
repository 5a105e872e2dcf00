"""What Megatron's gated delta net takes from flash-linear-attention, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Return x / sqrt(sum(x**2) + eps) over the last dimension, computed in fp32."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + eps)).to(x.dtype)


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: torch.Tensor | None = None,
    **_initial_and_final_state: object,
) -> tuple[torch.Tensor, None]:
    """Convolve each channel with its own past and apply silu; x: [b, s, d], weight: [d, w] -> [b, s, d], no state."""
    assert cu_seqlens is None, "packed sequences in a gated delta net need flash-linear-attention"
    width, length = weight.shape[1], x.shape[1]
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    result = F.conv1d(padded, weight.unsqueeze(1), bias, groups=weight.shape[0])[..., :length]
    if activation in ("silu", "swish"):
        result = F.silu(result)
    return result.transpose(1, 2), None
