"""How many ranks a layout needs. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm


def smallest_world(*, tp: int = 1, cp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1) -> int:
    """The fewest ranks that both divisions of a pipeline stage fit, the dense layers' and the experts': lcm(TP*CP, ETP*EP) * PP."""
    return lcm(tp * cp, etp * ep) * pp


def divisors(number: int) -> Iterator[int]:
    """Every divisor, ascending."""
    return (one for one in range(1, number + 1) if number % one == 0)
