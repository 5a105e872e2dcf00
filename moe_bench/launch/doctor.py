"""What is here to run on: versions, GPUs, Slurm, containers, paths, space. Looks without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from moe_bench.config.machine import device_files
from moe_bench.launch import nodes
from moe_bench.launch.nodes import Node
from moe_bench.units import GIB, format_bytes, format_duration

Level = Literal["ok", "note", "problem"]

COMMAND_TIMEOUT_S = 10
LOW_DISK_BYTES = 20 * GIB
LONG_COMPILATION_S = 10 * 60
LOW_TMP_BYTES = 5 * GIB
MAX_CLOCK_SKEW_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing looked at."""

    level: Level
    """problem: a run will fail or be wrong; note: worth knowing; ok."""
    subject: str
    found: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """A path that a knob names."""

    subject: str
    """The knob, as messages show it."""
    path: str
    origin: str
    """Where it was written."""
    may_be_a_name: bool = False
    """True for a tokenizer, which a Hugging Face name may stand for."""
    unseen_inside: bool = False
    """True when the run's container would not have it."""


@dataclass(frozen=True, slots=True)
class BadPair:
    """Two versions that do not work together."""

    package: str
    matches: Callable[[tuple[int, ...]], bool]
    other: str
    other_matches: Callable[[tuple[int, ...]], bool]
    reason: str
    fix: str


BAD_PAIRS = (
    BadPair(
        "nvidia-resiliency-ext",
        lambda v: v < (0, 6),
        "megatron-core",
        lambda v: v >= (0, 19),
        "`import megatron.core` fails with it",
        "install nvidia-resiliency-ext>=0.6, or remove it",
    ),
    BadPair(
        "megatron-core",
        lambda v: v >= (0, 19),
        "python",
        lambda v: v < (3, 12),
        "megatron-core 0.19 needs Python 3.12",
        "use Python 3.12",
    ),
    BadPair(
        "transformer-engine",
        lambda v: v < (2, 1),
        "megatron-core",
        lambda v: v >= (0, 11),
        "--moe-permute-fusion needs Transformer Engine 2.1",
        "install transformer-engine>=2.1, or take --moe-permute-fusion out of the model file",
    ),
    BadPair(
        "transformer-engine",
        lambda v: v < (1, 7),
        "megatron-core",
        lambda v: v >= (0, 11),
        "PR=fp8 computes only the attention in fp8",
        "install transformer-engine>=1.7",
    ),
    BadPair(
        "wandb",
        lambda v: v < (0, 15),
        "python",
        lambda v: v >= (3, 12),
        "wandb before 0.15 does not import on Python 3.12",
        "install wandb>=0.21",
    ),
)

PACKAGES = (
    ("torch", True),
    ("megatron-core", True),
    ("transformer-engine", False),
    ("apex", False),
    ("deep-ep", False),
    ("nvidia-nccl-cu13", False),
    ("nvidia-nccl-cu12", False),
    ("nvidia-cuda-runtime", False),
    ("nvidia-cuda-runtime-cu12", False),
    ("nvidia-resiliency-ext", False),
    ("nvidia-ml-py", False),
    ("wandb", False),
    ("transformers", False),
)
"""Distribution and whether training needs it."""


def examine(
    environment: Mapping[str, str], *, places: Sequence[Place], output: Path
) -> Iterator[Finding]:
    """Every finding, as it is found. `places`: what the cluster file and the environment name. `output`: where runs go."""
    versions = installed_versions()
    yield from _packages(versions)
    yield from _bad_pairs(versions)
    yield from _gpus(versions)
    yield from _slurm(environment)
    yield from _containers()
    yield from _paths(places)
    yield from _space(output)
    yield from _compilations(environment)
    yield from _wandb(environment, versions)
    yield from _nodes(environment, places)


def installed_versions() -> dict[str, str]:
    """Distribution -> version of what this interpreter could import, Python itself included."""
    versions = {"python": platform.python_version()}
    for name, _ in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def version_tuple(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: "2.11.0+cu130" -> (2, 11, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _packages(versions: Mapping[str, str]) -> Iterator[Finding]:
    yield Finding(level="ok", subject="python", found=f"{versions['python']} ({sys.executable})")
    for name, needed in PACKAGES:
        if name in versions:
            yield Finding(level="ok", subject=name, found=versions[name])
        elif needed:
            yield Finding(
                level="problem",
                subject=name,
                found="not installed",
                fix="`bash ./interactive_benchmarking.sh` sets up .venv, or run within a container that has it",
            )
    if not any(name.startswith("nvidia-nccl") for name in versions):
        yield Finding(level="note", subject="NCCL", found="no wheel; a container may bring its own")


def _bad_pairs(versions: Mapping[str, str]) -> Iterator[Finding]:
    for pair in BAD_PAIRS:
        mine, other = versions.get(pair.package), versions.get(pair.other)
        if mine is None or other is None:
            continue
        if pair.matches(version_tuple(mine)) and pair.other_matches(version_tuple(other)):
            yield Finding(
                level="problem",
                subject=f"{pair.package} {mine} with {pair.other} {other}",
                found=pair.reason,
                fix=pair.fix,
            )


def _gpus(versions: Mapping[str, str]) -> Iterator[Finding]:
    try:
        import pynvml  # noqa: PLC0415 - optional, and only this looks at GPUs
    except ImportError:
        yield Finding(
            level="note",
            subject="GPUs",
            found="nvidia-ml-py is not installed",
            fix="pip install nvidia-ml-py",
        )
        return
    try:
        pynvml.nvmlInit()
        yield _driver(pynvml, versions)
        for index in range(pynvml.nvmlDeviceGetCount()):
            yield _gpu(pynvml, index)
    except pynvml.NVMLError as error:
        files = device_files()
        found = f"none ({error}); training runs on the CPU over gloo"
        yield Finding(
            level="problem" if files else "note",
            subject="GPUs",
            found=f"{files} in /dev, but the driver says: {error}" if files else found,
            fix="see nvidia-smi: a driver that was updated needs a restart, a container needs --gpus all"
            if files
            else "",
        )


def _driver(nvml: ModuleType, versions: Mapping[str, str]) -> Finding:
    """A driver runs programs of its own CUDA and of older ones; torch finds no GPU where it is older."""
    number = nvml.nvmlSystemGetCudaDriverVersion_v2()
    knows = f"{number // 1000}.{number % 1000 // 10}"
    found = f"{_text(nvml.nvmlSystemGetDriverVersion())}, for CUDA up to {knows}"
    runtime = versions.get("nvidia-cuda-runtime") or versions.get("nvidia-cuda-runtime-cu12")
    if runtime is None or version_tuple(runtime)[0] <= number // 1000:
        return Finding(level="ok", subject="driver", found=found)
    return Finding(
        level="problem",
        subject="driver",
        found=f"{found}; torch {versions.get('torch')} is built for CUDA {runtime} and will find no GPU",
        fix="a newer driver, an image, or torch for an older CUDA (docs/gpu.md)",
    )


def _gpu(nvml: ModuleType, index: int) -> Finding:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        name = _text(nvml.nvmlDeviceGetName(handle))
    except nvml.NVMLError as error:
        return Finding(
            level="problem",
            subject=f"GPU {index}",
            found=str(error),
            fix=f"see nvidia-smi and dmesg; CUDA_VISIBLE_DEVICES without {index} leaves it out",
        )
    busy = memory.used > GIB
    return Finding(
        level="note" if busy else "ok",
        subject=f"GPU {index}",
        found=f"{name}, {format_bytes(memory.used)} of {format_bytes(memory.total)} used",
        fix="another process holds memory on it: see nvidia-smi" if busy else "",
    )


def _slurm(environment: Mapping[str, str]) -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding(level="note", subject="Slurm", found="no sbatch on PATH; only local runs")
        return
    version = _said(["sbatch", "--version"])
    answer = _said(["scontrol", "ping"])
    if answer is None or "UP" not in answer:
        yield Finding(
            level="problem",
            subject="Slurm",
            found=f"{version or 'sbatch'}: the controller does not answer",
            fix="scontrol ping; check SLURM_CONF and munge",
        )
        return
    yield Finding(level="ok", subject="Slurm", found=f"{version}, controller up")
    if (job := environment.get("SLURM_JOB_ID")) is not None:
        yield Finding(level="note", subject="allocation", found=f"within job {job}")
    accounting = _said(["sacct", "-n", "-X", "-S", "now-1minutes"], combine=True)
    if "disabled" in (accounting or ""):
        without = "off; `status` reads squeue and the run's own files"
        yield Finding(level="note", subject="accounting", found=without)
    if re.search(r"AccountingStoreFlags.*job_env", _said(["scontrol", "show", "config"]) or ""):
        yield Finding(
            level="note",
            subject="accounting",
            found="keeps every job's environment (job_env), secrets in it too",
            fix="unset WANDB_API_KEY and HF_TOKEN before you submit; docs/clusters.md says what to use in their place",
        )


def _containers() -> Iterator[Finding]:
    found = [
        name
        for name in ("enroot", "apptainer", "singularity", "docker", "podman")
        if shutil.which(name)
    ]
    if shutil.which("srun") and "--container-image" in (_said(["srun", "--help"]) or ""):
        found.insert(0, "pyxis")
    yield Finding(
        level="ok" if found else "note",
        subject="containers",
        found=", ".join(found) or "no container runtime; bare metal only",
    )


def _paths(places: Sequence[Place]) -> Iterator[Finding]:
    for place in places:
        if _exists(place.path):
            yield Finding(level="ok", subject=place.subject, found=place.path)
        elif place.may_be_a_name and not place.path.startswith(("/", ".", "~")):
            yield Finding(
                level="note",
                subject=place.subject,
                found=f"{place.path} is no path here: it is taken for a Hugging Face name",
            )
        else:
            yield Finding(
                level="problem",
                subject=place.subject,
                found=f"{place.path} does not exist here",
                fix=f"correct it ({place.origin}); on a login node a compute node's local path may be meant",
            )
        if place.unseen_inside:
            yield Finding(
                level="problem",
                subject=place.subject,
                found=f"{place.path} lies under none of CONTAINER_MOUNTS: the ranks will not see it",
                fix="add it to CONTAINER_MOUNTS, or correct it",
            )


def _exists(path: str) -> bool:
    # A dataset prefix names PREFIX.bin and PREFIX.idx.
    return Path(path).exists() or Path(f"{path}.idx").exists()


def _space(output: Path) -> Iterator[Finding]:
    existing = next(place for place in (output, *output.parents) if place.exists())
    usage = shutil.disk_usage(existing)
    low = usage.free < LOW_DISK_BYTES
    yield Finding(
        level="note" if low else "ok",
        subject=f"space at {existing}",
        found=f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}",
        fix="checkpoints may not fit: point OUTPUT_PATH to a larger file system" if low else "",
    )
    if not os.access(existing, os.W_OK):
        yield Finding(
            level="problem",
            subject=str(existing),
            found="not writable",
            fix="set OUTPUT_PATH to a folder of yours",
        )


def _compilations(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Locks of torch's compiled extensions; Megatron compiles one in the first backward pass of `--recompute-modules`."""
    home = environment.get("HOME", "/nonexistent")
    cache = environment.get("XDG_CACHE_HOME") or f"{home}/.cache"
    folder = Path(environment.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions")
    for lock in sorted((*folder.glob("*/lock"), *folder.glob("*/*/lock"))):
        try:
            age_s = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            continue  # done meanwhile
        if age_s > LONG_COMPILATION_S:
            yield Finding(
                level="problem",
                subject=f"compilation of {lock.parent.name}",
                found=f"{lock} is {format_duration(age_s)} old: ranks wait for it without end",
                fix="a process was killed while compiling: remove the file",
            )


def _wandb(environment: Mapping[str, str], versions: Mapping[str, str]) -> Iterator[Finding]:
    if "wandb" not in versions:
        yield Finding(
            level="note",
            subject="W&B",
            found="wandb is not installed; runs are recorded in files only",
        )
        return
    netrc = Path(environment.get("HOME", "/nonexistent")) / ".netrc"
    if environment.get("WANDB_API_KEY"):
        found = "WANDB_API_KEY is set"
    elif netrc.exists() and "api.wandb.ai" in netrc.read_text(errors="replace"):
        found = "logged in (~/.netrc)"
    else:
        found = "no key: runs are not mirrored unless WANDB_MODE=offline"
    yield Finding(level="ok" if "no key" not in found else "note", subject="W&B", found=found)


def _nodes(environment: Mapping[str, str], places: Sequence[Place]) -> Iterator[Finding]:
    """Within an allocation: what each of its nodes has, and how far their clocks are apart."""
    if not nodes.is_in_allocation(environment):
        return
    local = [place.path for place in places if not place.may_be_a_name]
    answers = nodes.ask([sys.executable, *local])
    if isinstance(answers, str):
        yield Finding(
            level="problem",
            subject="nodes",
            found=f"they could not be asked: {answers}",
            fix="try within the allocation: srun --overlap --ntasks-per-node=1 hostname",
        )
        return
    yield Finding(
        level="ok",
        subject="nodes",
        found=f"{len(answers)} answer: {', '.join(n.name for n in answers)}",
    )
    for node in answers:
        yield from _node(node)
    off = max(answers, key=lambda node: node.clock_off_s)
    wrong = off.clock_off_s > MAX_CLOCK_SKEW_S
    yield Finding(
        level="problem" if wrong else "ok",
        subject="clocks",
        found=f"{off.name} is off by at least {off.clock_off_s:.1f} s" if wrong else "agree",
        fix="let the administrators check NTP on it" if wrong else "",
    )


def _node(node: Node) -> Iterator[Finding]:
    for path in node.missing:
        yield Finding(
            level="problem",
            subject=node.name,
            found=f"{path} does not exist there",
            fix="put it on a file system that all nodes share, or mount it there",
        )
    if node.free_bytes < LOW_TMP_BYTES:
        yield Finding(
            level="note",
            subject=node.name,
            found=f"{format_bytes(node.free_bytes)} free in /tmp",
            fix="compiled kernels and caches go there: clean it, or set TRITON_CACHE_DIR and TMPDIR",
        )


def _said(command: list[str], *, combine: bool = False) -> str | None:
    """What the command printed; None when it failed, is missing or takes too long."""
    try:
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if combine:
        return done.stdout + done.stderr
    return done.stdout.strip() if done.returncode == 0 else None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
