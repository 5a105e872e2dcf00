"""The dashboard's panels name what the mirror logs, and the public library takes them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.errors import RecordError
from moe_bench.results.dashboard import read_dashboard, specification, workspace
from moe_bench.results.records import GpuSample
from moe_bench.results.wandb import metrics
from tests.support.projects import REPOSITORY
from tests.support.recorded import step_record
from tests.support.wandb_server import wandb_server

KEY = "0123456789abcdef0123456789abcdef01234567"


def logged() -> set[str]:
    gpu = GpuSample(rank=0, power_w=500, sm_clock_mhz=1900, utilization=0.9, memory_used_gib=70)
    return set(metrics(dataclasses.replace(step_record(1), gpus=(gpu,))))


def test_every_panel_names_what_a_run_with_gpus_logs() -> None:
    names = logged() | {"evaluation/validation/lm loss"}
    for panel in read_dashboard().panels:
        assert set(panel.metrics) <= names, panel.title
        if panel.regex:
            assert [name for name in names if re.fullmatch(panel.regex, name)], panel.title


def test_everything_that_is_logged_has_a_panel() -> None:
    panels = read_dashboard().panels
    shown = {name for panel in panels for name in panel.metrics}
    patterns = [panel.regex for panel in panels if panel.regex]
    left = {
        name
        for name in logged() - shown
        if not any(re.fullmatch(pattern, name) for pattern in patterns)
    }
    assert left == {"step", "consumed_tokens"}


def test_the_librarys_workspace_holds_every_panel_in_order() -> None:
    pytest.importorskip("wandb_workspaces")
    dashboard = read_dashboard()
    made = workspace(dashboard, entity="me", project="p")
    sections = json.loads(specification(made))["section"]["panelBankConfig"]["sections"]
    sent = [panel["config"] for section in sections for panel in section["panels"]]
    assert [one["chartTitle"] for one in sent] == [panel.title for panel in dashboard.panels]
    for config, panel in zip(sent, dashboard.panels, strict=True):
        assert tuple(config.get("metrics", ())) == panel.metrics
        assert config.get("metricRegex") == panel.regex


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\nsections: 1\n", "not a dashboard"),
        ("name: x\nsections:\n- name: y\n  panels:\n  - {title: z, metric: [a]}\n", "metric"),
        ("name: x\nsections:\n- name: y\n  panels:\n  - {title: z}\n", "either metrics or a regex"),
    ],
)
def test_a_file_that_is_no_dashboard_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecordError, match=said):
        read_dashboard(path)


def apply(tmp_path: Path, server: str, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "WANDB_API_KEY": KEY,
        "WANDB_BASE_URL": server,
    }
    return subprocess.run(
        [sys.executable, "-m", "moe_bench", "dashboard", "apply", *words],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_apply_sends_the_workspace_to_the_project(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    with wandb_server() as (server, received):
        done = apply(tmp_path, server, "team/bench")
    assert done.returncode == 0, done.stderr
    assert f"saved: {server}/team/bench" in done.stdout
    [sent] = [one["variables"] for one in received if "upsertView" in one.get("query", "")]
    assert (sent["entityName"], sent["projectName"]) == ("team", "bench")
    assert sent["displayName"] == read_dashboard().name
    assert "loss/lm loss" in sent["spec"]


def test_apply_says_what_is_wrong_without_the_key(tmp_path: Path) -> None:
    pytest.importorskip("wandb_workspaces")
    for target, server, said in (
        ("bench", "http://127.0.0.1:9", "not ENTITY/PROJECT"),
        ("team/bench", "http://127.0.0.1:9", "Connection refused"),
    ):
        done = apply(tmp_path, server, target)
        assert done.returncode == 2
        assert said in done.stderr
        assert KEY not in done.stderr + done.stdout
