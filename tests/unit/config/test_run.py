"""run.json holds everything and nothing secret."""

from __future__ import annotations

from pathlib import Path

from moe_bench.config.run import ResolvedRun
from tests.support.projects import Project


def test_a_run_survives_json(tmp_path: Path) -> None:
    run = Project(tmp_path).resolve(
        {"TP": "2"}, ["--recompute-granularity", "selective", "--recompute-modules", "mlp", "moe"]
    )
    assert ResolvedRun.from_json(run.to_json()) == run


def test_no_secret_is_in_it(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write("cluster_configs/benchmarking/local.conf", "export NOTE=shown\n")
    run = project.resolve({"WANDB_API_KEY": "hunter-one", "MY_PASSWORD": "hunter-three"})
    text = run.to_json().decode()
    assert "hunter" not in text
    assert "shown" in text
