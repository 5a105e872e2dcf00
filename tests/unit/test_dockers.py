"""The Dockerfiles pass a linter, pin what they fetch, keep the base's torch, and carry no secret."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "dockers").glob("*.Dockerfile"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_there_is_one_for_each_gpu() -> None:
    assert [path.stem for path in FILES] == ["B200", "GB200", "H100"]


@each_file
def test_dockerfile_passes_hadolint(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@each_file
def test_whatever_is_fetched_is_pinned(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^ARG BASE=\S+:\d[\w.-]+$", text, re.MULTILINE)
    commits = re.findall(r"^ARG (\w+)_COMMIT=(\S+)$", text, re.MULTILINE)
    assert {name for name, _ in commits} == {"TRANSFORMER_ENGINE", "DEEPEP"}
    for name, commit in commits:
        assert re.fullmatch(r"[0-9a-f]{40}", commit)
        assert f"${name}_COMMIT" in text
    for command in re.findall(r"pip install(?:[^&;]|\\\n)*", text):
        assert "--no-deps" in command, command
        assert "--require-hashes" in command or "_COMMIT" in command or "/opt/DeepEP" in command


@each_file
def test_what_the_base_brings_is_not_installed_over(path: Path) -> None:
    brought = re.compile(
        r"^(torch|triton|numpy|apex|transformer-engine|nvidia-c\w+)==", re.MULTILINE
    )
    installed = re.findall(r"--requirement /opt/(?:moe_bench/locks/)?(\w+\.txt)", path.read_text())
    assert sorted(installed) == ["container.txt", "nvshmem.txt"]
    for name in installed:
        assert not brought.search((ROOT / "locks" / name).read_text()), name


def test_deepep_is_built_against_the_nvshmem_that_torch_is_locked_with() -> None:
    pinned = re.compile(r"^nvidia-nvshmem-cu13==\S+", re.MULTILINE)
    [of_images] = pinned.findall((ROOT / "locks/nvshmem.txt").read_text())
    assert pinned.findall((ROOT / "locks/train.txt").read_text()) == [of_images]


@each_file
def test_no_layer_holds_a_secret(path: Path) -> None:
    assert not re.search(r"API_KEY|TOKEN|PASSWORD|SECRET", path.read_text())


def test_the_context_is_a_list_of_what_belongs_in_it() -> None:
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "*"
    for line in lines:
        if line.startswith("!") and "*" not in line:
            assert (ROOT / line[1:]).exists(), line
    assert "cluster_configs/benchmarking/*" in lines
