"""Budgets that hold in the worst case."""

from __future__ import annotations

import pytest

from moe_bench.errors import ConfigError
from moe_bench.results.sweep_record import Point
from moe_bench.sweep.cost import refuse_too_small, within


def point(number: int, *, nodes: int, run_time_s: int = 3600) -> Point:
    return Point(
        number=number,
        name=str(number),
        values={"TP": str(number)},
        nodes=nodes,
        ranks=8 * nodes,
        run_time_s=run_time_s,
        script_sha256="",
    )


def test_points_that_fit_are_taken_in_order_and_a_large_one_does_not_stop_smaller_ones() -> None:
    fit, over = within([point(1, nodes=1), point(2, nodes=4), point(3, nodes=1)], 2.5)
    assert [one.number for one in fit] == [1, 3]
    assert [one.number for one in over] == [2]


def test_without_a_budget_everything_fits() -> None:
    assert within([point(1, nodes=1000)], None)[1] == []


def test_a_budget_below_the_cheapest_point_is_refused_with_its_cost() -> None:
    with pytest.raises(ConfigError, match=r"0\.5 is less than .* 1 node-hours .*point 2"):
        refuse_too_small([point(1, nodes=2), point(2, nodes=1)], 0.5)
    refuse_too_small([point(1, nodes=2), point(2, nodes=1)], 1.0)
