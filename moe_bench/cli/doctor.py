"""`python -m moe_bench doctor`: what this machine, container or allocation has, and what to mend."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import click

from moe_bench.cli._launching import request_of
from moe_bench.config.gather import gather
from moe_bench.config.run import Origin, Setting
from moe_bench.config.sources import process_environment
from moe_bench.errors import ConfigError
from moe_bench.launch.doctor import Finding, Place, examine

MARKS = {"ok": "ok     ", "note": "note   ", "problem": "PROBLEM"}
PATH_KNOBS = ("DATA_PATH", "TOKENIZER_MODEL", "LOAD_PATH", "MEGATRON_PATH")


@click.command(short_help="Say what this machine has, and what to mend.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Where runs will go; default: OUTPUT_PATH of the cluster file, else runs.",
)
def command(output: Path | None) -> None:
    """Look at versions, GPUs, Slurm, containers, paths and space. Exits with 1 when there is a problem.

    With CLUSTER (and MODEL) set, the paths and mounts of that cluster file are looked at; within an allocation, on each
    of its nodes.
    """
    knobs, troubles = _knobs()
    runs = output or Path(knobs["OUTPUT_PATH"].value if "OUTPUT_PATH" in knobs else "runs")
    places = list(_places(knobs))
    problems = 0
    for finding in (
        *troubles,
        *examine(process_environment(), places=places, output=runs.absolute()),
    ):
        click.echo(f"{MARKS[finding.level]} {finding.subject}: {finding.found}")
        if finding.fix:
            click.echo(f"        -> {finding.fix}")
        problems += finding.level == "problem"
    click.echo(f"{problems} problem{'' if problems == 1 else 's'} found")
    sys.exit(1 if problems else 0)


def _knobs() -> tuple[Mapping[str, Setting], list[Finding]]:
    """What the cluster file and the environment say; the environment alone where no CLUSTER is named."""
    environment = process_environment()
    if environment.get("CLUSTER"):
        try:
            return gather(request_of((), local=False)).knobs, []
        except ConfigError as error:
            subject = f"CLUSTER={environment['CLUSTER']}"
            return {}, [Finding(level="problem", subject=subject, found=str(error))]
    origin = Origin(layer="environment", place="environment")
    return {name: Setting(value=value, origin=origin) for name, value in environment.items()}, []


def _places(knobs: Mapping[str, Setting]) -> Iterator[Place]:
    mounts = [mount for mount in _value(knobs, "CONTAINER_MOUNTS").split(",") if mount]
    image = _value(knobs, "CONTAINER_IMAGE")
    targets = [(mount.split(":") * 2)[1] for mount in mounts] if image else []
    for name in PATH_KNOBS:
        for path in _paths(_value(knobs, name)):
            yield Place(
                subject=name,
                path=path,
                origin=knobs[name].origin.place,
                may_be_a_name=name == "TOKENIZER_MODEL" and not path.startswith(("/", ".")),
                unseen_inside=bool(targets)
                and path.startswith("/")
                and not any(Path(path).is_relative_to(target) for target in targets),
            )
    for mount in mounts:
        origin = knobs["CONTAINER_MOUNTS"].origin.place
        yield Place(subject="CONTAINER_MOUNTS", path=mount.split(":")[0], origin=origin)
    if image.startswith(("/", "./")):
        origin = knobs["CONTAINER_IMAGE"].origin.place
        yield Place(subject="CONTAINER_IMAGE", path=image, origin=origin)


def _value(knobs: Mapping[str, Setting], name: str) -> str:
    return knobs[name].value if name in knobs else ""


def _paths(value: str) -> list[str]:
    """A blend is "weight prefix weight prefix": its prefixes; otherwise the value itself."""
    words = value.split()
    if len(words) > 1 and len(words) % 2 == 0 and all(_is_number(word) for word in words[::2]):
        return words[1::2]
    return [value] if value else []


def _is_number(word: str) -> bool:
    return word.replace(".", "", 1).isdigit()
