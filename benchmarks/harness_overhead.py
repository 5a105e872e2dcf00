"""What the record costs: the same Megatron training with and without it, interleaved step by step in one process group.

    python benchmarks/harness_overhead.py [pairs]

Two ranks train one model. In every pair of steps one is recorded and the other is not (the hooks are put on and taken
off between them, in alternating order). Printed: the median ratio of recorded to plain step time, and the same ratio
between plain steps, which is the noise floor.
"""

# ruff: noqa: PLC0415 - Megatron is imported in the ranks, with the embedding in place

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.end_to_end.test_record import FLAGS
from tests.support.ranks import run_ranks

LARGER = (
    "--hidden-size 256 --moe-ffn-hidden-size 256 --seq-length 256 --max-position-embeddings 256 "
    "--num-layers 4 --num-experts 8 --mock-data --eval-interval 100000 --log-interval 1"
).split()


class Alternating:
    """Wraps `training_log`: odd turns go through the recorder's hook, even turns through Megatron's own."""

    def __init__(self, plain: Any, recorded: Any, counter: Any) -> None:
        self.plain, self.recorded, self.counter = plain, recorded, counter
        self.times: list[tuple[int, float]] = []
        self.turn, self.last = 0, time.perf_counter()

    def kind(self, turn: int) -> int:
        """0 plain, 1 recorded, 2 plain: a period of six that alternates the order."""
        return (0, 1, 2, 2, 1, 0)[turn % 6]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = self.kind(self.turn)
        result = (self.recorded if kind == 1 else self.plain)(*args, **kwargs)
        now = time.perf_counter()
        self.times.append((kind, now - self.last))
        self.last, self.turn = now, self.turn + 1
        self.counter.enabled = self.kind(self.turn) == 1
        return result


def body(pairs: int, folder: str) -> list[tuple[int, float]]:
    """One rank's training; the time of each step with its kind."""
    import megatron.training.training as training
    import torch

    from moe_bench.mcore import entry
    from moe_bench.mcore.cpu.spec import reference_layers
    from moe_bench.mcore.patches import COMPILED_HELPERS
    from moe_bench.mcore.recording import Recorder
    from moe_bench.results.writer import RunWriter
    from moe_bench.runtime.meters import CpuMeters

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    sys.argv = ["pretrain_gpt.py", *FLAGS, *LARGER, "--train-iters", str(6 * pairs + 6)]
    plain = training.training_log
    recorder = Recorder(RunWriter(folder, rank=rank), CpuMeters(), rank=rank, world_size=size)
    with (
        Path("/dev/null").open("w") as silence,
        contextlib.redirect_stdout(silence),
        COMPILED_HELPERS.applied(),
        reference_layers(),
        recorder,
        recorder.hooks(),
    ):
        switch = Alternating(plain, training.training_log, _Switch(recorder))
        training.training_log = switch
        entry.train(entry.parse())
        training.training_log = switch.recorded
    return switch.times[6:]


class _Switch:
    """Turns the recorder's count of experts off in plain steps."""

    def __init__(self, recorder: Any) -> None:
        self._recorder = recorder
        self._on = True

    @property
    def enabled(self) -> bool:
        """Whether the coming step counts experts."""
        return self._on

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self._recorder._counter.paused = not on
        self._on = on


def main() -> None:
    """Run, and print the two ratios."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory() as folder:
        times = run_ranks(lambda: body(pairs, folder), timeout_s=280)[1]
    groups = {kind: [t for k, t in times if k == kind] for kind in (0, 1, 2)}
    medians = {kind: statistics.median(group) for kind, group in groups.items()}
    plain = (medians[0] + medians[2]) / 2
    print(f"plain step       {plain * 1e3:8.1f} ms (median of {len(times) * 2 // 3})")
    print(f"recorded / plain {medians[1] / plain:8.4f}")
    print(f"plain / plain    {medians[2] / medians[0]:8.4f}  (noise floor)")


if __name__ == "__main__":
    main()
