"""Mock data and rehearsals need no tokenizer of the Hugging Face hub; one that the user names stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.config.gather import MODELS
from moe_bench.config.run import ResolvedRun
from tests.support.projects import CPU, REPOSITORY, repository

PRESETS = sorted(path.stem for path in (REPOSITORY / MODELS).glob("*.yaml"))
HUB = "deepseek-ai/DeepSeek-V3"


def resolve(*words: str, local: bool = True, **given: str) -> ResolvedRun:
    knobs = {"MODEL": "DeepSeek-V3", "CLUSTER": "local", "MCORE_RELEASE_VERSION": "0.19.2"}
    return repository().resolve({**knobs, **given}, words, machine=CPU, local=local)


def tokenizer(run: ResolvedRun) -> tuple[str, ...]:
    flags = ("--tokenizer-type", "--tokenizer-model", "--vocab-size")
    return tuple(run.args[flag].value for flag in flags if flag in run.args)


def said(run: ResolvedRun) -> list[str]:
    return [one.used for one in run.substitutions if one.asked.startswith("--tokenizer-type")]


@pytest.mark.parametrize("model", PRESETS)
def test_a_rehearsal_on_mock_data_asks_no_hub(model: str) -> None:
    run = resolve("--mock-data", MODEL=model, REHEARSE="1")
    assert tokenizer(run) == ("NullTokenizer", "257")
    assert len(said(run)) == (not model.startswith("Tiny-"))


@pytest.mark.parametrize("model", ["DeepSeek-V3", "Mixtral-8x7B"])
def test_mock_data_on_a_cluster_have_as_many_ids_as_the_model(model: str) -> None:
    real = resolve(MODEL=model, local=False)
    run = resolve("--mock-data", MODEL=model, local=False)
    assert tokenizer(run) == ("NullTokenizer", real.args["--vocab-size"].value)
    assert said(run) == [f"{real.args['--vocab-size'].value} ids without text (NullTokenizer)"]


def test_a_release_that_counts_the_end_token_on_top_is_given_one_id_less() -> None:
    run = resolve("--mock-data", local=False, MCORE_RELEASE_VERSION="0.17.0")
    assert tokenizer(run) == ("NullTokenizer", "129279")
    assert said(run) == ["129280 ids without text (NullTokenizer)"]


def test_a_rehearsal_on_the_users_data_keeps_the_vocabulary_and_asks_no_hub() -> None:
    run = resolve(REHEARSE="1", DATA_PATH="/data/text")
    assert tokenizer(run) == ("NullTokenizer", "129280")


def test_a_real_run_on_the_users_data_has_the_models_own_tokenizer() -> None:
    run = resolve(local=False, DATA_PATH="/data/text")
    assert tokenizer(run) == ("HuggingFaceTokenizer", HUB, "129280")


@pytest.mark.parametrize("rehearse", ["0", "1"])
def test_a_tokenizer_that_the_user_names_stays_with_its_vocabulary(rehearse: str) -> None:
    kept = ("HuggingFaceTokenizer", "mine/own", "129280")
    for words, given in (
        ((), {"TOKENIZER_MODEL": "mine/own"}),
        (("--tokenizer-model", "mine/own"), {}),
        ((), {"TRAINING_PARAMS": "--tokenizer-model mine/own"}),
    ):
        local = rehearse == "1"
        run = resolve("--mock-data", *words, local=local, REHEARSE=rehearse, **given)
        assert tokenizer(run) == kept
        assert not said(run)


def test_a_path_in_the_models_own_yaml_stays(tmp_path: Path) -> None:
    text = (REPOSITORY / MODELS / "DeepSeek-V3.yaml").read_text()
    own = tmp_path / "own.yaml"
    own.write_text(text.replace("${TOKENIZER_MODEL}", "/data/tokenizer"))
    run = resolve("--mock-data", local=False, TRAINING_PARAMS_PATH=str(own))
    assert tokenizer(run) == ("HuggingFaceTokenizer", "/data/tokenizer", "129280")


def test_data_that_mock_data_replace_are_named() -> None:
    for words, given in (((), {"DATA_PATH": "/data/text"}), (("--data-path", "/data/text"), {})):
        run = resolve("--mock-data", *words, local=False, **given)
        assert "--data-path" not in run.args
        assert "--data-path /data/text" in [one.asked for one in run.substitutions]
