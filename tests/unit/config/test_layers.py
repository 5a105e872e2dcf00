"""One precedence list decides, and nothing overrides in silence."""

from __future__ import annotations

import pytest

from moe_bench.config.layers import MEANING, PRECEDENCE, Candidate, fold
from moe_bench.config.run import Origin


def said(layer: str, value: str) -> Candidate:
    return Candidate(name="x", value=value, origin=Origin(layer=layer, place=f"{layer}-place"))


@pytest.mark.parametrize("order", [PRECEDENCE, tuple(reversed(PRECEDENCE))])
def test_the_highest_layer_wins_whatever_the_order_of_mention(order: tuple[str, ...]) -> None:
    setting = fold(said(layer, layer) for layer in order)["x"]
    assert setting.value == "flag"
    assert [lost.value for lost in setting.overrode] == list(PRECEDENCE[1:])


def test_within_a_layer_the_later_wins() -> None:
    setting = fold([said("flag", "1"), said("flag", "2")])["x"]
    assert (setting.value, setting.overrode[0].value) == ("2", "1")


def test_an_equal_value_is_not_said_to_be_overridden() -> None:
    assert fold([said("model", "1"), said("flag", "1")])["x"].overrode == ()


def test_every_layer_is_explained() -> None:
    assert set(MEANING) == set(PRECEDENCE)


def test_the_order_is_the_one_that_users_are_told() -> None:
    confs = ("cluster", "runtime", "common")
    assert ("flag", "environment", *confs, "model", "derived", "default") == PRECEDENCE
