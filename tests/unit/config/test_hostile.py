"""Whatever stands in the environment, in a file or after the script's name: decided or refused in the user's words, and nothing is run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from moe_bench.arguments.resolve import Identity, resolve_gathered
from moe_bench.config import sources
from moe_bench.config.gather import CLUSTERS, COMMON, MODELS, Gathered, Request, gather_each
from moe_bench.config.knobs import KNOBS
from moe_bench.config.model_file import parse
from moe_bench.errors import ConfigError, MoeBenchError
from tests.support.projects import CPU, GPUS, MODEL, REPOSITORY, Project

VALUES = (
    "a|b", "$HOME", "a\nb", "'", '"', "--x", "-1", "٣", "²", "1e3", "0x10", "08", "+4", " 4 ", "4.0", "9" * 5000, "\x01",
    "${TP}", "$(touch pwned)", "`touch pwned`", "; touch pwned", "../../etc/passwd", "\udcff", "é" * 300, "null", "[0]*" + "9" * 50,
)  # fmt: skip
FLAGS = (
    "--lr", "--train-iters", "--seq-length", "--num-layers", "--moe-layer-freq", "--pipeline-model-parallel-layout",
    "--tensor-model-parallel-size", "--data-path", "--recompute-modules", "--bf16", "--mtp-num-layers", "--num-experts",
    "--decoder-first-pipeline-num-layers", "--window-size", "--hidden-size",
)  # fmt: skip


def outcomes(
    project: Project, asked: list[tuple[dict[str, str], tuple[str, ...], bool]]
) -> list[str]:
    """For each environment, words and whether it is for this machine: "ok" or the refusal. Any other exception goes on."""
    base = {"PATH": os.environ["PATH"], "MODEL": "Tiny-Test", "MCORE_RELEASE_VERSION": "0.19"}
    requests = [
        Request(environment=base | given, words=words, project=project.root, local=local)
        for given, words, local in asked
    ]
    found = list(gather_each(requests))
    return [_outcome(gathered, one) for gathered, one in zip(found, requests, strict=True)]


def _outcome(gathered: Gathered | ConfigError, request: Request) -> str:
    try:
        if isinstance(gathered, ConfigError):
            raise gathered
        machine = CPU if request.local else GPUS
        resolve_gathered(gathered, request, machine, Identity(run_id="run"))
    except MoeBenchError as error:
        return str(error)
    return "ok"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path)


def test_no_value_of_any_knob_is_run_or_ends_in_a_traceback(project: Project) -> None:
    asked = [({name: value}, (), False) for name in KNOBS for value in VALUES[::3]]
    found = outcomes(project, asked)
    assert "ok" in found
    assert not (project.root / "pwned").exists()


def test_a_number_is_a_plain_one_or_refused_with_its_name(project: Project) -> None:
    odd = ["1e3", "0x10", "08", "+4", " 4 ", "4.0", "-1", "0", "٣", "²", "9" * 5000, "4\n", "1_0"]
    names = [name for name, knob in KNOBS.items() if knob.kind == "count"]
    asked = [({name: value}, (), False) for name in names for value in odd]
    for (setting, _, _), said in zip(asked, outcomes(project, asked), strict=True):
        (name,) = setting
        assert said.startswith(f"{name}="), setting
        assert len(said) < 300


@pytest.mark.parametrize("rehearse", ["0", "1"])
def test_no_value_of_a_flag_ends_in_a_traceback(project: Project, rehearse: str) -> None:
    spelled = [
        words
        for flag in FLAGS
        for value in VALUES
        for words in ((flag, value), (f"{flag}={value}",), (flag, value, value))
    ]
    more = [
        ("--",),
        ("---",),
        ("--=3",),
        ("x",),
        ("",),
        ("--\n",),
        ("--" + "x" * 10000,),
        ("--lr",),
    ]
    given = {"REHEARSE": rehearse, "PP": "2", "EP": "2"}
    outcomes(project, [(given, words, rehearse == "1") for words in (*spelled, *more)])
    assert not (project.root / "pwned").exists()


text = st.text(alphabet=st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(st.sampled_from(sorted(KNOBS)), text, text), min_size=20, max_size=20))
def test_any_text_in_any_knob_and_flag_is_decided_or_refused(
    project: Project, found: list[tuple[str, str, str]]
) -> None:
    outcomes(project, [({name: value}, ("--lr", word), False) for name, value, word in found])


# A model's YAML

YAML = {
    "a bomb of anchors": "a: &a [x,x]\nb: &b [*a,*a]\nMODEL_ARGS:\n  --data-path: [*b,*b]\n",
    "an anchor within itself": "MODEL_ARGS: &a\n  --data-path: *a\n",
    "a key twice": "MODEL_ARGS:\n  --num-layers: 2\n  --num-layers: 3\n",
    "a key that is a number": "MODEL_ARGS:\n  4: 4\n",
    "a key that is a list": "MODEL_ARGS:\n  [a]: 4\n",
    "a tab": "MODEL_ARGS:\n\t--num-layers: 2\n",
    "an object": "MODEL_ARGS:\n  --x: !!python/object/apply:os.system ['touch pwned']\n",
    "an unknown variable": "MODEL_ARGS:\n  --num-layers: ${NOT_A_NAME}\n",
    "a variable that is a program": "MODEL_ARGS:\n  --num-layers: ${X:-$(touch pwned)}\n",
    "half a variable": "MODEL_ARGS:\n  --num-layers: ${TP\n",
    "two documents": "MODEL_ARGS:\n  --a: 1\n---\nMODEL_ARGS:\n  --a: 2\n",
    "a list": "- a\n",
    "nothing": "",
    "a NUL": "MODEL_ARGS:\n  --num-layers: '\0'\n",
    "a mapping deep down": "MODEL_ARGS:\n  --a: {b: {c: d}}\n",
    "an endless quote": "MODEL_ARGS:\n  --a: 'x\n",
    "a very deep list": "MODEL_ARGS:\n  --a: " + "[" * 500 + "]" * 500 + "\n",
    "a huge number": MODEL.replace("--hidden-size: 64", "--hidden-size: " + "9" * 6000),
}  # fmt: skip


@pytest.mark.parametrize("case", YAML)
def test_a_yaml_that_cannot_be_meant_is_refused_with_its_place(project: Project, case: str) -> None:
    project.write(f"{MODELS}/Tiny-Test.yaml", YAML[case])
    (said,) = outcomes(project, [({}, (), False)])
    assert said != "ok"
    assert "Tiny-Test.yaml" in said
    assert not (project.root / "pwned").exists()


BYTES = {
    "Windows line ends": (MODEL.replace("\n", "\r\n").encode(), "sed -i"),
    "a byte order mark": (b"\xef\xbb\xbf" + MODEL.encode(), "byte order mark"),
    "not UTF-8": (MODEL.encode() + b"# \xff\n", "not UTF-8"),
    "UTF-16": (MODEL.encode("utf-16"), "not UTF-8"),
}


@pytest.mark.parametrize("case", BYTES)
@pytest.mark.parametrize("name", [f"{MODELS}/Tiny-Test.yaml", COMMON])
def test_what_an_editor_did_to_a_file_is_said_with_the_way_out(
    project: Project, case: str, name: str
) -> None:
    data, expected = BYTES[case]
    project.write(name, data)
    (said,) = outcomes(project, [({}, (), False)])
    assert name in said
    assert expected in said


@pytest.mark.parametrize("name", [f"{MODELS}/Tiny-Test.yaml", COMMON, f"{CLUSTERS}/local.conf"])
@pytest.mark.parametrize("kind", ["directory", "loop", "gone", "device"])
def test_what_is_no_file_is_refused_with_its_name(project: Project, name: str, kind: str) -> None:
    path = project.root / name
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/full")
    (said,) = outcomes(project, [({}, (), False)])
    assert path.name in said or path.stem in said
    assert said != "ok"


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=" \n:-[]{}'\"#&*!|>%@`${}ab1\t", max_size=60))
def test_any_text_is_a_model_file_or_refused(body: str) -> None:
    said = ""
    try:
        parse(f"MODEL_ARGS:\n  --a: 1\n{body}", name="X.yaml")
    except ConfigError as error:
        said = str(error)
    assert said == "" or said.startswith("X.yaml")


# .conf programs

CONFS = {
    "quotes without an end": ("export X='a\n", "unexpected EOF"),
    "an end in the middle": ("exit 0\n", "ended the shell"),
    "an error": ("false\n", "failed"),
    "an unset name": ("echo $NOT_SET_AT_ALL\n", "NOT_SET_AT_ALL"),
    "a return that fails": ("return 3\n", "failed"),
    "a command that is not there": ("no-such-command --x\n", "no-such-command"),
    "a kill of its own shell": ("kill -9 $BASHPID\n", "failed"),
    "its own descriptor shut": ("exec 3>&- 4>&- 5>&- 6>&- 7>&-; TP=7\nfalse\n", "failed"),
}


@pytest.mark.parametrize("case", CONFS)
def test_a_conf_that_fails_is_named_with_bashs_words(project: Project, case: str) -> None:
    text, expected = CONFS[case]
    project.write(COMMON, text)
    (said,) = outcomes(project, [({}, (), False)])
    assert COMMON in said
    assert expected in said


@pytest.mark.parametrize(
    "text",
    [
        "echo hello; echo there >&2\nexport GBS=16\n",
        "read -r line || true; cat >/dev/null; export GBS=16\n",
        "set +e +u; false; echo $NOT_SET; export GBS=16\n",
        "trap 'echo bye' EXIT; export GBS=16\n",
        "IFS=,; shopt -s nullglob; cd /; export GBS=16\n",
        "printf() { :; }; declare() { :; }; trap() { :; }; builtin unset -f printf declare trap; export GBS=16\n",
        "export GBS=16; exec 2>/dev/null\n",
    ],
)
def test_a_conf_may_speak_read_and_change_its_shell(project: Project, text: str) -> None:
    project.write(COMMON, text)
    assert project.resolve().knobs["GBS"].value == "16"


def test_a_conf_without_an_end_is_stopped_and_leaves_nothing_behind(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_TIME_LIMIT_S", 2)
    project.write(COMMON, f"echo $BASHPID >{project.root}/pid\nwhile :; do :; done\n")
    (said,) = outcomes(project, [({}, (), False)])
    assert "still running after" in said
    assert COMMON in said
    pid = int((project.root / "pid").read_text())
    given_up_s = time.monotonic() + 60
    while (
        _runs(pid) and time.monotonic() < given_up_s
    ):  # a killed process dies when it is next scheduled
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """False for a process that is gone, or dead and not yet collected."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_conf_may_leave_a_process_in_the_background(project: Project) -> None:
    project.write(COMMON, f"sleep 600 & echo $! >{project.root}/pid\nexport GBS=16\n")
    begun_s = time.monotonic()
    assert project.resolve().knobs["GBS"].value == "16"
    assert time.monotonic() - begun_s < 30
    os.kill(int((project.root / "pid").read_text()), signal.SIGKILL)


# The command itself


def test_the_command_ends_with_2_and_one_error_line_and_never_shows_a_key(tmp_path: Path) -> None:
    given = {"PATH": os.environ["PATH"], "MODEL": "DeepSeek-V3", "CLUSTER": "local", "DRY_RUN": "1"}
    given |= {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path), "WANDB_API_KEY": "s3cret-key"}
    for wrong in ({"TP": "²"}, {"MODEL": "a\nb"}, {"GBS": "1e3"}, {"CLUSTER": "\udcff"}):
        done = subprocess.run(
            [sys.executable, "-m", "moe_bench", "launch", "slurm", "--lr", "\udcfe"],
            env=given | wrong,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 2
        assert done.stdout == b""
        assert done.stderr.startswith(b"error: ")
        assert b"Traceback" not in done.stderr
        assert b"s3cret" not in done.stderr
