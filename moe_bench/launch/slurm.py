"""Slurm: one sbatch script, rendered from the run alone, submitted as the very same bytes."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.arguments.chain import job_name
from moe_bench.arguments.emit import argv
from moe_bench.arguments.image import in_image
from moe_bench.config.knobs import says
from moe_bench.config.run import ResolvedRun
from moe_bench.errors import LaunchError
from moe_bench.launch import queue, sbatch, time_limit
from moe_bench.launch.containers import Container, container_of
from moe_bench.launch.launcher import JobHandle, LaunchPlan
from moe_bench.launch.queue import QueueEntry
from moe_bench.launch.script import (
    KUBERNETES_KNOBS,
    before_python,
    by_flag,
    printable,
    python_path,
    without_effect,
)
from moe_bench.results.records import STEPS_LEFT_FILE, STOP_FILE

PROBE_TIMEOUT_S = 30
"""How long each node has, after a failure, to start a task; one that does not is taken for dead."""
_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
_PLACEHOLDER = re.compile(r"@([A-Z_]+)@")
_GO_ON = 'go_on "stopped with steps left"'
_NO_CHECKPOINT = 'echo "moe_bench: stopped with steps left; not requeued: without --save there is nothing to go on from"'
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._+-]+")
_NOT_IN_A_DIRECTIVE = frozenset("\"'\\#")

OPTIONAL_DIRECTIVES = (
    ("QOS", "--qos"),
    ("RESERVATION", "--reservation"),
    ("CONSTRAINT", "--constraint"),
    ("EXCLUDE", "--exclude"),
    ("NODELIST", "--nodelist"),
    ("DEPENDENCY", "--dependency"),
    ("SEGMENT", "--segment"),
    ("GRES", "--gres"),
    ("MEM", "--mem"),
    ("CPUS_PER_TASK", "--cpus-per-task"),
)
"""Knobs that become an sbatch option when they are set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmLauncher:
    """Renders and submits batch jobs."""

    workspace: Path
    """The project's folder, seen under the same path by the compute nodes."""
    python: str
    """Interpreter for ranks on bare metal; within a container `python` is used."""

    def render(self, run: ResolvedRun) -> LaunchPlan:
        """The sbatch script. Raises LaunchError for a value that Slurm or the container runtime could not take."""
        return LaunchPlan(
            launcher="slurm",
            filename="launch.sh",
            script=self._script(run),
            notes=tuple(_notes(run)),
        )

    def submit(self, plan: LaunchPlan, run: ResolvedRun) -> JobHandle:
        """Write the script into the run's directory and hand that file to sbatch. Raises LaunchError with sbatch's words."""
        script = run.run_dir / plan.filename
        if not in_image(run):
            _check_python(self.python)
        return JobHandle(launcher="slurm", job_id=sbatch.submit(script))

    def query(self, job_ids: Iterable[str]) -> Mapping[str, QueueEntry]:
        """What squeue and sacct say. Raises LaunchError when Slurm does not answer."""
        return queue.query(job_ids)

    def cancel(self, job_id: str) -> None:
        """`scancel`. Raises LaunchError with its words."""
        queue.cancel(job_id)

    def array_key(self, run: ResolvedRun) -> tuple[str, ...]:
        """What the runs of one job array must share: all of the job's options but its name and its log."""
        return tuple(_shared_directives(run))

    def render_array(
        self, runs: Sequence[ResolvedRun], folder: Path, *, name: str, limit: int | None = None
    ) -> str:
        """An sbatch script whose element i runs the launch.sh of the i-th run, all of one `array_key`, directly in `folder`.

        `limit` is the most elements at once. Slurm requeues an element only where the runs may be requeued.
        """
        at_once = "" if limit is None else f"%{limit}"
        directives = [
            *_shared_directives(runs[0]),
            f"--array=0-{len(runs) - 1}{at_once}",
            f"--job-name={_NOT_IN_A_NAME.sub('_', name)[:120]}",
            f"--output={_log_path(folder, 'slurm-%A_%a.log')}",
        ]
        return _fill(
            "slurm_array.sh.in",
            DIRECTIVES=_directive_lines(directives),
            NAME=_NOT_IN_A_NAME.sub("_", name),
            FOLDER=shlex.quote(str(folder)),
            RUNS="\n".join(f"  {shlex.quote(run.run_id)}" for run in runs),
        )

    def _script(self, run: ResolvedRun) -> str:
        exported = dict(self._environment(run))
        container = container_of(run, self.workspace, exported=exported)
        options = [*_srun_options(run, container), *container.srun_options]
        kind = " (a rehearsal, NOT the real model)" if run.rehearsal else ""
        return _fill(
            "slurm.sh.in",
            DIRECTIVES=_directive_lines(_directives(run)),
            MODEL=printable(run.model) + kind,
            RUN_ID=printable(run.run_id),
            ENVIRONMENT="\n".join(_exports(run, exported)),
            SRUN_OPTIONS="\n".join(f"  {option} \\" for option in options),
            COMMAND=self._command(run, container),
            PROBE_S=str(PROBE_TIMEOUT_S),
            MAX_REQUEUES=str(_max_requeues(run)),
            STEPS_LEFT_FILE=STEPS_LEFT_FILE,
            STOP_FILE=STOP_FILE,
            STOP_SIGNAL="TERM"
            if container.runtime == "docker"
            else "URG",  # docker passes no URG on
            STEPS_LEFT=_GO_ON if "--save" in run.args else _NO_CHECKPOINT,
        )

    def _environment(self, run: ResolvedRun) -> Iterator[tuple[str, str]]:
        yield "MOE_BENCH_RUN_DIR", str(run.run_dir)
        yield from ((name, setting.value) for name, setting in run.env.items())
        yield "PYTHONPATH", python_path(run, str(self.workspace), in_image=in_image(run))
        for name in ("MEGATRON_PATH", "NVLINK_DOMAIN_SIZE"):
            if value := run.knob(name):
                yield name, value

    def _command(self, run: ResolvedRun, container: Container) -> str:
        python = "python" if container.runtime != "none" else self.python
        trace = str(run.run_dir / "profiles" / "nsys-rank-%q{SLURM_PROCID}")
        head = [*container.prefix, *before_python(run, trace=trace), python]
        lines = [[*head, "-m", "moe_bench.runtime.pretrain"], *by_flag(argv(run))]
        return " \\\n    ".join(shlex.join(line) for line in lines)


def _notes(run: ResolvedRun) -> Iterator[str]:
    """What the caller may believe of the job, and is not so."""
    if not in_image(run):
        runtime = run.knobs.get("CONTAINER_RUNTIME")
        how = f"with {says('CONTAINER_RUNTIME', runtime)}" if runtime else "without CONTAINER_IMAGE"
        why = f"does nothing {how}: the ranks run on the nodes themselves"
        yield from without_effect(run, ("CONTAINER_IMAGE", "CONTAINER_MOUNTS"), why)
    for names, why in (
        (KUBERNETES_KNOBS, "is Kubernetes' and does nothing under Slurm"),
        (_RENDEZVOUS, "does nothing under Slurm: the job's own nodes and number tell"),
    ):
        yield from without_effect(run, names, why, only_from="environment")
    if time_limit.is_unlimited(run):
        why = f"warns of no time limit: RUN_TIME={time_limit.written(run)} has none"
        yield from without_effect(run, ("SIGNAL_BEFORE_S",), why)
    if "--save" not in run.args:
        yield "nothing is saved: a job that reaches its time limit or loses a node starts over or ends (--save FOLDER)"


# The script's parts


def _directives(run: ResolvedRun) -> list[str]:
    lines = [
        f"--nodes={_positive(run, 'NNODES', default=1)}",
        f"--ntasks-per-node={_positive(run, 'GPUS_PER_NODE', default=8)}",
        f"--time={time_limit.written(run)}",
        f"--job-name={job_name(run)}",
        f"--output={_log_path(run.run_dir, 'slurm-%j.log')}",
        "--open-mode=append",
        "--requeue" if _max_requeues(run) else "--no-requeue",
        f"--signal=B:USR1@{_positive(run, 'SIGNAL_BEFORE_S', default=120)}",
    ]
    lines += [
        f"--{name.lower()}={_in_directive(run, name)}"
        for name in ("ACCOUNT", "PARTITION")
        if run.knob(name)
    ]
    lines += [
        f"{option}={_in_directive(run, name)}"
        for name, option in OPTIONAL_DIRECTIVES
        if run.knob(name)
    ]
    if run.knob("EXCLUSIVE") != "0":
        lines.append("--exclusive")
    return lines


def _exports(run: ResolvedRun, exported: Mapping[str, str]) -> Iterator[str]:
    inherits = "PYTHONPATH" not in run.env and not in_image(run)
    for name, value in exported.items():
        more = '"${PYTHONPATH:+:$PYTHONPATH}"' if name == "PYTHONPATH" and inherits else ""
        yield f"export {name}={shlex.quote(value)}{more}"


def _srun_options(run: ResolvedRun, container: Container) -> list[str]:
    mpi = run.knob("SRUN_MPI") or ("pmix" if container.runtime == "pyxis" else "none")
    log = _log_path(run.run_dir, "rank-%t.log")
    cores = run.knob("CPUS_PER_TASK")
    return [
        # srun takes no --cpus-per-task from sbatch since Slurm 22.05
        *([f"--cpus-per-task={_positive(run, 'CPUS_PER_TASK', default=1)}"] if cores else []),
        "--kill-on-bad-exit=1",
        f"--mpi={shlex.quote(mpi)}",
        "--cpu-bind=none",
        "--open-mode=append",
        f"--output={shlex.quote(log)}",
    ]


def _shared_directives(run: ResolvedRun) -> list[str]:
    own = ("--job-name=", "--output=")
    return [line for line in _directives(run) if not line.startswith(own)]


def _fill(template: str, **values: str) -> str:
    """The bash file with each @NAME@ replaced, once: a value that looks like a name stays as it is."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], _template(template))


@functools.cache
def _template(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text()


def _directive_lines(directives: Iterable[str]) -> str:
    return "\n".join(f"#SBATCH {directive}" for directive in directives)


# Values


def _in_directive(run: ResolvedRun, name: str) -> str:
    """The value as sbatch reads it in a line of the script: as it is, and in quotes where it holds a blank."""
    value = run.knob(name)
    if not value.isprintable() or _NOT_IN_A_DIRECTIVE & set(value):
        raise LaunchError(
            f"{name}={value!r} ({run.place(name)}) cannot stand in an #SBATCH line; "
            "leave out quotes, backslashes, # and line breaks"
        )
    return f'"{value}"' if " " in value else value


def _positive(run: ResolvedRun, name: str, *, default: int) -> int:
    value = run.knob(name) or str(default)
    if not re.fullmatch(r"[1-9]\d{0,8}", value):
        raise LaunchError(f"{name}={value} ({run.place(name)}) is not a positive whole number")
    return int(value)


def _max_requeues(run: ResolvedRun) -> int:
    value = run.knob("MAX_REQUEUES") or "10"
    if not re.fullmatch(r"\d{1,4}", value):
        raise LaunchError(
            f"MAX_REQUEUES={value} ({run.place('MAX_REQUEUES')}) is not a whole number; 0 means never"
        )
    return int(value)


def _log_path(folder: Path, pattern: str) -> str:
    """The log in the folder, whose name Slurm fills in; a % of the folder's own stays as it is."""
    text = str(folder)
    if re.search(r"[\s\"'\\#]", text):
        raise LaunchError(
            f"the run's directory {text!r} holds a blank, quote, backslash or # that an #SBATCH line cannot carry; "
            "set OUTPUT_PATH to a plain path"
        )
    return f"{text.replace('%', '%%')}/logs/{pattern}"


def _check_python(python: str) -> None:
    """Refuse to queue for a failure: the ranks run this very interpreter, and it may be set up for submitting only."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    try:
        done = subprocess.run([python, "-c", code], check=False, capture_output=True)
    except OSError as error:
        raise LaunchError(f"the ranks' Python {python} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise LaunchError(
            f"without an image the ranks run {python}, which has no torch; set CONTAINER_IMAGE, or "
            "MOE_BENCH_PYTHON to an environment that has torch and megatron-core, or let `bash ./interactive_benchmarking.sh` "
            "set up .venv for training once"
        )
