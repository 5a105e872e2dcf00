"""What this project brings to a GPU (layers, counts, an optimizer) makes every tensor on that GPU. Needs none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_tensor_is_made_on_the_device_of_the_input() -> None:
    command = [sys.executable, "-m", "tests.ranks.cuda_devices"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-1] == "optimizer", ended.stdout
