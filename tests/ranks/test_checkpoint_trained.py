"""A checkpoint that Megatron itself trained and saved, cut by its layout, exports to a model that transformers loads.

It trains through the product's own entry, so that DeepSeek-V2-Lite trains without the query norm that it does not have.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_bench.checkpoint.exporting import ExportOptions, plan_export, run_export
from moe_bench.checkpoint.source import CARRIED
from moe_bench.checkpoint.torch_dist import open_torch_dist
from moe_bench.checkpoint.verifying import damaged_chunks
from tests.ranks.checkpoint_ranks import run_listed
from tests.ranks.test_checkpoint_logits import BOUND, HERE, Case, spelled

STEPS = (
    "--train-iters 3 --global-batch-size 4 --lr 1e-2 --save-interval 3 --eval-interval 1000 --no-save-rng "
    "--num-workers 0 --split 100,0,0"
).split()
CUT = {
    "mixtral": Case("mixtral", "TP2"),
    "dsv3": Case("dsv3", "PP2 uneven"),
    "dsv2lite": Case("dsv2lite"),
}


@pytest.mark.ranks(2)
def test_trained_weights_reach_transformers_with_the_same_logits(
    models: Path, tmp_path: Path
) -> None:
    listed = []
    for family, case in CUT.items():
        saved = tmp_path / f"{family}-trained"
        train = spelled(case, models, tmp_path)
        train["how"] = "train"
        train["argv"] += [*STEPS, "--save", str(saved)]
        train["out"] = str(tmp_path / f"{family}-train")
        read = spelled(Case(family), models, tmp_path)
        read["argv"] += ["--load", str(saved)]
        listed += [train, read]
    log = run_listed(listed, tmp_path)
    to_transformers = []
    for family in CUT:
        trained = tmp_path / f"{family}-trained"
        assert trained.is_dir(), log[-3000:]
        checkpoint = open_torch_dist(trained)
        assert not any("linear_q_proj.layer_norm" in key for key in checkpoint.tensors)
        assert any(key.startswith(("optimizer", "chained_")) for key in checkpoint.tensors)
        assert all(problem is None for _, problem in damaged_chunks(checkpoint))
        config = tmp_path / f"{family}-te-auto" / CARRIED
        plan = plan_export(trained, config, ExportOptions())
        run_export(plan, tmp_path / f"{family}-hf", ExportOptions())
        tokens, out = models / f"{family}.tokens.pt", tmp_path / f"{family}.pt"
        to_transformers += [str(tmp_path / f"{family}-hf"), str(tokens), str(out)]
    script = [sys.executable, "-W", "ignore", str(HERE / "make_hf_models.py")]
    subprocess.run([*script, *to_transformers], check=True, capture_output=True, timeout=300)
    for family, read in zip(CUT, listed[1::2], strict=True):
        found, before = torch.load(read["out"]), torch.load(models / f"{family}.logits.pt")
        assert float((found - before).abs().max()) > 1e-3, "training changed nothing"
        assert float((found - torch.load(tmp_path / f"{family}.pt")).abs().max()) <= BOUND
