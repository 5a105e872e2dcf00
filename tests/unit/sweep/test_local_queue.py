"""The queue on this machine with points that are small scripts: what it starts, stops, skips, and writes down."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moe_bench.errors import LaunchError
from moe_bench.launch.launcher import LaunchPlan
from moe_bench.results.sweep_record import (
    COMPLETED,
    FAILED,
    INTERRUPTED,
    LOST,
    TIMED_OUT,
    Attempt,
    Axis,
    Point,
    Sweep,
    read_sweep,
    write_sweep,
)
from moe_bench.results.triage import Rule, read_rules
from moe_bench.sweep.directory import locked
from moe_bench.sweep.local_queue import LocalQueue, process_began
from tests.support.projects import REPOSITORY
from tests.support.recorded import write_manifest, write_run

TRAIN = '#!/usr/bin/env bash\ncp "${0%/*/*}/recorded/results/"*.jsonl "${0%/*}/results/"\n'
"""Leaves the record of a run that completed."""
FAIL = "#!/usr/bin/env bash\necho 'torch.OutOfMemoryError: CUDA out of memory'\nexit 1\n"
BUILT_IN = read_rules()
SLEEP = "#!/usr/bin/env bash\nexec sleep 600\n"


def make(folder: Path, scripts: Sequence[str], *, run_time_s: int = 3600, **sweep: object) -> Sweep:
    """A sweep over MBS with one script a point."""
    write_run(folder / "recorded", num_steps=12, step_time_s=0.1)
    points = []
    for number, script in enumerate(scripts, start=1):
        run_dir = folder / f"{number}-MBS{number}"
        write_manifest(run_dir)
        for name in ("logs", "results"):
            (run_dir / name).mkdir()
        (run_dir / "launch.sh").write_text(script)
        plan = LaunchPlan(launcher="local", filename="launch.sh", script=script)
        points.append(
            Point(
                number=number,
                name=run_dir.name,
                values={"MBS": str(number)},
                nodes=1,
                ranks=2,
                run_time_s=run_time_s,
                script_sha256=plan.sha256,
            )
        )
    made = Sweep(
        sweep_id=folder.name,
        model="Tiny-Qwen3",
        axes=(Axis(names=("MBS",), values=tuple((str(n + 1),) for n in range(len(scripts)))),),
        words=(),
        given={},
        where="local",
        created_unix_s=0.0,
        points=tuple(points),
        **sweep,
    )
    write_sweep(folder, made)
    return made


def work(
    folder: Path, *, retry_failed: bool = False, rules: Sequence[Rule] = BUILT_IN, **changes: object
) -> tuple[int, str]:
    """Run the queue to its end: its status, and what it said."""
    said = io.StringIO()
    sweep = replace(read_sweep(folder), **changes)
    queue = LocalQueue(
        folder, sweep, retry_failed=retry_failed, rules=rules, console=Console(file=said, width=200)
    )
    return queue.run(), said.getvalue()


def outcomes(folder: Path) -> list[str | None]:
    return [point.outcome for point in read_sweep(folder).points]


def test_points_run_one_after_another_and_a_failure_does_not_stop_the_rest(tmp_path: Path) -> None:
    make(tmp_path / "s", [TRAIN, FAIL, TRAIN])
    status, said = work(tmp_path / "s")
    assert status == 1
    assert outcomes(tmp_path / "s") == [COMPLETED, FAILED, COMPLETED]
    assert "point 2 failed" in said
    assert "out of GPU memory" in said
    sweep = read_sweep(tmp_path / "s")
    assert [len(point.attempts) for point in sweep.points] == [1, 1, 1]
    assert 0 < sweep.node_hours < 0.1


def test_a_failure_is_named_by_the_users_own_rules(tmp_path: Path) -> None:
    make(tmp_path / "s", ["#!/usr/bin/env bash\necho 'Error: licence server gone'\nexit 1\n"])
    own = Rule(name="no licence", pattern="licence server", what_to_do="ask for one")
    _, said = work(tmp_path / "s", rules=(own, *BUILT_IN))
    assert "point 1 failed" in said
    assert read_sweep(tmp_path / "s").points[0].attempts[0].why == "no licence"


def test_a_second_time_nothing_is_left_and_failed_points_start_only_when_asked(
    tmp_path: Path,
) -> None:
    make(tmp_path / "s", [TRAIN, FAIL])
    work(tmp_path / "s")
    _, said = work(tmp_path / "s")
    assert "--retry-failed" in said
    assert [len(point.attempts) for point in read_sweep(tmp_path / "s").points] == [1, 1]
    work(tmp_path / "s", retry_failed=True)
    assert [len(point.attempts) for point in read_sweep(tmp_path / "s").points] == [1, 2]


def test_a_larger_micro_batch_than_one_that_ran_out_of_memory_is_skipped_when_asked(
    tmp_path: Path,
) -> None:
    make(tmp_path / "s", [TRAIN, FAIL, TRAIN], prune_oom=True)
    _, said = work(tmp_path / "s")
    skipped = read_sweep(tmp_path / "s").points[2]
    assert skipped.attempts == ()
    assert skipped.skipped == "point 2 (MBS=2) was out of GPU memory"
    assert "skipped" in said


def test_the_budget_is_never_exceeded_and_names_what_was_not_started(tmp_path: Path) -> None:
    make(tmp_path / "s", [TRAIN, TRAIN, TRAIN], run_time_s=1800, budget_node_hours=0.6)
    status, said = work(tmp_path / "s")
    assert status == 0
    assert outcomes(tmp_path / "s") == [COMPLETED, COMPLETED, COMPLETED], "short points leave room"
    make(tmp_path / "t", [TRAIN, TRAIN], run_time_s=1800, budget_node_hours=0.5)
    _, said = work(tmp_path / "t")
    assert outcomes(tmp_path / "t") == [COMPLETED, None]
    assert "point 2  MBS=2: not started" in said
    status, _ = work(tmp_path / "t", budget_node_hours=1.0)
    assert outcomes(tmp_path / "t") == [COMPLETED, COMPLETED], "a larger budget goes on"


def test_a_point_is_gone_by_its_run_time(tmp_path: Path) -> None:
    make(tmp_path / "s", [SLEEP], run_time_s=4)
    began = time.monotonic()
    _, said = work(tmp_path / "s")
    assert time.monotonic() - began < 4 + 2
    assert outcomes(tmp_path / "s") == [TIMED_OUT]
    assert "RUN_TIME of 4.0 s was over after no step" in said


def test_a_signal_stops_the_point_and_says_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    make(folder, [TRAIN, SLEEP, TRAIN])
    process = queue_process(folder)
    wait_until(lambda: len(read_sweep(folder).points[1].attempts) == 1)
    running = read_sweep(folder).points[1].attempts[0].process
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert f"go on with:\n  python -m moe_bench sweep --resume {folder}\n" in said
    assert outcomes(folder) == [COMPLETED, INTERRUPTED, None]
    assert running is not None
    assert process_began(running) is None, "the point's process outlived the sweep"


def test_a_killed_sweeps_point_must_be_gone_before_it_starts_again(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    make(folder, [SLEEP, TRAIN])
    process = queue_process(folder)
    wait_until(lambda: bool(read_sweep(folder).points[0].attempts))
    process.kill()
    process.communicate()
    orphan = read_sweep(folder).points[0].attempts[0].process
    assert orphan is not None
    with pytest.raises(LaunchError, match=f"still runs as process {orphan}.*kill {orphan}"):
        work(folder)
    os.kill(orphan, signal.SIGKILL)
    wait_until(lambda: process_began(orphan) is None)
    script = folder / "1-MBS1" / "launch.sh"
    script.write_text(TRAIN)
    sweep = read_sweep(folder)
    digest = LaunchPlan(launcher="local", filename="launch.sh", script=TRAIN).sha256
    write_sweep(folder, with_script(sweep, digest))
    status, _ = work(folder)
    assert status == 0
    first = read_sweep(folder).points[0]
    assert [one.outcome for one in first.attempts] == [LOST, COMPLETED]


def test_a_script_that_was_changed_since_is_not_run(tmp_path: Path) -> None:
    make(tmp_path / "s", [TRAIN])
    (tmp_path / "s" / "1-MBS1" / "launch.sh").write_text("#!/bin/bash\n")
    with pytest.raises(LaunchError, match="was changed since the sweep was made"):
        work(tmp_path / "s")


def test_two_processes_cannot_work_on_one_sweep(tmp_path: Path) -> None:
    make(tmp_path / "s", [TRAIN])
    with (
        locked(tmp_path / "s"),
        pytest.raises(LaunchError, match=f"process {os.getpid()} works on this sweep"),
        locked(tmp_path / "s"),
    ):
        pass


def test_the_record_is_whole_json_after_every_change(tmp_path: Path) -> None:
    sweep = make(tmp_path / "s", [TRAIN])
    attempt = Attempt(started_unix_s=1.0, process=1, node_hours=0.5)
    point = replace(sweep.points[0], attempts=(attempt,))
    write_sweep(tmp_path / "s", replace(sweep, points=(point,)))
    assert json.loads((tmp_path / "s" / "sweep.json").read_text())["points"][0]["attempts"]
    assert read_sweep(tmp_path / "s").points == (point,)
    assert [path.name for path in (tmp_path / "s").glob(".sweep*")] == []


def with_script(sweep: Sweep, digest: str) -> Sweep:
    first, *rest = sweep.points
    return replace(sweep, points=(replace(first, script_sha256=digest), *rest))


def queue_process(folder: Path) -> subprocess.Popen[str]:
    """The queue in a process of its own, as the verb runs it."""
    program = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from moe_bench.results.sweep_record import read_sweep\n"
        "from moe_bench.sweep.local_queue import LocalQueue\n"
        "folder = Path(sys.argv[1])\n"
        "queue = LocalQueue(folder, read_sweep(folder), retry_failed=False, rules=(), console=Console(width=200))\n"
        "sys.exit(queue.run())\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(holds: object, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
