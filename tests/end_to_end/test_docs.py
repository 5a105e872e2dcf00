"""Commands shown in the README and docs do what the pages say."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
RUNNABLE = re.compile(r"<!-- run -->\n+```console\n(?P<body>.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#|mailto:)(?P<target>[^)#\s]+)")


def runnable_commands() -> list[tuple[str, str]]:
    """(page, command) for each `$ ` line of a console block marked `<!-- run -->`."""
    found = []
    for page in PAGES:
        for block in RUNNABLE.finditer(page.read_text()):
            lines = block["body"].replace("\\\n", " ").splitlines()
            found += [(str(page.relative_to(ROOT)), line[2:]) for line in lines if line[:2] == "$ "]
    return found


@pytest.mark.parametrize(("page", "command"), runnable_commands())
def test_command_shown_in_a_page_succeeds(page: str, command: str, tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": _path_with_venv()}
    done = subprocess.run(
        ["bash", "-c", command],
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{page}: {command}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    dead = [
        m["target"]
        for m in LINK.finditer(page.read_text())
        if not (page.parent / m["target"]).exists()
    ]
    assert not dead


def _path_with_venv() -> str:
    return f"{ROOT / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
