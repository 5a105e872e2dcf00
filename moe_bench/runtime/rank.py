"""This process's place in the job, read from the environment that torchrun, srun or `runtime.local` sets."""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import LaunchError
from moe_bench.runtime.heap import keep_freed_memory

PROFILES = ("", "0", "1", "torch", "memory", "nsys")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankContext:
    """Who this process is and what the run asks of it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    run_dir: Path | None
    """The run's directory (MOE_BENCH_RUN_DIR); None when started by hand: nothing is recorded then."""
    megatron_path: Path | None
    """A Megatron-LM checkout whose pretrain_gpt.py runs (MEGATRON_PATH); None for the installed megatron-core."""
    profile: str
    """"" for none, "torch", "memory" or "nsys" (MOE_BENCH_PROFILE)."""
    threads: int
    """Threads of one rank: OMP_NUM_THREADS, else this machine's cores over its ranks."""


def rank_context() -> RankContext:
    """From RANK, WORLD_SIZE, LOCAL_RANK (or Slurm's SLURM_*). Raises LaunchError when a value cannot be used."""
    world_size = _number("WORLD_SIZE", "SLURM_NTASKS", default=1)
    rank = _number("RANK", "SLURM_PROCID", default=0)
    local_world_size = _number("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", default=1)
    return RankContext(
        rank=rank,
        world_size=world_size,
        local_rank=_number("LOCAL_RANK", "SLURM_LOCALID", default=0),
        local_world_size=local_world_size,
        run_dir=_path("MOE_BENCH_RUN_DIR"),
        megatron_path=_checkout(_path("MEGATRON_PATH")),
        profile=_profile(os.environ.get("MOE_BENCH_PROFILE", "")),
        threads=threads_per_rank(local_world_size),
    )


def fill_in(words: Sequence[str]) -> list[str]:
    """`words`, and this process's variables, with each `${SLURM_...}` that configuration left to the job; 0 where it has none."""

    def filled(text: str) -> str:
        return _OF_THE_JOB.sub(lambda match: os.environ.get(match[1], "0"), text)

    for name, value in os.environ.items():
        if "${SLURM_" in value:
            os.environ[name] = filled(value)
    return [filled(word) for word in words]


_OF_THE_JOB = re.compile(r"\$\{(SLURM_[A-Z0-9_]+)\}")


def environment() -> Mapping[str, str]:
    """This process's variables, for those who must not read them on their own."""
    return os.environ


def export(context: RankContext) -> None:
    """Set the variables that Megatron reads, where Slurm has only set its own."""
    os.environ["RANK"] = str(context.rank)
    os.environ["WORLD_SIZE"] = str(context.world_size)
    os.environ["LOCAL_RANK"] = str(context.local_rank)
    os.environ["LOCAL_WORLD_SIZE"] = str(context.local_world_size)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


def device_ordinal(local_rank: int, visible_devices: int) -> int:
    """The CUDA device of this rank among those it sees. Raises LaunchError when it would share one.

    Slurm may show each task its own GPU alone (--gpus-per-task, --gpu-bind), which is then device 0 of every task;
    torchrun shows all of them to each of its workers.
    """
    if local_rank < visible_devices:
        return local_rank
    if visible_devices == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0
    shown = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
    raise LaunchError(
        f"LOCAL_RANK={local_rank} has no GPU: this process sees {visible_devices} (CUDA_VISIBLE_DEVICES: {shown}); "
        f"start at most {visible_devices} ranks on this machine, or give it more GPUs"
    )


def export_device(ordinal: int) -> None:
    """Megatron takes LOCAL_RANK as its device (megatron/training/initialize.py _initialize_distributed, 0.19.2)."""
    os.environ["LOCAL_RANK"] = str(ordinal)


def hide_gpus() -> None:
    """Before CUDA is first asked anything: what of torch is not presented by the host finds no GPU either."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def export_for_cpu() -> None:
    """What a CPU rank needs before torch is imported."""
    hide_gpus()
    keep_freed_memory(os.environ)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing here is compiled for a GPU
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # asserted by Megatron with TP and SP


def export_for_gpu() -> str | None:
    """Turn torch.compile off where it could not work, and say what is missing. Before torch is imported.

    Megatron compiles functions as soon as it starts (megatron/training/initialize.py _warmup_jit_function, 0.19.2); for
    each of them Triton builds a small C module (triton/runtime/build.py, 3.6), which a bare machine has no compiler for.
    """
    if "TORCHDYNAMO_DISABLE" in os.environ:
        return None
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"]) / "Python.h"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is not None and header.is_file():
        return None
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    return f"{header} (python3-dev)" if compiler is not None else "a C compiler (gcc)"


def export_forked(rank: int, world_size: int, port: str) -> None:
    """The place of a process that was forked as one of `world_size` ranks of this machine."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
    }
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)


def threads_per_rank(local_world_size: int) -> int:
    """OMP_NUM_THREADS, else the cores this process may use over the ranks of this machine, at least 1."""
    asked = os.environ.get("OMP_NUM_THREADS")
    if asked:
        return _positive("OMP_NUM_THREADS", asked)
    return max(1, len(os.sched_getaffinity(0)) // local_world_size)


def _number(*names: str, default: int) -> int:
    for name in names:
        if name in os.environ:
            return _integer(name, os.environ[name])
    return default


def _positive(name: str, text: str) -> int:
    number = _integer(name, text)
    if number < 1:
        raise LaunchError(f"{name}={text} (environment) is below 1; unset it or give a count")
    return number


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise LaunchError(
            f"{name}={text!r} (environment) is not a whole number; unset it or start through torchrun"
        ) from None


def _path(name: str) -> Path | None:
    text = os.environ.get(name, "")
    return Path(text) if text else None


def _checkout(path: Path | None) -> Path | None:
    if path is not None and not (path / "pretrain_gpt.py").is_file():
        raise LaunchError(
            f"MEGATRON_PATH={path} (environment) holds no pretrain_gpt.py; give the root of a Megatron-LM "
            "checkout, or unset it to run the installed megatron-core"
        )
    return path


def _profile(text: str) -> str:
    if text not in PROFILES:
        raise LaunchError(
            f"PROFILE={text} (environment) is not a profiler; use 1, torch, memory or nsys"
        )
    return {"0": "", "1": "torch"}.get(text, text)


def local_context(nproc: int) -> RankContext:
    """The context of rank 0 of `nproc` ranks on this machine, for the process that will fork them."""
    if nproc < 1:
        raise LaunchError(f"--nproc {nproc} is below 1; give the number of ranks")
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", nproc)):
        os.environ[name] = str(value)
    os.environ["LOCAL_WORLD_SIZE"] = str(nproc)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_rank(nproc)))
    return rank_context()
