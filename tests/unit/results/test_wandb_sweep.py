"""A sweep's points in W&B, as the real client wrote them offline: one group, and what varies in name and config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_bench.results.wandb import WandbMirror
from moe_bench.results.writer import RunWriter
from tests.support.recorded import step_record, write_manifest
from tests.support.wandb_files import read_offline


def mirrored(run_dir: Path, environment: dict[str, str], **args: str) -> tuple[object, dict]:
    """The run and its config after one step."""
    write_manifest(run_dir, args={name.replace("_", "-"): value for name, value in args.items()})
    path = run_dir / "run.json"
    run = json.loads(path.read_text())
    values = {"TP": "2", "--lr": "1e-3"}
    run["point"] = {"sweep_id": "Tiny-Qwen3-abc", "number": 7, "values": values}
    path.write_text(json.dumps(run))
    mirror = WandbMirror(
        run_dir,
        environment={"WANDB_MODE": "offline"} | environment,
        report=RunWriter(run_dir).event,
    )
    mirror.step(step_record(1))
    mirror.close()
    found = read_offline(run_dir)
    return found.run, found.config


def test_a_point_is_in_its_sweeps_group_with_its_values(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run, config = mirrored(tmp_path / "7-TP2-lr1e-3", {})
    assert run.run_group == "Tiny-Qwen3-abc"
    assert "TP2-lr1e-3" in run.display_name
    assert config["sweep"] == {"id": "Tiny-Qwen3-abc", "point": 7, "TP": "2", "lr": "1e-3"}


def test_a_group_of_the_callers_own_wins_and_a_presets_name_gets_the_point(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run, _ = mirrored(
        tmp_path / "7-TP2-lr1e-3", {"WANDB_RUN_GROUP": "mine"}, **{"--wandb-exp-name": "DeepSeek"}
    )
    assert run.run_group == "mine"
    assert run.display_name == "DeepSeek-7-TP2-lr1e-3"
