"""Layouts as they are named on the command line, and what fits into memory."""

from __future__ import annotations

import pytest

from moe_bench.checkpoint.trial import Weight, check_fits, parse_layout
from moe_bench.errors import CheckpointError


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("1", 1), ("EP2", 2), ("TP2EP2", 2), ("TP2ETP2EP2", 4), ("PP2VPP2", 2), ("CP2PP2", 4)],
)
def test_a_layout_takes_as_few_ranks_as_it_can(name: str, ranks: int) -> None:
    assert parse_layout(name).world_size == ranks


@pytest.mark.parametrize("name", ["", "2", "EP", "EP0", "EP2EP2", "DP2", "EP2 ", "ep2", "VPP2"])
def test_anything_else_is_refused_with_examples(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"--layout"):
        parse_layout(name)


def test_layers_are_spread_over_the_stages_however_many_there_are() -> None:
    words = parse_layout("PP2VPP2").flags(num_layers=27)
    assert words[-1] == "E" + "t" * 7 + "|" + "t" * 7 + "|" + "t" * 7 + "|" + "t" * 6 + "L"
    with pytest.raises(CheckpointError, match="3 layers do not fill 4 pipeline stages"):
        parse_layout("PP2VPP2").flags(num_layers=3)


def test_a_model_that_does_not_fit_is_refused_with_the_numbers() -> None:
    weight = Weight(routed=654_000_000_000, others=17_000_000_000)
    layouts = [parse_layout("1"), parse_layout("EP2")]
    words = r"671B parameters in float32 need 2\.5 TiB of memory \(Megatron in EP2\), and 23\.3 GiB are free"
    with pytest.raises(CheckpointError, match=words):
        check_fits(weight, layouts, 25_000_000_000)
    check_fits(Weight(routed=800_000_000, others=100_000_000), layouts, 25_000_000_000)
