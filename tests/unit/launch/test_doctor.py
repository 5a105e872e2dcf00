"""What `doctor` finds, from what is installed and from what nodes say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.launch import nodes
from tests.support.nvml import HEALTHY, NvmlStub
from tests.support.projects import REPOSITORY


def doctor(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, where no Slurm and no container runtime is on PATH."""
    bash = tmp_path / "bin"
    bash.mkdir(exist_ok=True)
    (bash / "bash").unlink(missing_ok=True)
    (bash / "bash").symlink_to("/bin/bash")
    given = {"PATH": str(bash), "HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-m", "moe_bench", "doctor", "--output", str(tmp_path)],
        env=given | environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )


def pretend_installed(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_a_healthy_machine_has_no_problem_and_exit_code_0(tmp_path: Path) -> None:
    done = doctor(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("0 problems found\n")
    assert "note    Slurm: no sbatch on PATH; only local runs" in done.stdout


@pytest.mark.parametrize(
    ("package", "version", "fix"),
    [
        ("nvidia-resiliency-ext", "0.4.1", "nvidia-resiliency-ext>=0.6"),
        ("transformer-engine", "2.0.0", "transformer-engine>=2.1"),
        ("transformer-engine", "1.6", "transformer-engine>=1.7"),
    ],
)
def test_a_known_bad_pair_is_a_problem_with_its_fix_and_exit_code_1(
    package: str, version: str, fix: str, tmp_path: Path
) -> None:
    pretend_installed(tmp_path / "site", package, version)
    done = doctor(tmp_path, PYTHONPATH=f"{tmp_path}/site{os.pathsep}{REPOSITORY}")
    assert done.returncode == 1
    assert f"PROBLEM {package} {version} with megatron-core" in done.stdout
    assert fix in done.stdout


def test_paths_of_the_environment_that_do_not_exist_are_problems(tmp_path: Path) -> None:
    (tmp_path / "one.idx").touch()
    blend = f"0.3 {tmp_path}/one 0.7 {tmp_path}/two"
    done = doctor(tmp_path, DATA_PATH=blend, TOKENIZER_MODEL="Qwen/Qwen3-30B-A3B")
    assert f"ok      DATA_PATH: {tmp_path}/one" in done.stdout
    assert f"PROBLEM DATA_PATH: {tmp_path}/two does not exist here" in done.stdout
    assert "note    TOKENIZER_MODEL: Qwen/Qwen3-30B-A3B is no path here" in done.stdout


def test_a_cluster_file_that_bash_refuses_is_a_problem_in_bashs_words(tmp_path: Path) -> None:
    clusters = tmp_path / "cluster_configs" / "benchmarking"
    clusters.mkdir(parents=True)
    (clusters / "broken.conf").write_text('export ACCOUNT="open\n')
    for name in ("model_configs", "runtime_configs"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    done = doctor(tmp_path, CLUSTER="broken", WORKSPACE=str(tmp_path))
    assert done.returncode == 1
    assert "PROBLEM CLUSTER=broken: cluster_configs/benchmarking/broken.conf failed" in done.stdout
    assert "unexpected EOF" in done.stdout


def test_a_clock_is_wrong_only_by_what_the_time_of_asking_cannot_explain() -> None:
    text = "n1\tclock\t100.5\nn2\tclock\t107.0\nn1\tspace\t9\nn2\tspace\t9\nn2\tmissing\t/data x\n"
    first, second = nodes.read(text, asked_s=100.0, answered_s=102.0)
    assert (first.clock_off_s, second.clock_off_s) == (0.0, 5.0)
    assert (first.missing, second.missing) == ((), ("/data x",))


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> NvmlStub:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the stub of NVIDIA's library")
    return NvmlStub(tmp_path_factory.mktemp("nvml"))


def test_gpus_are_named_with_what_they_hold(tmp_path: Path, nvml: NvmlStub) -> None:
    nvml.answer(HEALTHY)
    said = doctor(tmp_path, **nvml.environment).stdout
    assert "ok      driver: driver 580, for CUDA up to 13.0" in said
    assert "note    GPU 0: name 1, 1.5 GiB of 80 GiB used" in said


@pytest.mark.parametrize("answer", ["first", "memory_used"])
def test_a_gpu_that_is_lost_is_a_problem_and_the_next_is_still_looked_at(
    answer: str, tmp_path: Path, nvml: NvmlStub
) -> None:
    nvml.answer(HEALTHY | {"count": "2", answer: "!15", "second": "0"})
    done = doctor(tmp_path, **nvml.environment)
    assert done.returncode == 1, done.stderr
    assert "PROBLEM GPU 0: GPU is lost" in done.stdout
    assert "GPU 1: " in done.stdout


def test_a_driver_older_than_torchs_cuda_is_a_problem(tmp_path: Path, nvml: NvmlStub) -> None:
    pretend_installed(tmp_path / "site", "nvidia-cuda-runtime", "13.0.96")
    nvml.answer(HEALTHY | {"driver": "550", "cuda": "12040"})
    path = f"{tmp_path}/site{os.pathsep}{REPOSITORY}"
    done = doctor(tmp_path, **nvml.environment, PYTHONPATH=path)
    assert done.returncode == 1
    assert "PROBLEM driver: driver 550, for CUDA up to 12.4; torch " in done.stdout
    assert "is built for CUDA 13.0.96 and will find no GPU" in done.stdout


def test_the_lock_of_a_killed_compilation_is_a_problem(tmp_path: Path) -> None:
    locks = [tmp_path / "extensions" / name / "lock" for name in ("killed", "going_on")]
    for lock in locks:
        lock.parent.mkdir(parents=True)
        lock.touch()
    os.utime(locks[0], (0, 0))
    done = doctor(tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"))
    assert done.returncode == 1
    assert "compilation of killed: " in done.stdout
    assert str(locks[0]) in done.stdout
    assert "going_on" not in done.stdout
