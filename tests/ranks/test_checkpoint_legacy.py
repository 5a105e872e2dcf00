"""Legacy checkpoints (mp_rank_*) that Megatron itself wrote become torch_dist with --ckpt-convert-save, as in the guide.

Megatron reads them with torch's allow-list of harmless types; what names anything else is refused, not run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_bench.checkpoint.families import family_of
from moe_bench.checkpoint.flags import megatron_flags
from moe_bench.checkpoint.torch_dist import open_torch_dist
from moe_bench.errors import CheckpointError
from moe_bench.runtime.logits import CPU_FLAGS
from tests.ranks.checkpoint_ranks import run_listed
from tests.support import hf_models

TRAIN = (
    "--train-iters 2 --global-batch-size 4 --lr 1e-2 --eval-interval 1000 --no-save-rng --no-save-optim "
    "--num-workers 0 --split 100,0,0 --pipeline-model-parallel-size 2 --seq-length 16 --vocab-size 37 --ckpt-format torch"
).split()


def argv(*more: object, load: Path | None) -> list[str]:
    config = {**hf_models.MIXTRAL, "num_hidden_layers": 4}
    flags = [*megatron_flags(family_of(config), config), *CPU_FLAGS, *TRAIN, *map(str, more)]
    if load is None:
        only_when_loading = ("--finetune", "--exit-on-missing-checkpoint")
        return [flag for flag in flags if flag not in only_when_loading]
    return [*flags, "--load", str(load)]


@pytest.mark.ranks(2)
def test_the_guides_flags_rewrite_a_legacy_checkpoint_and_never_run_what_it_names(
    tmp_path: Path,
) -> None:
    legacy, converted, never = (tmp_path / name for name in ("legacy", "converted", "never"))
    convert = ["--ckpt-convert-format", "torch_dist", "--ckpt-convert-save"]
    cases: dict[str, dict[str, Any]] = {
        "train": {"how": "train", "argv": argv("--save", legacy, "--save-interval", 2, load=None)},
        "convert": {"how": "train", "argv": argv(*convert, converted, load=legacy)},
        "before": {"argv": argv(load=legacy)},
        "after": {"argv": argv("--ckpt-format", "torch_dist", load=converted / "torch_dist")},
        "poison": {"how": "poison", "world_size": 1, "folder": str(legacy), "argv": []},
        "hostile": {"how": "train", "argv": argv(*convert, never, load=legacy)},
    }
    torch.save(torch.randint(0, 37, (2, 16)), tmp_path / "tokens.pt")
    for name, case in cases.items():
        case |= {"tokens": str(tmp_path / "tokens.pt"), "out": str(tmp_path / f"{name}.pt")}
        case.setdefault("world_size", 2)
    log = run_listed(list(cases.values()), tmp_path)
    codes = {name: json.loads((tmp_path / f"{name}.pt.codes").read_text()) for name in cases}
    assert all(codes.pop("hostile")), "Megatron leaves without a status, which is not success"
    assert not any(any(code) for code in codes.values()), log[-3000:]
    files = sorted(p.name for p in legacy.rglob("mp_rank_*"))
    assert files == ["mp_rank_00_000", "mp_rank_00_001"]
    assert torch.equal(torch.load(tmp_path / "after.pt"), torch.load(tmp_path / "before.pt"))
    assert "Weights only load failed" in log
    assert not (tmp_path / "owned").exists()
    assert not never.exists()
    with pytest.raises(CheckpointError, match=r"legacy.*--ckpt-convert-format torch_dist"):
        open_torch_dist(legacy)
