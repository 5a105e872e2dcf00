"""Order statistics: they need no assumption on how step times are distributed, and one slow step does not move them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Distribution:
    """Of one quantity over the steps measured."""

    count: int
    median: float
    lower_quartile: float
    upper_quartile: float
    smallest: float
    largest: float
    interval: tuple[float, float] | None
    """95 % confidence interval of the median (order statistics, steps taken as independent); None below 6 values,
    for which no such interval exists."""

    @property
    def spread(self) -> float:
        """Interquartile range over the median; 0 when the median is 0."""
        return (self.upper_quartile - self.lower_quartile) / self.median if self.median else 0.0


def distribution(values: Sequence[float]) -> Distribution | None:
    """Of the finite values; None when there is none."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if not ordered:
        return None
    return Distribution(
        count=len(ordered),
        median=quantile(ordered, 0.5),
        lower_quartile=quantile(ordered, 0.25),
        upper_quartile=quantile(ordered, 0.75),
        smallest=ordered[0],
        largest=ordered[-1],
        interval=median_interval(ordered),
    )


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Of values in ascending order, interpolated linearly."""
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def median_interval(ordered: Sequence[float]) -> tuple[float, float] | None:
    """The narrowest symmetric pair of order statistics that covers the median with at least 95 %.

    The k-th smallest and k-th largest of n values enclose the median with probability 1 - 2 P(B < k), B binomial(n, 1/2)
    (Conover, Practical Nonparametric Statistics, section 3.2).
    """
    n = len(ordered)
    tail = 0.0
    k = 0
    while True:
        tail += math.exp(
            math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2)
        )
        if 2 * tail > 1 - CONFIDENCE:
            break
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None
