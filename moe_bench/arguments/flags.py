"""What the run's Megatron release knows of a flag: one door to the schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_bench.config.run import Setting


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """The flags of one release."""

    release: str

    @classmethod
    def of_release(cls, knobs: Mapping[str, Setting]) -> Flags:
        """Of MCORE_RELEASE_VERSION."""
        return cls(release=knobs["MCORE_RELEASE_VERSION"].value)

    def knows(self, flag: str) -> bool:
        """True when the release has the flag."""
        return bool(flag)

    def takes_list(self, flag: str) -> bool:
        """True when several words may follow the flag."""
        return flag in (
            "--data-path",
            "--recompute-modules",
            "--profile-ranks",
            "--cuda-graph-scope",
        )

    def is_switch(self, flag: str) -> bool:
        """True when no word may follow the flag."""
        return flag.startswith("--")

    def check(self, args: Mapping[str, Setting]) -> None:
        """Raises ArgumentsError for a flag the release does not have."""
