"""Secrets stay where they were: in the caller's environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.config.gather import CLUSTERS
from moe_bench.errors import ConfigError
from tests.support.projects import Project


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "S3_SECRET", "DB_PASSWORD"])
def test_a_conf_that_brings_a_secret_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(f"{CLUSTERS}/local.conf", f"\nexport {name}=${{{name}:-hunter2}}\n")
    with pytest.raises(ConfigError) as refused:
        project.resolve()
    assert f"{CLUSTERS}/local.conf:2 sets {name}" in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_conf_may_pass_the_callers_secret_on(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(f"{CLUSTERS}/local.conf", "export HF_TOKEN=${HF_TOKEN:-} OTHER_KEY=\n")
    assert b"hunter2" not in project.resolve({"HF_TOKEN": "hunter2"}).to_json()
    assert "HF_TOKEN" not in project.resolve({"HF_TOKEN": "hunter2"}).env


def test_a_key_that_is_the_guides_placeholder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"WANDB_API_KEY \(environment\) still holds"):
        Project(tmp_path).resolve({"WANDB_API_KEY": "your_own_wandb_api_key"})
