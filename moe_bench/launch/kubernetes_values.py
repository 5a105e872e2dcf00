"""What varies between clusters and runs on Kubernetes: the tree of the chart's values.yaml, from a resolved run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from moe_bench.arguments.emit import argv
from moe_bench.config.run import Origin, ResolvedRun, Setting
from moe_bench.errors import LaunchError
from moe_bench.launch import time_limit
from moe_bench.launch.script import (
    SECRETS,
    before_python,
    is_on_cpu,
    python_path,
    without_effect,
)

CHART = Path(__file__).parent / "chart"
RUN_LABEL = "moe-bench/run"
WORKSPACE = "/opt/moe_bench"
"""Where dockers/*.Dockerfile put the project."""
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_LABEL_VALUE = re.compile(r"[^A-Za-z0-9._-]+")
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kKMGTPE]i?)?\Z")
_TOLERATION = re.compile(
    r"(?P<key>[\w./-]+)(=(?P<value>[\w.-]*))?(:(?P<effect>NoSchedule|PreferNoSchedule|NoExecute))?\Z"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Values:
    """A values file with what belongs to it."""

    tree: dict[str, Any]
    header: str
    tool: str
    """kubectl or helm."""
    notes: tuple[str, ...]


def values_of(run: ResolvedRun, *, project: Path) -> Values:
    """Raises LaunchError for a knob that Kubernetes could not take, and for an output path on no volume."""
    _refuse_slurm_only(run)
    name = _object_name(run)
    volumes = _volumes(run)
    inside = _as_pods_see(run, project)
    _check_on_volume(run, inside, volumes)
    tree: dict[str, Any] = {
        "name": name,
        "namespace": _label(run, "K8S_NAMESPACE") or "default",
        "kind": run.knob("K8S_KIND") or "Job",
        "labels": {
            RUN_LABEL: name,
            "moe-bench/model": _LABEL_VALUE.sub("_", run.model)[:63],
        },
        "queue": _label(run, "K8S_QUEUE"),
        "image": _image(run),
        "imagePullSecret": run.knob("K8S_PULL_SECRET"),
        "nodes": int(run.knobs["NNODES"].value),
        "ranksPerNode": int(run.knobs["GPUS_PER_NODE"].value),
        "port": int(run.knob("MASTER_PORT") or 29500),
        "resources": _resources(run),
        "capabilities": _capabilities(run),
        "shmGiB": int(run.knob("K8S_SHM_GIB") or 64),
        "timeLimitSeconds": None if time_limit.is_unlimited(run) else time_limit.seconds(run),
        "graceSeconds": int(run.knob("SIGNAL_BEFORE_S") or 120),
        "maxRestarts": int(run.knob("MAX_REQUEUES") or 10),
        "hostNetwork": run.knob("K8S_HOST_NETWORK") == "1",
        "nodeSelector": _pairs(run, "K8S_NODE_SELECTOR"),
        "tolerations": _tolerations(run),
        "secret": run.knob("K8S_SECRET"),
        "secretKeys": list(SECRETS),
        "volumes": volumes,
        "workspace": _workspace(run),
        "runDirectory": str(inside.run_dir),
        "environment": _environment(inside),
        "wrapper": list(
            before_python(inside, trace=f"{inside.run_dir}/profiles/nsys-rank-%q{{RANK}}")
        ),
        "flags": list(argv(inside)),
        "run": msgspec.json.format(inside.to_json(), indent=-1).decode(),
    }
    tool = run.knob("K8S_TOOL") or "kubectl"
    return Values(tree=tree, header=_header(run), tool=tool, notes=tuple(_off_volume(inside, tree)))


# Slurm's knobs

_REFUSED = {
    "CONTAINER_MOUNTS": "K8S_VOLUMES=pvc:CLAIM:/mount,host:/path:/mount",
    "NODELIST": "K8S_NODE_SELECTOR=kubernetes.io/hostname=NODE",
    "EXCLUDE": "a taint on the node, which pods do not bear by themselves",
    "CONSTRAINT": "K8S_NODE_SELECTOR=key=value",
    "RESERVATION": "K8S_QUEUE, or a taint that K8S_TOLERATIONS bears",
    "DEPENDENCY": "cancelling or waiting for the other run first",
    "SEGMENT": "K8S_NODE_SELECTOR with the rack's label",
}
"""Knobs that say where or when a job runs: leaving them out would run another job than was asked for."""
_WITHOUT_MEANING = (
    *("ACCOUNT", "PARTITION", "RUN_NAME", "QOS", "EXCLUSIVE"),
    *("SRUN_MPI", "CONTAINER_RUNTIME", "MASTER_ADDR", "NODE_RANK"),
)


def _refuse_slurm_only(run: ResolvedRun) -> None:
    for name, instead in _REFUSED.items():
        if run.knob(name):
            raise LaunchError(
                f"{name}={run.knob(name)} ({run.place(name)}) is Slurm's and cannot be kept on Kubernetes; "
                f"unset it, and use {instead}"
            )


def without_meaning(run: ResolvedRun) -> Iterator[str]:
    """One line for each knob of Slurm's that is set and does nothing here."""
    return without_effect(run, _WITHOUT_MEANING, "is Slurm's and does nothing on Kubernetes")


# Paths


def _as_pods_see(run: ResolvedRun, project: Path) -> ResolvedRun:
    """The run with this machine's paths replaced by the pods': its own directory, and the project's folder."""
    base = run.knob("K8S_OUTPUT_PATH")
    run_dir = Path(base) / run.run_id if base else run.run_dir
    if not run_dir.is_absolute():
        raise LaunchError(
            f"K8S_OUTPUT_PATH={base} ({run.place('K8S_OUTPUT_PATH')}) is not absolute"
        )
    moved = {
        str(run.run_dir): str(run_dir),
        # Megatron's index cache is made by one rank and read by all: it belongs on the volume.
        str(project / "data_cache"): str(run_dir.parent / "data_cache"),
        str(project): _workspace(run),
    }
    return replace(
        run,
        run_dir=run_dir,
        args={name: _moved(setting, moved) for name, setting in run.args.items()},
        env={name: _moved(setting, moved) for name, setting in _mirrored(run).items()},
    )


def _mirrored(run: ResolvedRun) -> dict[str, Setting]:
    """The environment, with W&B on where the key comes from a Secret: common.conf only saw that none is here."""
    env = dict(run.env)
    mode = env.get("WANDB_MODE")
    if mode is not None and mode.origin.layer == "common" and run.knob("K8S_SECRET"):
        place = Origin(layer="derived", place=f"K8S_SECRET ({run.place('K8S_SECRET')})")
        env["WANDB_MODE"] = Setting(value="online", origin=place)
    return env


def _moved(setting: Any, moved: dict[str, str]) -> Any:
    words = setting.words and tuple(_move(word, moved) for word in setting.words)
    return replace(setting, value=_move(setting.value, moved), words=words)


def _move(text: str, moved: dict[str, str]) -> str:
    """The path, or each path of a list with colons, as the pods see it."""
    return ":".join(_move_one(part, moved) for part in text.split(":"))


def _move_one(text: str, moved: dict[str, str]) -> str:
    for before, after in moved.items():
        if text == before or text.startswith(f"{before}/"):
            return after + text[len(before) :]
    return text


def _check_on_volume(run: ResolvedRun, inside: ResolvedRun, volumes: list[dict[str, Any]]) -> None:
    if not _covered(inside.run_dir, volumes):
        raise LaunchError(
            f"the run's directory {inside.run_dir} is on no volume of the pods (K8S_VOLUMES {run.place('K8S_VOLUMES')}), "
            "so its record and checkpoints would go with them; mount one, for example K8S_VOLUMES=pvc:CLAIM:/data "
            "K8S_OUTPUT_PATH=/data/runs"
        )


def _off_volume(inside: ResolvedRun, tree: dict[str, Any]) -> Iterator[str]:
    """Paths of the run that no volume and not the project's folder holds: the image must."""
    for name in ("--data-path", "--tokenizer-model", "--load"):
        setting = inside.args.get(name)
        for word in setting.words or (setting.value,) if setting else ():
            path = Path(word)
            held = path.is_relative_to(tree["workspace"]) or _covered(path, tree["volumes"])
            if path.is_absolute() and not held:
                yield f"{name} {word} is on no volume of K8S_VOLUMES: the image must hold it"


def _covered(path: Path, volumes: list[dict[str, Any]]) -> bool:
    return any(path.is_relative_to(volume["mountPath"]) for volume in volumes)


def _workspace(run: ResolvedRun) -> str:
    return run.knob("K8S_WORKSPACE") or WORKSPACE


# Values


def _environment(inside: ResolvedRun) -> dict[str, str]:
    plain = {name: setting.value for name, setting in inside.env.items()}
    plain["MOE_BENCH_RUN_DIR"] = str(inside.run_dir)
    plain["PYTHONPATH"] = python_path(inside, _workspace(inside), in_image=True)
    for name in ("MEGATRON_PATH", "NVLINK_DOMAIN_SIZE"):
        if value := inside.knob(name):
            plain[name] = value
    return plain


def _object_name(run: ResolvedRun) -> str:
    # A service's name begins with a letter; of its 63 characters a pod's suffix needs up to 12.
    name = re.sub(r"[^a-z0-9-]+", "-", f"moe-{run.run_id.lower()}")
    return name if len(name) <= 48 else f"{name[:39].strip('-')}-{_tail(name)}"


def _tail(name: str) -> str:
    """Eight characters that differ where what was cut off differs."""
    import hashlib  # noqa: PLC0415 - for long names only

    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _image(run: ResolvedRun) -> str:
    if run.knob("CONTAINER_RUNTIME") == "none":
        raise LaunchError(
            f"CONTAINER_RUNTIME=none ({run.place('CONTAINER_RUNTIME')}) asks for ranks without an image, and pods always have one; "
            "unset it"
        )
    image = run.knob("CONTAINER_IMAGE").removeprefix("docker://").replace("#", "/")
    if not image or image.startswith(("/", ".")) or image.endswith(".sqsh"):
        raise LaunchError(
            f"CONTAINER_IMAGE={image!r} ({run.place('CONTAINER_IMAGE')}) is not an image that a kubelet can pull; "
            "set it to REGISTRY/IMAGE:TAG"
        )
    return image


def _resources(run: ResolvedRun) -> dict[str, Any]:
    """The node's GPUs, or on a CPU its ranks' cores, and what K8S_RESOURCES adds."""
    name = run.knob("K8S_RESOURCE") or ("cpu" if is_on_cpu(run) else "nvidia.com/gpu")
    resources: dict[str, Any] = {name: int(run.knobs["GPUS_PER_NODE"].value)}
    for key, value in _pairs(run, "K8S_RESOURCES").items():
        if not _QUANTITY.match(value):
            raise LaunchError(
                f"K8S_RESOURCES holds {key}={value} ({run.place('K8S_RESOURCES')}), which is no quantity; "
                "write 8, 500m or 900Gi"
            )
        resources[key] = int(value) if value.isdigit() else value
    return resources


def _capabilities(run: ResolvedRun) -> list[str]:
    """RDMA pins memory; a namespace under the baseline policy would refuse the capability, so others do without."""
    rdma = any("rdma" in name or "hca" in name for name in _pairs(run, "K8S_RESOURCES"))
    return ["IPC_LOCK"] if rdma or run.knob("K8S_HOST_NETWORK") == "1" else []


def _tolerations(run: ResolvedRun) -> list[dict[str, str]]:
    """K8S_TOLERATIONS=key[=value][:effect],...; without it the taint that GPU nodes usually have."""
    texts = _list(run, "K8S_TOLERATIONS") or ["nvidia.com/gpu:NoSchedule"]
    found = []
    for text in texts:
        match = _TOLERATION.match(text)
        if not match:
            raise LaunchError(
                f"K8S_TOLERATIONS holds {text!r} ({run.place('K8S_TOLERATIONS')}); "
                "write key[=value][:NoSchedule|:PreferNoSchedule|:NoExecute]"
            )
        one = {"key": match["key"], "operator": "Exists" if match["value"] is None else "Equal"}
        one |= {name: match[name] for name in ("value", "effect") if match[name]}
        found.append(one)
    return found


def _volumes(run: ResolvedRun) -> list[dict[str, Any]]:
    """K8S_VOLUMES=pvc:CLAIM:/mount,host:/path:/mount."""
    volumes = []
    for index, text in enumerate(_list(run, "K8S_VOLUMES")):
        match text.split(":"):
            case ["pvc", claim, mount] if _DNS_LABEL.match(claim) and mount.startswith("/"):
                source: dict[str, Any] = {"persistentVolumeClaim": {"claimName": claim}}
            case ["host", path, mount] if path.startswith("/") and mount.startswith("/"):
                source = {"hostPath": {"path": path}}
            case _:
                raise LaunchError(
                    f"K8S_VOLUMES holds {text!r} ({run.place('K8S_VOLUMES')}); "
                    "write pvc:CLAIM:/mount or host:/path:/mount"
                )
        volumes.append({"name": f"volume-{index}", "mountPath": mount, "source": source})
    return volumes


def _pairs(run: ResolvedRun, name: str) -> dict[str, str]:
    pairs = {}
    for text in _list(run, name):
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise LaunchError(f"{name} holds {text!r} ({run.place(name)}), which is not KEY=VALUE")
        pairs[key] = value
    return pairs


def _list(run: ResolvedRun, name: str) -> list[str]:
    return [part.strip() for part in run.knob(name).split(",") if part.strip()]


def _label(run: ResolvedRun, name: str) -> str:
    value = run.knob(name)
    if value and not _DNS_LABEL.match(value):
        raise LaunchError(
            f"{name}={value!r} ({run.place(name)}) is not a DNS label; use lower-case letters, digits and -, at most 63"
        )
    return value


def _header(run: ResolvedRun) -> str:
    model = _LABEL_VALUE.sub("_", run.model)
    kind = " (a rehearsal, NOT the real model)" if run.rehearsal else ""
    return f"# {model}{kind}, run {run.run_id}; made by moe_bench.\n"
