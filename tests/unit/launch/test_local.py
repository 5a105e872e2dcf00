"""The local script: its golden bytes, its quoting as bash reads it, and a run directory that is whole or absent."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from moe_bench.arguments.emit import argv
from moe_bench.commits import commits
from moe_bench.config.machine import Machine
from moe_bench.config.run import Origin, ResolvedRun, Setting
from moe_bench.errors import LaunchError
from moe_bench.launch import directory
from moe_bench.launch.local import LocalLauncher
from tests.support.projects import CPU, GPUS, REPOSITORY, Project, repository

GOLDEN = REPOSITORY / "tests" / "golden"
GOLDEN_RUNS = {
    "local-cpu-tiny-deepseek-v3": (CPU, {"MODEL": "Tiny-DeepSeek-V3"}, []),
    "local-cpu-tiny-qwen3-tp2-pp2": (
        CPU,
        {"MODEL": "Tiny-Qwen3", "TP": "2", "PP": "2", "EP": "1", "COMMENT": "it's $HOME\nnow"},
        ["--mock-data"],
    ),
    "local-gpu-tiny-mixtral": (GPUS, {"MODEL": "Tiny-Mixtral", "GPUS_PER_NODE": "2"}, []),
    "local-rehearse-deepseek-v3": (CPU, {"MODEL": "DeepSeek-V3", "REHEARSE": "1"}, []),
}


def rendered(machine: Machine, given: dict[str, str], flags: list[str]) -> str:
    run = repository().resolve(
        given | {"OUTPUT_PATH": "/runs"},
        flags,
        machine=machine,
        local=True,
        demo_prefix=Path("/corpus/demo"),
    )
    launcher = LocalLauncher(project=REPOSITORY, python="/venv/bin/python", device=machine.device)
    return launcher.render(run).script.replace(str(REPOSITORY), "/project")


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_scripts_are_golden(name: str) -> None:
    path = GOLDEN / f"{name}.sh"
    script = rendered(*GOLDEN_RUNS[name])
    if not path.exists():
        path.write_text(script)
        pytest.fail(f"{path} was missing and has been written: read it, commit it")
    assert script == path.read_text(), f"if the change is meant, delete {path} and run again"


@pytest.mark.parametrize("name", GOLDEN_RUNS)
def test_scripts_are_accepted_by_shellcheck(name: str) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("shellcheck")), str(GOLDEN / f"{name}.sh")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


HOSTILE = [
    "a b",
    "it's",
    'x"y',
    "a|b",
    "$HOME",
    "`touch marker`",
    "$(touch marker)",
    "two\nlines",
    "",
    "*",
    "; touch marker",
    "\\",
    "!x",
    "${SLURM_X}y",
]


def hostile_run(tmp_path: Path) -> ResolvedRun:
    run = Project(tmp_path / "project").resolve(local=True, machine=CPU)
    origin = Origin(layer="flag", place="command line")
    args = {
        f"--flag-{index}": Setting(value=text, origin=origin, words=(text,))
        for index, text in enumerate(HOSTILE)
    }
    env = {"MOE_BENCH_RUN_DIR": Setting(value=str(tmp_path / "run dir"), origin=origin)}
    env |= {
        f"VARIABLE_{index}": Setting(value=text, origin=origin)
        for index, text in enumerate(HOSTILE)
    }
    env["WANDB_API_KEY"] = Setting(value="hunter", origin=origin)
    return replace(run, args=args, env=env, run_dir=tmp_path / "run dir")


def test_every_word_reaches_the_program_exactly_and_nothing_is_run(tmp_path: Path) -> None:
    program = tmp_path / "python program"
    program.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@"\nenv -0 | grep -z "^VARIABLE_"\n')
    program.chmod(0o755)
    (tmp_path / "moe_bench").symlink_to(REPOSITORY / "moe_bench")
    run = hostile_run(tmp_path)
    plan = LocalLauncher(project=tmp_path, python=str(program), device="cpu").render(run)
    done = subprocess.run(
        ["bash", "-c", plan.script], capture_output=True, check=True, cwd=tmp_path
    )
    said = done.stdout.decode().split("\0")
    words = argv(run)
    start = said.index("--") + 1
    assert tuple(said[start : start + len(words)]) == words
    expected = {f"VARIABLE_{index}={text}" for index, text in enumerate(HOSTILE[:-1])}
    assert expected <= set(said)
    assert f"VARIABLE_{len(HOSTILE) - 1}=0y" in said  # only a Slurm job knows SLURM_X
    assert not list(tmp_path.glob("**/marker"))


def test_no_secret_is_in_the_script(tmp_path: Path) -> None:
    plan = LocalLauncher(project=tmp_path, python="python", device="cpu").render(
        hostile_run(tmp_path)
    )
    assert "hunter" not in plan.script


def test_the_same_run_gives_the_same_bytes() -> None:
    assert rendered(*GOLDEN_RUNS["local-gpu-tiny-mixtral"]) == rendered(
        *GOLDEN_RUNS["local-gpu-tiny-mixtral"]
    )


def test_what_a_file_says_of_pythonpath_follows_the_project(tmp_path: Path) -> None:
    run = Project(tmp_path / "p").resolve(local=True, machine=CPU)
    said = Setting(value="/opt/pkg", origin=Origin(layer="cluster", place="mine.conf:1"))
    launcher = LocalLauncher(project=tmp_path, python="python", device="cpu")
    script = launcher.render(replace(run, env={**run.env, "PYTHONPATH": said})).script
    exports = "\n".join(line for line in script.splitlines() if "PYTHONPATH" in line)
    command = ["bash", "-c", f'{exports}\necho "$PYTHONPATH"']
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert shown == f"{tmp_path}:/opt/pkg\n"


def test_a_run_directory_is_made_whole(tmp_path: Path) -> None:
    run = replace(Project(tmp_path / "p").resolve(), run_dir=tmp_path / "base" / "run")
    plan = LocalLauncher(project=tmp_path, python="python", device="cpu").render(run)
    directory.create(run, plan)
    assert (run.run_dir / "launch.sh").read_text() == plan.script
    recorded = ResolvedRun.from_json((run.run_dir / "run.json").read_bytes())
    assert recorded == replace(run, commits=commits())
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["run"]


def test_a_run_directory_that_exists_is_left_alone(tmp_path: Path) -> None:
    run = replace(Project(tmp_path / "p").resolve(), run_dir=tmp_path / "base" / "run")
    plan = LocalLauncher(project=tmp_path, python="python", device="cpu").render(run)
    directory.create(run, plan)
    before = (run.run_dir / "run.json").stat().st_mtime_ns
    with pytest.raises(LaunchError, match=r"RUN_ID=run: .* exists already and is left alone"):
        directory.create(run, plan)
    assert (run.run_dir / "run.json").stat().st_mtime_ns == before


def test_of_two_that_make_one_run_directory_at_once_the_second_is_told(tmp_path: Path) -> None:
    run = replace(Project(tmp_path / "p").resolve(), run_dir=tmp_path / "base" / "run")
    plan = LocalLauncher(project=tmp_path, python="python", device="cpu").render(run)

    class Late(type(tmp_path)):  # type: ignore[misc]
        """Looks before the other has come."""

        def exists(self, **_: bool) -> bool:
            return False

    directory.create(run, plan)
    with pytest.raises(LaunchError, match=r"RUN_ID=run: .* exists already and is left alone"):
        directory.create(replace(run, run_dir=Late(run.run_dir)), plan)
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["run"]


def test_a_base_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = Project(tmp_path / "p").resolve({"OUTPUT_PATH": str(tmp_path / "file")})
    plan = LocalLauncher(project=tmp_path, python="python", device="cpu").render(run)
    with pytest.raises(LaunchError, match=r"OUTPUT_PATH=.*file \(environment\): cannot write"):
        directory.create(run, plan)
