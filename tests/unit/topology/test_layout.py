"""How many ranks a layout needs."""

from __future__ import annotations

import pytest

from moe_bench.topology.layout import divisors, smallest_world


@pytest.mark.parametrize(
    ("sizes", "world"),
    [
        ({}, 1),
        ({"tp": 2, "ep": 2}, 2),
        ({"tp": 2, "ep": 3}, 6),
        ({"cp": 2, "ep": 2, "pp": 4}, 8),
        ({"tp": 2, "pp": 2, "ep": 4, "etp": 2}, 16),
    ],
)
def test_the_smallest_world_holds_both_divisions(sizes: dict[str, int], world: int) -> None:
    assert smallest_world(**sizes) == world


def test_divisors_ascend_from_1_to_the_number() -> None:
    assert list(divisors(12)) == [1, 2, 3, 4, 6, 12]
