"""One all-reduce a step carries everything that ranks tell one another for the record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_bench.mcore.expert_load import ExpertCounter, expert_load
from moe_bench.results.records import ExpertLoad, GpuSample
from moe_bench.units import GIB

TIMERS = (
    "forward-backward",
    "batch-generator",
    "forward-compute",
    "backward-compute",
    "forward-recv",
    "forward-send",
    "backward-recv",
    "backward-send",
    "forward-send-forward-recv",
    "forward-send-backward-recv",
    "backward-send-forward-recv",
    "backward-send-backward-recv",
    "layernorm-grads-all-reduce",
    "embedding-grads-all-reduce",
    "all-grads-sync",
    "params-all-gather",
    "optimizer-copy-to-main-grad",
    "optimizer-unscale-and-check-inf",
    "optimizer-clip-main-grad",
    "optimizer-inner-step",
    "optimizer-copy-main-to-model-params",
    "optimizer",
)
"""Megatron's timers that are recorded, in the order of its log (megatron/training/training.py, 0.16 to 0.19)."""

_GPU_SLOTS = 5
_SLOTS = 2 + _GPU_SLOTS + len(TIMERS)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankReading:
    """What one rank measured in a step."""

    memory_bytes: float
    stop_requested: bool
    gpu: GpuSample | None
    timers_s: Sequence[float]
    """In the order of TIMERS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchanged:
    """What all ranks measured, the same on each of them."""

    memory_gib: tuple[float, ...]
    stop_requested: bool
    gpus: tuple[GpuSample, ...]
    timers_s: dict[str, float]
    expert_load: tuple[ExpertLoad, ...]


class StepExchange:
    """Sums a vector with one slot for each (rank, reading) and each (layer, expert)."""

    def __init__(self, counter: ExpertCounter | None) -> None:
        """`counter`: None without experts."""
        self._counter = counter
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def run(self, mine: RankReading) -> Exchanged:
        """Tell the others and hear them. Collective over all ranks; synchronises the device."""
        own = torch.zeros(self._world_size, _SLOTS, dtype=torch.float64)
        own[self._rank] = torch.tensor(_slots(mine), dtype=torch.float64)
        pieces = [own.view(-1)]
        width = boundary = 0
        if self._counter is not None:
            counts = self._counter.table
            width, boundary = counts.shape[1], counts.numel()
            pieces.insert(0, counts.view(-1))
        vector = torch.cat([piece.to(_device(), torch.float64) for piece in pieces])
        if self._world_size > 1:
            dist.all_reduce(vector)
        values = vector.tolist()
        rows = [values[i : i + width] for i in range(0, boundary, width or 1)]
        ranks = [values[i : i + _SLOTS] for i in range(boundary, len(values), _SLOTS)]
        return Exchanged(
            memory_gib=tuple(row[0] / GIB for row in ranks),
            stop_requested=any(row[1] for row in ranks),
            gpus=tuple(
                _gpu(rank, row[2 : 2 + _GPU_SLOTS]) for rank, row in enumerate(ranks) if row[2]
            ),
            timers_s=_maxima([row[2 + _GPU_SLOTS :] for row in ranks]),
            expert_load=tuple(
                expert_load(index + 1, [round(count) for count in row[:-1]], round(row[-1]))
                for index, row in enumerate(rows)
                if row[-1]
            ),
        )


def _slots(mine: RankReading) -> list[float]:
    gpu, sample = mine.gpu, [0.0] * _GPU_SLOTS
    if gpu:
        figures = (gpu.power_w, gpu.sm_clock_mhz, gpu.utilization, gpu.memory_used_gib)
        sample = [1.0, *(math.nan if figure is None else figure for figure in figures)]
    return [mine.memory_bytes, float(mine.stop_requested), *sample, *mine.timers_s]


def _gpu(rank: int, row: Sequence[float]) -> GpuSample:
    told = (None if math.isnan(figure) else figure for figure in row[1:])
    power_w, clock, utilization, used = told
    return GpuSample(
        rank=rank,
        power_w=power_w,
        sm_clock_mhz=clock,
        utilization=utilization,
        memory_used_gib=used,
    )


def _maxima(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    maxima = (max(column) for column in zip(*rows, strict=True))
    return {name: value for name, value in zip(TIMERS, maxima, strict=True) if value > 0}


def _device() -> Any:
    return torch.cuda.current_device() if dist.get_backend() == "nccl" else "cpu"
