"""What Megatron's optimizer and gradient buffers use on a CPU in place of a GPU library's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch


class FusedAdam(torch.optim.Adam):
    """torch's one-pass CPU Adam under the interface of Apex's and Transformer Engine's `FusedAdam`.

    Megatron takes torch's AdamW when neither is installed, which on a CPU walks over each tensor ten times.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        assert not capturable, "a CUDA graph of the optimizer needs a GPU"
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            fused=True,
            decoupled_weight_decay=adam_w_mode,
        )


def scale_tensors(
    chunk_size: int,  # noqa: ARG001 - Apex's signature
    overflow: torch.Tensor,  # noqa: ARG001
    tensor_lists: Sequence[Sequence[torch.Tensor]],
    scale: float | torch.Tensor,
) -> None:
    """Set each destination to its source times scale: Megatron's `local_multi_tensor_scale` without a temporary."""
    for source, destination in zip(*tensor_lists, strict=True):
        torch.mul(source, scale, out=destination)


def skipping_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Return the collective without its copies where a group has one member and the result is already in place."""

    def call(
        output: torch.Tensor,
        input_: torch.Tensor,
        *args: Any,
        group: torch.distributed.ProcessGroup | None = None,
        **options: Any,
    ) -> Any:
        alone = group is not None and group.size() == 1
        if alone and output.data_ptr() == input_.data_ptr() and output.shape == input_.shape:
            return None
        return collective(output, input_, *args, group=group, **options)

    return call
