"""How --split divides a dataset, and whether a share holds a token."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.data.index_header import HEADER, MAGIC
from moe_bench.data.split import (
    BLOCK_BYTES,
    FEWEST_FOR_USUAL,
    USUAL,
    has_tokens,
    sequences_of,
    shares_of,
)
from moe_bench.errors import DataError


@pytest.mark.parametrize(
    ("split", "sizes"),
    [
        ("99,1,0", (2, 0, None)),
        ("100,0,0", (2, None, None)),
        ("1", (2, None, None)),
        ("1,1", (1, 1, None)),
        ("0,1,1", (None, 1, 1)),
        ("969, 30, 1", (2, 0, 0)),
    ],
)
def test_two_sequences_are_divided_as_megatron_does(
    split: str, sizes: tuple[int | None, ...]
) -> None:
    shares = shares_of(split)
    assert shares is not None
    found = tuple(None if share is None else len(sequences_of(share, 2)) for share in shares)
    assert found == sizes


@pytest.mark.parametrize("split", ["", "0,0,0", "1,2,3,4", "1.2.3", "words"])
def test_what_megatron_refuses_is_no_split(split: str) -> None:
    assert shares_of(split) is None


def test_the_usual_split_needs_as_many_as_is_said() -> None:
    validation = (shares_of(USUAL) or ())[1]
    assert validation is not None
    for count in range(1, 300):
        assert bool(sequences_of(validation, count)) == (count >= FEWEST_FOR_USUAL)


def test_a_token_is_found_wherever_it_is(tmp_path: Path) -> None:
    """Lengths of several blocks, all 0 but the last."""
    count = BLOCK_BYTES // 4 + 5
    index = tmp_path / "text.idx"
    lengths = bytes(4 * (count - 1)) + (256).to_bytes(4, "little")
    index.write_bytes(HEADER.pack(MAGIC, 1, 8, count, 1) + lengths)
    assert has_tokens(index, range(count))
    assert not has_tokens(index, range(count - 1))
    assert not has_tokens(index, range(3, 3))
    with pytest.raises(DataError, match="cut off"):
        has_tokens(index, range(count, count + 1))
