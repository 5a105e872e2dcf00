"""On a recorded run Megatron is not told of W&B; every other flag reaches it untouched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moe_bench.runtime.pretrain import _without_wandb
from moe_bench.runtime.rank import rank_context

ARGV = ["--lr", "1e-3", "--wandb-project", "p", "--wandb-exp-name=a b", "--swiglu", "--seed", "1"]


def test_a_recorded_run_leaves_wandb_to_the_mirror() -> None:
    context = replace(rank_context(), run_dir=Path("/runs/a"))
    assert _without_wandb(context, ARGV) == ["--lr", "1e-3", "--swiglu", "--seed", "1"]


def test_a_run_started_by_hand_keeps_megatrons_own_wandb() -> None:
    context = replace(rank_context(), run_dir=None)
    assert _without_wandb(context, ARGV) == ARGV
