"""Data of too few documents for --split end a run before its ranks: Megatron's would count for ever."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_bench.cli._data_shares import prefixes_of, refuse_empty_shares
from moe_bench.config.run import ResolvedRun
from moe_bench.data.index_header import HEADER, MAGIC
from moe_bench.errors import ConfigError
from tests.support.projects import CPU, REPOSITORY, repository


def resolve(*words: str, **given: str) -> ResolvedRun:
    knobs = {"MODEL": "Mixtral-8x7B", "MOE_BENCH_DEVICE": "cpu", "PRETRAIN": "0", "PP": "1"}
    knobs |= {"VPP": "1", "EP": "2", **given}
    return repository().resolve(knobs, words, machine=CPU, local=True)


def index(path: Path, *lengths: int) -> str:
    """An index of sequences of these lengths; its prefix."""
    sequences = b"".join(length.to_bytes(4, "little") for length in lengths)
    rest = bytes(8 * (2 * len(lengths) + 1))
    head = HEADER.pack(MAGIC, 1, 8, len(lengths), len(lengths) + 1)
    path.with_suffix(".idx").write_bytes(head + sequences + rest)
    return str(path)


@pytest.fixture
def one(tmp_path: Path) -> str:
    return index(tmp_path / "one", 500)


@pytest.fixture
def many(tmp_path: Path) -> str:
    return index(tmp_path / "many", *[5] * 100)


@pytest.mark.parametrize(
    "words", [("one",), ("1", "one"), ("0.9", "many", "0.1", "one"), ("many", "one", "many")]
)
@pytest.mark.usefixtures("many")
def test_too_few_documents_are_named_with_the_split_and_the_way_out(
    words: tuple[str, ...], one: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_empty_shares(resolve("--data-path", *words), tmp_path)
    said = str(refused.value)
    assert f"{one}.idx has 1 document(s), of which --split 99,1,0 (model_configs/" in said
    assert "none with text for validation" in said
    assert "--text paragraph" in said
    assert "--split 100,0,0 --eval-iters 0" in said


def test_documents_without_tokens_are_none(tmp_path: Path) -> None:
    prefix = index(tmp_path / "hollow", *[5] * 99, 0)
    with pytest.raises(ConfigError, match=re.escape(f"DATA_PATH={prefix} (environment): ")):
        refuse_empty_shares(resolve(DATA_PATH=prefix), tmp_path)


def test_a_share_is_refused_whether_or_not_it_is_evaluated(one: str, tmp_path: Path) -> None:
    """Megatron builds it for --eval-iters 0, too, and hangs."""
    with pytest.raises(ConfigError, match="none with text for validation"):
        refuse_empty_shares(resolve("--data-path", one, "--eval-iters", "0"), tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ("--data-path", "many"),
        ("--data-path", "0.3", "many", "0.7", "many"),
        ("--data-path", "one", "--split", "100,0,0", "--eval-iters", "0"),
        ("--data-path", "not/here"),
        ("--data-path", "s3://bucket/one"),
        ("--data-path", "/"),
        ("--mock-data",),
    ],
)
@pytest.mark.usefixtures("one", "many")
def test_what_megatron_can_divide_is_let_be(words: tuple[str, ...], tmp_path: Path) -> None:
    refuse_empty_shares(resolve(*words), tmp_path)


def test_data_of_their_own_for_each_purpose_are_not_divided(
    one: str, many: str, tmp_path: Path
) -> None:
    refuse_empty_shares(resolve("--train-data-path", one, "--valid-data-path", many), tmp_path)
    hollow = index(tmp_path / "hollow", 0)
    with pytest.raises(ConfigError, match=r"--valid-data-path .*hollow\.idx holds no token"):
        refuse_empty_shares(
            resolve("--train-data-path", one, "--valid-data-path", hollow), tmp_path
        )
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps({"train": [many], "valid": f"1 {hollow}", "test": None}))
    with pytest.raises(ConfigError, match=r"--per-split-data-args-path .*hollow\.idx holds"):
        refuse_empty_shares(resolve("--per-split-data-args-path", str(listed)), tmp_path)


def test_a_file_of_prefixes_is_read(one: str, many: str, tmp_path: Path) -> None:
    listed = tmp_path / "listed"
    listed.write_text(f"0.5 {many}\n0.5 {one}\n")
    with pytest.raises(ConfigError, match=r"--data-args-path .*one\.idx has 1 document"):
        refuse_empty_shares(resolve("--data-args-path", str(listed)), tmp_path)


def test_nothing_to_validate_on_is_said_before_the_last_step(many: str, tmp_path: Path) -> None:
    given = ("--data-path", many, "--split", "100,0,0")
    with pytest.raises(
        ConfigError, match=r"--split 100,0,0 .*--eval-iters 32 .*add --eval-iters 0"
    ):
        refuse_empty_shares(resolve(*given), tmp_path)
    with pytest.raises(ConfigError, match=r"--train-data-path: leaves nothing to validate on"):
        refuse_empty_shares(resolve("--train-data-path", many), tmp_path)
    refuse_empty_shares(
        resolve(*given, MCORE_RELEASE_VERSION="0.13"), tmp_path
    )  # skips it by itself


def test_nothing_to_train_on_is_refused_but_for_an_evaluation(many: str, tmp_path: Path) -> None:
    given = ("--data-path", many, "--split", "0,100,0")
    with pytest.raises(ConfigError, match="leaves nothing to train on"):
        refuse_empty_shares(resolve(*given), tmp_path)
    refuse_empty_shares(resolve(*given, "--skip-train"), tmp_path)


def test_a_path_of_the_container_is_looked_up_on_the_host(one: str, tmp_path: Path) -> None:
    run = resolve("--data-path", "/inside/one")
    refuse_empty_shares(run, REPOSITORY)
    with pytest.raises(ConfigError, match=re.escape(f"{one}.idx")):
        refuse_empty_shares(run, REPOSITORY, mounts=f"/somewhere:/else,{tmp_path}:/inside:ro")


def test_words_are_weights_only_where_each_prefix_has_one() -> None:
    assert prefixes_of(("1", "a", "2e-1", "b")) == ("a", "b")
    assert prefixes_of(("1", "a", "b")) == ("1", "a", "b")
    assert prefixes_of(("a", "b")) == ("a", "b")


@pytest.mark.parametrize("launcher", ["local", "slurm"])
def test_a_launch_ends_before_anything_is_made(launcher: str, one: str, tmp_path: Path) -> None:
    given = {"MODEL": "Tiny-Mixtral", "CLUSTER": "local", "MOE_BENCH_DEVICE": "cpu"}
    given |= {"PATH": os.environ["PATH"], "OUTPUT_PATH": str(tmp_path / "runs")}
    flags = ("--data-path", one, "--tokenizer-type", "NullTokenizer", "--vocab-size", "257")
    done = subprocess.run(
        [sys.executable, "-m", "moe_bench", "launch", launcher, *flags],
        env={"PYTHONPATH": str(REPOSITORY), **given},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "has 1 document(s), of which --split 90,5,5" in done.stderr
    assert not (tmp_path / "runs").exists()
