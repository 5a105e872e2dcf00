"""The table of runtime.conf, the model files, and the bash that joins them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parents[2]
MODELS = sorted(path.stem for path in (PROJECT / "model_configs/benchmarking").glob("*.yaml"))
CONFS = sorted(PROJECT.glob("*_configs/benchmarking/*.conf"))

COLUMNS = (
    "TP PP EP CP VPP MBS GBS NUM_LAYERS MOE_TOKEN_DISPATCHER MOE_GROUPED_GEMM NNODES RUN_TIME PRETRAIN "
    "SEQ_LEN DATASET PP_FIRST PP_LAST"
).split()

GUIDE = """
| Mixtral-8x2B | 1 | 1 | 8 | 1 | 1 | 2 | 256 | 24 | alltoall | false | 8 | 00:20:00 | 1 | 4096 | Slimpajama | | |
| Mixtral-8x7B | 1 | 4 | 8 | 1 | 8 | 1 | 256 | 32 | alltoall | true | 8 | 00:20:00 | 0 | 4096 | Slimpajama | | |
| Mixtral-8x22B | 2 | 8 | 8 | 1 | 1 | 1 | 256 | 56 | alltoall | true | 16 | 00:20:00 | 0 | 4096 | Slimpajama | | |
| DeepSeek-V2 | 1 | 16 | 8 | 1 | 2 | 1 | 1024 | 60 | alltoall | true | 32 | 00:20:00 | 0 | 4096 | Slimpajama | 2 | 2 |
| DeepSeek-V2-Lite | 1 | 1 | 8 | 1 | 1 | 1 | 512 | 27 | alltoall | true | 1 | 00:20:00 | 0 | 4096 | Slimpajama | | |
| DeepSeek-V3 | 1 | 16 | 64 | 1 | 1 | 1 | 8192 | 61 | flex | true | 128 | 00:20:00 | 0 | 4096 | Slimpajama | 4 | 1 |
| Qwen2-57B-A14B | 2 | 4 | 4 | 1 | 7 | 1 | 256 | 28 | alltoall | true | 8 | 00:20:00 | 0 | 4096 | Slimpajama | | |
"""
ROWS = {
    cells[0]: dict(zip(COLUMNS, cells[1:], strict=True))
    for cells in (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in GUIDE.split("\n") if line
    )
}


def source(model: str, **environment: str) -> dict[str, str]:
    """The environment after the .conf files, read by bash."""
    program = " && ".join(f". {name}" for name in ("common.conf", "runtime.conf"))
    done = subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", f"{program} && env -0"],
        cwd=PROJECT / "runtime_configs/benchmarking",
        env={"PATH": "/usr/bin:/bin", "WORKSPACE": str(PROJECT), "MODEL": model, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return dict(one.split("=", 1) for one in done.stdout.split("\0") if "=" in one)


@pytest.mark.parametrize("model", ROWS)
def test_the_table_is_the_guides(model: str) -> None:
    found = source(model)
    assert {name: found.get(name, "") for name in COLUMNS} == ROWS[model]


def test_the_environment_wins_over_every_column() -> None:
    asked = dict.fromkeys(COLUMNS, "7")
    found = source("DeepSeek-V3", **asked)
    assert {name: found[name] for name in COLUMNS} == asked


def test_every_model_file_has_a_row_and_every_row_a_file() -> None:
    table = (PROJECT / "runtime_configs/benchmarking/runtime.conf").read_text()
    assert sorted(re.findall(r"^ *\[([\w.-]+)\]=", table, re.MULTILINE)) == MODELS


def test_an_unknown_model_fails_with_the_known_ones() -> None:
    with pytest.raises(
        RuntimeError, match=r"MODEL=DeepSeek-V9 is not in the table; known: DeepSeek-V2 "
    ):
        source("DeepSeek-V9")


def test_a_precision_the_model_does_not_know_fails() -> None:
    with pytest.raises(RuntimeError, match="PR=fp32 is not a precision of DeepSeek-V3"):
        source("DeepSeek-V3", PR="fp32")


@pytest.mark.parametrize("model", MODELS)
def test_a_model_file_alone_says_the_same_as_the_table(model: str) -> None:
    """DEFAULTS stand in where a user's own runtime.conf does not know a name: they must not differ from ours."""
    text = (PROJECT / f"model_configs/benchmarking/{model}.yaml").read_text()
    defaults = yaml.load(text, Loader=yaml.BaseLoader).get("DEFAULTS", {})
    ours = source(model)
    shared = defaults.keys() & ours.keys()
    assert {name: ours[name] for name in shared} == {name: defaults[name] for name in shared}


@pytest.mark.parametrize("model", MODELS)
def test_the_padded_vocabulary_is_the_models_own(model: str) -> None:
    text = (PROJECT / f"model_configs/benchmarking/{model}.yaml").read_text()
    args = yaml.load(text, Loader=yaml.BaseLoader)["MODEL_ARGS"]
    vocab, multiple = int(args["--vocab-size"]), int(args["--make-vocab-size-divisible-by"])
    assert model.startswith("Tiny-") or vocab % (multiple * int(source(model)["TP"])) == 0


@pytest.mark.parametrize("model", [name for name in MODELS if not name.startswith("Tiny-")])
def test_fewer_layers_keep_the_dense_ones(model: str) -> None:
    found = source(model, NUM_LAYERS="20")
    assert int(found["DENSE_LAYERS"]) + int(found["MOE_LAYERS"]) == 20


def test_megatron_0_11_is_not_given_flags_it_lacks() -> None:
    found = source("DeepSeek-V3", MCORE_RELEASE_VERSION="0.11.0")
    assert (found["MOE_ROUTER_DTYPE"], found["MTP"]) == ("false", "false")
    assert source("DeepSeek-V3", MCORE_RELEASE_VERSION="0.12.1")["MTP"] == "1"


def test_the_confs_pass_shellcheck() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("shellcheck")), *map(str, CONFS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
