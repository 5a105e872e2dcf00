"""`${NAME}` is replaced as envsubst does it, and what envsubst would lose in silence is an error."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from moe_bench.config.expand import expand
from moe_bench.errors import ConfigError

VARIABLES = {"TP": "2", "P": "/a b/$HOME|'x'", "EMPTY": ""}


@pytest.mark.parametrize(
    "value",
    [
        "${TP}",
        "$TP",
        "TP${TP}PP$TP-x",
        "${P}",
        "a$b5c".replace("b5c", "TP"),
        "$",
        "$5",
        "100%",
        "{TP}",
        "$$TP",
        "${EMPTY}x",
        "$TP$P",
    ],
)
def test_it_agrees_with_envsubst(value: str) -> None:
    if shutil.which("envsubst") is None:
        pytest.skip("envsubst (gettext) is not installed")
    said = subprocess.run(
        ["envsubst"],
        input=value,
        env=VARIABLES | {"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert expand(value, VARIABLES, place="X:1") == said


def test_an_undefined_name_is_an_error_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"X.yaml:7: \$\{TQ\} is not defined; set TQ"):
        expand("a${TQ}", VARIABLES, place="X.yaml:7")


def test_a_shell_default_is_an_error_because_envsubst_would_pass_it_on() -> None:
    with pytest.raises(ConfigError, match="is not a plain"):
        expand("${TP:-1}", VARIABLES, place="X:1")


def test_an_optional_name_alone_leaves_the_flag_out() -> None:
    assert expand("${LOAD_PATH}", {}, place="X:1") is None
    assert expand("${LOAD_PATH}", {"LOAD_PATH": ""}, place="X:1") is None
    assert expand("run-${COMMENT}", {}, place="X:1") == "run-"


def test_a_name_that_only_the_job_knows_is_left_to_it() -> None:
    assert expand("/tmp/$SLURM_NODEID", {}, place="X:1") == "/tmp/${SLURM_NODEID}"


def test_a_value_is_never_expanded_twice() -> None:
    assert expand("${A}", {"A": "${TP}", "TP": "2"}, place="X:1") == "${TP}"
