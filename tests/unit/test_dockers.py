"""The Dockerfiles pass a linter, pin what they fetch and carry no secret."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "dockers").glob("*.Dockerfile"))


def test_there_is_one_for_each_gpu() -> None:
    assert [path.stem for path in FILES] == ["B200", "GB200", "H100"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_dockerfile_passes_hadolint(path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_whatever_is_fetched_is_pinned(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^FROM \S+:\d[\w.-]+$", text, re.MULTILINE)
    for commit in re.findall(r"^ARG \w+_COMMIT=(\S+)$", text, re.MULTILINE):
        assert re.fullmatch(r"[0-9a-f]{40}", commit)
    assert "--require-hashes" in text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_layer_holds_a_secret(path: Path) -> None:
    assert not re.search(r"API_KEY|TOKEN|PASSWORD|SECRET", path.read_text())
