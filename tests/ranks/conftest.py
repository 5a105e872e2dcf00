"""What several files of rank tests stand on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import hf_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and logits, made by transformers."""
    out = tmp_path_factory.mktemp("models")
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(Path(__file__).with_name("make_hf_models.py")),
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    # transformers leaves multi-token prediction out: these are written by hand
    hf_models.make_model(out / "dsv3_mtp", hf_models.DEEPSEEK_V3)
    hf_models.make_model(out / "glm_mtp", hf_models.GLM)
    return out
