"""Which ranks form which group, in Megatron's order (tp-cp-ep-dp-pp). Pure."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm, prod

import msgspec

DENSE_ORDER = ("tp", "cp", "dp", "pp")
"""Fastest first: neighbouring ranks share a tensor-parallel group."""
EXPERT_ORDER = ("etp", "ep", "edp", "pp")
"""The same ranks, as the expert layers divide them."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """How a world is divided. The experts divide the same ranks of a pipeline stage in their own way."""

    world_size: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    def __post_init__(self) -> None:
        for divisor, what in (
            (self.tp * self.cp * self.pp, "TP*CP*PP"),
            (self.etp * self.ep * self.pp, "ETP*EP*PP"),
        ):
            if self.world_size % divisor:
                raise ValueError(
                    f"{what}={divisor} does not divide the world of {self.world_size} ranks"
                )

    @property
    def dp(self) -> int:
        """Data-parallel size of the dense layers."""
        return self.world_size // (self.tp * self.cp * self.pp)

    @property
    def edp(self) -> int:
        """Data-parallel size of the expert layers."""
        return self.world_size // (self.etp * self.ep * self.pp)

    def sizes(self, order: tuple[str, ...]) -> tuple[int, ...]:
        """Sizes of the named dimensions."""
        return tuple(int(getattr(self, name)) for name in order)

    def coordinates(self, rank: int, order: tuple[str, ...] = DENSE_ORDER) -> dict[str, int]:
        """A rank's place in each dimension of `order`."""
        place = {}
        for name, size in zip(order, self.sizes(order), strict=True):
            rank, place[name] = divmod(rank, size)
        return place

    def groups(self, *names: str, order: tuple[str, ...] = DENSE_ORDER) -> list[list[int]]:
        """Every group over the named dimensions, members ascending; groups by their first rank.

        The members of a group differ only in `names`: `groups("tp")`, `groups("dp", "cp")`,
        `groups("ep", order=EXPERT_ORDER)`.
        """
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            place = self.coordinates(rank, order)
            key = tuple(place[name] for name in order if name not in names)
            found.setdefault(key, []).append(rank)
        return sorted(found.values())

    def group_of(self, rank: int, *names: str, order: tuple[str, ...] = DENSE_ORDER) -> list[int]:
        """The group over `names` that holds `rank`."""
        return next(group for group in self.groups(*names, order=order) if rank in group)


def smallest_world(*, tp: int = 1, cp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1) -> int:
    """The fewest ranks that both divisions fit: lcm(TP*CP, ETP*EP) * PP."""
    return lcm(tp * cp, etp * ep) * pp


def divisors(number: int) -> Iterator[int]:
    """Every divisor, ascending."""
    return (one for one in range(1, number + 1) if number % one == 0)


def product_of(order: tuple[int, ...]) -> int:
    """Product of sizes; 1 for none."""
    return prod(order)
