"""What became of flags: spellings of one thing, flags that are gone, flags better written otherwise."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from moe_bench.arguments import compiled

RENAMES = Path(__file__).parent / "renames.yaml"


class SameThing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Spellings of one thing, oldest first."""

    flags: tuple[str, ...]
    note: str = ""
    value: str = ""
    """What the newest spelling is given where the older one was a switch."""


class Gone(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A flag whose meaning later releases do not have."""

    flag: str
    effect: Literal["none", "lost"]
    """none: a run is the same without it."""
    reason: str


class Deprecated(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    omit_defaults=True,
    rename={"since": "from"},
):
    """A flag still parsed but better written otherwise."""

    flag: str
    effect: Literal["none", "lost", "refused", "works"]
    """none: ignored and harmless; lost: ignored, though it asks for something; refused: Megatron stops; works: as before."""
    reason: str
    since: str = "0.11"


class Renames(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """renames.yaml."""

    same: tuple[SameThing, ...]
    gone: tuple[Gone, ...]
    deprecated: tuple[Deprecated, ...]

    def siblings(self, flag: str) -> list[tuple[str, SameThing]]:
        """Other spellings of what a flag says, newest first."""
        return [
            (other, entry)
            for entry in self.same
            if flag in entry.flags
            for other in reversed(entry.flags)
            if other != flag
        ]

    def departed(self, flag: str) -> Gone | None:
        """The flag's entry among those gone."""
        return next((entry for entry in self.gone if entry.flag == flag), None)


@cache
def renames() -> Renames:
    """What renames.yaml says, read once."""
    return compiled.load(RENAMES, Renames) or read_renames()


def read_renames() -> Renames:
    """renames.yaml itself."""
    import yaml  # noqa: PLC0415 - only after an edit

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return msgspec.convert(yaml.load(RENAMES.read_bytes(), Loader=loader), type=Renames)
