"""What the real wandb client wrote offline is what was recorded, and no key is in it."""

from __future__ import annotations

import importlib
from pathlib import Path

import msgspec
import pytest

from moe_bench.results.reader import read_events
from moe_bench.results.wandb import WandbMirror, choose_mode
from moe_bench.results.writer import RunWriter
from tests.support.recorded import step_record, write_manifest

KEY = "0123456789abcdef0123456789abcdef01234567"


def test_the_mode_follows_the_environment() -> None:
    assert choose_mode({}) == "disabled"
    assert choose_mode({"WANDB_PROJECT": "p"}) == "offline"
    assert choose_mode({"WANDB_API_KEY": KEY}) == "online"
    assert choose_mode({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}) == "offline"
    assert choose_mode({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}) == "disabled"


def test_a_disabled_mirror_starts_nothing(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    mirror = WandbMirror(tmp_path, environment={}, report=writer.event)
    mirror.step(step_record(1))
    mirror.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failing_mirror_is_one_warning_without_the_key(tmp_path: Path) -> None:
    """No run.json: the mirror's first act fails, after the client was imported."""
    pytest.importorskip("wandb")
    run_dir = tmp_path / KEY
    writer = RunWriter(run_dir)
    environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}
    mirror = WandbMirror(run_dir, environment=environment, report=writer.event)
    mirror.step(step_record(1))
    mirror.close()
    events = read_events(run_dir).records
    assert [event.event for event in events] == ["warning"]
    assert "W&B mirror stopped (RecordError" in str(events[0].fields["message"])
    assert KEY not in str(events[0].fields["message"])


def test_an_offline_run_holds_every_step_and_the_configuration_with_origins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    run_dir = tmp_path / "20261121-Tiny"
    knobs = {"COMMENT": "hello", "MY_TOKEN": "hide me", "NOTE": f"my key is {KEY}"}
    write_manifest(run_dir, knobs=knobs, args={"--wandb-project": "bench"})
    writer = RunWriter(run_dir)
    environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "COMMENT": "hello"}
    mirror = WandbMirror(run_dir, environment=environment, report=writer.event)
    for step in range(1, 6):
        mirror.step(step_record(step))
    mirror.close()
    assert [event.event for event in read_events(run_dir).records] == ["wandb"]

    run, config, history = read_offline(run_dir)
    assert (run.project, run.display_name, run.notes) == ("bench", "20261121-Tiny-hello", "hello")
    assert config["knobs"]["EP"] == "2"
    assert config["origins"]["knobs"]["COMMENT"] == "command line"
    assert config["knobs"]["MY_TOKEN"] == "<hidden>"
    assert config["knobs"]["NOTE"] == "my key is <hidden>"
    assert [row["loss/lm loss"] for row in history] == [
        step_record(step).losses["lm loss"] for step in range(1, 6)
    ]
    assert history[0]["experts/layer_3/max_over_mean"] > 2
    for path in (run_dir / "wandb").rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


def read_offline(run_dir: Path) -> tuple[object, dict, list[dict]]:
    """The run, its config and its history, by wandb's own reader of its offline files."""
    records = importlib.import_module("wandb.proto.wandb_internal_pb2")
    store = importlib.import_module("wandb.sdk.internal.datastore").DataStore()
    [path] = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    store.open_for_scan(str(path))
    run, config, history = None, {}, []
    while (data := store.scan_data()) is not None:
        record = records.Record.FromString(data)
        if record.HasField("run"):
            run = record.run
            items = record.run.config.update
            config |= {item.key: msgspec.json.decode(item.value_json) for item in items}
        elif record.HasField("history"):
            row = {
                item.key or ".".join(item.nested_key): msgspec.json.decode(item.value_json)
                for item in record.history.item
            }
            history.append(row)
    return run, config, history
