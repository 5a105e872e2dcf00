"""Which code runs: the commit of this project and of a Megatron-LM checkout, where they are git's."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

PROJECT = Path(__file__).parents[1]
_PATIENCE_S = 10.0


def commits(megatron_path: str = "") -> dict[str, str]:
    """{"moe_bench": commit, "MEGATRON_PATH": commit}, with "-dirty" where tracked files differ from it; without what git cannot tell."""
    folders = {"moe_bench": PROJECT}
    if megatron_path:
        folders["MEGATRON_PATH"] = Path(megatron_path)
    found = {name: _commit(folder) for name, folder in folders.items()}
    return {name: commit for name, commit in found.items() if commit}


def _commit(folder: Path) -> str:
    git = shutil.which("git")
    if git is None or not (folder / ".git").exists():  # an installed package may lie in another's
        return ""
    words = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = [git, "--no-optional-locks", "-C", str(folder), *words]
    try:
        said = subprocess.run(  # noqa: TID251 - launchers and ranks ask alike
            command, check=False, capture_output=True, text=True, timeout=_PATIENCE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip() if said.returncode == 0 else ""
