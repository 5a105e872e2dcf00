"""How the ranks of a Slurm job get into their image: pyxis, Apptainer or docker. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from moe_bench.config.run import ResolvedRun
from moe_bench.errors import LaunchError
from moe_bench.launch.script import SECRETS

RUNTIMES = ("pyxis", "apptainer", "docker", "none")
_MOUNT_PATH = r"/[^:,\"$`\\\n\r\t]*"  # enroot writes mounts into a shell script of its own
_MOUNT = re.compile(rf"{_MOUNT_PATH}(:{_MOUNT_PATH}(:[A-Za-z0-9=+_-]+)?)?")
_OF_THE_JOB = (
    *("MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_NODEID", "SLURM_NTASKS"),
    *("SLURM_NTASKS_PER_NODE", "SLURM_PROCID", "SLURM_LOCALID"),
)
"""What tells a rank its place, beside what the script sets for the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Container:
    """How the ranks get into the image."""

    runtime: str
    """One of RUNTIMES."""
    srun_options: tuple[str, ...] = ()
    """Shell-quoted options for srun."""
    prefix: tuple[str, ...] = ()
    """Words before the rank's own command."""


def container_of(run: ResolvedRun, workspace: Path, *, exported: Iterable[str]) -> Container:
    """By CONTAINER_RUNTIME and CONTAINER_IMAGE. Raises LaunchError for what the runtime could not take.

    `exported`: the variables that the script sets, which docker must be told of.
    """
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
    if runtime == "pyxis":
        return _pyxis(run, image, mounts, workdir)
    if runtime == "apptainer":
        return _apptainer(image, mounts, workdir)
    return _docker(run, image, mounts, workdir, exported)


def _pyxis(run: ResolvedRun, image: str, mounts: tuple[str, ...], workdir: str) -> Container:
    _check_pyxis_image(image, run.place("CONTAINER_IMAGE"))
    options = (
        "--no-container-mount-home",
        f"--container-image={shlex.quote(image)}",
        f"--container-mounts={shlex.quote(','.join(mounts))}",
        f"--container-workdir={shlex.quote(workdir)}",
    )
    return Container(runtime="pyxis", srun_options=options)


def _apptainer(image: str, mounts: tuple[str, ...], workdir: str) -> Container:
    binds = [word for mount in mounts for word in ("--bind", mount)]
    prefix = ("apptainer", "exec", "--nv", *binds, "--pwd", workdir, image)
    return Container(runtime="apptainer", prefix=prefix)


def _docker(
    run: ResolvedRun,
    image: str,
    mounts: tuple[str, ...],
    workdir: str,
    exported: Iterable[str],
) -> Container:
    if (nodes := run.knob("NNODES") or "1") != "1":
        raise LaunchError(
            f"CONTAINER_RUNTIME=docker runs on one node only, and NNODES={nodes} ({run.place('NNODES')}); "
            "use pyxis or apptainer on several nodes"
        )
    # One without a value is taken from the caller's environment, or left out where it is not there.
    taken = dict.fromkeys((*sorted(exported), *_OF_THE_JOB, *SECRETS))
    names = [word for name in taken for word in ("--env", name)]
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
