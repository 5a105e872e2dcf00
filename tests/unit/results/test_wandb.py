"""What the real wandb client wrote offline is what was recorded; it never stops a training, and no key is in it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_bench.results.reader import read_events
from moe_bench.results.wandb import WandbMirror, choose_mode
from moe_bench.results.writer import RunWriter
from tests.support.projects import REPOSITORY
from tests.support.recorded import step_record, write_manifest
from tests.support.wandb_files import read_offline
from tests.support.wandb_server import wandb_server

KEY = "0123456789abcdef0123456789abcdef01234567"
EXIT_PATIENCE_S = 60.0
"""For a process of five steps on a busy machine; wandb by itself would wait for hours."""


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
    knobs = {
        "COMMENT": "hello",
        "WANDB_RUN_GROUP": "a-sweep",
        "WANDB_ENTITY": "team",
        "MY_TOKEN": "hide me",
        "NOTE": f"my key is {KEY}",
    }
    write_manifest(run_dir, knobs=knobs, args={"--wandb-project": "bench"})
    writer = RunWriter(run_dir)
    environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}
    mirror = WandbMirror(run_dir, environment=environment, report=writer.event)
    for step in range(1, 6):
        mirror.step(step_record(step))
    mirror.close()
    [event] = read_events(run_dir).records
    assert event.event == "wandb"
    assert str(event.fields["sync"]).endswith(f"-m wandb sync {event.fields['path']}")
    assert Path(str(event.fields["path"])).is_dir()

    found = read_offline(run_dir)
    run, config, history = found.run, found.config, found.history
    assert (run.project, run.display_name, run.notes) == ("bench", "20261121-Tiny-hello", "hello")
    assert (run.run_group, run.entity, run.run_id) == ("a-sweep", "team", "20261121-Tiny")
    assert config["knobs"]["EP"] == "2"
    assert config["origins"]["knobs"]["COMMENT"] == "command line"
    assert config["knobs"]["MY_TOKEN"] == "<hidden>"
    assert config["knobs"]["NOTE"] == "my key is <hidden>"
    assert [row["loss/lm loss"] for row in history] == [
        step_record(step).losses["lm loss"] for step in range(1, 6)
    ]
    assert history[0]["experts/layer_3/max_over_mean"] > 2
    assert_no_key_below(run_dir / "wandb")


def test_the_clients_own_system_monitor_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_X_STATS_SAMPLING_INTERVAL", "0.2")
    run_dir = tmp_path / "run"
    write_manifest(run_dir)
    writer = RunWriter(run_dir)
    mirror = WandbMirror(run_dir, environment={"WANDB_MODE": "offline"}, report=writer.event)
    mirror.step(step_record(1))
    deadline_s = time.monotonic() + EXIT_PATIENCE_S
    while not read_events(run_dir).records:
        assert time.monotonic() < deadline_s, "the client did not start"
        time.sleep(0.1)
    time.sleep(2)  # ten samples
    mirror.close()
    assert {"cpu", "memory_percent"} <= read_offline(run_dir).system


def assert_no_key_below(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path


PROGRAM = """
import os, sys, time
from pathlib import Path
from moe_bench.results.wandb import WandbMirror
from moe_bench.results.writer import RunWriter
from tests.support.recorded import step_record
run_dir = Path(sys.argv[1])
writer = RunWriter(run_dir)
mirror = WandbMirror(run_dir, environment=os.environ, report=writer.event)
for step in range(1, 6):
    mirror.step(step_record(step))
sys.stdin.readline()
began = time.monotonic()
mirror.close(patience_s=float(sys.argv[2]))
print(f"closed after {time.monotonic() - began:.1f} s")
"""


def online(
    tmp_path: Path,
    server: str,
    *,
    patience_s: float = 30.0,
    key: str = KEY,
    may_close: Callable[[], bool] = lambda: True,
) -> tuple[Path, str]:
    """A process that mirrors five steps to `server`, closes once it may, and ends: its run's directory, what it said."""
    run_dir = tmp_path / "run"
    write_manifest(run_dir)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(REPOSITORY),
        "WANDB_MODE": "online",
        "WANDB_API_KEY": key,
        "WANDB_BASE_URL": server,
    }
    words = [sys.executable, "-c", PROGRAM, str(run_dir), str(patience_s)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(words, env=environment, text=True, **pipes) as process:
        try:
            deadline_s = time.monotonic() + EXIT_PATIENCE_S
            while not may_close() and time.monotonic() < deadline_s:
                time.sleep(0.05)
            said, _ = process.communicate("\n", timeout=EXIT_PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 0, said
    assert KEY not in said
    assert_no_key_below(tmp_path)
    return run_dir, said


def test_without_a_network_the_run_is_kept_offline_and_the_process_ends(tmp_path: Path) -> None:
    run_dir, _ = online(tmp_path, "http://127.0.0.1:9")
    warning, event = read_events(run_dir).records
    assert "Connection refused" in str(warning.fields["message"])
    assert event.fields["mode"] == "offline"
    assert len(read_offline(run_dir).history) == 5


def test_with_a_wrong_key_the_run_is_kept_offline(tmp_path: Path) -> None:
    with wandb_server(refuses=True) as (server, _):
        run_dir, _ = online(tmp_path, server)
    warning, event = read_events(run_dir).records
    assert "permission denied" in str(warning.fields["message"])
    assert event.fields["mode"] == "offline"
    assert len(read_offline(run_dir).history) == 5


def test_with_a_key_of_another_shape_the_run_is_kept_offline(tmp_path: Path) -> None:
    with wandb_server() as (server, _):
        run_dir, _ = online(tmp_path, server, key="too-short")
    warning, _ = read_events(run_dir).records
    assert "API key must have 40+ characters" in str(warning.fields["message"])
    assert len(read_offline(run_dir).history) == 5


def test_a_server_that_stalls_holds_nobody_up_for_longer_than_the_patience(tmp_path: Path) -> None:
    """It is there, but never takes the run: the client by itself would ask on and on."""
    with wandb_server(stalls=True) as (server, received):
        run_dir, said = online(tmp_path, server, patience_s=3, may_close=lambda: bool(received))
        assert received, "the client never asked"
    seconds = float(said.split("closed after ")[1].split()[0])
    assert seconds < 15
    assert "W&B" in str(read_events(run_dir).records[0].fields["message"])


def test_where_nothing_can_be_written_training_goes_on(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_manifest(run_dir)
    (run_dir / "wandb").write_text("a file where a folder should be")
    writer = RunWriter(run_dir)
    mirror = WandbMirror(run_dir, environment={"WANDB_MODE": "offline"}, report=writer.event)
    mirror.step(step_record(1))
    mirror.close()
    [event] = read_events(run_dir).records
    assert "training and its record go on" in str(event.fields["message"])
