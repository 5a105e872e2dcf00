"""What is written is what is read, whatever ended the writer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moe_bench.config.run import ResolvedRun
from moe_bench.errors import RecordError
from moe_bench.results.manifest import locate_run, read_manifest
from moe_bench.results.reader import (
    read_events,
    read_expert_loads,
    read_last_steps,
    read_steps,
    tail_steps,
)
from moe_bench.results.records import Event
from moe_bench.results.writer import RunWriter
from tests.support.recorded import step_record, write_manifest, write_run

STEPS = "results/steps.jsonl"


def write_steps(run_dir: Path, *steps: int) -> None:
    writer = RunWriter(run_dir)
    for step in steps:
        writer.step(step_record(step))
    writer.close()


def test_every_field_of_a_step_comes_back(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3)
    assert read_expert_loads(tmp_path, frozenset({2})) == (step_record(2),)
    read = read_steps(tmp_path).records[1]
    assert read.losses == step_record(2).losses
    assert [load.max_over_mean for load in read.expert_load] == [
        load.max_over_mean for load in step_record(2).expert_load
    ]


def test_a_loss_that_is_not_a_number_is_read_as_none(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    writer.step(replace(step_record(1), losses={"lm loss": float("nan")}, grad_norm=float("inf")))
    read = read_steps(tmp_path).records[0]
    assert (read.loss, read.grad_norm) == (None, None)
    assert read.losses == {"lm loss": None}


def test_a_run_without_steps_has_none(tmp_path: Path) -> None:
    assert read_steps(tmp_path).records == ()
    assert read_events(tmp_path).records == ()
    assert read_last_steps(tmp_path, 5) == ()


@pytest.mark.parametrize("lost", [1, 2, 40])
def test_a_torn_last_line_is_counted_and_named(tmp_path: Path, lost: int) -> None:
    write_steps(tmp_path, 1, 2, 3)
    path = tmp_path / STEPS
    path.write_bytes(path.read_bytes()[: -1 - lost])
    read = read_steps(tmp_path)
    assert [record.step for record in read.records] == [1, 2]
    assert read.torn == (f"{path}:4",)
    assert [step.step for step in read_last_steps(tmp_path, 5)] == [1, 2]


def test_a_writer_that_continues_after_a_torn_line_loses_nothing_else(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3)
    path = tmp_path / STEPS
    path.write_bytes(path.read_bytes()[:-30])
    write_steps(tmp_path, 3, 4)
    read = read_steps(tmp_path)
    assert [record.step for record in read.records] == [1, 2, 3, 4]
    assert read.torn == (f"{path}:4",)


def test_damage_in_the_middle_is_refused_with_its_place(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3)
    path = tmp_path / STEPS
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2][:50] + b"\n", *lines[3:]]))
    with pytest.raises(RecordError, match=rf"{STEPS}:3: damaged record"):
        read_steps(tmp_path)


def test_a_newer_format_is_refused_and_both_versions_named(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    path = tmp_path / STEPS
    path.write_bytes(path.read_bytes().replace(b'"version":1', b'"version":2'))
    with pytest.raises(RecordError, match=r"record format 2 is newer .* reads up to 1"):
        read_steps(tmp_path)


def test_steps_made_again_after_a_restart_replace_what_was_rolled_back(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4, 5)
    write_steps(tmp_path, 3, 4)
    read = read_steps(tmp_path)
    assert [record.step for record in read.records] == [1, 2, 3, 4]
    assert (read.rolled_back, read.attempt_starts) == (3, (0, 2))
    assert [step.step for step in read_last_steps(tmp_path, 9)] == [1, 2, 3, 4]


def test_each_record_is_one_write_that_ends_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[bytes] = []
    write = os.write

    def observed(descriptor: int, data: bytes) -> int:
        written.append(data)
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", observed)
    write_steps(tmp_path, 1, 2, 3)
    monkeypatch.undo()
    assert [line.count(b"\n") for line in written] == [1, 1, 1, 1]  # the header's, too
    assert all(line.endswith(b"\n") for line in written)
    assert b"".join(written) == (tmp_path / STEPS).read_bytes()


def test_a_killed_writer_leaves_whole_lines_before_the_last(tmp_path: Path) -> None:
    script = (
        "import itertools, sys\n"
        "from moe_bench.results.writer import RunWriter\n"
        "from tests.support.recorded import step_record\n"
        "writer = RunWriter(sys.argv[1])\n"
        "for step in itertools.count(1): writer.step(step_record(step))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=Path.cwd())
    deadline = time.monotonic() + 60
    while len(read_steps(tmp_path).records) < 50:
        assert time.monotonic() < deadline, "the writer wrote nothing"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    read = read_steps(tmp_path)
    assert len(read.torn) <= 1  # a killed process's write may end where a page does
    assert [record.step for record in read.records] == list(range(1, len(read.records) + 1))


def test_events_of_all_ranks_and_the_launcher_are_merged_by_time(tmp_path: Path) -> None:
    for time_unix_s, rank, source in ((3.0, 0, None), (1.0, 5, None), (2.0, 0, "launcher")):
        writer = RunWriter(tmp_path, rank=rank, source=source)
        writer.event(Event(event="phase", time_unix_s=time_unix_s, rank=rank))
    assert [event.time_unix_s for event in read_events(tmp_path).records] == [1.0, 2.0, 3.0]
    assert len(list((tmp_path / "results").iterdir())) == 3


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "results").mkdir()
    (tmp_path / STEPS).symlink_to("/dev/full")
    with pytest.raises(RecordError, match=r"cannot append to .*No space left on device"):
        RunWriter(tmp_path).step(step_record(1))


def test_the_tail_reads_only_whole_lines_and_only_once(tmp_path: Path) -> None:
    tail = tail_steps(tmp_path)
    assert tail.poll() == []
    write_steps(tmp_path, 1, 2)
    path = tmp_path / STEPS
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert [record.step for record in tail.poll()] == [1]
    path.write_bytes(whole)
    assert [record.step for record in tail.poll()] == [2]
    assert tail.poll() == []


def test_the_last_steps_of_a_long_file_are_those_of_the_whole(tmp_path: Path) -> None:
    write_steps(tmp_path, *range(1, 301))
    last = read_last_steps(tmp_path, 20)
    assert [step.step for step in last] == list(range(281, 301))
    assert last[-1].losses == read_steps(tmp_path).records[-1].losses


def test_the_manifest_agrees_with_what_the_resolver_writes(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a", args={"--swiglu": "true"}, knobs={"COMMENT": "x y"})
    run = ResolvedRun.from_json((tmp_path / "a" / "run.json").read_bytes())
    manifest = read_manifest(tmp_path / "a")
    assert (manifest.run_id, manifest.model, manifest.world_size) == (
        "a",
        run.model,
        run.world_size,
    )
    for ours, theirs in ((manifest.knobs, run.knobs), (manifest.args, run.args)):
        assert {name: (value.value, value.origin.place) for name, value in ours.items()} == {
            name: (setting.value, setting.origin.place) for name, setting in theirs.items()
        }


def test_a_run_is_found_by_path_id_part_and_latest(tmp_path: Path) -> None:
    older, newer = (
        write_run(tmp_path / "x-old", num_steps=1),
        write_run(tmp_path / "x-new", num_steps=1),
    )
    os.utime(older / "run.json", (1, 1))
    for name in (str(newer), "x-new", "new", "latest"):
        assert locate_run(name, base=tmp_path) == newer
    with pytest.raises(RecordError, match="fits 2 runs"):
        locate_run("x-", base=tmp_path)
    with pytest.raises(RecordError, match="neither a run directory nor a run"):
        locate_run("other", base=tmp_path)


def test_a_record_without_each_experts_count_is_read_without_them(tmp_path: Path) -> None:
    path = write_run(tmp_path, num_steps=3) / "results" / "steps.jsonl"
    path.write_text(re.sub(r',"tokens_per_expert":\[[0-9,]*\]', "", path.read_text()))
    assert len(read_steps(tmp_path).records[0].expert_load) == 4
    assert read_expert_loads(tmp_path, frozenset({1, 2, 3})) == ()
