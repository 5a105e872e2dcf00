"""Megatron's --split: which sequences of a dataset train, validate and test. Without numpy, as a launch needs it.

megatron/core/datasets/blended_megatron_dataset_config.py (parse_and_normalize_split, convert_split_vector_to_split_matrix)
and blended_megatron_dataset_builder.py (_build_megatron_dataset_splits), the same from 0.11 to 0.19. A share above 0 is
built whether or not anything reads it, and on one without tokens _get_num_epochs of gpt_dataset.py counts for ever.
"""

from __future__ import annotations

import re
from itertools import accumulate, pairwise
from pathlib import Path

from moe_bench.data.index_header import HEADER, LENGTH_BYTES
from moe_bench.errors import DataError

type Share = tuple[float, float]
"""Of a dataset's sequences, from 0 to 1: where it begins and ends."""
type Shares = tuple[Share | None, Share | None, Share | None]
"""To train, to validate and to test; None where nothing is built."""

PURPOSES = ("training", "validation", "test")
MEGATRONS_OWN = "969, 30, 1"
"""The split where --data-path is given without one."""
USUAL = "99,1,0"
"""The full-size presets'."""
FEWEST_FOR_USUAL = 51
"""Sequences: of fewer, 1 % rounds to none."""
BLOCK_BYTES = 1 << 20


def shares_of(split: str) -> Shares | None:
    """What `--split 99,1,0` says; None where Megatron itself refuses it."""
    try:
        parts = [float(word) for word in re.findall(r"[.0-9]+", split)]
    except ValueError:
        return None
    if len(parts) > 3 or not any(parts):
        return None
    *_, total = accumulate(parts)  # sum() would round otherwise than numpy does
    ends = [0.0, *accumulate(part / total for part in (*parts, 0.0, 0.0)[:3])]
    train, validation, test = (
        (begin, end) if end > begin else None for begin, end in pairwise(ends)
    )
    return train, validation, test


def sequences_of(share: Share, num_sequences: int) -> range:
    """Those of the share, rounded as Megatron rounds."""
    begin, end = (round(bound * float(num_sequences)) for bound in share)
    return range(begin, end)


def has_tokens(index: Path, sequences: range) -> bool:
    """Whether one of these sequences is not empty. Reads until it finds one. Raises DataError."""
    left = len(sequences) * LENGTH_BYTES
    try:
        with index.open("rb") as stream:
            stream.seek(HEADER.size + sequences.start * LENGTH_BYTES)
            while left > 0:
                block = stream.read(min(left, BLOCK_BYTES))
                if not block:
                    raise DataError(
                        f"{index}: ends before its last length: cut off; prepare it again"
                    )
                if block.count(0) < len(block):
                    return True
                left -= len(block)
    except OSError as error:
        raise DataError(f"{index}: cannot be read: {error.strerror}") from error
    return False
