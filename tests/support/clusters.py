"""A folder for PATH that holds the tests' own `kubectl`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

FAKE = Path(__file__).with_name("kubectl.py")


def kubectl_on_path(folder: Path) -> Path:
    """Makes the folder, with `kubectl` in it, and returns it."""
    folder.mkdir(parents=True)
    program = folder / "kubectl"
    words = shlex.join([sys.executable, str(FAKE)])
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    program.chmod(0o755)
    return folder
