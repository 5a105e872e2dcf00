"""Which GPU a rank takes among those it sees."""

from __future__ import annotations

import os

import pytest

from moe_bench.errors import LaunchError
from moe_bench.runtime.rank import device_ordinal, fill_in


def test_a_rank_takes_the_device_of_its_number() -> None:
    assert [device_ordinal(rank, 8) for rank in range(8)] == list(range(8))


def test_a_task_that_slurm_shows_one_gpu_takes_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert device_ordinal(5, 1) == 0


@pytest.mark.parametrize(("local_rank", "devices"), [(1, 1), (4, 4), (7, 2)])
def test_a_worker_without_a_gpu_of_its_own_is_told_before_nccl_is(
    local_rank: int, devices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(LaunchError, match=f"LOCAL_RANK={local_rank} .* sees {devices} .*2,3"):
        device_ordinal(local_rank, devices)


def test_what_is_left_to_the_job_is_filled_in_by_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NODEID", "3")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/tmp/triton_${SLURM_NODEID}")
    assert fill_in(["--x", "a${SLURM_NODEID}_${SLURM_JOB_ID}", "$HOME ${OTHER}"]) == [
        "--x", "a3_0", "$HOME ${OTHER}",
    ]  # fmt: skip
    assert os.environ["TRITON_CACHE_DIR"] == "/tmp/triton_3"
