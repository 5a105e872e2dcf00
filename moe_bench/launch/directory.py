"""A run's own directory: made once, complete or not at all."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

from moe_bench.commits import commits
from moe_bench.config.run import ResolvedRun
from moe_bench.errors import LaunchError
from moe_bench.launch.launcher import LaunchPlan

RUN_FILE = "run.json"
FOLDERS = ("logs", "results")


def create(run: ResolvedRun, plan: LaunchPlan) -> None:
    """Write run.json, the script and the empty folders aside, then move all into place at once.

    Raises LaunchError when the run's directory exists already or cannot be written.
    """
    target = run.run_dir
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            raise _taken(run, plan)
        _fill(aside, run, plan)
        aside.rename(target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if target.is_dir():  # another came first, a moment ago
            raise _taken(run, plan) from error
        base = run.knobs.get("OUTPUT_PATH")
        said = f"OUTPUT_PATH={base.value} ({base.origin.place}): " if base else ""
        raise LaunchError(f"{said}cannot write {target}: {error.strerror}") from error


def _taken(run: ResolvedRun, plan: LaunchPlan) -> LaunchError:
    return LaunchError(
        f"RUN_ID={run.run_id}: {run.run_dir} exists already and is left alone; choose another RUN_ID, or start that run's own "
        f"{run.run_dir / plan.filename} again to go on with it"
    )


def _fill(folder: Path, run: ResolvedRun, plan: LaunchPlan) -> None:
    is_profiled = run.knobs["PROFILE"].value != "0"
    for name in (*FOLDERS, "profiles") if is_profiled else FOLDERS:
        (folder / name).mkdir(parents=True)
    recorded = replace(run, commits=commits(run.knob("MEGATRON_PATH")))
    (folder / RUN_FILE).write_bytes(recorded.to_json() + b"\n")
    script = folder / plan.filename
    script.write_text(plan.script, newline="")
    script.chmod(0o755)
