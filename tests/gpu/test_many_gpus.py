"""Two GPUs and more: every parallelism over NCCL trains as one GPU does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.gpu.conftest import Reference, Train, farthest, need_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
LAYOUTS = {
    "EP2": (2, {"EP": "2"}),
    "TP2": (2, {"TP": "2"}),
    "PP2": (2, {"PP": "2"}),
    "CP2": (2, {"CP": "2"}),
    "DP2": (2, {}),
    "TP2-EP2-PP2": (4, {"TP": "2", "EP": "2", "PP": "2"}),
    "EP8": (8, {"EP": "8", "MBS": "1"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_rank_does(
    name: str, layers: str, train: Train, reference_of: Callable[[str], Reference]
) -> None:
    count, knobs = LAYOUTS[name]
    need_gpus(count)
    reference = reference_of("Tiny-Qwen3")
    given = {"EP": "1", "GPUS_PER_NODE": str(count), "PR": "bf16"} | knobs
    run = train(f"{name}-{layers}", reference.start, layers=layers, **given)
    bound = reference.bound("bf16")
    assert farthest(run.losses, reference.fp32) <= bound, (run.losses, reference.fp32)
    for step in run.steps:
        assert len(step.memory_gib) == count
        assert {sum(load.tokens_per_expert) for load in step.expert_load} == {8 * 256 * 2}


def test_each_rank_reports_its_own_gpu(train: Train) -> None:
    need_gpus(2)
    run = train("two-gpus", TRAIN_ITERS="60", GPUS_PER_NODE="2", EP="2")
    assert [gpu.rank for gpu in run.steps[-1].gpus] == [0, 1]
