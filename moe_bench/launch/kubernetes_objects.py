"""Kubernetes' own objects from a values tree: what the chart beside this file says in Helm's language. Pure."""

from __future__ import annotations

from typing import Any

from moe_bench.launch.kubernetes_values import CHART, RUN_LABEL

_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
_RUN_FOLDER = "/etc/moe-bench"


def manifests(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's record, the service that names the pods, and the job."""
    return [_config_map(values), *_service(values), _job_object(values)]


def _metadata(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": values["name"],
        "namespace": values["namespace"],
        "labels": dict(values["labels"]),
    }


def _config_map(values: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(values),
        "immutable": True,
        "data": {"run.json": values["run"]},
    }


def _service(values: dict[str, Any]) -> list[dict[str, Any]]:
    if values["kind"] == "JobSet":
        return []  # JobSet makes its own from `network`
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,  # ranks meet before any of them is ready
        "selector": {RUN_LABEL: values["name"]},
        "ports": [{"name": "rendezvous", "port": values["port"]}],
    }
    return [{"apiVersion": "v1", "kind": "Service", "metadata": _metadata(values), "spec": spec}]


def _job_object(values: dict[str, Any]) -> dict[str, Any]:
    metadata = _metadata(values)
    if values["queue"]:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = values["queue"]
    if values["kind"] == "Job":
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": metadata,
            # A pod that ends starts again alone; what the others do then ends them too, and each costs one retry.
            "spec": _job(values, retries=values["maxRestarts"] * values["nodes"]),
        }
    template = {
        "metadata": {"labels": dict(values["labels"])},
        "spec": _job(values, retries=0),  # the set starts all pods again together
    }
    spec = {
        "network": {
            "enableDNSHostnames": True,
            "subdomain": values["name"],
            "publishNotReadyAddresses": True,
        },
        "failurePolicy": {"maxRestarts": values["maxRestarts"]},
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": template}],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": spec,
    }


def _job(values: dict[str, Any], *, retries: int) -> dict[str, Any]:
    # An eviction is not the run's fault and costs no retry.
    evicted = {"type": "DisruptionTarget", "status": "True"}
    spec: dict[str, Any] = {
        "completionMode": "Indexed",
        "completions": values["nodes"],
        "parallelism": values["nodes"],
        "backoffLimit": retries,
    }
    if values["timeLimitSeconds"] is not None:
        spec["activeDeadlineSeconds"] = values["timeLimitSeconds"]
    if values["kind"] == "Job":
        spec["podFailurePolicy"] = {"rules": [{"action": "Ignore", "onPodConditions": [evicted]}]}
    spec["template"] = {"metadata": {"labels": dict(values["labels"])}, "spec": _pod(values)}
    return spec


def _pod(values: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "subdomain": values["name"],
        "terminationGracePeriodSeconds": values["graceSeconds"],
        "tolerations": values["tolerations"],
    }
    if values["hostNetwork"]:
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if values["nodeSelector"]:
        pod["nodeSelector"] = values["nodeSelector"]
    if values["imagePullSecret"]:
        pod["imagePullSecrets"] = [{"name": values["imagePullSecret"]}]
    shm = {"medium": "Memory", "sizeLimit": f"{values['shmGiB']}Gi"}
    pod["containers"] = [_container(values)]
    pod["volumes"] = [
        {"name": "shm", "emptyDir": shm},
        {"name": "run", "configMap": {"name": values["name"]}},
        *({"name": volume["name"], **volume["source"]} for volume in values["volumes"]),
    ]
    return pod


def _container(values: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "ranks",
        "image": values["image"],
        "workingDir": values["workspace"],
        "command": ["bash", "-c", script("pod.sh"), "moe_bench"],
        "args": _torchrun(values),
        "env": _environment(values),
        "resources": {"limits": values["resources"], "requests": values["resources"]},
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},
            {"name": "run", "mountPath": _RUN_FOLDER},
            *(
                {"name": volume["name"], "mountPath": volume["mountPath"]}
                for volume in values["volumes"]
            ),
        ],
    }
    if values["capabilities"]:
        container["securityContext"] = {"capabilities": {"add": values["capabilities"]}}
    return container


def _torchrun(values: dict[str, Any]) -> list[str]:
    name = values["name"]
    # Pods of an indexed Job are called JOB-INDEX; those of a JobSet SET-REPLICATED-JOB-REPLICA-INDEX.
    first_pod = f"{name}-0" if values["kind"] == "Job" else f"{name}-node-0-0"
    return [
        *("python", "-m", "torch.distributed.run"),
        f"--nnodes={values['nodes']}",
        f"--nproc-per-node={values['ranksPerNode']}",
        "--node-rank=$(NODE_RANK)",
        f"--master-addr={first_pod}.{name}",
        f"--master-port={values['port']}",
        *("--no-python", "bash", "-c", script("rank.sh"), "moe_bench"),
        *(_literal(word) for word in values["wrapper"]),
        *("python", "-m", "moe_bench.runtime.pretrain"),
        *(_literal(word) for word in values["flags"]),
    ]


def _environment(values: dict[str, Any]) -> list[dict[str, Any]]:
    environment: list[dict[str, Any]] = [
        {"name": "NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}}
    ]
    for name, value in sorted(values["environment"].items()):
        environment.append({"name": name, "value": _literal(value)})
    for name in values["secretKeys"] if values["secret"] else ():
        key = {"name": values["secret"], "key": name, "optional": True}
        environment.append({"name": name, "valueFrom": {"secretKeyRef": key}})
    return environment


def script(name: str) -> str:
    """A script that the pods run, from the chart's files."""
    return (CHART / "files" / name).read_text()


def _literal(value: str) -> str:
    """Kubernetes expands $(NAME) in commands and values, and reads $$ as a dollar: all are doubled."""
    return value.replace("$", "$$")
