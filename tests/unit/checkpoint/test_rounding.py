"""Rounding to bfloat16 is torch's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from moe_bench.checkpoint.arithmetic import to_bfloat16

torch = pytest.importorskip("torch")


def test_float32_is_rounded_to_the_nearest_bfloat16_and_ties_to_even() -> None:
    bits = np.random.default_rng(3).integers(0, 1 << 32, 20_000, dtype=np.uint32)
    ties = np.arange(0x3F80, 0x3F90, dtype=np.uint32) << 16 | 0x8000
    values = np.concatenate([bits, ties, ties + 1, ties - 1]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(to_bfloat16(values), expected)
