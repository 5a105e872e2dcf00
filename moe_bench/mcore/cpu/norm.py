"""RMSNorm and LayerNorm that a CPU can run, with the switches of Transformer Engine's norms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_bench.mcore.cpu.sharding import Offsets, sharded_parameters


class Norm(torch.nn.Module):
    """Normalize the last dimension by `config.normalization`: RMSNorm or LayerNorm.

    Stands in for `TENorm` and `WrappedTorchNorm`. With `layernorm_zero_centered_gamma` the stored weight is
    gamma - 1. The parameters are marked `sequence_parallel`, so that Megatron sums their gradients over the
    tensor-parallel group when each of its ranks normalizes only its own part of the sequence.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object
    ) -> None:
        super().__init__()
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise ValueError(f"normalization {config.normalization!r} is not RMSNorm or LayerNorm")
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias: torch.nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
            self.bias.sequence_parallel = config.sequence_parallel
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the norm to scale by one and shift by zero."""
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered else 1.0)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the normalized x, in x's dtype; the arithmetic is fp32 as in Transformer Engine."""
        return normalize(x, self.weight, self.bias, self.eps, zero_centered=self.zero_centered)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, object] | None = None,
    ) -> ShardedStateDict:
        """Return the parameters, replicated over the tensor-parallel group."""
        return sharded_parameters(self, prefix, sharded_offsets, metadata)


def normalize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    zero_centered: bool,
) -> torch.Tensor:
    """RMSNorm when bias is None, else LayerNorm, over the last dimension of x."""
    scale = weight.float() + 1 if zero_centered else weight.float()
    if bias is None:
        return _RMSNorm.apply(x.float(), scale, eps).to(x.dtype)
    return F.layer_norm(x.float(), (x.shape[-1],), scale, bias.float(), eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x**2) + eps) * scale, in half the passes over memory of torch 2.11's CPU composite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normalized = x * inverse
        ctx.save_for_backward(normalized, scale, inverse)
        return normalized * scale

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        normalized, scale, inverse = ctx.saved_tensors
        weighted = grad * normalized
        mean = (weighted @ scale).div_(grad.shape[-1]).unsqueeze_(-1)
        grad_scale = weighted.flatten(0, -2).sum(dim=0)
        grad_x = torch.mul(grad, scale, out=weighted)
        return grad_x.addcmul_(normalized, mean, value=-1).mul_(inverse), grad_scale, None
