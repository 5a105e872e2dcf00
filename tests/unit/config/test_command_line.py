"""Trailing words become flags with their exact words."""

from __future__ import annotations

import pytest

from moe_bench.config.command_line import parse
from moe_bench.errors import ConfigError


def test_the_four_spellings() -> None:
    found = parse(["--a", "1", "--b=2 3", "--c", "--d", "x", "y z"])
    assert [(flag.name, flag.words) for flag in found] == [
        ("--a", ("1",)),
        ("--b", ("2 3",)),
        ("--c", ()),
        ("--d", ("x", "y z")),
    ]


@pytest.mark.parametrize("word", ["-1", "-0.5", "a=b", "", "$(id)", "-", "|"])
def test_any_word_can_be_a_value(word: str) -> None:
    assert parse(["--a", word])[0].words == (word,)


def test_an_equals_sign_within_the_value_stays() -> None:
    assert parse(["--a=b=c"])[0].words == ("b=c",)


def test_a_word_before_any_flag_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'8' .* belongs to no flag"):
        parse(["8", "--a"])


def test_a_knob_after_the_scripts_name_is_told_where_it_goes() -> None:
    with pytest.raises(ConfigError, match="knobs go before it: TP=2 bash"):
        parse(["TP=2"])


def test_a_word_after_a_value_given_with_equals_is_refused() -> None:
    with pytest.raises(ConfigError, match="belongs to no flag after --a"):
        parse(["--a=1", "2"])


def test_two_hyphens_alone_end_a_flags_words() -> None:
    assert [flag.words for flag in parse(["--", "--a", "1", "--", "--b"])] == [("1",), ()]
    with pytest.raises(ConfigError, match=r"'2' .* belongs to no flag after --a"):
        parse(["--a", "1", "--", "2"])


def test_a_dash_that_an_editor_made_is_named() -> None:
    with pytest.raises(ConfigError, match="write -- with two hyphens"):
        parse(["\u2014-lr", "1"])
