"""Which layers each stage holds, and the strings that say it."""

from __future__ import annotations

import pytest

from moe_bench.topology.pipeline import even, from_layout, uneven, unrolled


def test_virtual_stages_interleave() -> None:
    found = even(8, pp=2, vpp=2)
    assert [stage.layers for stage in found.stages] == [(1, 2), (3, 4), (5, 6), (7, 8)]
    assert found.layers_of_rank(0) == (1, 2, 5, 6)


def test_embedding_and_loss_may_count_as_layers() -> None:
    found = even(94, pp=8, vpp=4, count_embedding=True, count_loss=True)
    assert [len(stage.layers) for stage in found.stages] == [2, *[3] * 30, 2]
    assert found.num_layers == 94


def test_uneven_ends() -> None:
    found = uneven(61, pp=16, first=4, last=1)
    assert [len(found.layers_of_rank(rank)) for rank in range(16)] == [4, *[4] * 14, 1]
    assert found.stages[-1].loss


def test_two_stages_of_their_own_sizes_leave_megatron_none_to_lay_virtual_stages_out_over() -> None:
    with pytest.raises(ValueError, match="give only one of the two"):
        uneven(8, pp=2, vpp=2, first=4, last=4)
    assert uneven(10, pp=2, vpp=2, first=6).num_layers == 10


def test_one_uneven_end() -> None:
    assert [len(uneven(7, pp=3, last=1).layers_of_rank(rank)) for rank in range(3)] == [3, 3, 1]


@pytest.mark.parametrize(
    ("text", "pp", "counts"),
    [
        ("Et*2|(tt|)*22t|(tt|)*7mL", 8, [2, *[2] * 22, 1, *[2] * 7, 0]),
        ("Et|(tt|)*30mL", 8, [1, *[2] * 30, 0]),
        ("Et*4|(tttt|)*14tmL", 4, [4, *[4] * 14, 1]),
        ("Ettt|(tt|)*29,m|L", 16, [3, *[2] * 29, 0, 0]),
    ],
)
def test_published_layout_strings(text: str, pp: int, counts: list[int]) -> None:
    found = from_layout(text, pp=pp)
    assert [len(stage.layers) for stage in found.stages] == counts
    assert sorted(layer for stage in found.stages for layer in stage.layers) == list(
        range(1, sum(counts) + 1)
    )


@pytest.mark.parametrize("text", ["Et*2|(tt|)*30mL", "Ett|ttL", "E|t|t|L"])
def test_a_layout_written_again_means_the_same(text: str) -> None:
    found = from_layout(text, pp=1)
    assert unrolled(found.layout()) == unrolled(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tt|ttL", "E \\(embedding\\) must stand in it exactly once"),
        ("Ett|tt", "L \\(loss\\) must stand in it exactly once"),
        ("tEt|tL", "E \\(embedding\\) must come first"),
        ("Et|Lt", "L \\(loss\\) must come last"),
        ("Emt|tL", "m \\(MTP\\) must come after every t"),
        ("Et;|tL", "';' is none of"),
    ],
)
def test_bad_layout_strings(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_layout(text, pp=1)


def test_the_table_shows_every_stage() -> None:
    assert uneven(5, pp=2, first=2, mtp_layers=1).table() == (
        "  stage 0: embedding, layers 1-2 (2)\n  stage 1: layers 3-5 (3), MTP x1, loss"
    )
