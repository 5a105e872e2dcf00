"""Slurm: one sbatch script, rendered from the run alone, submitted as the very same bytes."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from moe_bench.arguments.chain import job_name
from moe_bench.arguments.emit import argv
from moe_bench.config.run import ResolvedRun
from moe_bench.errors import LaunchError
from moe_bench.launch import queue
from moe_bench.launch.launcher import JobHandle, LaunchPlan
from moe_bench.launch.queue import QueueEntry
from moe_bench.results.records import STEPS_LEFT_FILE, STOP_FILE

SUBMIT_TIMEOUT_S = 60
QUEUE_FULL_PATIENCE_S = 12
"""How long sbatch may try again by itself while the cluster takes no more jobs: it is then amid one of its pauses."""
PROBE_TIMEOUT_S = 30
"""How long each node has, after a failure, to start a task; one that does not is taken for dead."""
_PLACEHOLDER = re.compile(r"@([A-Z_]+)@")
_GO_ON = 'go_on "stopped with steps left"'
_NO_CHECKPOINT = 'echo "moe_bench: stopped with steps left; not requeued: without --save there is nothing to go on from"'
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9._+-]+")
_TIME = re.compile(r"(\d+-)?\d{1,3}(:\d{2}){0,2}\Z")
_MOUNT_PATH = r"/[^:,\"$`\\\n\r\t]*"  # enroot writes mounts into a shell script of its own
_MOUNT = re.compile(rf"{_MOUNT_PATH}(:{_MOUNT_PATH}(:[A-Za-z0-9=+_-]+)?)?")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,@:+/-]*\Z")

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
        if not run.knob("CONTAINER_IMAGE"):
            _check_python(self.python)
        done = _sbatch(["--parsable", str(script)])
        if done.returncode != 0:
            raise LaunchError(_refusal(done, script))
        return JobHandle(launcher="slurm", job_id=done.stdout.strip().split(";")[0])

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

    def submit_array(self, script: Path) -> str:
        """Hand the script to sbatch. Returns the array's job id. Raises LaunchError with sbatch's words."""
        done = _sbatch(["--parsable", str(script)])
        if done.returncode != 0:
            raise LaunchError(_refusal(done, script))
        return done.stdout.strip().split(";")[0]

    def _script(self, run: ResolvedRun) -> str:
        container = _container(run, self.workspace)
        exported = [("MOE_BENCH_RUN_DIR", str(run.run_dir)), *self._environment(run, container)]
        options = [*_srun_options(run, container), *container.srun_options]
        kind = " (a rehearsal, NOT the real model)" if run.rehearsal else ""
        return _fill(
            "slurm.sh.in",
            DIRECTIVES=_directive_lines(_directives(run)),
            MODEL=_in_a_comment(run.model) + kind,
            RUN_ID=_in_a_comment(run.run_id),
            ENVIRONMENT="\n".join(f"export {n}={shlex.quote(v)}" for n, v in exported),
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

    def _environment(self, run: ResolvedRun, container: Container) -> Iterable[tuple[str, str]]:
        yield from ((name, setting.value) for name, setting in run.env.items())
        yield "PYTHONPATH", str(self.workspace)
        yield from container.environment
        for name in ("MEGATRON_PATH", "NVLINK_DOMAIN_SIZE"):
            if value := run.knob(name):
                yield name, value

    def _command(self, run: ResolvedRun, container: Container) -> str:
        python = "python" if container.runtime != "none" else self.python
        words = [*container.prefix, *_profiler(run), python, "-m", "moe_bench.runtime.pretrain"]
        return " \\\n    ".join([shlex.join(words), *_flag_lines(argv(run))])


def _notes(run: ResolvedRun) -> Iterator[str]:
    """What the caller may believe of the job, and is not so."""
    if run.knob("CONTAINER_MOUNTS") and not run.knob("CONTAINER_IMAGE"):
        yield (
            f"CONTAINER_MOUNTS ({run.place('CONTAINER_MOUNTS')}) does nothing without CONTAINER_IMAGE: "
            "the ranks run on the nodes themselves"
        )
    if "--save" not in run.args:
        yield "nothing is saved: a job that reaches its time limit or loses a node starts over or ends (--save FOLDER)"


# Containers


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """How the ranks get into the image."""

    runtime: str
    """pyxis, apptainer, docker or none."""
    srun_options: tuple[str, ...] = ()
    """Shell-quoted options for srun."""
    prefix: tuple[str, ...] = ()
    """Words before the rank's own command."""
    environment: tuple[tuple[str, str], ...] = ()


RUNTIMES = ("pyxis", "apptainer", "docker", "none")


def _container(run: ResolvedRun, workspace: Path) -> Container:
    image = run.knob("CONTAINER_IMAGE")
    runtime = run.knob("CONTAINER_RUNTIME") or ("pyxis" if image else "none")
    if runtime not in RUNTIMES:
        raise LaunchError(
            f"CONTAINER_RUNTIME={runtime} ({run.place('CONTAINER_RUNTIME')}) is not known; use one of {', '.join(RUNTIMES)}"
        )
    if runtime == "none":
        return Container(runtime="none")
    if not image:
        raise LaunchError(
            f"CONTAINER_RUNTIME={runtime} ({run.place('CONTAINER_RUNTIME')}) needs CONTAINER_IMAGE; "
            "set it to a .sqsh file or an image address, or set CONTAINER_RUNTIME=none"
        )
    mounts = _mounts(run, workspace)
    workdir = run.knob("MEGATRON_PATH") or str(workspace)
    return {"pyxis": _pyxis, "apptainer": _apptainer, "docker": _docker}[runtime](
        run, image, mounts, workdir
    )


def _pyxis(run: ResolvedRun, image: str, mounts: tuple[str, ...], workdir: str) -> Container:
    _check_pyxis_image(image, run.place("CONTAINER_IMAGE"))
    options = (
        "--no-container-mount-home",
        f"--container-image={shlex.quote(image)}",
        f"--container-mounts={shlex.quote(','.join(mounts))}",
        f"--container-workdir={shlex.quote(workdir)}",
    )
    return Container(runtime="pyxis", srun_options=options)


def _apptainer(run: ResolvedRun, image: str, mounts: tuple[str, ...], workdir: str) -> Container:  # noqa: ARG001 - one signature
    binds = [word for mount in mounts for word in ("--bind", mount)]
    prefix = ("apptainer", "exec", "--nv", *binds, "--pwd", workdir, image)
    return Container(runtime="apptainer", prefix=prefix)


def _docker(run: ResolvedRun, image: str, mounts: tuple[str, ...], workdir: str) -> Container:
    if (nodes := _positive(run, "NNODES", default=1)) != 1:
        raise LaunchError(
            f"CONTAINER_RUNTIME=docker runs on one node only, and NNODES={nodes} ({run.place('NNODES')}); "
            "use pyxis or apptainer on several nodes"
        )
    passed = sorted(
        {*run.env, "MOE_BENCH_RUN_DIR", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "MEGATRON_PATH"}
    )
    slurm = (
        "SLURM_PROCID",
        "SLURM_NTASKS",
        "SLURM_LOCALID",
        "SLURM_JOB_ID",
        "SLURM_NODEID",
        "WANDB_API_KEY",
    )
    names = [word for name in (*passed, *slurm) for word in ("--env", name)]
    volumes = [word for mount in mounts for word in ("--volume", mount)]
    prefix = (
        *("docker", "run", "--rm", "--gpus", "all", "--network", "host", "--ipc", "host"),
        *("--ulimit", "memlock=-1", *names, *volumes, "--workdir", workdir, image),
    )
    return Container(runtime="docker", prefix=prefix)


def _check_pyxis_image(image: str, place: str) -> None:
    """Refuse what enroot would only refuse on the node: a file that is not an image, a port in a registry address."""
    if image.startswith(("/", "./")):
        if not image.endswith((".sqsh", ".squashfs")):
            raise LaunchError(
                f"CONTAINER_IMAGE={image} ({place}) is a file but not a .sqsh image; "
                "import one with: enroot import -o IMAGE.sqsh docker://[USER@][REGISTRY#]IMAGE[:TAG]"
            )
        return
    host, _, rest = image.removeprefix("docker://").partition("/")
    if re.search(r":\d+\Z", host) and rest:
        raise LaunchError(
            f"CONTAINER_IMAGE={image} ({place}) has a port in the registry's address, which enroot reads as a tag; "
            f"leave it out: {host.rsplit(':', 1)[0]}#{rest}"
        )


def _mounts(run: ResolvedRun, workspace: Path) -> tuple[str, ...]:
    """The user's mounts, then the project's folder, the run's and MEGATRON_PATH unless a user's mount covers them."""
    given = [mount for mount in run.knob("CONTAINER_MOUNTS").split(",") if mount]
    for mount in given:
        if not _MOUNT.fullmatch(mount):
            raise LaunchError(
                f"CONTAINER_MOUNTS holds {mount!r} ({run.place('CONTAINER_MOUNTS')}), which is not SRC[:DST[:FLAGS]] with "
                'absolute paths, free of , : " $ ` \\ and line breaks; link such a folder under a plain name and mount the link'
            )
    own = [str(workspace), str(run.run_dir)]
    if megatron := run.knob("MEGATRON_PATH"):
        own.append(megatron)
    targets = [(mount.split(":") * 2)[1] for mount in given]
    for path in own:
        if not any(Path(path).is_relative_to(target) for target in targets):
            if bad := set(path) & set(",:"):
                raise LaunchError(
                    f"{path!r} holds {''.join(sorted(bad))!r} and cannot be mounted; move it to a path without it"
                )
            given.append(f"{path}:{path}")
            targets.append(path)
    return tuple(given)


# The script's parts


def _directives(run: ResolvedRun) -> list[str]:
    lines = [
        f"--nodes={_positive(run, 'NNODES', default=1)}",
        f"--ntasks-per-node={_positive(run, 'GPUS_PER_NODE', default=8)}",
        f"--time={_time(run)}",
        f"--job-name={job_name(run)}",
        f"--output={_log_path(run.run_dir, 'slurm-%j.log')}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{_positive(run, 'SIGNAL_BEFORE_S', default=120)}",
    ]
    lines += [
        f"--{name.lower()}={_word(run, name)}"
        for name in ("ACCOUNT", "PARTITION")
        if run.knob(name)
    ]
    lines += [
        f"{option}={_word(run, name)}" for name, option in OPTIONAL_DIRECTIVES if run.knob(name)
    ]
    if run.knob("EXCLUSIVE") != "0":
        lines.append("--exclusive")
    return lines


def _srun_options(run: ResolvedRun, container: Container) -> list[str]:
    mpi = (
        _word(run, "SRUN_MPI")
        if run.knob("SRUN_MPI")
        else ("pmix" if container.runtime == "pyxis" else "none")
    )
    log = _log_path(run.run_dir, "rank-%t.log")
    cores = run.knob("CPUS_PER_TASK")
    return [
        # srun takes no --cpus-per-task from sbatch since Slurm 22.05
        *([f"--cpus-per-task={_positive(run, 'CPUS_PER_TASK', default=1)}"] if cores else []),
        "--kill-on-bad-exit=1",
        f"--mpi={mpi}",
        "--cpu-bind=none",
        "--open-mode=append",
        f"--output={shlex.quote(log)}",
    ]


def _flag_lines(words: Iterable[str]) -> list[str]:
    """One flag with its values a line, each word quoted for bash."""
    lines: list[str] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return lines


def _profiler(run: ResolvedRun) -> tuple[str, ...]:
    if run.knob("PROFILE") not in {"1", "nsys"}:
        return ()
    output = run.run_dir / "profiles" / "nsys-rank-%q{SLURM_PROCID}"
    return (
        *("nsys", "profile", "--sample=none", "--cpuctxsw=none", "--trace=cuda,nvtx"),
        *("--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--cuda-graph-trace=node"),
        *("--force-overwrite=true", f"--output={output}"),
    )


def _shared_directives(run: ResolvedRun) -> list[str]:
    own = ("--job-name=", "--output=", "--requeue")
    requeue = "--requeue" if _max_requeues(run) else "--no-requeue"
    return [*(line for line in _directives(run) if not line.startswith(own)), requeue]


def _fill(template: str, **values: str) -> str:
    """The bash file with each @NAME@ replaced, once: a value that looks like a name stays as it is."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], _template(template))


@functools.cache
def _template(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text()


def _directive_lines(directives: Iterable[str]) -> str:
    return "\n".join(f"#SBATCH {directive}" for directive in directives)


# Values


def _word(run: ResolvedRun, name: str) -> str:
    value = run.knob(name)
    if not _WORD.match(value):
        raise LaunchError(
            f"{name}={value!r} ({run.place(name)}) cannot stand in an #SBATCH line; "
            "use letters, digits and . _ , @ : + / - only"
        )
    return value


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


def _time(run: ResolvedRun) -> str:
    value = run.knob("RUN_TIME") or "00:20:00"
    if not _TIME.match(value):
        raise LaunchError(
            f"RUN_TIME={value!r} ({run.place('RUN_TIME')}) is not Slurm's [DAYS-]HH:MM:SS; write 00:20:00 for 20 minutes"
        )
    return value


def _in_a_comment(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _log_path(folder: Path, pattern: str) -> str:
    """The log in the folder, whose name Slurm fills in; a % of the folder's own stays as it is."""
    text = str(folder)
    if re.search(r"[\s\"'\\#]", text):
        raise LaunchError(
            f"the run's directory {text!r} holds a blank, quote, backslash or # that an #SBATCH line cannot carry; "
            "set OUTPUT_PATH to a plain path"
        )
    return f"{text.replace('%', '%%')}/logs/{pattern}"


# sbatch


def _check_python(python: str) -> None:
    """Refuse to queue for a failure: the ranks run this very interpreter, and it may be set up for submitting only."""
    code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    try:
        done = subprocess.run([python, "-c", code], check=False, capture_output=True)
    except OSError as error:
        raise LaunchError(f"the ranks' Python {python} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise LaunchError(
            f"without CONTAINER_IMAGE the ranks run {python}, which has no torch; set CONTAINER_IMAGE, or "
            "MOE_BENCH_PYTHON to an environment that has torch and megatron-core, or let `bash ./interactive_benchmarking.sh` "
            "set up .venv for training once"
        )


def _sbatch(options: list[str]) -> subprocess.CompletedProcess[str]:
    if shutil.which("sbatch") is None:
        raise LaunchError(
            "sbatch is not on PATH: this is not a Slurm login node; run on this machine with ./interactive_benchmarking.sh, "
            "or look at what would be submitted with DRY_RUN=1"
        )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("SBATCH_")
    }
    command = ["sbatch", *options]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, env=environment)
        try:
            answer = _answer(process, said)
        finally:
            process.kill()
            process.wait()
        words = _written(said)
    return subprocess.CompletedProcess(command, process.returncode, answer.decode(), words)


def _answer(process: subprocess.Popen[bytes], said: IO[bytes]) -> bytes:
    try:
        return process.communicate(timeout=QUEUE_FULL_PATIENCE_S)[0]
    except subprocess.TimeoutExpired:
        if _QUEUE_FULL in _written(said):  # sbatch would go on trying for two minutes
            raise LaunchError(
                f"the cluster takes no more jobs (sbatch: {_written(said).strip()}); nothing was submitted: wait for a job "
                "to end (`squeue -u $USER`, `scontrol show config | grep MaxJobCount`) and submit again"
            ) from None
    try:
        return process.communicate(timeout=SUBMIT_TIMEOUT_S - QUEUE_FULL_PATIENCE_S)[0]
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"sbatch did not answer within {SUBMIT_TIMEOUT_S} s; the controller may be down (scontrol ping), and the job may or may not be queued: look with squeue"
        ) from None


def _written(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


_QUEUE_FULL = "temporarily unable to accept job"


_ADVICE = (
    (
        "unrecognized option '--segment",
        "this Slurm is older than 24.05 and knows no --segment; unset SEGMENT",
    ),
    (
        "unrecognized option '--container",
        "this Slurm has no pyxis; set CONTAINER_RUNTIME=apptainer, or none with a bare-metal Python",
    ),
    (
        "Invalid account",
        "the account is not one of yours: see `sacctmgr show assoc user=$USER`; set ACCOUNT",
    ),
    ("invalid partition", "see `sinfo -s` for the partitions; set PARTITION"),
    ("Invalid node name", "see `sinfo -N` for the nodes; set NODELIST or EXCLUDE"),
    ("Invalid feature", "see `sinfo -o '%N %f'` for the nodes' features; set CONSTRAINT"),
    ("reservation is invalid", "see `scontrol show reservation`; set or unset RESERVATION"),
    ("Invalid qos", "see `sacctmgr show assoc user=$USER format=qos`; set QOS"),
    ("time limit", "the partition or QOS allows less time: see `sinfo -o '%P %l'`; lower RUN_TIME"),
    (
        "node configuration is not available",
        "no node of the partition has what was asked; compare NNODES, GPUS_PER_NODE, GRES and MEM with `sinfo -N -l`",
    ),
    ("QOSMaxSubmitJobPerUserLimit", "the queue is full for you: wait for a job of yours to end"),
    (
        "Unable to contact slurm controller",
        "the controller is down or unreachable: `scontrol ping`",
    ),
)


def _refusal(done: subprocess.CompletedProcess[str], script: Path) -> str:
    said = (
        " ".join(line.strip() for line in done.stderr.strip().splitlines())
        or f"exit code {done.returncode}"
    )
    advice = next(
        (way_out for sign, way_out in _ADVICE if sign.lower() in said.lower()),
        "nothing was submitted",
    )
    return f"sbatch refused {script}: {said}; {advice}"
