"""A submission full of values that a shell would act on: each arrives as it was written, and nothing of it is run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.projects import REPOSITORY

HOSTILE = "a|b $HOME $(touch pwned) `touch pwned` 'x' \"y\" ; touch pwned & # *\nline two"


def launch(tmp_path: Path, *flags: str, **knobs: str) -> subprocess.CompletedProcess[str]:
    """A dry run of a submission in an otherwise plain environment."""
    given = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(REPOSITORY),
        "MODEL": "Tiny-Qwen3",
        "CLUSTER": "local",
        "MOE_BENCH_DEVICE": "cpu",
        "DRY_RUN": "1",
        "OUTPUT_PATH": str(tmp_path / "runs"),
    }
    return subprocess.run(
        [sys.executable, "-m", "moe_bench", "launch", "slurm", *flags],
        env=given | knobs,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )


def run_script(script: str, tmp_path: Path) -> list[str]:
    """The words that srun gets, when the script runs with every tool of Slurm replaced."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("srun", "scontrol", "squeue", "scancel"):
        body = f'printf "%s\\0" "$@" > {tmp_path}/words' if name == "srun" else "echo n1"
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1"}
    subprocess.run(
        ["bash", "-c", script],
        env={"PATH": f"{tools}:/usr/bin:/bin"} | slurm,
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    return (tmp_path / "words").read_text().split("\0")[:-1]


def test_every_value_arrives_as_written(tmp_path: Path) -> None:
    data = "/data sets/50% of $it|all"
    done = launch(
        tmp_path,
        *("--wandb-exp-name", HOSTILE),
        DATA_PATH=f"'{data}'",  # the quotes hold it together in a flag that takes several
        COMMENT=HOSTILE,
        RUN_NAME=HOSTILE,
        WANDB_PROJECT=HOSTILE,
    )
    assert done.returncode == 0, done.stderr
    job_name = re.search(r"^#SBATCH --job-name=(.*)$", done.stdout, re.MULTILINE)
    assert job_name
    assert re.fullmatch(r"[A-Za-z0-9._+-]+", job_name[1])
    words = run_script(done.stdout, tmp_path)
    assert words[words.index("--data-path") + 1] == data
    assert words[words.index("--wandb-exp-name") + 1] == HOSTILE
    assert not list(tmp_path.rglob("pwned"))


def test_a_newline_in_the_comment_stays_within_the_experiments_name(tmp_path: Path) -> None:
    done = launch(
        tmp_path,
        MODEL="Mixtral-8x2B",
        TOKENIZER_MODEL="/t",
        DATA_PATH="/d",
        COMMENT="one\n#SBATCH --uid=0\ntouch pwned",
    )
    assert done.returncode == 0, done.stderr
    directives = done.stdout.partition("\n\n")[0]
    assert "uid" not in directives
    words = run_script(done.stdout, tmp_path)
    assert words[words.index("--wandb-exp-name") + 1].endswith("one\n#SBATCH --uid=0\ntouch pwned")
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCOUNT", "a\n#SBATCH --uid=0"),
        ("PARTITION", "a' --uid=0"),
        ("QOS", 'a" --uid=0'),
        ("NODELIST", "a#b"),
        ("DEPENDENCY", "-x\\"),
    ],
)
def test_a_value_that_an_sbatch_line_cannot_carry_is_refused(
    name: str, value: str, tmp_path: Path
) -> None:
    done = launch(tmp_path, "--mock-data", **{name: value})
    assert done.returncode == 2
    assert f"{name}=" in done.stderr
    assert "cannot stand in an #SBATCH line" in done.stderr
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("value", ["$(touch pwned)", "`touch pwned`", "a;touch pwned", "a & b"])
def test_a_directive_is_no_shells_and_acts_on_nothing(value: str, tmp_path: Path) -> None:
    done = launch(tmp_path, "--mock-data", CONSTRAINT=value)
    assert done.returncode == 0, done.stderr
    [line] = re.findall(r"^#SBATCH --constraint=.*$", done.stdout, re.MULTILINE)
    assert line.removeprefix("#SBATCH --constraint=").strip('"') == value
    run_script(done.stdout, tmp_path)
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("folder", "accepted"),
    [("plain", True), ("50%j", True), ("a$(id)`id`", True), ("a b", False), ("a#b", False), ('a"b', False)],
)  # fmt: skip
def test_a_folder_of_runs_is_carried_as_it_is_or_refused(
    folder: str, accepted: bool, tmp_path: Path
) -> None:
    done = launch(tmp_path, "--mock-data", OUTPUT_PATH=f"{tmp_path}/{folder}", RUN_ID="r")
    if not accepted:
        assert done.returncode == 2
        assert "set OUTPUT_PATH to a plain path" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    escaped = folder.replace("%", "%%")
    assert f"#SBATCH --output={tmp_path}/{escaped}/r/logs/slurm-%j.log\n" in done.stdout
    words = run_script(done.stdout, tmp_path)
    assert f"--output={tmp_path}/{escaped}/r/logs/rank-%t.log" in words
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('export ACCOUNT="team\n', "unexpected EOF"),
        ("export ACCOUNT='team\n", "unexpected EOF"),
        ("export ACCOUNT=$(\n", "unexpected EOF"),
    ],
)
def test_a_cluster_file_with_unbalanced_quotes_is_refused_in_bashs_words(
    text: str, said: str, tmp_path: Path
) -> None:
    for name in ("model_configs", "runtime_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    clusters = tmp_path / "cluster_configs" / "benchmarking"
    clusters.mkdir(parents=True)
    (clusters / "ours.conf").write_text(text)
    done = launch(tmp_path, "--mock-data", WORKSPACE=str(tmp_path), CLUSTER="ours")
    assert done.returncode == 2
    assert "ours.conf failed" in done.stderr
    assert re.search(said, done.stderr)
    assert "Traceback" not in done.stderr
