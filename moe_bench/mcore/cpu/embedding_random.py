"""Random numbers: the device generator is the host's default generator.

Megatron keeps one generator state for each purpose and swaps it into "the CUDA generator" around the work
(megatron/core/tensor_parallel/random.py, CudaRNGStatesTracker), saves and restores it together with the host's for
recomputation, and stores both in a checkpoint. All of that holds when the two are one generator: dropout draws from the
generator that the tracker has set, and restoring both restores one state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class DefaultGenerators:
    """`torch.cuda.default_generators`: each ordinal's generator is the host's."""

    def __getitem__(self, _index: int) -> torch.Generator:
        return torch.default_generator

    def __len__(self) -> int:
        return 1


def get_rng_state(device: Any = "cuda") -> torch.Tensor:
    """State of the host's generator."""
    del device  # there is one; Megatron names it by keyword
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = "cuda", **_kwargs: Any) -> None:
    """Set the host's generator."""
    del device
    torch.default_generator.set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    """One state: there is one generator."""
    return [get_rng_state()]


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """Set the host's generator to the first."""
    for state in list(new_states)[:1]:
        set_rng_state(state)


def manual_seed(seed: int) -> None:
    """Seed the host's generator."""
    torch.default_generator.manual_seed(int(seed))


def initial_seed() -> int:
    """Seed of the host's generator."""
    return torch.default_generator.initial_seed()


def call_now(function: Callable[[], Any], **_kwargs: Any) -> None:
    """`torch.cuda._lazy_call`: nothing is lazy here."""
    function()
