"""What a GPU without Transformer Engine and Apex is given, on CPU ranks: its flags, layers and optimizer; not its CUDA."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest
import torch

from moe_bench.arguments.emit import argv
from moe_bench.config.machine import Machine
from moe_bench.results.reader import read_steps
from tests.support.projects import CPU, repository
from tests.support.ranks import run_ranks
from tests.support.training import train

if torch.cuda.is_available():
    pytest.skip("tests/gpu runs it on the GPU itself", allow_module_level=True)

PLAIN = Machine(device="cuda", gpus=2, cores=2, transformer_engine=False, apex=False)
SHORT = "--mock-data --eval-iters 0 --lr-decay-style constant --lr-warmup-iters 0".split()


def flags(machine: Machine, *more: str, steps: int = 4) -> list[str]:
    given = {"MODEL": "Tiny-Qwen3", "PR": "fp32", "SEQ_LEN": "64", "TRAIN_ITERS": str(steps)}
    given |= {"EP": "2", "GPUS_PER_NODE": "2", "NUM_LAYERS": "2"}
    run = repository().resolve(given, [*SHORT, *more], machine=machine, local=True)
    return list(argv(run))


def train_as_on_a_gpu(words: list[str], run_dir: Path) -> list[tuple[float | None, float | None]]:
    """Loss and gradient norm of each step."""
    run_dir.mkdir()

    def body() -> None:
        from moe_bench.mcore import entry
        from moe_bench.mcore.cpu.spec import reference_layers
        from moe_bench.mcore.patches import ALWAYS
        from moe_bench.mcore.recording import Recorder
        from moe_bench.results.writer import RunWriter
        from moe_bench.runtime.meters import CpuMeters

        rank = int(os.environ["RANK"])
        with (run_dir / f"rank-{rank}.log").open("w") as log:
            os.dup2(log.fileno(), 1)
        own = "--distributed-backend gloo --use-cpu-initialization --override-opt_param-scheduler".split()
        sys.argv = ["pretrain_gpt.py", *words, *own]
        recorder = Recorder(RunWriter(run_dir, rank=rank), CpuMeters(), rank=rank, world_size=2)
        with contextlib.ExitStack() as stack:
            for patch in ALWAYS:
                stack.enter_context(patch.applied())
            for each in (reference_layers(on_cpu=False), recorder, recorder.hooks()):
                stack.enter_context(each)
            entry.train(entry.parse())

    run_ranks(body, 2)
    return [(step.loss, step.grad_norm) for step in read_steps(run_dir).records]


@pytest.mark.ranks(2)
def test_it_trains_as_cpu_ranks_do_and_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    weights = ["--save", str(tmp_path / "weights"), "--save-interval", "2"]
    whole = train_as_on_a_gpu(flags(PLAIN), tmp_path / "whole")
    first = train_as_on_a_gpu(flags(PLAIN, *weights, steps=2), tmp_path / "first")
    on = ["--load", str(tmp_path / "weights")]
    rest = train_as_on_a_gpu(flags(PLAIN, *on), tmp_path / "rest")
    assert first + rest == whole, "Adam's moments or step count were lost"
    cpu = train(flags(CPU), 2, tmp_path / "cpu")
    assert [loss for loss, _ in whole] == pytest.approx(cpu.losses, rel=1e-5)
