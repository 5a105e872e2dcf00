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
from moe_bench.config.run import ResolvedRun, Setting
from moe_bench.errors import LaunchError
from moe_bench.launch.launcher import JobHandle, JobState, LaunchPlan
from moe_bench.launch.script import (
    CONTAINER_KNOBS,
    KUBERNETES_KNOBS,
    SLURM_KNOBS,
    before_python,
    by_flag,
    printable,
    without_effect,
)
from moe_bench.secrets import is_secret

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
_TEMPLATES = "moe_bench/launch/templates"


class LocalLauncher:
    """One node: torchrun on GPUs, forked ranks over gloo on a CPU."""

    def __init__(self, *, project: Path, python: str, device: str) -> None:
        self._project = project
        self._python = python
        self._device = device

    def render(self, run: ResolvedRun) -> LaunchPlan:
        """Pure: the same run gives the same bytes."""
        why = "does nothing: the ranks start on this machine as it is, without a scheduler or a container"
        names = (*SLURM_KNOBS, *KUBERNETES_KNOBS, *CONTAINER_KNOBS)
        return LaunchPlan(
            launcher="local",
            filename=SCRIPT,
            script="".join(self._lines(run)),
            notes=(
                *without_effect(run, names, why, only_from="environment"),
                *_notes_on_machines(run),
            ),
        )

    def submit(self, plan: LaunchPlan, run: ResolvedRun) -> JobHandle:
        """Start the script. Raises LaunchError when bash cannot be started."""
        return JobHandle(launcher="local", job_id=str(start(plan, run).pid))

    def query(self, job_ids: Iterable[str]) -> Mapping[str, JobState]:  # noqa: ARG002 - the protocol's
        """Nothing: of a run on this machine the files alone tell."""
        return {}

    def cancel(self, job_id: str) -> None:
        """Ask the script, and with it its ranks, to save and end. Raises LaunchError when it is not there."""
        if not _is_a_run(Path("/proc") / job_id / "cmdline"):
            raise LaunchError(
                f"process {job_id} is no run of this machine; it has ended, or runs on another"
            )
        os.kill(int(job_id), signal.SIGTERM)

    def _lines(self, run: ResolvedRun) -> Iterator[str]:
        yield "#!/usr/bin/env bash\n"
        kind = "a rehearsal, NOT the real model" if run.rehearsal else "one machine"
        yield f"# {printable(run.model)}, run {printable(run.run_id)}: {kind}. Written by moe_bench.\n"
        yield "set -euo pipefail\n\n"
        yield f"cd {shlex.quote(str(self._project))}\n"
        for name, setting in run.env.items():
            if not is_secret(name):
                yield f"export {name}={shell_word(setting)}\n"
        if _is_over_machines(run):
            yield "export MOE_BENCH_SEPARATE_RUN_DIRS=1\n"
        yield f'export PYTHONPATH={shlex.quote(str(self._project))}"${{PYTHONPATH:+:$PYTHONPATH}}"\n'
        yield "\nexec " + " \\\n  ".join(self._command(run)) + "\n"

    def _command(self, run: ResolvedRun) -> list[str]:
        head = self._gpu_words(run) if self._device == "cuda" else self._cpu_words(run)
        before = before_python(run, trace=f"{run.run_dir}/profiles/nsys")
        supervisor = ["bash", str(self._project / _TEMPLATES / "local.sh")]
        ranks = [*supervisor, *before, *head]
        return [shlex.join(words) for words in (ranks, *by_flag(argv(run)))]

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
        words += ["--no-python", "bash", str(self._project / _TEMPLATES / "rank.sh")]
        return [*words, self._python, "-m", "moe_bench.runtime.pretrain"]


def _is_over_machines(run: ResolvedRun) -> bool:
    return run.knobs["NNODES"].value != "1"


def _notes_on_machines(run: ResolvedRun) -> Iterator[str]:
    save, load = (run.args.get(flag) for flag in ("--save", "--load"))
    if _is_over_machines(run) and save is not None and (load is None or load.value != save.value):
        yield (
            f"each machine has a run directory of its own, so a stopped run goes on only from --load: --load {save.value} "
            "loads the newest checkpoint there, and none as long as there is none"
        )


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
    *,
    has_ended: Callable[[], bool],
    patience_s: float = STEP_PATIENCE_S,
    exit_patience_s: float = EXIT_PATIENCE_S,
) -> int:
    """End the script and all its ranks. Returns the exit status.

    The first signal has the ranks end after the step in progress, the second at once, the third kills them
    (templates/local.sh). `has_ended` says whether they have closed their record. A KeyboardInterrupt meanwhile ends
    the asking.
    """
    with contextlib.suppress(KeyboardInterrupt):
        process.terminate()
        _wait(process, patience_s, has_ended)
        if has_ended():
            _wait(process, exit_patience_s, lambda: False)
    for _ in range(2):
        if process.poll() is None:
            process.terminate()
            _wait(process, exit_patience_s, lambda: False)
    return process.wait()


def _wait(
    process: subprocess.Popen[bytes], patience_s: float, has_ended: Callable[[], bool]
) -> None:
    deadline_s = time.monotonic() + patience_s
    while process.poll() is None and not has_ended() and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
