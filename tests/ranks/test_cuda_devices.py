"""The layers that a GPU without Transformer Engine gets make every tensor on the GPU. Needs none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_reference_layers_keep_to_the_device_of_their_input() -> None:
    command = [sys.executable, "-m", "tests.ranks.cuda_devices"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "rotation", ended.stdout
