"""Groups of a layout by hand; tests/ranks/test_topology.py compares many layouts with Megatron itself."""

from __future__ import annotations

import pytest

from moe_bench.topology.layout import EXPERT_ORDER, Layout, smallest_world


def test_neighbours_share_a_tensor_group_and_far_ranks_a_pipeline() -> None:
    layout = Layout(world_size=8, tp=2, pp=2)
    assert layout.dp == 2
    assert layout.groups("tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("pp") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_experts_divide_the_same_ranks_in_their_own_way() -> None:
    layout = Layout(world_size=8, tp=2, ep=4, etp=1)
    assert (layout.dp, layout.edp) == (4, 2)
    assert layout.groups("ep", order=EXPERT_ORDER) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert layout.groups("edp", order=EXPERT_ORDER) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_every_rank_is_in_exactly_one_group_of_each_kind() -> None:
    layout = Layout(world_size=16, tp=2, cp=2, pp=2, ep=2, etp=2)
    for names in (("tp",), ("cp",), ("dp", "cp"), ("pp",)):
        assert sorted(rank for group in layout.groups(*names) for rank in group) == list(range(16))
        assert 5 in layout.group_of(5, *names)


def test_coordinates_name_a_rank() -> None:
    layout = Layout(world_size=16, tp=2, cp=2, pp=2)
    assert layout.coordinates(13) == {"tp": 1, "cp": 0, "dp": 1, "pp": 1}


@pytest.mark.parametrize(
    ("sizes", "world"),
    [
        ({}, 1),
        ({"tp": 2, "ep": 2}, 2),
        ({"tp": 2, "ep": 3}, 6),
        ({"tp": 2, "pp": 2, "ep": 4, "etp": 2}, 16),
    ],
)
def test_the_smallest_world_holds_both_divisions(sizes: dict[str, int], world: int) -> None:
    assert smallest_world(**sizes) == world
    Layout(world_size=world, **sizes)


def test_a_world_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="TP\\*CP\\*PP=3 does not divide the world of 8"):
        Layout(world_size=8, tp=3)
