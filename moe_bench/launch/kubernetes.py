"""Kubernetes: a headless service and an indexed Job (or JobSet), one pod a node, torchrun within."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_bench.arguments.emit import argv
from moe_bench.config.run import ResolvedRun
from moe_bench.errors import LaunchError
from moe_bench.launch.launcher import JobHandle, LaunchPlan

MASTER_PORT = 29500
SUBMIT_TIMEOUT_S = 60
KINDS = ("Job", "JobSet")
_NAME = re.compile(r"[^a-z0-9-]+")
_DNS_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_INDEX_ANNOTATION = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


@dataclass(frozen=True, kw_only=True, slots=True)
class KubernetesLauncher:
    """Renders manifests as one YAML stream and applies them with kubectl."""

    workspace: Path
    """The project's folder within the image or on a mounted volume."""

    def render(self, run: ResolvedRun) -> LaunchPlan:
        """The manifests. Raises LaunchError for a value that Kubernetes could not take."""
        script = _header(run) + _dump(self.manifests(run))
        return LaunchPlan(
            launcher="kubernetes", filename="launch.yaml", script=script, environment={}
        )

    def manifests(self, run: ResolvedRun) -> list[dict[str, Any]]:
        """The service and the job, as Kubernetes' own objects."""
        values = helm_values(run)
        name = values["name"]
        metadata = {"name": name, "namespace": values["namespace"], "labels": values["labels"]}
        service = {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {"moe-bench/run": name},
                "ports": [{"name": "rendezvous", "port": MASTER_PORT}],
            },
        }
        job = self._job(run, values)
        if values["kind"] == "Job":
            return [
                service,
                {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": job},
            ]
        replicated = {"name": "node", "replicas": 1, "template": {"spec": job}}
        spec = {
            "network": {
                "enableDNSHostnames": True,
                "subdomain": name,
                "publishNotReadyAddresses": True,
            },
            "failurePolicy": {"maxRestarts": values["maxRestarts"]},
            "replicatedJobs": [replicated],
        }
        # JobSet makes its own headless service from `network`.
        return [
            {
                "apiVersion": "jobset.x-k8s.io/v1alpha2",
                "kind": "JobSet",
                "metadata": metadata,
                "spec": spec,
            }
        ]

    def submit(self, plan: LaunchPlan, run: ResolvedRun) -> JobHandle:
        """`kubectl apply` of the file in the run's directory. Raises LaunchError with kubectl's words."""
        path = run.run_dir / plan.filename
        if shutil.which("kubectl") is None:
            raise LaunchError(
                f"kubectl is not on PATH; the manifests are in {path}: apply them where it is"
            )
        try:
            done = subprocess.run(
                ["kubectl", "apply", "--filename", str(path)],
                check=False, capture_output=True, text=True, timeout=SUBMIT_TIMEOUT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise LaunchError(
                f"kubectl did not answer within {SUBMIT_TIMEOUT_S} s; see `kubectl cluster-info`"
            ) from None
        if done.returncode != 0:
            raise LaunchError(f"kubectl refused {path}: {done.stderr.strip()}")
        values = helm_values(run)
        return JobHandle(launcher="kubernetes", job_id=f"{values['namespace']}/{values['name']}")

    def _job(self, run: ResolvedRun, values: dict[str, Any]) -> dict[str, Any]:
        nodes = values["nodes"]
        return {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            # A lost pod restarts every pod's torchrun: within a Job that is one shared budget of retries.
            "backoffLimit": values["maxRestarts"] * nodes,
            "template": {"metadata": {"labels": values["labels"]}, "spec": self._pod(run, values)},
        }

    def _pod(self, run: ResolvedRun, values: dict[str, Any]) -> dict[str, Any]:
        container = {
            "name": "ranks",
            "image": values["image"],
            "workingDir": str(self.workspace),
            "command": _torchrun(run, values),
            "env": self._environment(run, values),
            "resources": {"limits": values["limits"], "requests": values["limits"]},
            "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}]
            + [
                {"name": volume["name"], "mountPath": volume["mountPath"]}
                for volume in values["volumes"]
            ],
        }
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "subdomain": values["name"],
            "containers": [container],
            "volumes": [
                {
                    "name": "shm",
                    "emptyDir": {"medium": "Memory", "sizeLimit": f"{values['shmGiB']}Gi"},
                },
                *({"name": volume["name"], **volume["source"]} for volume in values["volumes"]),
            ],
        }
        if values["nodeSelector"]:
            pod["nodeSelector"] = values["nodeSelector"]
        return pod

    def _environment(self, run: ResolvedRun, values: dict[str, Any]) -> list[dict[str, Any]]:
        plain = {name: setting.value for name, setting in run.env.items()}
        plain |= {"MOE_BENCH_RUN_DIR": str(run.run_dir), "PYTHONPATH": str(self.workspace)}
        if megatron := _knob(run, "MEGATRON_PATH"):
            plain["MEGATRON_PATH"] = megatron
        environment: list[dict[str, Any]] = [
            {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _INDEX_ANNOTATION}}}
        ]
        environment += [{"name": name, "value": _literal(value)} for name, value in plain.items()]
        if secret := values["secret"]:
            key = {"name": secret, "key": "WANDB_API_KEY", "optional": True}
            environment.append({"name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": key}})
        return environment


def helm_values(run: ResolvedRun) -> dict[str, Any]:
    """What varies between clusters and runs, in the shape of a Helm chart's values.yaml."""
    name = _object_name(run)
    return {
        "name": name,
        "namespace": _label(run, "K8S_NAMESPACE", default="default"),
        "kind": _choice(run, "K8S_KIND", KINDS),
        "labels": {
            "moe-bench/run": name,
            "moe-bench/model": _LABEL_VALUE.sub("_", run.model),
            **_queue(run),
        },
        "image": _image(run),
        "nodes": int(run.knobs["NNODES"].value),
        "ranksPerNode": int(run.knobs["GPUS_PER_NODE"].value),
        "limits": {
            _knob(run, "K8S_RESOURCE") or "nvidia.com/gpu": int(run.knobs["GPUS_PER_NODE"].value)
        },
        "shmGiB": int(_knob(run, "K8S_SHM_GIB") or 64),
        "maxRestarts": int(_knob(run, "MAX_REQUEUES") or 10),
        "secret": _knob(run, "K8S_SECRET"),
        "nodeSelector": _pairs(run, "K8S_NODE_SELECTOR"),
        "volumes": _volumes(run),
    }


def dump_values(run: ResolvedRun) -> str:
    """The text of values.yaml."""
    return _header(run) + _dump([helm_values(run)])


_LABEL_VALUE = re.compile(r"[^A-Za-z0-9._-]+")


def _torchrun(run: ResolvedRun, values: dict[str, Any]) -> list[str]:
    name = values["name"]
    # Pods of an indexed Job are called JOB-INDEX; those of a JobSet SET-REPLICATED-JOB-REPLICA-INDEX.
    first_pod = f"{name}-0" if values["kind"] == "Job" else f"{name}-node-0-0"
    return [
        *("torchrun", f"--nnodes={values['nodes']}", f"--nproc-per-node={values['ranksPerNode']}"),
        *(
            "--node-rank=$(NODE_RANK)",
            f"--master-addr={first_pod}.{name}",
            f"--master-port={MASTER_PORT}",
        ),
        *("-m", "moe_bench.runtime.pretrain", *(_literal(word) for word in argv(run))),
    ]


def _literal(value: str) -> str:
    """Kubernetes expands $(NAME) in commands and values; doubling the dollar keeps it as written."""
    return value.replace("$(", "$$(")


def _object_name(run: ResolvedRun) -> str:
    # A service's name begins with a letter; of its 63 characters a pod's suffix needs up to 12.
    name = _NAME.sub("-", f"moe-{run.run_id.lower()}")
    return name[:48].strip("-")


def _image(run: ResolvedRun) -> str:
    image = _knob(run, "CONTAINER_IMAGE").removeprefix("docker://").replace("#", "/")
    if not image or image.endswith(".sqsh"):
        raise LaunchError(
            f"CONTAINER_IMAGE={image!r} ({_place(run, 'CONTAINER_IMAGE')}) is not an image that a kubelet can pull; "
            "set it to REGISTRY/IMAGE:TAG"
        )
    return image


def _queue(run: ResolvedRun) -> dict[str, str]:
    queue = _knob(run, "K8S_QUEUE")
    return {"kueue.x-k8s.io/queue-name": _label(run, "K8S_QUEUE", default="")} if queue else {}


def _volumes(run: ResolvedRun) -> list[dict[str, Any]]:
    """K8S_VOLUMES=pvc:CLAIM:/mount,host:/path:/mount."""
    volumes = []
    for index, text in enumerate(part for part in _knob(run, "K8S_VOLUMES").split(",") if part):
        match text.split(":"):
            case ["pvc", claim, mount] if _DNS_LABEL.match(claim) and mount.startswith("/"):
                source: dict[str, Any] = {"persistentVolumeClaim": {"claimName": claim}}
            case ["host", path, mount] if path.startswith("/") and mount.startswith("/"):
                source = {"hostPath": {"path": path}}
            case _:
                raise LaunchError(
                    f"K8S_VOLUMES holds {text!r} ({_place(run, 'K8S_VOLUMES')}); write pvc:CLAIM:/mount or host:/path:/mount"
                )
        volumes.append({"name": f"volume-{index}", "mountPath": mount, "source": source})
    return volumes


def _pairs(run: ResolvedRun, name: str) -> dict[str, str]:
    pairs = {}
    for text in (part for part in _knob(run, name).split(",") if part):
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise LaunchError(
                f"{name} holds {text!r} ({_place(run, name)}), which is not KEY=VALUE"
            )
        pairs[key] = value
    return pairs


def _label(run: ResolvedRun, name: str, *, default: str) -> str:
    value = _knob(run, name) or default
    if not _DNS_LABEL.match(value):
        raise LaunchError(
            f"{name}={value!r} ({_place(run, name)}) is not a DNS label; use lower-case letters, digits and -, at most 63"
        )
    return value


def _choice(run: ResolvedRun, name: str, choices: tuple[str, ...]) -> str:
    value = _knob(run, name) or choices[0]
    if value not in choices:
        raise LaunchError(
            f"{name}={value} ({_place(run, name)}) is not one of {', '.join(choices)}"
        )
    return value


def _knob(run: ResolvedRun, name: str) -> str:
    setting = run.knobs.get(name)
    return setting.value if setting else ""


def _place(run: ResolvedRun, name: str) -> str:
    setting = run.knobs.get(name)
    return setting.origin.place if setting else "not set"


def _header(run: ResolvedRun) -> str:
    model = _LABEL_VALUE.sub("_", run.model)
    return f"# {model}{' (a rehearsal, NOT the real model)' if run.rehearsal else ''}, run {run.run_id}; made by moe_bench.\n"


def _dump(documents: list[dict[str, Any]]) -> str:
    import yaml  # noqa: PLC0415 - only a rendering needs it

    class Plain(yaml.SafeDumper):
        """Writes a shared object twice rather than as an alias, which readers of manifests do not expect."""

        def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - PyYAML's signature
            return True

    return yaml.dump_all(
        documents, Dumper=Plain, sort_keys=False, explicit_start=len(documents) > 1
    )
