"""`explain` and the dry run as commands: what they print, that they write nothing, and what they never import."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.projects import REPOSITORY


def run(tmp_path: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(REPOSITORY),
        "OUTPUT_PATH": str(tmp_path / "runs"),
    }
    return subprocess.run(
        [sys.executable, "-m", "moe_bench", *words],
        env=given | {"RUN_ID": "r", "MOE_BENCH_DEVICE": "cpu"} | environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )


def test_a_key_is_shown_with_its_origin_and_what_it_overrode(tmp_path: Path) -> None:
    done = run(tmp_path, "explain", "EP", MODEL="Tiny-Qwen3", EP="1")
    assert "EP = 1" in done.stdout
    assert "environment  [environment]" in done.stdout
    assert "overrode  2  runtime_configs/benchmarking/runtime.conf:" in done.stdout


def test_the_whole_run_as_json(tmp_path: Path) -> None:
    done = run(tmp_path, "explain", "--json", MODEL="Tiny-Qwen3")
    found = json.loads(done.stdout)
    assert found["precedence"][0] == "flag"
    assert found["args"]["--num-layers"]["origin"]["layer"] == "runtime"


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_an_unknown_key_is_an_error_with_the_nearest(tmp_path: Path, form: tuple[str, ...]) -> None:
    done = run(tmp_path, "explain", *form, "SEQLEN", MODEL="Tiny-Qwen3")
    assert done.returncode == 2
    assert "SEQ_LEN" in done.stderr


def test_what_follows_two_hyphens_is_the_runs_own(tmp_path: Path) -> None:
    done = run(tmp_path, "explain", "--lr", "--", "--lr", "5e-4", MODEL="Tiny-Qwen3")
    assert done.stdout.startswith("--lr = 5e-4")


def test_help_after_a_script_says_where_knobs_and_flags_go(tmp_path: Path) -> None:
    done = run(tmp_path, "launch", "local", "--help")
    assert done.returncode == 0
    assert "said by variables before the command" in " ".join(done.stdout.split())


def test_a_dry_run_prints_the_scripts_bytes_and_hash_and_writes_nothing(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "launch",
        "local",
        "--mock-data",
        DRY_RUN="1",
        WANDB_API_KEY="hunter",
        HF_TOKEN="hunter",
    )
    assert done.returncode == 0
    assert done.stdout.startswith("#!/usr/bin/env bash")
    assert hashlib.sha256(done.stdout.encode()).hexdigest() in done.stderr
    assert "hunter" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_user_exit_with_2_and_no_traceback(tmp_path: Path) -> None:
    done = run(tmp_path, "launch", "local", MODEL="Tiny-Quen3")
    assert done.returncode == 2
    assert done.stderr.startswith("error: MODEL=Tiny-Quen3 (environment)")
    assert "Tiny-Qwen3" in done.stderr
    assert "Traceback" not in done.stderr


def test_deciding_imports_neither_torch_nor_megatron_nor_numpy(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom moe_bench.cli.main import main\nsys.argv = ['moe_bench', 'launch', 'local', '--mock-data']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'megatron', 'numpy', 'jinja2', 'rich'} & sys.modules.keys()), file=sys.stderr)\n"
    )
    given = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(REPOSITORY),
        "DRY_RUN": "1",
        "MOE_BENCH_DEVICE": "cpu",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=given,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stderr.splitlines()[-1] == "[]"
