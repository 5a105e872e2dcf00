"""A training that stops and goes on from its checkpoint makes the steps that an unbroken one makes, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.training import CPU_FLAGS, QWEN3_LIKE, train

STEPS, SAVED_AT = 6, 4
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
WAYS = {
    "one-rank": (1, ""),
    "ep2-distributed-optimizer-bf16": (2, f"--expert-model-parallel-size 2 {DISTRIBUTED} --bf16"),
    "stage-without-experts": (
        4,
        "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --use-distributed-optimizer "
        "--moe-layer-freq [0,0,1,1]",
    ),
    "ep2-fully-reshardable": (
        2,
        f"--expert-model-parallel-size 2 {DISTRIBUTED} --dist-ckpt-optim-fully-reshardable",
    ),
}
MORE_WAYS = {
    "ep2-bf16": (2, "--expert-model-parallel-size 2 --bf16"),
    "ep2-distributed-optimizer": (2, f"--expert-model-parallel-size 2 {DISTRIBUTED}"),
    "dp2-distributed-optimizer-bf16": (2, "--use-distributed-optimizer --bf16"),
}


@pytest.mark.parametrize(
    "way", [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in MORE_WAYS)]
)
def test_going_on_from_a_checkpoint_equals_never_stopping(way: str, tmp_path: Path) -> None:
    world_size, flags = (WAYS | MORE_WAYS)[way]
    argv = [*CPU_FLAGS, *QWEN3_LIKE, *flags.split(), "--train-iters", str(STEPS)]
    unbroken = train(argv, world_size, tmp_path / "unbroken")
    broken = tmp_path / "broken"
    saving = [*argv, "--save", str(broken / "checkpoints"), "--save-interval", str(SAVED_AT)]
    train([*saving, "--exit-interval", str(SAVED_AT)], world_size, broken)
    resumed = train(saving, world_size, broken)  # loads its own checkpoint without being told
    assert len(resumed.losses) == STEPS
    assert resumed == unbroken
