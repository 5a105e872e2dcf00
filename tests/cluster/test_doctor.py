"""`doctor` within a real allocation of two nodes."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import ROOT, Cluster

DOCTOR = (sys.executable, "-m", "moe_bench", "doctor")
NODES = ("--nodes=2", "--nodelist=n1,n2")
"""By name: a job that has just ended may still hold one for a moment."""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The project's files with a cluster file of our own."""
    for name in ("model_configs", "runtime_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    clusters = tmp_path / "cluster_configs" / "benchmarking"
    clusters.mkdir(parents=True)
    (tmp_path / "data.idx").touch()
    (clusters / "ours.conf").write_text(
        f"export OUTPUT_PATH={tmp_path}/runs DATA_PATH={tmp_path}/data\n"
        f"export CONTAINER_IMAGE=/images/gone.sqsh\n"
        f"export CONTAINER_MOUNTS={tmp_path}:/data,/gone/too:/gone\n"
    )
    return tmp_path


def test_both_nodes_are_asked_and_what_the_cluster_file_names_in_vain_is_found(
    cluster: Cluster, project: Path
) -> None:
    knobs = {"WORKSPACE": str(project), "CLUSTER": "ours", "MODEL": "Tiny-Qwen3"}
    done = cluster.run("salloc", *NODES, *DOCTOR, check=False, **knobs)
    assert done.returncode == 1, done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert "ok      nodes: 2 answer: n1, n2" in said
    assert "ok      clocks: agree" in said
    assert f"ok      DATA_PATH: {project}/data" in said
    assert (
        f"PROBLEM DATA_PATH: {project}/data lies under none of CONTAINER_MOUNTS: the ranks will not see it"
        in said
    )
    assert "PROBLEM CONTAINER_IMAGE: /images/gone.sqsh does not exist here" in said
    assert "PROBLEM CONTAINER_MOUNTS: /gone/too does not exist here" in said
    assert "PROBLEM n2: /gone/too does not exist there" in said
    assert any("ours.conf:3" in line for line in said)  # where to mend it
    assert f"ok      CONTAINER_MOUNTS: {project}" in said


def test_within_a_task_of_srun_all_nodes_are_asked_too(cluster: Cluster, tmp_path: Path) -> None:
    knobs = {"OUTPUT_PATH": str(tmp_path)}
    srun = ("srun", *NODES, "--ntasks-per-node=1", "--label")
    done = cluster.run(*srun, *DOCTOR, check=False, **knobs)
    for task in ("0", "1"):
        said = [line[3:] for line in done.stdout.splitlines() if line.startswith(f"{task}: ")]
        assert any("allocation: within job" in line for line in said), done.stdout + done.stderr
        assert "ok      nodes: 2 answer: n1, n2" in said, done.stdout
        assert said[-1] == "0 problems found", done.stdout


def test_a_node_whose_clock_is_wrong_is_named(cluster: Cluster, tmp_path: Path) -> None:
    date = tmp_path / "date"
    date.write_text(
        '#!/bin/bash\nnow=$(/bin/date "$@")\n[[ $SLURMD_NODENAME == n2 ]] && now=$((${now%.*} + 60)).0\necho "$now"\n'
    )
    date.chmod(0o755)
    done = cluster.run(
        "salloc", *NODES, *DOCTOR, check=False, PATH=f"{tmp_path}:{os.environ['PATH']}"
    )
    assert done.returncode == 1
    off = re.search(r"PROBLEM clocks: n2 is off by at least (\S+) s\n", done.stdout)
    assert off, done.stdout
    assert 50 < float(off[1]) <= 60  # less what the question took
