"""`convert verify --logits`, as a user calls it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import hf_models
from tests.unit.checkpoint.test_full_size import write_sparse

ROOT = Path(__file__).parents[2]


def convert(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "moe_bench", "convert", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=380, check=False, cwd=ROOT
    )


@pytest.mark.ranks(2)
def test_logits_agree_in_the_layouts_that_are_named(models: Path, tmp_path: Path) -> None:
    hf = models / "dsv2lite"
    assert convert("import", hf, tmp_path / "out").returncode == 0
    done = convert("verify", hf, tmp_path / "out", "--logits", "--layout", "EP2", "--layout", "PP2")
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said[0].endswith("the same")
    for line, layout in zip(said[1:], ("EP2", "PP2"), strict=True):
        found = re.match(rf"logits {layout} +2 ranks  largest difference (\S+) of logits", line)
        assert found, line
        assert 0 < float(found[1]) < 5e-6
        assert line.endswith("128 of 128 greedy tokens the same: agree")


@pytest.mark.ranks(1)
def test_a_quantised_source_is_run_in_bfloat16(models: Path, tmp_path: Path) -> None:
    hf = models / "gpt_oss_mxfp4"
    assert convert("import", hf, tmp_path / "out").returncode == 0
    done = convert("verify", hf, tmp_path / "out", "--logits", "--layout", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("128 of 128 greedy tokens the same: agree")


def test_a_model_that_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", {**hf_models.MIXTRAL, "num_hidden_layers": 1})
    assert convert("import", hf, tmp_path / "out").returncode == 0
    done = convert("verify", hf, hf, "--logits")
    assert done.returncode == 2
    assert "--logits compares a Hugging Face model with a torch_dist checkpoint" in done.stderr
    done = convert("verify", hf, tmp_path / "out", "--layout", "EP2")
    assert done.returncode == 2
    assert "--layout and --bound belong to --logits" in done.stderr
    big = tmp_path / "big"
    big.mkdir()
    write_sparse(big, 163)
    done = convert("verify", big, tmp_path / "out", "--logits", "--layout", "EP4096")
    assert done.returncode == 2
    assert "are free; run it on a larger machine, or without --logits" in done.stderr
