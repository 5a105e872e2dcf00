"""Which inputs there are, and their bytes: plain, gzip or Zstandard; files, folders or standard input."""

from __future__ import annotations

import gzip
import hashlib
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from moe_bench.errors import DataError, MissingExtraError

type Form = Literal["jsonl", "text"]

SUFFIXES: dict[str, Form] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".rst": "text",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BLOCK_BYTES = 1 << 18
ZSTD_FEED_BYTES = 1 << 14
"""Compressed bytes given to Zstandard at a time: what comes out at once stays bounded."""


class CutOffError(DataError):
    """A compressed input ends before its end, or cannot be decompressed further."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One input."""

    name: str
    """As the user would find it: a path, or `<stdin>`."""
    path: Path | None
    """None for standard input."""
    form: Form
    compression: str | None
    """gzip, zstd or None."""
    size: int
    """Bytes on disk; 0 for standard input, whose size is not known."""
    mtime_ns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """What will be read, and what lay beside it and will not."""

    sources: tuple[Source, ...]
    ignored: tuple[str, ...]
    """Files in a given folder whose suffix is not one of text or JSONL."""
    duplicates: tuple[str, ...]
    """Files named more than once; each is read once."""


def find_sources(names: Sequence[str], *, form: Form | None, skip_duplicates: bool) -> Inputs:
    """Expand folders (sorted by path), refuse what cannot be read. Raises DataError."""
    sources: list[Source] = []
    ignored: list[str] = []
    for name in names:
        if not name:
            raise DataError(
                "an input is empty (''); name a file or a folder, . for the one you are in"
            )
        if name == "-":
            sources.append(_standard_input(form))
            continue
        path = Path(name)
        if path.is_dir():
            inside, others = _in_folder(path, form)
            sources.extend(inside)
            ignored.extend(others)
        else:
            sources.append(_file_source(path, form))
    unique, duplicates = _without_duplicates(sources)
    if duplicates and not skip_duplicates:
        raise DataError(
            f"{duplicates[0]}: given twice (by name, folder or link); name it once, or pass --on-error skip"
        )
    return Inputs(sources=unique, ignored=tuple(ignored), duplicates=duplicates)


def _standard_input(form: Form | None) -> Source:
    if form is None:
        raise DataError(
            "-: standard input has no suffix to tell its form; add --format jsonl or text"
        )
    return Source(name="<stdin>", path=None, form=form, compression=None, size=0, mtime_ns=0)


def _in_folder(folder: Path, form: Form | None) -> tuple[list[Source], list[str]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    known = [path for path in files if _known_form(path) is not None]
    if not known:
        raise DataError(
            f"{folder}: holds no text among {len(files)} files; looked for {' '.join(SUFFIXES)}, "
            "also with .gz or .zst"
        )
    taken = set(known)
    return (
        [_file_source(path, form) for path in known],
        [str(path) for path in files if path not in taken],
    )


def _file_source(path: Path, form: Form | None) -> Source:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(
                f"{path}: is a pipe or a device, which cannot be looked at before it is read; feed it to - with --format"
            )
        with path.open("rb") as stream:
            stream.read(1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    found = form or _known_form(path)
    if found is None:
        raise DataError(f"{path}: its suffix does not tell its form; add --format jsonl or text")
    return Source(
        name=str(path),
        path=path,
        form=found,
        compression=COMPRESSIONS.get(path.suffix.lower()),
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
    )


def _known_form(path: Path) -> Form | None:
    inner = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return SUFFIXES.get(inner.suffix.lower())


def _without_duplicates(sources: Sequence[Source]) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    seen: set[str] = set()
    unique: list[Source] = []
    duplicates: list[str] = []
    for source in sources:
        key = str(source.path.resolve()) if source.path else source.name
        (duplicates if key in seen else unique).append(source.name if key in seen else source)  # type: ignore[arg-type]
        seen.add(key)
    return tuple(unique), tuple(duplicates)


class HashedFile:
    """A binary file whose bytes are counted and hashed as they are read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._digest = hashlib.sha256()
        self.position = 0
        """Bytes read so far."""

    def read(self, size: int = -1) -> bytes:
        """Like a file's."""
        data = self._stream.read(size)
        self._digest.update(data)
        self.position += len(data)
        return data

    def seek(self, position: int) -> int:
        """GzipFile asks for a file that has this; reading in one pass never calls it."""
        raise OSError(f"cannot go to byte {position}: a source is read once, in order")

    @property
    def sha256(self) -> str:
        """Of all that was read."""
        return self._digest.hexdigest()


@contextmanager
def opened(source: Source) -> Iterator[HashedFile]:
    """The source's raw bytes."""
    if source.path is None:
        yield HashedFile(sys.stdin.buffer)
        return
    try:
        stream = source.path.open("rb")
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error.strerror}") from error
    with stream:
        yield HashedFile(stream)


def blocks_of(source: Source, raw: HashedFile) -> Iterator[bytes]:
    """Decompressed bytes, bounded block by block. Raises CutOffError where they end too early."""
    try:
        if source.compression == "gzip":
            yield from _read_all(gzip.GzipFile(fileobj=raw, mode="rb"))
        elif source.compression == "zstd":
            yield from _zstd_blocks(source, raw)
        else:
            yield from _read_all(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CutOffError(
            f"{source.name}: damaged or cut off after {raw.position} bytes: {error}; "
            "fetch it again, or pass --on-error skip to keep what comes before"
        ) from error
    except OSError as error:
        raise DataError(f"{source.name}: cannot be read: {error.strerror or error}") from error


def _read_all(stream: HashedFile | gzip.GzipFile) -> Iterator[bytes]:
    while block := stream.read(BLOCK_BYTES):
        yield block


def _zstd_blocks(source: Source, raw: HashedFile) -> Iterator[bytes]:
    try:
        import zstandard  # noqa: PLC0415 - only .zst inputs need it
    except ModuleNotFoundError as error:
        raise MissingExtraError("zstandard", extra="train", needed_for=source.name) from error
    context = zstandard.ZstdDecompressor()
    frame, fed = context.decompressobj(), False
    try:
        while pending := raw.read(ZSTD_FEED_BYTES):
            while pending:
                block = frame.decompress(pending)
                fed = True
                if block:
                    yield block
                pending = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, fed = context.decompressobj(), False
    except zstandard.ZstdError as error:
        raise zlib.error(str(error)) from error
    if fed:
        raise EOFError("the last frame is incomplete")
