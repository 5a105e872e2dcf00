"""The real srun and sbatch parse what we render for pyxis, with a plugin of our own that takes the same options."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster
from tests.cluster.jobs import FLAGS, KNOBS, status, submit

PROBE = """#!/bin/bash
printf '%s\\n' "$PWD" "$(cat "$MOUNTED/file")" > "$OUT/rank-$SLURM_PROCID"
touch "$MOUNTED/written" 2>/dev/null && echo writable >> "$OUT/rank-$SLURM_PROCID"
printf '%s\\n' "$@" >> "$OUT/rank-$SLURM_PROCID"
"""
"""Stands for the container's python."""


@pytest.fixture
def containers(cluster: Cluster) -> Cluster:
    """The cluster, where the plugin could be built."""
    if not cluster.has_container_stub:
        pytest.skip("the SPANK plugin needs libslurm-dev and a C compiler")
    return cluster


@pytest.fixture
def inside(tmp_path: Path) -> dict[str, str]:
    """Knobs of a run in a container whose python says what it sees."""
    for folder in ("bin", "out", "data with blanks", "target with blanks"):
        (tmp_path / folder).mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(PROBE)
    python.chmod(0o755)
    (tmp_path / "moe bench.sqsh").touch()
    (tmp_path / "data with blanks" / "file").write_text("of the source\n")
    return {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "OUT": str(tmp_path / "out"),
        "MOUNTED": str(tmp_path / "target with blanks"),
        "CONTAINER_STUB_LOG": str(tmp_path / "stub.log"),
        "CONTAINER_IMAGE": str(tmp_path / "moe bench.sqsh"),
        "CONTAINER_MOUNTS": f"{tmp_path}/data with blanks:{tmp_path}/target with blanks:ro,/tmp:/tmp",
        "SRUN_MPI": "none",  # Debian's Slurm has no PMIx
    }


def test_srun_takes_image_mounts_and_working_directory_as_they_were_given(
    containers: Cluster, inside: dict[str, str], tmp_path: Path
) -> None:
    knobs = inside | {"MEGATRON_PATH": megatron(tmp_path)}
    job, run_dir = submit(containers, tmp_path / "runs", "inside", "--train-iters", "6", **knobs)
    containers.wait_for(job, "COMPLETED")
    said = [
        json.loads(line) for line in Path(inside["CONTAINER_STUB_LOG"]).read_text().splitlines()
    ]
    tasks = [line for line in said if line["where"] == "task"]
    assert sorted(line["task"] for line in tasks) == [0, 1]
    for line in tasks:
        assert line["container-image"] == inside["CONTAINER_IMAGE"]
        mounts = line["container-mounts"].split(",")
        assert mounts[:2] == inside["CONTAINER_MOUNTS"].split(",")
        assert line["container-workdir"] == knobs["MEGATRON_PATH"]
        assert line["no-container-mount-home"] is True
    for rank in (0, 1):
        workdir, content, *words = (tmp_path / "out" / f"rank-{rank}").read_text().splitlines()
        assert workdir == knobs["MEGATRON_PATH"]
        assert content == "of the source"
        assert words[:2] == ["-m", "moe_bench.runtime.pretrain"]  # not writable: ro holds
        assert words[words.index("--train-iters") + 1] == "6"
    assert (run_dir / "logs" / "rank-1.log").is_file()


def megatron(folder: Path) -> str:
    """A Megatron-LM checkout, as far as the login node looks at one."""
    checkout = folder / "Megatron-LM"
    (checkout / "megatron" / "core").mkdir(parents=True)
    (checkout / "pretrain_gpt.py").touch()
    (checkout / "megatron" / "core" / "package_info.py").write_text(
        "MAJOR = 0\nMINOR = 19\nPATCH = 2\n"
    )
    return str(checkout)


@pytest.mark.parametrize(
    "mounts",
    [
        "/data,with,commas:/data",
        "/data:/data:ro:/more",
        "/data:relative",
        "relative:/data",
        "/da$(touch pwned)ta:/data",
        "/da`touch pwned`ta:/data",
        '/da"ta:/data',
        "/data:/data:ro;touch pwned",
        "/da\nta:/data",
    ],
)
def test_a_mount_that_could_be_read_as_another_is_refused_before_submission(
    mounts: str, cluster: Cluster, tmp_path: Path
) -> None:
    knobs = KNOBS | {
        "OUTPUT_PATH": str(tmp_path),
        "RUN_ID": "hostile",
        "CONTAINER_IMAGE": "/x.sqsh",
    }
    done = cluster.submit(*FLAGS, check=False, **knobs, CONTAINER_MOUNTS=mounts)
    assert done.returncode == 2
    assert "CONTAINER_MOUNTS holds" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_is_not_there_fails_the_job_and_status_says_so(
    containers: Cluster, inside: dict[str, str], tmp_path: Path
) -> None:
    knobs = inside | {"CONTAINER_IMAGE": "/images/gone.sqsh"}
    job, run_dir = submit(containers, tmp_path / "runs", "gone", "--train-iters", "6", **knobs)
    containers.wait_for(job, "FAILED", timeout_s=60)
    said = status(containers, run_dir)
    assert said.startswith("gone  failed")
    assert "container could not start" in said


def test_without_pyxis_the_failure_says_what_to_set(
    containers: Cluster, inside: dict[str, str], tmp_path: Path
) -> None:
    plugins = containers.folder / "plugstack.conf"
    text = plugins.read_text()
    plugins.write_text("")
    try:
        job, run_dir = submit(containers, tmp_path / "runs", "none", "--train-iters", "6", **inside)
        containers.wait_for(job, "FAILED", timeout_s=60)
    finally:
        plugins.write_text(text)
    said = status(containers, run_dir)
    assert "no pyxis" in said
    assert "CONTAINER_RUNTIME=apptainer" in said
