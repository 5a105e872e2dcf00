"""The unfinished output: append-only files beside the target and a ledger of what in them is whole.

`PREFIX.partial/` holds `plan.json` (what is being made), one file for each stream, and `ledger.jsonl`. A commit first
makes the streams' bytes durable, then appends one line with their sizes. Whoever comes after a crash cuts each stream
back to the last whole line: what was written after it never happened.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from moe_bench.errors import DataError


@dataclass(kw_only=True, slots=True)
class Progress:
    """What is safely stored. Grows only through commits."""

    units: int = 0
    """Units whose output is in the streams."""
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """Decompressed bytes read."""
    blank_lines: int = 0
    source_units: int = 0
    """Of these, units of the source that is not yet read to its end."""
    crc32: int = 0
    """Of that source's text so far: tells a resumed run that its input is still the same."""
    skips: dict[str, int] = field(default_factory=dict)
    """Documents left out, by reason."""
    sources: int = 0
    """Read to their end."""
    complete: bool = False
    """All sources were read to their end."""


_SPELLED = {"json_keys": "--json-key", "max_document_bytes": "--max-document-mib"}
_READ_BIT_BY_BIT = ("options", "sources")
"""Of a plan's keys, those that may differ in part."""


class PartialStore:
    """Open, append and commit. One process at a time: a lock tells the second."""

    def __init__(self, folder: Path, *, plan: Mapping[str, Any], streams: tuple[str, ...]) -> None:
        self.folder, self._plan, self._names = folder, plan, streams
        self._files: dict[str, BinaryIO] = {}
        self._lock: BinaryIO | None = None
        self.progress = Progress()
        self.committed_documents = 0

    def __enter__(self) -> Self:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            sizes = self._read_ledger()
            self._check_plan()
            self._open_streams(sizes)
        except OSError as error:
            self.close()
            raise write_error(self.folder, error) from error
        except DataError:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def path(self, stream: str) -> Path:
        """Where a stream's bytes are."""
        return self.folder / stream

    def append(self, stream: str, data: bytes) -> None:
        """Buffered; safe only after the next commit. Raises DataError when the disk is full."""
        try:
            self._files[stream].write(data)
        except OSError as error:
            raise write_error(self.path(stream), error) from error

    def commit(self) -> None:
        """Make all that was appended, and self.progress, durable. Raises DataError when the disk is full."""
        try:
            sizes = {name: self._flush(stream) for name, stream in self._files.items()}
            record = {"sizes": sizes, "progress": _to_json(self.progress)}
            with (self.folder / "ledger.jsonl").open("ab") as ledger:
                ledger.write(json.dumps(record).encode() + b"\n")
                ledger.flush()
                os.fsync(ledger.fileno())
        except OSError as error:
            raise write_error(self.folder, error) from error
        self.committed_documents = self.progress.documents

    def remove(self) -> None:
        """The output is in place: the folder has served."""
        self.close()
        shutil.rmtree(self.folder)

    def close(self) -> None:
        """Without a commit: what was appended since the last one is cut off by the next to come."""
        self.close_streams()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def close_streams(self) -> None:
        """Bytes that no commit has counted may be lost."""
        for stream in self._files.values():
            with suppress(OSError):  # a full disk again, for bytes the ledger does not count
                stream.close()
        self._files.clear()

    def _take_lock(self) -> None:
        self._lock = (self.folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{self.folder}: another `data prepare` is writing this output; wait for it or choose another --output"
            ) from error

    def _check_plan(self) -> None:
        """What is stored must be what this plan would have stored. What was not read yet may have changed since."""
        path = self.folder / "plan.json"
        wanted = json.loads(json.dumps(self._plan))
        found = json.loads(path.read_bytes()) if path.exists() else wanted
        different = [
            *(
                key
                for key in wanted
                if key not in _READ_BIT_BY_BIT and found.get(key) != wanted[key]
            ),
            *_other_options(found["options"], wanted["options"], self.progress),
            *(
                ["sources"]
                if _other_sources(found["sources"], wanted["sources"], self.progress)
                else []
            ),
        ]
        if different:
            raise DataError(
                f"{self.folder}: was begun with other {', '.join(different)}; run the command it was begun with, "
                "or start afresh with --restart"
            )
        if found != wanted or not path.exists():
            write_aside(path, json.dumps(self._plan, indent=1).encode())

    def _read_ledger(self) -> dict[str, int]:
        path = self.folder / "ledger.jsonl"
        sizes = dict.fromkeys(self._names, 0)
        if not path.exists():
            return sizes
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            sizes, whole = record["sizes"], whole + len(line)
            self.progress = Progress(**record["progress"])
        os.truncate(path, whole)
        self.committed_documents = self.progress.documents
        return sizes

    def _open_streams(self, sizes: Mapping[str, int]) -> None:
        for name in self._names:
            path = self.path(name)
            if self.progress.complete and not path.exists():
                continue  # already renamed to its final name
            stream = path.open("ab")
            self._files[name] = stream
            if stream.tell() < sizes[name]:
                raise DataError(
                    f"{path}: has {stream.tell()} bytes where the ledger says {sizes[name]}; start afresh with --restart"
                )
            stream.truncate(sizes[name])

    @staticmethod
    def _flush(stream: BinaryIO) -> int:
        stream.flush()
        os.fsync(stream.fileno())
        return stream.tell()


def _other_options(
    found: Mapping[str, Any], wanted: Mapping[str, Any], progress: Progress
) -> list[str]:
    """As the command spells them. Until something is left out, it does not matter whether it would be."""
    names = [name for name in wanted if name != "on_error" and found.get(name) != wanted[name]]
    if wanted["on_error"] == "fail" and progress.skips:
        names.append("on_error")
    return [_SPELLED.get(name, f"--{name.replace('_', '-')}") for name in names]


def _other_sources(
    found: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]], progress: Progress
) -> bool:
    """Of the source that is half read, its stored units are compared when it is read again: it may be mended."""
    if progress.complete or progress.skips:  # what was left out of it is in no unit
        return found != wanted
    read = progress.sources
    if found[:read] != wanted[:read]:
        return True
    if not progress.source_units:
        return False
    half = wanted[read] if read < len(wanted) else {}
    return any(half.get(key) != found[read][key] for key in ("name", "form"))


def write_aside(path: Path, data: bytes) -> None:
    """The file is there whole or not at all. Raises OSError."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_error(path: Path, error: OSError) -> DataError:
    """In the user's words: the disk is full, the target is read-only, ..."""
    return DataError(
        f"{path}: cannot be written: {error.strerror or error}; "
        "what is stored so far is kept: mend this and run the same command to go on"
    )


def _to_json(progress: Progress) -> dict[str, Any]:
    return {name: getattr(progress, name) for name in Progress.__slots__}
