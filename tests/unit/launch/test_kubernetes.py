"""Kubernetes manifests, checked against Kubernetes' own schemas, and what kubectl is asked to do with them."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from moe_bench.cli import cancel, logs, status
from moe_bench.config.run import Origin, ResolvedRun, Setting
from moe_bench.errors import LaunchError
from moe_bench.launch.job import record_submission
from moe_bench.launch.kubernetes import KubernetesLauncher, dump
from moe_bench.launch.kubernetes_objects import manifests
from moe_bench.launch.kubernetes_values import CHART
from moe_bench.launch.launcher import LaunchPlan
from tests.support.clusters import kubectl_on_path
from tests.support.runs import FLAGS, make_run

PROJECT = Path("/home/me/project")
LAUNCHER = KubernetesLauncher(project=PROJECT)
GOLDEN = Path(__file__).parents[2] / "golden"
IMAGE = "registry.example/moe:1"
LEAST = {"CONTAINER_IMAGE": IMAGE, "K8S_VOLUMES": "pvc:datasets:/data,host:/raid:/runs"}
FULL: dict[str, Any] = LEAST | {
    "K8S_NAMESPACE": "train",
    "K8S_NODE_SELECTOR": "gpu=h100",
    "K8S_TOLERATIONS": "nvidia.com/gpu:NoSchedule,team=moe",
    "K8S_RESOURCES": "rdma/hca=8,memory=900Gi",
    "K8S_SECRET": "wandb",
    "K8S_PULL_SECRET": "registry",
    "K8S_QUEUE": "research",
    "K8S_HOST_NETWORK": "1",
    "RUN_TIME": "1-02:00:00",
    "args": FLAGS | {"--profile": "true"},
}


def rendered(**knobs: Any) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(LAUNCHER.render(make_run(**knobs)).script))


def job_of(**knobs: str) -> dict[str, Any]:
    return next(one for one in rendered(**LEAST, **knobs) if one["kind"] == "Job")


@pytest.mark.parametrize("knobs", [LEAST, FULL], ids=["least", "full"])
@pytest.mark.parametrize("version", ["1.29", "1.31", "1.37"])
def test_manifests_fit_the_kubernetes_schemas(version: str, knobs: dict[str, str]) -> None:
    kinds = []
    for document in rendered(**knobs):
        kubernetes_validate.validate(document, version, strict=True)
        kinds.append(document["kind"])
    assert kinds == ["ConfigMap", "Service", "Job"]


def test_a_planted_fault_is_caught_by_the_schemas() -> None:
    job = job_of()
    job["spec"]["completionmode"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_a_jobset_fits_its_published_model_and_its_job_the_kubernetes_schemas() -> None:
    model = importlib.import_module("kubeflow_trainer_api.models.jobset_v1alpha2_job_set")
    jobset = next(one for one in rendered(**FULL, K8S_KIND="JobSet") if one["kind"] == "JobSet")
    known = model.JobsetV1alpha2JobSet.from_dict(jobset).to_dict()
    assert known == jobset, "the model drops what it does not know"
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", **replicated["template"]}
    job["metadata"]["name"] = "a-name"
    kubernetes_validate.validate(job, "1.31", strict=True)


def test_a_jobset_makes_its_own_service_and_starts_all_pods_again_together() -> None:
    documents = rendered(**LEAST, K8S_KIND="JobSet")
    assert [one["kind"] for one in documents] == ["ConfigMap", "JobSet"]
    spec = documents[1]["spec"]
    assert spec["network"]["enableDNSHostnames"] is True
    assert spec["failurePolicy"]["maxRestarts"] == 10
    assert spec["replicatedJobs"][0]["template"]["spec"]["backoffLimit"] == 0


def without_record(text: str) -> str:
    """The run's record is frozen elsewhere; here it only must be there."""
    short, count = re.subn(r"(?m)^( *run(?:\.json)?): '\{.*\}'$", r"\1: RECORD", text)
    assert count == 1
    return short


def test_manifest_is_the_golden_one() -> None:
    text = without_record(LAUNCHER.render(make_run(**FULL)).script)
    assert text == (GOLDEN / "kubernetes.yaml").read_text()


def test_values_file_is_the_golden_one() -> None:
    plan = LAUNCHER.render(make_run(**FULL, K8S_TOOL="helm"))
    assert plan.filename == "values.yaml"
    assert without_record(plan.script) == (GOLDEN / "kubernetes_values.yaml").read_text()


def chart_sha256() -> str:
    digest = hashlib.sha256()
    for path in sorted(CHART.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(CHART).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("kind", ["Job", "JobSet"])
def test_helm_makes_of_the_chart_what_the_launcher_makes(kind: str) -> None:
    """tools/render_chart.py wrote the golden file with Helm's own engine, from this very chart."""
    golden = GOLDEN / f"kubernetes_helm_{kind.lower()}.yaml"
    first_line = golden.read_text().splitlines()[0]
    assert chart_sha256() in first_line, (
        f"the chart is not the one that {golden.name} was made from: run tools/render_chart.py"
    )
    by_helm = {one["kind"]: one for one in yaml.safe_load_all(golden.read_text()) if one}
    ours = {one["kind"]: one for one in manifests(helm_values(kind))}
    assert by_helm == ours


def helm_values(kind: str) -> dict[str, Any]:
    script = LAUNCHER.render(make_run(**FULL, K8S_KIND=kind, K8S_TOOL="helm")).script
    values: dict[str, Any] = yaml.safe_load(without_record(script))
    return values


def test_one_pod_a_node_meets_at_the_first_pods_name() -> None:
    _, service, job = rendered(**LEAST)
    name = service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    pod = job["spec"]["template"]["spec"]
    assert f"--master-addr={name}-0.{name}" in pod["containers"][0]["args"]
    assert pod["subdomain"] == name
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()


def test_secrets_come_from_the_secret_alone() -> None:
    text = LAUNCHER.render(make_run(**FULL)).script
    job = next(one for one in yaml.safe_load_all(text) if one["kind"] == "Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    by_name = {variable["name"]: variable for variable in container["env"]}
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        assert by_name[name]["valueFrom"]["secretKeyRef"]["name"] == "wandb"
        assert "value" not in by_name[name]


@pytest.mark.parametrize(
    ("layer", "secret", "mode"),
    [
        ("common", "wandb", "online"),
        ("common", "", "disabled"),
        ("environment", "wandb", "disabled"),
    ],
)
def test_wandb_is_on_where_the_key_comes_from_a_secret(layer: str, secret: str, mode: str) -> None:
    disabled = Setting(value="disabled", origin=Origin(layer=layer, place="there"))
    run = dataclasses.replace(make_run(**LEAST, K8S_SECRET=secret), env={"WANDB_MODE": disabled})
    documents = yaml.safe_load_all(LAUNCHER.render(run).script)
    job = next(one for one in documents if one["kind"] == "Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert {"name": "WANDB_MODE", "value": mode} in container["env"]


def test_a_pod_of_a_cpu_run_asks_for_cores() -> None:
    args = FLAGS | {"--distributed-backend": "gloo"}
    documents = yaml.safe_load_all(LAUNCHER.render(make_run(args=args, **LEAST)).script)
    job = next(one for one in documents if one["kind"] == "Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"cpu": 4}


def test_a_capability_is_asked_for_only_where_rdma_needs_it() -> None:
    def asked(**knobs: str) -> bool:
        [container] = job_of(**knobs)["spec"]["template"]["spec"]["containers"]
        return "securityContext" in container

    assert asked(K8S_RESOURCES="rdma/hca=8")
    assert asked(K8S_HOST_NETWORK="1")
    assert not asked(K8S_RESOURCES="memory=900Gi")


@pytest.mark.parametrize("kind", ["Job", "JobSet"])
def test_a_job_without_a_time_limit_has_no_deadline(kind: str) -> None:
    script = LAUNCHER.render(make_run(**LEAST, RUN_TIME="UNLIMITED", K8S_KIND=kind)).script
    assert "completionMode: Indexed" in script
    assert "activeDeadlineSeconds" not in script


def test_time_limit_grace_and_retries_are_the_knobs() -> None:
    spec = job_of(RUN_TIME="90", SIGNAL_BEFORE_S="300", MAX_REQUEUES="3")["spec"]
    assert spec["activeDeadlineSeconds"] == 90 * 60
    assert spec["backoffLimit"] == 3 * 2
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 300


def test_paths_become_those_of_the_pods() -> None:
    args = FLAGS | {
        "--save": "/runs/20261121-120000-Tiny-Qwen3-0a1b/checkpoints",
        "--data-cache-path": str(PROJECT / "data_cache"),
        "--tokenizer-model": str(PROJECT / "tokenizers/x"),
    }
    plan = LAUNCHER.render(make_run(args=args, K8S_OUTPUT_PATH="/data/out", **LEAST))
    run_dir = "/data/out/20261121-120000-Tiny-Qwen3-0a1b"
    text = plan.script
    for path in (
        f"{run_dir}/checkpoints",
        "/data/out/data_cache",
        "/opt/moe_bench/tokenizers/x",
    ):
        assert f"- {path}\n" in text
    record = next(one for one in yaml.safe_load_all(text) if one["kind"] == "ConfigMap")
    inside = ResolvedRun.from_json(record["data"]["run.json"].encode())
    assert str(inside.run_dir) == run_dir
    assert inside.args["--save"].value == f"{run_dir}/checkpoints"


def test_the_confs_python_path_follows_the_projects_folder_in_the_image() -> None:
    run = make_run(**LEAST)
    said = Setting(
        value=f"/data/mypkg:{PROJECT}:{PROJECT}/.deps:{PROJECT}/more:",
        origin=Origin(layer="cluster", place="ours.conf:1"),
    )
    run = dataclasses.replace(run, env=run.env | {"PYTHONPATH": said})
    documents = yaml.safe_load_all(LAUNCHER.render(run).script)
    job = next(one for one in documents if one["kind"] == "Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    [found] = [one["value"] for one in container["env"] if one["name"] == "PYTHONPATH"]
    assert found == "/opt/moe_bench:/data/mypkg:/opt/moe_bench/more"


def test_long_names_stay_short_and_distinct() -> None:
    names = set()
    for tail in ("0a1b", "0a1c"):
        run_dir = Path(f"/runs/{'A-very-long-model-name-' * 3}{tail}")
        documents = yaml.safe_load_all(LAUNCHER.render(make_run(run_dir, **LEAST)).script)
        names |= {one["metadata"]["name"] for one in documents}
    assert len(names) == 2
    assert max(map(len, names)) <= 48


def test_a_value_that_looks_like_an_expansion_stays_as_written() -> None:
    written = "$(HOSTNAME) $$ $HOME"
    run = make_run(args=FLAGS | {"--wandb-exp-name": written}, **LEAST)
    documents = yaml.safe_load_all(LAUNCHER.render(run).script)
    job = next(one for one in documents if one["kind"] == "Job")
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert written.replace("$", "$$") in container["args"]


def test_the_pods_scripts_hold_nothing_that_kubernetes_would_expand() -> None:
    for path in (CHART / "files").iterdir():
        assert not {"$(", "$$"} & set(map("".join, itertools.pairwise(path.read_text()))), path


@pytest.mark.parametrize("path", sorted((CHART / "files").iterdir()), ids=lambda path: path.name)
def test_the_pods_scripts_pass_shellcheck(path: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "--shell=bash", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"CONTAINER_IMAGE": ""}, "CONTAINER_IMAGE"),
        ({"CONTAINER_IMAGE": "/images/x.sqsh"}, "REGISTRY/IMAGE:TAG"),
        ({"K8S_NAMESPACE": "Not_A_Label"}, "K8S_NAMESPACE"),
        ({"K8S_VOLUMES": "datasets:/data"}, "pvc:CLAIM:/mount"),
        ({"K8S_VOLUMES": "pvc:datasets:/data"}, "is on no volume of the pods"),
        ({"K8S_OUTPUT_PATH": "out"}, "not absolute"),
        ({"K8S_TOLERATIONS": "a b"}, "K8S_TOLERATIONS"),
        ({"K8S_RESOURCES": "memory=lots"}, "900Gi"),
        ({"K8S_NODE_SELECTOR": "h100"}, "KEY=VALUE"),
        ({"CONTAINER_RUNTIME": "none"}, "pods always have one"),
        ({"CONTAINER_MOUNTS": "/a:/b"}, "K8S_VOLUMES=pvc"),
        ({"NODELIST": "n1"}, "kubernetes.io/hostname"),
        ({"DEPENDENCY": "singleton"}, "DEPENDENCY=singleton .environment. is Slurm's"),
    ],
)
def test_what_kubernetes_could_not_take_is_refused(knobs: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        LAUNCHER.render(make_run(**(LEAST | knobs)))


def test_knobs_without_meaning_and_data_off_the_volumes_are_named() -> None:
    args = FLAGS | {"--data-path": "/elsewhere/corpus"}
    notes = LAUNCHER.render(make_run(args=args, PARTITION="gpu", **LEAST)).notes
    assert any("PARTITION=gpu (environment) is Slurm's" in note for note in notes)
    assert any("--data-path /elsewhere/corpus is on no volume" in note for note in notes)


# kubectl


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    store = tmp_path / "cluster"
    monkeypatch.setenv("PATH", f"{kubectl_on_path(tmp_path / 'bin')}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_CLUSTER", str(store))
    return store


def submitted(tmp_path: Path, **knobs: str) -> tuple[LaunchPlan, ResolvedRun]:
    run = make_run(tmp_path / "runs" / "one", **(LEAST | {"K8S_OUTPUT_PATH": "/data"} | knobs))
    plan = LAUNCHER.render(run)
    run.run_dir.mkdir(parents=True)
    (run.run_dir / plan.filename).write_text(plan.script)
    return plan, run


def calls(store: Path) -> list[list[str]]:
    return [json.loads(line) for line in (store / "calls").read_text().splitlines()]


def test_a_job_is_created_seen_and_deleted(tmp_path: Path, cluster: Path) -> None:
    plan, run = submitted(tmp_path, K8S_NAMESPACE="train")
    handle = LAUNCHER.submit(plan, run)
    assert handle.job_id == "train/job/moe-one"
    assert calls(cluster) == [["create", "--filename", str(run.run_dir / "launch.yaml")]]
    assert LAUNCHER.query([handle.job_id])[handle.job_id].state == "PENDING"
    with pytest.raises(LaunchError, match="already exists; choose another RUN_ID"):
        LAUNCHER.submit(plan, run)
    LAUNCHER.cancel(handle.job_id)
    assert list(cluster.glob("*.json")) == []
    assert LAUNCHER.query([handle.job_id]) == {}


def test_status_logs_and_cancel_work_where_the_volume_is_not_seen(
    tmp_path: Path, cluster: Path
) -> None:
    plan, run = submitted(tmp_path)
    (run.run_dir / "run.json").write_bytes(run.to_json())
    record_submission(run.run_dir, plan, LAUNCHER.submit(plan, run))
    labels = {"moe-bench/run": "moe-one"}
    metadata = {"name": "moe-one-0", "namespace": "default", "labels": labels}
    pod = {"kind": "Pod", "metadata": metadata, "spec": {"nodeName": "n7"}, "status": {}}
    (cluster / "Pod-default-moe-one-0.json").write_text(json.dumps(pod))
    (cluster / "moe-one-0.log").write_text("torch.OutOfMemoryError: CUDA out of memory.\n")

    def said(verb: click.Command) -> str:
        result = CliRunner().invoke(verb, [str(run.run_dir)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "starting  job default/job/moe-one" in said(status.command)
    assert "on n7" in said(status.command)
    assert "[pod/moe-one-0/ranks] torch.OutOfMemoryError" in said(logs.command)
    assert "out of GPU memory" in said(logs.command)
    assert "cancelled" in said(cancel.command)
    assert not list(cluster.glob("Job-*"))
    assert "one  cancelled" in said(status.command)


STATES = [
    ({"conditions": [{"type": "Complete", "status": "True"}]}, [], "COMPLETED", "None"),
    (
        {
            "conditions": [
                {
                    "type": "Failed",
                    "status": "True",
                    "reason": "DeadlineExceeded",
                    "message": "late",
                }
            ]
        },
        [],
        "TIMEOUT",
        "late",
    ),
    (
        {
            "conditions": [
                {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"},
            ]
        },
        [],
        "FAILED",
        "BackoffLimitExceeded",
    ),
    ({"conditions": [{"type": "Suspended", "status": "True"}]}, [], "PENDING", "suspended"),
    (
        {},
        [
            {
                "phase": "Pending",
                "conditions": [
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "message": "0/4 nodes are available: 4 Insufficient nvidia.com/gpu.",
                    }
                ],
            }
        ],
        "PENDING",
        "Insufficient nvidia.com/gpu",
    ),
    (
        {},
        [
            {
                "phase": "Pending",
                "containerStatuses": [
                    {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "not found"}}}
                ],
            }
        ],
        "PENDING",
        "ImagePullBackOff: not found",
    ),
    ({}, [{"phase": "Running"}, {"phase": "Running"}], "RUNNING", "None"),
]


@pytest.mark.parametrize(
    ("status", "pods", "state", "why"), STATES, ids=lambda value: str(value)[:20]
)
def test_the_state_is_told_from_the_job_and_its_pods(
    tmp_path: Path, cluster: Path, status: dict, pods: list[dict], state: str, why: str
) -> None:
    plan, run = submitted(tmp_path)
    job_id = LAUNCHER.submit(plan, run).job_id
    path = cluster / "Job-default-moe-one.json"
    job = json.loads(path.read_text()) | {"status": status}
    path.write_text(json.dumps(job))
    for index, pod in enumerate(pods):
        metadata = job["metadata"] | {"name": f"moe-one-{index}"}
        item = {
            "kind": "Pod",
            "metadata": metadata,
            "spec": {"nodeName": f"n{index}"},
            "status": pod,
        }
        (cluster / f"Pod-default-moe-one-{index}.json").write_text(json.dumps(item))
    found = LAUNCHER.query([job_id])[job_id]
    assert found.state == state
    assert why in found.explanation
    assert found.ended == (state not in ("PENDING", "RUNNING"))


@pytest.mark.usefixtures("cluster")
def test_a_cluster_that_does_not_answer_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run = submitted(tmp_path)
    monkeypatch.setenv("FAKE_CLUSTER_DOWN", "1")
    with pytest.raises(LaunchError, match="kubectl cluster-info"):
        LAUNCHER.submit(plan, run)
    with pytest.raises(LaunchError, match="kubectl cluster-info"):
        LAUNCHER.query(["default/job/moe-one"])


def test_without_kubectl_the_dry_run_is_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, run = submitted(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"kubectl is not on PATH.*DRY_RUN=1"):
        LAUNCHER.submit(plan, run)
    assert LAUNCHER.query(["default/job/moe-one"]) == {}


def test_helm_installs_and_uninstalls_the_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    helm = folder / "helm"
    helm.write_text(f'#!/bin/sh\nfor word; do echo "$word"; done >> {tmp_path}/said\n')
    helm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    plan, run = submitted(tmp_path, K8S_TOOL="helm", K8S_NAMESPACE="train")
    handle = LAUNCHER.submit(plan, run)
    assert handle.job_id == "train/helm/moe-one"
    LAUNCHER.cancel(handle.job_id)
    values = str(run.run_dir / "values.yaml")
    assert (tmp_path / "said").read_text().split() == [
        *("install", "moe-one", str(CHART), "--namespace", "train", "--values", values),
        *("uninstall", "moe-one", "--namespace", "train"),
    ]


def test_yaml_is_written_as_people_do() -> None:
    text = dump([{"script": "a\nb\n", "same": [{"x": "1"}]}])
    assert text == "script: |\n  a\n  b\nsame:\n- x: '1'\n"
