"""The guide's spelling: environment variables and one script for each family."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.checkpoint.torch_dist import open_torch_dist
from moe_bench.checkpoint.verifying import verify
from tests.support import hf_models

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "ckpt_convert_scripts").glob("*/*.sh"))


def run(script: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, "MOE_BENCH_PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.parent.name)
def test_every_script_defaults_to_a_preset_that_exists(script: Path) -> None:
    (model,) = re.findall(r"MODEL:-([^}]+)}", script.read_text())
    assert (ROOT / f"model_configs/benchmarking/{model}.yaml").is_file()


OF_SCRIPT = {
    "DeepSeek-V2": (hf_models.DEEPSEEK_V2, "per-layer"),
    "DeepSeek-V3": (hf_models.DEEPSEEK_V3, "per-layer"),
    "GLM-4.5": (hf_models.GLM, "per-layer"),
    "Kimi-K2": (hf_models.DEEPSEEK_V3, "per-layer"),
    "Mixtral": (hf_models.MIXTRAL, "stacked"),
    "Moonlight": (hf_models.MOONLIGHT, "per-layer"),
    "OLMoE": (hf_models.OLMOE, "stacked"),
    "Qwen2-MoE": (hf_models.QWEN2, "stacked"),
    "Qwen3-MoE": (hf_models.QWEN3, "stacked"),
    "Qwen3-Next": (hf_models.QWEN3_NEXT, "per-layer"),
    "gpt-oss": (hf_models.GPT_OSS, "stacked"),
}
"""Script -> a small model of its family, and the keys that its preset's training asks for."""


def test_every_family_has_its_script() -> None:
    assert {path.parent.name for path in SCRIPTS} == set(OF_SCRIPT)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.parent.name)
def test_every_script_plans_its_family_with_the_keys_that_its_preset_trains_with(
    script: Path, tmp_path: Path
) -> None:
    config, keys = OF_SCRIPT[script.parent.name]
    hf = hf_models.make_model(tmp_path / "hf", config)
    target = str(tmp_path / "out")
    done = run(script, "--dry-run", SOURCE_CKPT_PATH=str(hf), TARGET_CKPT_PATH=target)
    assert done.returncode == 0, done.stderr
    assert f"te keys, {keys};" in done.stdout


def test_the_guides_command_converts_deepseek_v3(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "a b" / "hf", hf_models.DEEPSEEK_V3)
    done = run(
        ROOT / "ckpt_convert_scripts/DeepSeek-V3/convert_deepseek_v3.sh",
        MODEL="DeepSeek-V3",
        MEGATRON_PATH="/nowhere",
        SOURCE_CKPT_PATH=str(hf),
        TARGET_CKPT_PATH=str(tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    assert "decoder.layers.0.input_layernorm.weight" in open_torch_dist(tmp_path / "out").tensors
    assert verify(hf, tmp_path / "out").differences == ()


def test_a_missing_path_is_said(tmp_path: Path) -> None:
    script = ROOT / "ckpt_convert_scripts/Mixtral/convert_mixtral.sh"
    done = run(script, SOURCE_CKPT_PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: TARGET_CKPT_PATH is not set: the folder to write")


def test_arguments_reach_the_converter_and_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.MIXTRAL)
    done = run(
        ROOT / "ckpt_convert_scripts/Mixtral/convert_mixtral.sh",
        "--dialect",
        "both",
        "--dry-run",
        SOURCE_CKPT_PATH=str(hf),
        TARGET_CKPT_PATH=str(tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    assert "both keys, stacked" in done.stdout
    assert "nothing was written" in done.stdout
    assert not (tmp_path / "out").exists()


def test_an_error_names_the_tensor_and_exits_2_without_a_traceback(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.MIXTRAL)
    (hf / "config.json").write_text(json.dumps({**hf_models.MIXTRAL, "vocab_size": 40}))
    command = [sys.executable, "-m", "moe_bench", "convert", "import", str(hf), str(tmp_path / "o")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "model.embed_tokens.weight" in done.stderr
    assert "Traceback" not in done.stderr
