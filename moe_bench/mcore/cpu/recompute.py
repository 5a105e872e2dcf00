"""The answers that Megatron's recomputation wants from Transformer Engine: there is no FP8 here.

`CheckpointWithoutOutput()` (megatron/core/tensor_parallel/random.py, 0.19.2) takes its default `fp8=False` for a yes
(`fp8 is not None`) and then uses names that exist only with Transformer Engine. Goes when it asks for truth.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext


class NoFp8:
    """Transformer Engine's `FP8GlobalStateManager` of a process without FP8."""

    @staticmethod
    def is_fp8_enabled() -> bool:
        """Return False."""
        return False


def no_fp8_context(**_options: object) -> AbstractContextManager[None]:
    """Return a context that changes nothing."""
    return nullcontext()
