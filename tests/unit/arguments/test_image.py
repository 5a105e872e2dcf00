"""Whether the ranks are in an image: one answer for the resolver, lint and the launchers."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from moe_bench.arguments.image import in_image
from moe_bench.arguments.lint import versions_here
from moe_bench.config.machine import Machine
from tests.support.projects import Project
from tests.support.runs import make_run

IMAGE = {"CONTAINER_IMAGE": "/images/pytorch.sqsh"}


@pytest.mark.parametrize(
    ("knobs", "answer"),
    [
        ({}, False),
        (IMAGE, True),
        (IMAGE | {"CONTAINER_RUNTIME": "apptainer"}, True),
        (IMAGE | {"CONTAINER_RUNTIME": "none"}, False),
    ],
)
def test_the_runtime_none_leaves_the_image_out(knobs: dict[str, str], answer: bool) -> None:
    assert in_image(make_run(**knobs)) is answer


def test_with_the_runtime_none_the_versions_are_those_of_this_interpreter() -> None:
    run = make_run(**IMAGE, CONTAINER_RUNTIME="none")
    assert versions_here(run, {}, local=True)["torch"] == metadata.version("torch")


def test_with_the_runtime_none_a_job_has_the_layers_of_this_interpreter(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.add_flags("--transformer-impl: transformer_engine")
    login = Machine(device="cpu", gpus=0, cores=4, transformer_engine=False)
    given = {"CLUSTER": "local", "CONTAINER_RUNTIME": "none"} | IMAGE
    run = project.resolve(given, machine=login, must_name=True, device="cuda")
    assert run.args["--transformer-impl"].value == "local"
