"""A run whose data, checkpoint or tokenizer are not on this machine ends before its ranks start."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from moe_bench.checkpoint.layout import TRACKER
from moe_bench.cli._inputs import refuse_missing, refuse_unnamed_tokenizer
from moe_bench.config.run import Origin, ResolvedRun, Setting
from moe_bench.errors import ConfigError
from tests.support.projects import CPU, REPOSITORY, repository


def resolve(*words: str, **given: str) -> ResolvedRun:
    knobs = {"MODEL": "Mixtral-8x7B", "MOE_BENCH_DEVICE": "cpu", "PRETRAIN": "0", "PP": "1"}
    knobs |= {"VPP": "1", "EP": "2", **given}
    return repository().resolve(knobs, words, machine=CPU, local=True)


def test_what_is_there_is_let_be(tmp_path: Path) -> None:
    for name in ("text.idx", "more.idx", "tokenizer.model", TRACKER):
        (tmp_path / name).touch()
    here = {"LOAD_PATH": str(tmp_path), "TOKENIZER_MODEL": str(tmp_path / "tokenizer.model")}
    for words, given in (
        ((), {"DATA_PATH": str(tmp_path / "text")}),
        (("--data-path", "0.3", str(tmp_path / "text"), "0.7", str(tmp_path / "more")), {}),
        (("--data-path", "text"), {}),  # relative to where the ranks start
        (("--mock-data",), {}),
    ):
        refuse_missing(resolve(*words, **here, **given), tmp_path)
    refuse_missing(resolve("--mock-data", TOKENIZER_MODEL="owner/name"), tmp_path)


@pytest.mark.parametrize(
    ("words", "given", "said"),
    [
        (
            (),
            {"DATA_PATH": "/no/text"},
            "DATA_PATH=/no/text (environment): there is no /no/text.idx",
        ),
        (("--data-path", "1", "/no/text"), {}, "/no/text.idx; it is the prefix"),
        (("--valid-data-path", "/no/text"), {}, "/no/text.idx; it is the prefix"),
        (("--mock-data",), {"LOAD_PATH": "/no/where"}, "LOAD_PATH=/no/where (environment)"),
        (("--mock-data",), {"LOAD_PATH": str(REPOSITORY)}, "there is no checkpoint in"),
        (("--mock-data", "--load", "no/where"), {}, "--load no/where (command line): there is no"),
        (("--mock-data",), {"TOKENIZER_MODEL": "/no/m"}, "TOKENIZER_MODEL=/no/m (environment)"),
    ],
)
def test_what_is_not_there_is_named(
    words: tuple[str, ...], given: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        refuse_missing(resolve(*words, **given), REPOSITORY)


def test_conversations_to_fine_tune_on_are_a_file_without_an_index(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").touch()
    place = Origin(layer="flag", place="command line")

    def tuning(path: str) -> ResolvedRun:
        run = resolve("--data-path", path)
        return replace(run, args={**run.args, "--sft": Setting(value="true", origin=place)})

    refuse_missing(tuning(str(tmp_path / "chat.jsonl")), tmp_path)
    with pytest.raises(ConfigError, match=re.escape("/no/chat.jsonl; --sft reads")):
        refuse_missing(tuning("/no/chat.jsonl"), tmp_path)


def test_a_checkpoint_nearby_is_named(tmp_path: Path) -> None:
    (tmp_path / "iter_0000020").mkdir()
    (tmp_path / TRACKER).write_text("20")
    said = f"; there is one in {tmp_path};"
    with pytest.raises(ConfigError, match=re.escape(said)):
        refuse_missing(resolve("--mock-data", LOAD_PATH=str(tmp_path / "iter_0000020")), tmp_path)


def test_going_on_in_a_folder_that_is_still_empty_is_a_start(tmp_path: Path) -> None:
    run = resolve("--mock-data", "--load", f"{tmp_path}/", "--save", str(tmp_path))
    refuse_missing(run, tmp_path)
    assert "--exit-on-missing-checkpoint" not in run.args
    started_from = resolve("--mock-data", LOAD_PATH=str(tmp_path))
    demanded = started_from.args["--exit-on-missing-checkpoint"]
    assert demanded.origin.place.startswith(f"--load {tmp_path} (")


def test_a_tokenizer_that_is_read_must_be_named() -> None:
    said = "--tokenizer-type Llama2Tokenizer (model_configs/benchmarking/Mixtral-8x7B.yaml:"
    with pytest.raises(ConfigError, match=re.escape(said) + r"\d+\): nothing says which one"):
        refuse_unnamed_tokenizer(resolve("--data-path", "text"))
    refuse_unnamed_tokenizer(resolve("--data-path", "text", TOKENIZER_MODEL="owner/name"))
    refuse_unnamed_tokenizer(resolve("--mock-data"))
