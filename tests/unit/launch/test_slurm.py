"""Slurm scripts: what is in them, and what is refused before anything is submitted."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.errors import LaunchError
from moe_bench.launch.slurm import SlurmLauncher
from tests.support.runs import FLAGS, make_run, setting

LAUNCHER = SlurmLauncher(workspace=Path("/opt/moe_bench"), python="/opt/moe_bench/.venv/bin/python")
GOLDEN = Path(__file__).parents[2] / "golden"

CASES = {
    "slurm_bare_metal.sh": {},
    "slurm_pyxis.sh": {
        "CONTAINER_IMAGE": "/images/moe bench.sqsh",
        "CONTAINER_MOUNTS": "/lustre:/lustre,/data:/data:ro",
        "ACCOUNT": "coreai",
        "PARTITION": "batch",
        "MEGATRON_PATH": "/lustre/Megatron-LM",
        "SEGMENT": "16",
    },
    "slurm_apptainer.sh": {"CONTAINER_IMAGE": "/images/moe.sif", "CONTAINER_RUNTIME": "apptainer"},
    "slurm_docker_profile.sh": {
        "CONTAINER_IMAGE": "registry.example/moe:1",
        "CONTAINER_RUNTIME": "docker",
        "NNODES": "1",
        "BINDPCIE_PATH": "/opt/bind.sh",
    },
}
PROFILED = FLAGS | {"--profile": "true"}


def golden_script(name: str) -> str:
    args = PROFILED if "profile" in name else FLAGS
    return LAUNCHER.render(make_run(args=args, **CASES[name])).script


@pytest.mark.parametrize("name", CASES)
def test_script_is_the_golden_one(name: str) -> None:
    rendered = golden_script(name)
    golden = GOLDEN / name
    if not golden.exists():
        golden.write_text(rendered)
        pytest.fail(f"{golden} was missing and has been written: read it, commit it")
    assert rendered == golden.read_text()


@pytest.mark.parametrize("name", CASES)
def test_script_is_valid_bash(name: str) -> None:
    script = golden_script(name)
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


HOSTILE = ("$(touch /tmp/pwned)", "a;b|c&d", "`id`", 'it\'s "quoted"', "line one\nline two", "--lr")


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_flag_value_reaches_the_rank_as_it_was_written(
    value: str, tmp_path: Path
) -> None:
    command = tmp_path / "python"
    command.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
    command.chmod(0o755)
    launcher = SlurmLauncher(workspace=Path("/opt/moe_bench"), python=str(command))
    script = launcher.render(make_run(args={**FLAGS, "--wandb-exp-name": value})).script
    srun = script[script.index("srun \\") : script.index("&\nstep=")]
    done = subprocess.run(
        ["bash", "-c", f'srun() {{ while [[ "$1" == --* ]]; do shift; done; "$@"; }}\n{srun}'],
        capture_output=True,
        check=True,
    )
    words = done.stdout.decode().split("\0")[:-1]
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--wandb-exp-name")
    assert parser.parse_known_args(words)[0].wandb_exp_name == value
    assert not Path("/tmp/pwned").exists()


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"ACCOUNT": "a\n#SBATCH --uid=0"}, "ACCOUNT="),
        ({"PARTITION": 'a"b'}, "PARTITION="),
        ({"CONSTRAINT": "a#b"}, "CONSTRAINT='a#b' (environment) cannot stand in an #SBATCH line"),
        ({"NODELIST": "n1\tn2"}, "NODELIST="),
        ({"EXCLUDE": "n1\\"}, "EXCLUDE="),
        ({"QOS": "n1\u2028"}, "QOS="),
        ({"NNODES": "0"}, "NNODES=0 (environment) is not a positive whole number"),
        ({"RUN_TIME": "soon"}, "RUN_TIME='soon'"),
        (
            {"CONTAINER_IMAGE": "gitlab.example:5005/group/image:tag"},
            "gitlab.example#group/image:tag",
        ),
        ({"CONTAINER_IMAGE": "/images/x.tar"}, "enroot import -o IMAGE.sqsh"),
        ({"CONTAINER_IMAGE": "/i.sqsh", "CONTAINER_MOUNTS": "data:/data"}, "absolute paths"),
        ({"CONTAINER_RUNTIME": "podman"}, "pyxis, apptainer, docker, none"),
        ({"CONTAINER_RUNTIME": "pyxis"}, "needs CONTAINER_IMAGE"),
        ({"CONTAINER_RUNTIME": "docker", "CONTAINER_IMAGE": "x"}, "NNODES=2"),
    ],
)
def test_what_slurm_could_not_take_is_refused_with_its_place(
    knobs: dict[str, str], said: str
) -> None:
    with pytest.raises(LaunchError) as refused:
        LAUNCHER.render(make_run(**knobs))
    assert said in str(refused.value)


def test_a_run_directory_with_a_blank_is_refused() -> None:
    with pytest.raises(LaunchError, match="OUTPUT_PATH"):
        LAUNCHER.render(make_run(Path("/my runs/x")))


def test_job_name_holds_no_shell_metacharacters() -> None:
    script = LAUNCHER.render(make_run(ACCOUNT="a", RUN_NAME="x;rm -rf $HOME")).script
    assert "#SBATCH --job-name=a-moe-x_rm_-rf_HOME\n" in script


def test_same_run_gives_the_same_bytes() -> None:
    run = make_run()
    assert LAUNCHER.render(run).sha256 == LAUNCHER.render(run).sha256


def test_sbatch_refusal_says_what_slurm_said_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(
        "#!/bin/bash\necho 'sbatch: error: invalid partition specified: nowhere' >&2\nexit 1\n"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    run = make_run(tmp_path / "run")
    launcher = SlurmLauncher(workspace=tmp_path, python=sys.executable)
    with pytest.raises(LaunchError) as refused:
        launcher.submit(launcher.render(run), run)
    assert "invalid partition specified: nowhere" in str(refused.value)
    assert "sinfo -s" in str(refused.value)


def test_without_sbatch_the_way_out_is_the_interactive_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    run = make_run(tmp_path / "run")
    launcher = SlurmLauncher(workspace=tmp_path, python=sys.executable)
    with pytest.raises(LaunchError, match=r"sbatch is not on PATH.*interactive_benchmarking\.sh"):
        launcher.submit(launcher.render(run), run)


def test_an_interpreter_without_torch_is_not_queued_for(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')  # -S: no site-packages
    python.chmod(0o755)
    launcher = SlurmLauncher(workspace=tmp_path, python=str(python))
    run = make_run(tmp_path / "run")
    with pytest.raises(LaunchError, match="has no torch; set CONTAINER_IMAGE, or MOE_BENCH_PYTHON"):
        launcher.submit(launcher.render(run), run)


def test_quoting_is_that_of_the_shell() -> None:
    script = LAUNCHER.render(make_run()).script
    assert f"--data-path {shlex.quote(FLAGS['--data-path'])}" in script


def test_mounts_without_an_image_are_said_to_do_nothing() -> None:
    notes = LAUNCHER.render(make_run(CONTAINER_MOUNTS="/data:/data")).notes
    assert any(
        "CONTAINER_MOUNTS=/data:/data (environment) does nothing without CONTAINER_IMAGE" in note
        for note in notes
    )
    with_image = make_run(CONTAINER_MOUNTS="/data:/data", CONTAINER_IMAGE="/i.sqsh")
    assert not any("CONTAINER_MOUNTS" in note for note in LAUNCHER.render(with_image).notes)


def test_an_image_that_the_runtime_none_leaves_out_is_said_to_do_nothing() -> None:
    plan = LAUNCHER.render(make_run(CONTAINER_IMAGE="/i.sqsh", CONTAINER_RUNTIME="none"))
    assert any(
        "CONTAINER_IMAGE=/i.sqsh (environment) does nothing with CONTAINER_RUNTIME=none (environment)"
        in note
        for note in plan.notes
    )
    assert f"{LAUNCHER.python} -m moe_bench.runtime.pretrain" in plan.script


def test_with_the_runtime_none_the_ranks_interpreter_is_looked_at(tmp_path: Path) -> None:
    launcher = SlurmLauncher(workspace=tmp_path, python=str(tmp_path / "none"))
    run = make_run(tmp_path / "run", CONTAINER_IMAGE="/i.sqsh", CONTAINER_RUNTIME="none")
    with pytest.raises(LaunchError, match="cannot be run"):
        launcher.submit(launcher.render(run), run)


def python_path(job: dict[str, str], conf: str | None, **knobs: str) -> str:
    """What the script exports, in a job with that environment."""
    run = make_run(**knobs)
    if conf is not None:
        run = dataclasses.replace(run, env=run.env | {"PYTHONPATH": setting(conf)})
    script = LAUNCHER.render(run).script
    [line] = [one for one in script.splitlines() if one.startswith("export PYTHONPATH=")]
    shell = f'set -euo pipefail\n{line}\nprintf %s "$PYTHONPATH"'
    done = subprocess.run(
        ["bash", "-c", shell], env=job, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_projects_folder_is_put_before_the_jobs_own_python_path() -> None:
    assert python_path({}, None) == "/opt/moe_bench"
    assert python_path({"PYTHONPATH": "/a b:/c"}, None) == "/opt/moe_bench:/a b:/c"


def test_the_projects_folder_is_put_before_the_confs_python_path() -> None:
    mine = "/opt/mypkg:/opt/moe_bench:/opt/moe_bench/.deps:"
    assert (
        python_path({"PYTHONPATH": "/c"}, mine) == "/opt/moe_bench:/opt/mypkg:/opt/moe_bench/.deps"
    )


def test_what_this_machines_python_has_beside_the_project_is_not_for_an_image() -> None:
    mine = "/opt/mypkg:/opt/moe_bench/.deps:/opt/moe_bench"
    job = {"PYTHONPATH": "/opt/moe_bench:/opt/moe_bench/.deps"}
    image = {"CONTAINER_IMAGE": "/i.sqsh"}
    assert python_path(job, mine, **image) == "/opt/moe_bench:/opt/mypkg"
    assert python_path(job, None, **image) == "/opt/moe_bench"


def test_only_a_run_that_saves_is_requeued_when_it_stops() -> None:
    without = LAUNCHER.render(make_run())
    assert "nothing is saved" in " ".join(without.notes)
    assert 'go_on "stopped with steps left"' not in without.script
    saving = LAUNCHER.render(make_run(args={**FLAGS, "--save": "/runs/checkpoints"}))
    assert saving.notes == ()
    assert 'go_on "stopped with steps left"' in saving.script


def test_zero_requeues_are_none() -> None:
    script = LAUNCHER.render(make_run(MAX_REQUEUES="0")).script
    assert "(( ${SLURM_RESTART_COUNT:-0} >= 0 ))" in script
    assert "#SBATCH --no-requeue\n" in script


def test_nsys_traces_only_where_megatron_starts_its_capture_on_a_gpu() -> None:
    def words(**flags: str) -> str:
        args = PROFILED | {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
        return LAUNCHER.render(make_run(args=args)).script

    assert "nsys profile" in words()
    assert "nsys profile" not in words(use_pytorch_profiler="true")
    assert "nsys profile" not in words(distributed_backend="gloo")


def test_what_whole_nodes_do_not_bring_can_be_asked_for() -> None:
    script = LAUNCHER.render(make_run(GRES="gpu:8", MEM="0", CPUS_PER_TASK="12")).script
    for line in ("--gres=gpu:8", "--mem=0", "--cpus-per-task=12"):
        assert f"#SBATCH {line}\n" in script
    assert "  --cpus-per-task=12 \\\n" in script  # srun itself, too


SLURMS_OWN = {
    "ACCOUNT": "_x",
    "CONSTRAINT": "[rack1*2&rack2*4|a100]",
    "DEPENDENCY": "afterok:12?afterany:13",
    "EXCLUDE": "node[01,03-05]",
    "GRES": "gpu:h100:8(S:0-1)",
    "NODELIST": "node[001-004]",
}


@pytest.mark.parametrize("name", SLURMS_OWN)
def test_slurms_own_notation_stands_in_the_directive_as_it_is(name: str) -> None:
    value = SLURMS_OWN[name]
    script = LAUNCHER.render(make_run(**{name: value})).script
    assert f"#SBATCH --{name.lower()}={value}\n" in script


def test_a_blank_is_within_quotes_in_the_directive() -> None:
    script = LAUNCHER.render(make_run(RESERVATION="large one --uid=0")).script
    assert '#SBATCH --reservation="large one --uid=0"\n' in script


def test_srun_gets_its_mpi_as_one_word() -> None:
    script = LAUNCHER.render(make_run(SRUN_MPI="pmix $(id)")).script
    assert "  --mpi='pmix $(id)' \\\n" in script


def test_without_a_time_limit_the_warning_before_it_is_said_to_do_nothing() -> None:
    plan = LAUNCHER.render(make_run(RUN_TIME="infinite", SIGNAL_BEFORE_S="300"))
    assert "#SBATCH --time=UNLIMITED\n" in plan.script
    assert any(
        "SIGNAL_BEFORE_S=300 (environment) warns of no time limit" in note for note in plan.notes
    )
    assert not any("warns" in note for note in LAUNCHER.render(make_run(RUN_TIME="infinite")).notes)


def test_docker_gets_the_signal_that_it_passes_on() -> None:
    docker = make_run(CONTAINER_RUNTIME="docker", CONTAINER_IMAGE="x", NNODES="1")
    assert "scancel --signal=TERM" in LAUNCHER.render(docker).script
    assert "scancel --signal=URG" in LAUNCHER.render(make_run()).script
