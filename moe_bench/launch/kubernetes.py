"""Kubernetes: a headless service and an indexed Job (or JobSet), one pod a node, torchrun within."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_bench.config.run import ResolvedRun
from moe_bench.errors import LaunchError
from moe_bench.launch.kubernetes_objects import manifests
from moe_bench.launch.kubernetes_values import CHART, RUN_LABEL, values_of, without_meaning
from moe_bench.launch.launcher import JobHandle, JobState, LaunchPlan

SUBMIT_TIMEOUT_S = 60
QUERY_TIMEOUT_S = 20
_NO_FOLDING = 10**9
_PULLING = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "CreateContainerConfigError")


@dataclass(frozen=True, kw_only=True, slots=True)
class KubernetesLauncher:
    """Renders manifests and creates them with kubectl, or a Helm values file and installs the chart with it.

    A job's id is `NAMESPACE/KIND/NAME`, where KIND is job, jobset or helm.
    """

    project: Path
    """The project's folder here; its paths become those of the image."""
    python: str = "python"
    """Unused: the image brings its own."""

    def render(self, run: ResolvedRun) -> LaunchPlan:
        """The manifests, or with K8S_TOOL=helm the values. Raises LaunchError for what Kubernetes could not take."""
        values = values_of(run, project=self.project)
        notes = (*without_meaning(run), *values.notes)
        helm = values.tool == "helm"
        return LaunchPlan(
            launcher="kubernetes",
            filename="values.yaml" if helm else "launch.yaml",
            script=values.header + dump([values.tree] if helm else manifests(values.tree)),
            notes=notes,
        )

    def submit(self, plan: LaunchPlan, run: ResolvedRun) -> JobHandle:
        """`kubectl create` or `helm install` of the file in the run's directory. Raises LaunchError with their words."""
        path = run.run_dir / plan.filename
        values = values_of(run, project=self.project)
        name, namespace = values.tree["name"], values.tree["namespace"]
        if values.tool == "helm":
            words = ["helm", "install", name, str(CHART), "--namespace", namespace]
            _call([*words, "--values", str(path)], timeout_s=SUBMIT_TIMEOUT_S, about=str(path))
            return JobHandle(launcher="kubernetes", job_id=f"{namespace}/helm/{name}")
        # `apply` would keep the whole ConfigMap a second time, in an annotation that may hold 256 KiB.
        _call(
            ["kubectl", "create", "--filename", str(path)],
            timeout_s=SUBMIT_TIMEOUT_S,
            about=str(path),
        )
        return JobHandle(
            launcher="kubernetes", job_id=f"{namespace}/{values.tree['kind'].lower()}/{name}"
        )

    def query(self, job_ids: Iterable[str]) -> Mapping[str, JobState]:
        """What `kubectl get` says of the jobs and their pods; nothing where there is no kubectl."""
        wanted = {job_id: _parts(job_id) for job_id in job_ids}
        if not wanted or shutil.which("kubectl") is None:
            return {}
        found: dict[str, JobState] = {}
        for namespace in sorted({namespace for namespace, _, _ in wanted.values()}):
            words = ["kubectl", "get", "jobs.batch,pods", "--namespace", namespace]
            words += ["--selector", RUN_LABEL, "--output", "json"]
            said = _call(words, timeout_s=QUERY_TIMEOUT_S, about=f"namespace {namespace}")
            jobs, pods = _by_run(json.loads(said)["items"])
            for job_id, (of, _, name) in wanted.items():
                if of == namespace and name in jobs:
                    found[job_id] = _state(job_id, jobs[name], pods.get(name, []))
        return found

    def cancel(self, job_id: str) -> None:
        """Delete what was made for the run; its files stay. Raises LaunchError with kubectl's or helm's words."""
        namespace, kind, name = _parts(job_id)
        if kind == "helm":
            words = ["helm", "uninstall", name, "--namespace", namespace]
        else:
            kinds = f"{'jobsets.jobset.x-k8s.io' if kind == 'jobset' else 'jobs.batch'},services,configmaps"
            words = ["kubectl", "delete", kinds, "--namespace", namespace]
            words += ["--selector", f"{RUN_LABEL}={name}", "--wait=false"]
        _call(words, timeout_s=SUBMIT_TIMEOUT_S, about=job_id)

    def logs(self, job_id: str, *, lines: int) -> str:
        """The end of every pod's output, each line after its pod's name: for runs whose files are not seen here."""
        namespace, _, name = _parts(job_id)
        words = ["kubectl", "logs", "--namespace", namespace, "--selector", f"{RUN_LABEL}={name}"]
        words += ["--prefix", "--max-log-requests=1000", f"--tail={lines or -1}"]
        return _call(words, timeout_s=SUBMIT_TIMEOUT_S, about=job_id)


def dump(documents: list[dict[str, Any]]) -> str:
    """YAML as people write it: scripts as blocks, no aliases."""
    import yaml  # noqa: PLC0415 - only a rendering needs it

    class Plain(yaml.SafeDumper):
        """Writes a shared object twice rather than as an alias, which readers of manifests do not expect."""

        def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - PyYAML's signature
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Plain.add_representer(str, text)
    return yaml.dump_all(
        documents,
        Dumper=Plain,
        sort_keys=False,
        width=_NO_FOLDING,
        explicit_start=len(documents) > 1,
    )


def _parts(job_id: str) -> tuple[str, str, str]:
    parts = job_id.split("/")
    if len(parts) != 3:
        raise LaunchError(
            f"job id {job_id!r} is not NAMESPACE/KIND/NAME, as a submission writes it"
        )
    return parts[0], parts[1], parts[2]


def _by_run(
    items: list[dict[str, Any]],
) -> tuple[dict[str, dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    jobs: dict[str, dict[str, Any]] = {}
    pods: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        name = item["metadata"]["labels"][RUN_LABEL]
        if item["kind"] == "Job":
            jobs[name] = item
        else:
            pods.setdefault(name, []).append(item)
    return jobs, pods


def _state(job_id: str, job: dict[str, Any], pods: list[dict[str, Any]]) -> JobState:
    status = job.get("status", {})
    nodes = ",".join(sorted({pod["spec"]["nodeName"] for pod in pods if "nodeName" in pod["spec"]}))
    for condition in status.get("conditions", []):
        if condition["status"] != "True":
            continue
        why = condition.get("message") or condition.get("reason") or "None"
        match condition["type"]:
            case "Complete":
                return JobState(job_id=job_id, state="COMPLETED", nodes=nodes)
            case "Failed":
                late = condition.get("reason") == "DeadlineExceeded"
                state = "TIMEOUT" if late else "FAILED"
                return JobState(job_id=job_id, state=state, reason=why, nodes=nodes)
            case "Suspended":
                why = "suspended: its queue has not let it in yet"
                return JobState(job_id=job_id, state="PENDING", reason=why)
    waiting = _why_waiting(pods)
    if waiting is not None or not pods:
        why = waiting or "no pod has been made yet"
        return JobState(job_id=job_id, state="PENDING", reason=why, nodes=nodes)
    return JobState(job_id=job_id, state="RUNNING", nodes=nodes)


def _why_waiting(pods: list[dict[str, Any]]) -> str | None:
    """Of the first pod that cannot start; None when all have."""
    for pod in pods:
        status = pod.get("status", {})
        for container in status.get("containerStatuses", []):
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") in _PULLING:
                return f"{waiting['reason']}: {waiting.get('message', 'see kubectl describe pod')}"
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return str(condition.get("message") or condition.get("reason"))
        if status.get("phase") == "Pending":
            return "its pods are being started"
    return None


_ADVICE = (
    ("already exists", "choose another RUN_ID, or cancel the one that is there"),
    ("no matches for kind", "this cluster has no JobSet: use K8S_KIND=Job, or install JobSet"),
    ("forbidden", "ask for the rights, or set K8S_NAMESPACE to a namespace of yours"),
    ("not found", "look at K8S_NAMESPACE"),
    ("connection refused", "no cluster answers: see `kubectl cluster-info`"),
)


_OTHERWISE = {
    "kubectl": "what was made before that is removed with: kubectl delete --filename launch.yaml",
    "helm": "see `helm list` and `helm uninstall`",
}


def _call(words: list[str], *, timeout_s: int, about: str) -> str:
    tool = words[0]
    if shutil.which(tool) is None:
        raise LaunchError(
            f"{tool} is not on PATH ({about}); install it, or look at what would be submitted with DRY_RUN=1"
        )
    try:
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{tool} did not answer within {timeout_s} s ({about}); see `kubectl cluster-info`"
        ) from None
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    advice = next((way for sign, way in _ADVICE if sign in said.lower()), _OTHERWISE[tool])
    raise LaunchError(f"{tool} refused {about}: {said}; {advice}")
