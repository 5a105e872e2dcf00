"""Where a release's flags come from: the shipped table, or the checkout MEGATRON_PATH names."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import msgspec

from moe_bench.arguments.schema.spec import FlagSpec
from moe_bench.errors import ArgumentsError

TABLE = Path(__file__).parent / "flags.json"


class _Variant(msgspec.Struct, frozen=True, rename={"where": "in"}):
    """A spec and the release lines that have it."""

    where: tuple[int, ...]
    spec: FlagSpec


class _Table(msgspec.Struct, frozen=True):
    """flags.json."""

    lines: tuple[str, ...]
    sources: dict[str, tuple[str, ...]]
    flags: tuple[_Variant, ...]


class _Cached(msgspec.Struct, frozen=True):
    """A checkout's flags as kept between runs."""

    release: str
    flags: tuple[FlagSpec, ...]
    unread: tuple[str, ...]
    hashes: dict[str, str]


@cache
def _table() -> _Table:
    return msgspec.json.decode(TABLE.read_bytes(), type=_Table)


def release_lines() -> tuple[str, ...]:
    """The release lines with shipped flags, oldest first: `0.11`, ..., `0.19`."""
    return _table().lines


def releases_with(flag: str) -> tuple[str, ...]:
    """The release lines that have a flag, oldest first; empty when none of the table does."""
    table = _table()
    where = {index for row in table.flags if flag in row.spec.options for index in row.where}
    return tuple(table.lines[index] for index in sorted(where))


def shipped(release: str) -> dict[str, FlagSpec]:
    """Every spelling of the release's flags -> its spec. Raises ArgumentsError for a release the table lacks."""
    table = _table()
    line = ".".join(release.split(".")[:2])
    if line not in table.lines:
        raise ArgumentsError(
            f"MCORE_RELEASE_VERSION={release}: the flags of Megatron-Core {table.lines[0]} to "
            f"{table.lines[-1]} are known, not those of {line}; set MEGATRON_PATH to a checkout of it and leave "
            "MCORE_RELEASE_VERSION unset, then its own source says which flags there are"
        )
    index = table.lines.index(line)
    found: dict[str, FlagSpec] = {}
    for row in table.flags:
        if index in row.where:
            found.update(dict.fromkeys(row.spec.options, row.spec))
    return found


def from_checkout(
    root: Path, cache_dir: Path | None
) -> tuple[dict[str, FlagSpec], str, tuple[str, ...]]:
    """Flags, release and unread declarations of a Megatron-LM tree; kept in `cache_dir` until a file it rests on changes."""
    kept = None if cache_dir is None else cache_dir / f"{_tree_key(root)}.json"
    cached = _still_true(root, kept)
    if cached is None:
        cached = _read(root)
        if kept is not None:
            _keep(kept, cached)
    found: dict[str, FlagSpec] = {}
    for spec in cached.flags:
        found.update(dict.fromkeys(spec.options, spec))
    return found, cached.release, cached.unread


def _tree_key(root: Path) -> str:
    return _sha256(str(root.resolve()).encode())[:16]


def _sha256(data: bytes) -> str:
    import hashlib  # noqa: PLC0415 - for checkouts only

    return hashlib.sha256(data).hexdigest()


def _still_true(root: Path, kept: Path | None) -> _Cached | None:
    if kept is None or not kept.is_file():
        return None
    try:
        cached = msgspec.json.decode(kept.read_bytes(), type=_Cached)
    except (OSError, msgspec.DecodeError):
        return None  # a damaged cache is only a slower start
    for name, digest in cached.hashes.items():
        path = root / name
        if not path.is_file() or _sha256(path.read_bytes()) != digest:
            return None
    return cached


def _read(root: Path) -> _Cached:
    from moe_bench.arguments.schema.extract import extract  # noqa: PLC0415 - seldom needed

    found = extract(root)
    return _Cached(
        release=found.release, flags=found.flags, unread=found.unread, hashes=found.hashes
    )


def _keep(path: Path, cached: _Cached) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{_sha256(str(path).encode())[:8]}.partial")
        partial.write_bytes(msgspec.json.encode(cached))
        partial.replace(path)
    except OSError:
        return  # a read-only project reads the checkout each time
