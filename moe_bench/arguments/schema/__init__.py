"""Megatron's flags, as data per release: what each accepts, and what became of those that are gone.

`load("0.16.1")` reads the shipped table (releases 0.11 to 0.19; made by tools/extract_flags.py); `schema_for(path)` reads the
source of the Megatron-LM checkout itself. Neither imports torch or Megatron.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from moe_bench.arguments.schema.flag_schema import FlagSchema
from moe_bench.arguments.schema.spec import FlagSpec
from moe_bench.arguments.schema.store import from_checkout, release_lines, releases_with, shipped

__all__ = ["FlagSchema", "FlagSpec", "load", "release_lines", "releases_with", "schema_for"]


@cache
def load(release: str) -> FlagSchema:
    """Flags of a release (`0.16`, `0.16.1`). Raises ArgumentsError for one the table lacks."""
    return FlagSchema(release=release, flags=shipped(release))


def schema_for(release_or_checkout: str | Path, *, cache_dir: Path | None = None) -> FlagSchema:
    """Flags of a release, or of the Megatron-LM checkout at a path: then its own source decides, whatever it calls itself.

    `cache_dir` keeps a checkout's flags between calls; they are read anew when one of its files changes.
    """
    if isinstance(release_or_checkout, str):
        return load(release_or_checkout)
    flags, release, unread = from_checkout(release_or_checkout, cache_dir)
    return FlagSchema(release=release or str(release_or_checkout), flags=flags, unread=unread)
