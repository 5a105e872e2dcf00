"""Kubernetes manifests, checked against Kubernetes' own schemas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from moe_bench.errors import LaunchError
from moe_bench.launch.kubernetes import KubernetesLauncher, dump_values
from tests.support.runs import FLAGS, make_run

LAUNCHER = KubernetesLauncher(workspace=Path("/opt/moe_bench"))
GOLDEN = Path(__file__).parents[2] / "golden"
IMAGE = "registry.example/moe:1"
FULL = {
    "CONTAINER_IMAGE": IMAGE,
    "K8S_NAMESPACE": "train",
    "K8S_VOLUMES": "pvc:datasets:/data,host:/raid:/scratch",
    "K8S_NODE_SELECTOR": "gpu=h100",
    "K8S_SECRET": "wandb",
    "K8S_QUEUE": "research",
}


def rendered(**knobs: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(LAUNCHER.render(make_run(**knobs)).script))


@pytest.mark.parametrize("version", ["1.29", "1.31"])
def test_manifests_fit_the_kubernetes_schemas(version: str) -> None:
    for document in rendered(**FULL):
        kubernetes_validate.validate(document, version, strict=True)


def test_a_planted_fault_is_caught_by_the_schemas() -> None:
    job = rendered(**FULL)[1]
    job["spec"]["completionmode"] = "Indexed"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_manifest_is_the_golden_one() -> None:
    text = LAUNCHER.render(make_run(**FULL)).script
    assert text == (GOLDEN / "kubernetes.yaml").read_text()


def test_values_file_is_the_golden_one() -> None:
    assert dump_values(make_run(**FULL)) == (GOLDEN / "kubernetes_values.yaml").read_text()


def test_one_pod_a_node_meets_at_the_first_pods_name() -> None:
    service, job = rendered(CONTAINER_IMAGE=IMAGE)
    name = service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    command = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert f"--master-addr={name}-0.{name}" in command
    assert (
        job["spec"]["template"]["metadata"]["labels"]["moe-bench/run"]
        == service["spec"]["selector"]["moe-bench/run"]
    )


def test_jobset_makes_its_own_service() -> None:
    (jobset,) = rendered(CONTAINER_IMAGE=IMAGE, K8S_KIND="JobSet")
    assert jobset["kind"] == "JobSet"
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True


def test_a_value_that_looks_like_an_expansion_stays_as_written() -> None:
    run = make_run(args={**FLAGS, "--wandb-exp-name": "$(HOSTNAME)"}, CONTAINER_IMAGE=IMAGE)
    assert "$$(HOSTNAME)" in LAUNCHER.render(run).script


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({}, "CONTAINER_IMAGE"),
        ({"CONTAINER_IMAGE": "/images/x.sqsh"}, "REGISTRY/IMAGE:TAG"),
        ({"CONTAINER_IMAGE": IMAGE, "K8S_NAMESPACE": "Not_A_Label"}, "K8S_NAMESPACE"),
        ({"CONTAINER_IMAGE": IMAGE, "K8S_VOLUMES": "datasets:/data"}, "pvc:CLAIM:/mount"),
        ({"CONTAINER_IMAGE": IMAGE, "K8S_KIND": "Deployment"}, "Job, JobSet"),
    ],
)
def test_what_kubernetes_could_not_take_is_refused(knobs: dict[str, str], said: str) -> None:
    with pytest.raises(LaunchError, match=said):
        LAUNCHER.render(make_run(**knobs))
