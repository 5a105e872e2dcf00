"""Runs on this machine: renders one bash script, and starts that very script."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from moe_bench.arguments.emit import argv
from moe_bench.config.knobs import is_secret
from moe_bench.config.run import ResolvedRun, Setting
from moe_bench.errors import LaunchError
from moe_bench.launch.launcher import JobHandle, JobState, LaunchPlan
from moe_bench.results.records import STEPS_FILE, STOP_FILE

SCRIPT = "launch.sh"
LOG = "logs/launch.log"
_SLURM = re.compile(r"\$\{SLURM_[A-Z0-9_]+\}")
STEP_PATIENCE_S = 60.0
"""How long the step in progress may take after an interrupt."""
SAVE_PATIENCE_S = 600.0
"""The same where a checkpoint follows."""
EXIT_PATIENCE_S = 35.0
"""How long the processes may take to go: W&B may take 30 s, and torch's agent gives its ranks 30 s before it ends them."""
_POLL_S = 0.1
_RANK_SCRIPT = "moe_bench/launch/templates/rank.sh"


class LocalLauncher:
    """One node: torchrun on GPUs, forked ranks over gloo on a CPU."""

    def __init__(self, *, project: Path, python: str, device: str) -> None:
        self._project = project
        self._python = python
        self._device = device

    def render(self, run: ResolvedRun) -> LaunchPlan:
        """Pure: the same run gives the same bytes."""
        return LaunchPlan(
            launcher="local", filename=SCRIPT, script="".join(self._lines(run)), environment={}
        )

    def submit(self, plan: LaunchPlan, run: ResolvedRun) -> JobHandle:
        """Start the script. Raises LaunchError when bash cannot be started."""
        return JobHandle(launcher="local", job_id=str(start(plan, run).pid))

    def query(self, job_ids: Iterable[str]) -> Mapping[str, JobState]:  # noqa: ARG002 - the protocol's
        """Nothing: of a run on this machine the files alone tell."""
        return {}

    def cancel(self, job_id: str) -> None:
        """Ask the script's process, and with it its ranks, to end. Raises LaunchError when it is not there."""
        if not _is_a_run(Path("/proc") / job_id / "cmdline"):
            raise LaunchError(
                f"process {job_id} is no run of this machine; it has ended, or runs on another"
            )
        os.kill(int(job_id), signal.SIGTERM)

    def _lines(self, run: ResolvedRun) -> Iterator[str]:
        yield "#!/usr/bin/env bash\n"
        kind = "a rehearsal, NOT the real model" if run.rehearsal else "one machine"
        yield f"# {_comment(run.model)}, run {_comment(run.run_id)}: {kind}. Written by moe_bench.\n"
        yield "set -euo pipefail\n\n"
        yield f"cd {shlex.quote(str(self._project))}\n"
        yield f'export PYTHONPATH={shlex.quote(str(self._project))}"${{PYTHONPATH:+:$PYTHONPATH}}"\n'
        for name, setting in run.env.items():
            if not is_secret(name):
                yield f"export {name}={shell_word(setting)}\n"
        yield "\nexec " + " \\\n  ".join(self._command(run)) + "\n"

    def _command(self, run: ResolvedRun) -> list[str]:
        head = self._gpu_words(run) if self._device == "cuda" else self._cpu_words(run)
        lines = [shlex.join([*_profiler(run), *_binding(run), *head])]
        return lines + [shlex.join(words) for words in _by_flag(argv(run))]

    def _cpu_words(self, run: ResolvedRun) -> list[str]:
        ranks = run.knobs["GPUS_PER_NODE"].value
        return [self._python, "-m", "moe_bench.runtime.local", "--nproc", ranks, "--"]

    def _gpu_words(self, run: ResolvedRun) -> list[str]:
        knobs = {name: setting.value for name, setting in run.knobs.items()}
        words = [self._python, "-m", "torch.distributed.run"]
        words += ["--nproc-per-node", knobs["GPUS_PER_NODE"], "--nnodes", knobs["NNODES"]]
        if knobs["NNODES"] == "1" and "MASTER_ADDR" not in knobs:
            words += ["--standalone"]
        else:
            words += ["--master-addr", knobs.get("MASTER_ADDR", "localhost")]
            words += ["--master-port", knobs.get("MASTER_PORT", "6000")]
            words += ["--node-rank", knobs.get("NODE_RANK", "0")]
        words += ["--no-python", "bash", str(self._project / _RANK_SCRIPT)]
        return [*words, self._python, "-m", "moe_bench.runtime.pretrain"]


def _is_a_run(cmdline: Path) -> bool:
    """Whether a process still is what `submit` started: its id may have gone to another."""
    try:
        return b"moe_bench" in cmdline.read_bytes() or SCRIPT.encode() in cmdline.read_bytes()
    except OSError:
        return False


def shell_word(setting: Setting) -> str:
    """The value quoted for bash; `${SLURM_...}`, which only a job knows, is 0 on one machine."""
    return shlex.quote(_SLURM.sub("0", setting.value))


def start(plan: LaunchPlan, run: ResolvedRun) -> subprocess.Popen[bytes]:
    """The script in a session of its own, so that Ctrl-C reaches us first; what it says goes to logs/launch.log."""
    (run.run_dir / STOP_FILE).unlink(missing_ok=True)
    with (run.run_dir / LOG).open("wb") as log:
        try:
            return subprocess.Popen(
                ["bash", str(run.run_dir / plan.filename)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise LaunchError(f"cannot start bash: {error.strerror}") from error


def stop(
    process: subprocess.Popen[bytes],
    run_dir: Path,
    *,
    has_ended: Callable[[], bool],
    patience_s: float = STEP_PATIENCE_S,
    exit_patience_s: float = EXIT_PATIENCE_S,
) -> int:
    """End the script and all its ranks: they are asked first, then made to. Returns the exit status.

    Ranks that train are asked by a file, after whose step they save: of a signal torch's agent would hear, too, which
    ends them 30 s later, in the middle of a checkpoint. `has_ended` says whether they have closed their record.
    A KeyboardInterrupt meanwhile ends the asking.
    """
    with contextlib.suppress(KeyboardInterrupt):
        if _has_begun(run_dir):
            (run_dir / STOP_FILE).touch()
        else:
            _signal(os.kill, process.pid, signal.SIGTERM)
        _wait(process, patience_s, has_ended)
        if has_ended():
            _wait(process, exit_patience_s, lambda: False)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            _signal(os.killpg, process.pid, number)
            _wait(process, exit_patience_s, lambda: False)
    return process.wait()


def _has_begun(run_dir: Path) -> bool:
    """Whether a step is on record: before it there is nothing to save."""
    steps = run_dir / STEPS_FILE
    return steps.is_file() and steps.stat().st_size > 0


def _signal(send: Callable[[int, int], None], pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(pid, number)


def _wait(
    process: subprocess.Popen[bytes], patience_s: float, has_ended: Callable[[], bool]
) -> None:
    deadline_s = time.monotonic() + patience_s
    while process.poll() is None and not has_ended() and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _profiler(run: ResolvedRun) -> list[str]:
    if "--profile" not in run.args or "--use-pytorch-profiler" in run.args:
        return []
    if "--distributed-backend" in run.args:  # gloo: no CUDA to trace
        return []
    return [
        *("nsys", "profile", "--sample=none", "--cpuctxsw=none", "-t", "cuda,nvtx"),
        *("--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--cuda-graph-trace=node"),
        *("-f", "true", "-x", "true", "-o", f"{run.run_dir}/profiles/nsys"),
    ]


def _binding(run: ResolvedRun) -> list[str]:
    knob = run.knobs.get("BINDPCIE_PATH")
    return [knob.value] if knob else []


def _comment(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _by_flag(words: tuple[str, ...]) -> list[list[str]]:
    """One line a flag."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(word)
    return lines
