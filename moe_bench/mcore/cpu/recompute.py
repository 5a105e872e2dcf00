"""What Megatron's recomputation of activations wants from Transformer Engine and from a C++ compiler.

`CheckpointWithoutOutput()` (megatron/core/tensor_parallel/random.py, 0.19.2) takes its default `fp8=False` for a yes
(`fp8 is not None`) and then uses names that exist only with Transformer Engine. Goes when it asks for truth.

From 0.17 on it compiles an extension in its first backward pass (`share_storage`, same file), for which a laptop would need
ninja and a compiler, and which waits for ever on the lock of a process that was killed while compiling.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


class NoFp8:
    """Transformer Engine's `FP8GlobalStateManager` of a process without FP8."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Return False."""
        return False


def no_fp8_context(**_options: object) -> AbstractContextManager[None]:
    """Return a context that changes nothing."""
    return nullcontext()


def without_compiler() -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Megatron's `_get_share_storage` of 0.16: what was recomputed is copied, not shared."""
    return _copy_storage


def _copy_storage(output: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Fill the emptied storage of `output`, and so of all its views, without their version counters seeing it."""
    source = recomputed.untyped_storage()
    output.untyped_storage().resize_(source.size())
    output.untyped_storage().copy_(source)
