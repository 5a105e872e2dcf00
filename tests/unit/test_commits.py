"""A run's record names the code that ran, where git knows it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from moe_bench import commits as module
from moe_bench.commits import commits

_WHO = ("-c", "user.name=a", "-c", "user.email=a@b")


def git(folder: Path, *words: str) -> str:
    command = ["git", *_WHO, "-C", str(folder), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_a_commit_and_changes_to_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is no commit")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert commits(str(tmp_path))["MEGATRON_PATH"] == commit
    (tmp_path / "file").write_text("2")
    assert commits(str(tmp_path))["MEGATRON_PATH"] == f"{commit}-dirty"


def test_a_folder_within_anothers_repository_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(module, "PROJECT", tmp_path / "inside")
    assert commits(str(tmp_path / "inside")) == {}
