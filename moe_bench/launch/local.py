"""Runs on this machine: renders one bash script, and starts that very script."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

from moe_bench.arguments.emit import argv
from moe_bench.config.run import ResolvedRun
from moe_bench.launch.launcher import JobHandle, LaunchPlan

SCRIPT = "launch.sh"


class LocalLauncher:
    """One node: torchrun on GPUs, forked ranks over gloo on a CPU."""

    def __init__(self, *, project: Path, python: str, device: str) -> None:
        self._project = project
        self._python = python
        self._device = device

    def render(self, run: ResolvedRun) -> LaunchPlan:
        """Pure: the same run gives the same bytes."""
        lines = [
            "#!/usr/bin/env bash",
            f"# moe_bench: run {shlex.quote(run.run_id)}",
            "set -euo pipefail",
            "",
        ]
        lines += [f"cd {shlex.quote(str(self._project))}"]
        lines += [
            f"export {name}={shlex.quote(setting.value)}" for name, setting in run.env.items()
        ]
        lines += ["", "exec " + " \\\n  ".join(self._command(run)), ""]
        return LaunchPlan(
            launcher="local", filename=SCRIPT, script="\n".join(lines), environment={}
        )

    def _command(self, run: ResolvedRun) -> list[str]:
        ranks = run.knobs["GPUS_PER_NODE"].value
        head = [shlex.join([self._python, "-m", "moe_bench.runtime.local", "--nproc", ranks, "--"])]
        return head + [shlex.join(words) for words in _by_flag(argv(run))]

    def submit(self, plan: LaunchPlan, run: ResolvedRun) -> JobHandle:
        """Start the script that was rendered."""
        process = start(plan, run)
        return JobHandle(launcher="local", job_id=str(process.pid))


def start(plan: LaunchPlan, run: ResolvedRun) -> subprocess.Popen[bytes]:
    """The script, in a process group of its own; its output goes to logs/launch.log."""
    log = (run.run_dir / "logs" / "launch.log").open("wb")
    return subprocess.Popen(
        ["bash", str(run.run_dir / plan.filename)],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _by_flag(words: tuple[str, ...]) -> list[list[str]]:
    """One line a flag."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(word)
    return lines
