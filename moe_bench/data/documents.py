"""Bytes to units that workers can take, and a unit's bytes to documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from moe_bench.data.sources import CutOffError, Form, HashedFile, Source, blocks_of

type TextMode = Literal["file", "paragraph", "line"]

UNIT_BYTES = 1 << 20
"""A unit of work is cut at the first document end after about this much text."""
CUT_OFF = "source damaged or cut off"
BOM = b"\xef\xbb\xbf"
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")
LEADING_BLANK_LINES = re.compile(r"(?:[ \t]*\n)*")


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRules:
    """How text becomes documents. Part of a preparation's identity."""

    json_keys: tuple[str, ...]
    text_mode: TextMode
    separator: str | None
    """Literal string between documents of a text file; replaces text_mode."""
    max_document_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """A document that cannot be used."""

    line: int
    reason: str
    """A short fixed phrase: skips are counted by it."""
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Whole documents of one source."""

    source_index: int
    form: Form
    first_line: int
    """Line number of its first byte, from 1."""
    data: bytes
    problems: tuple[Problem, ...]
    """Found while cutting: a document too long, a source that ends too early."""
    raw_position: int
    """Bytes of the source read when it was cut."""
    source_sha256: str | None
    """Of the whole source, with its last unit; else None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One document: for each key, one text, or several sequences as Megatron's tool takes a list."""

    line: int
    texts: tuple[tuple[str, ...], ...]


def units_of(
    source_index: int, source: Source, raw: HashedFile, rules: DocumentRules
) -> Iterator[Unit]:
    """Cut a source at document ends. A source that ends too early gives a last unit that says so."""
    cutter = _Cutter(source_index, source, raw, rules)
    cut_off: CutOffError | None = None
    try:
        for block in blocks_of(source, raw):
            cutter.add(block)
            unit = cutter.take()
            if unit is not None:
                yield unit
    except CutOffError as error:
        cut_off = error
    yield cutter.last(cut_off)


class _Cutter:
    """Collects blocks until a document ends. Holds at most one document and one unit."""

    def __init__(
        self, source_index: int, source: Source, raw: HashedFile, rules: DocumentRules
    ) -> None:
        self._source_index, self._source, self._raw, self._rules = source_index, source, raw, rules
        self._buffer = bytearray()
        self._line = 1
        self._at_start = True
        self._dropping = False
        self._problems: list[Problem] = []
        self._searched = 0

    def add(self, block: bytes) -> None:
        self._buffer += block
        if self._at_start and len(self._buffer) >= len(BOM):
            if self._buffer.startswith(BOM):
                del self._buffer[: len(BOM)]
            self._at_start = False

    def take(self) -> Unit | None:
        """A unit, when the buffer holds enough."""
        if self._dropping:
            self._drop_to_boundary()
        if len(self._buffer) < UNIT_BYTES:
            return None
        end = self._last_boundary()
        if end > 0:
            return self._unit(end, sha256=None)
        if len(self._buffer) > self._rules.max_document_bytes:
            self._refuse_long_document()
        return None

    def last(self, cut_off: CutOffError | None) -> Unit:
        """All that is left; after a cut the torn last document is not text to trust."""
        if cut_off is not None:
            end = self._last_boundary(whole=True)
            self._problems.append(
                Problem(
                    line=self._line + self._buffer.count(b"\n"),
                    reason=CUT_OFF,
                    detail=str(cut_off),
                )
            )
            del self._buffer[max(end, 0) :]
        if self._dropping:
            self._buffer.clear()
        return self._unit(len(self._buffer), sha256=self._raw.sha256)

    def _unit(self, end: int, *, sha256: str | None) -> Unit:
        data = bytes(memoryview(self._buffer)[:end])
        del self._buffer[:end]
        unit = Unit(
            source_index=self._source_index,
            form=self._source.form,
            first_line=self._line,
            data=data,
            problems=tuple(self._problems),
            raw_position=self._raw.position,
            source_sha256=sha256,
        )
        self._line += data.count(b"\n")
        self._problems.clear()
        self._searched = 0
        return unit

    def _last_boundary(self, *, whole: bool = False) -> int:
        """End of the last complete document in the buffer; 0 when there is none."""
        start = 0 if whole else self._searched
        ends = (
            self._buffer.rfind(mark, max(0, start - len(mark))) + len(mark)
            for mark in self._marks()
            if self._buffer.find(mark, max(0, start - len(mark))) >= 0
        )
        self._searched = len(self._buffer)
        return max(ends, default=0)

    def _marks(self) -> tuple[bytes, ...]:
        if self._source.form == "jsonl":
            return (b"\n",)
        if self._rules.separator is not None:
            return (self._rules.separator.encode(),)
        marks = {"file": (), "line": (b"\n",), "paragraph": (b"\n\n", b"\n\r\n")}
        return marks[self._rules.text_mode]

    def _refuse_long_document(self) -> None:
        self._problems.append(
            Problem(
                line=self._line,
                reason="document too long",
                detail=f"longer than {self._rules.max_document_bytes} bytes; "
                "raise --max-document-mib (each worker's memory grows with it)",
            )
        )
        self._dropping = True
        self._drop_to_boundary()

    def _drop_to_boundary(self) -> None:
        found = [
            (at, at + len(mark)) for mark in self._marks() if (at := self._buffer.find(mark)) >= 0
        ]
        if found:
            end = min(found)[1]
            self._dropping = False
        else:
            # A mark may straddle two blocks: keep what could be its beginning.
            end = len(self._buffer) - max((len(mark) - 1 for mark in self._marks()), default=0)
        dropped = self._buffer[:end]
        self._line += dropped.count(b"\n")
        del self._buffer[:end]
        self._searched = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitText:
    """What a unit's bytes hold."""

    documents: list[Document]
    problems: list[Problem]
    blank_lines: int
    """Empty lines where each line is a document: no document, no problem, but counted."""


def read_unit(unit: Unit, rules: DocumentRules) -> UnitText:
    """Decode and split. Pure."""
    if unit.form == "jsonl":
        return _read_jsonl(unit, rules)
    try:
        text = unit.data.decode()
    except UnicodeDecodeError:
        return _read_damaged_text(unit, rules)
    return UnitText(documents=_split_text(text, unit.first_line, rules), problems=[], blank_lines=0)


def _read_damaged_text(unit: Unit, rules: DocumentRules) -> UnitText:
    """Only the documents that hold the bad bytes are lost."""
    text = unit.data.decode(errors="surrogateescape")
    documents: list[Document] = []
    problems: list[Problem] = []
    for document in _split_text(text, unit.first_line, rules):
        raw = document.texts[0][0].encode(errors="surrogateescape")
        try:
            raw.decode()
        except UnicodeDecodeError as bad:
            line = document.line + raw[: bad.start].count(b"\n")
            problems.append(_bad_utf8(line, bad))
        else:
            documents.append(document)
    blank = _blank_lines(text, [*documents, *problems], rules)
    return UnitText(documents=documents, problems=problems, blank_lines=blank)


def _blank_lines(text: str, found: Sequence[object], rules: DocumentRules) -> int:
    """Where each line is a document: how many lines are none."""
    if rules.separator is not None or rules.text_mode != "line":
        return 0
    return text.count("\n") + (not text.endswith("\n")) - len(found) if text else 0


def _bad_utf8(line: int, error: UnicodeDecodeError) -> Problem:
    byte = error.object[error.start]
    hint = "; it looks like UTF-16: convert it first" if byte in (0xFF, 0xFE) else ""
    return Problem(
        line=line,
        reason="not UTF-8",
        detail=f"byte 0x{byte:02x} at position {error.start} of the text: {error.reason}{hint}",
    )


def _split_text(text: str, first_line: int, rules: DocumentRules) -> list[Document]:
    text = text.replace("\r\n", "\n")
    if rules.separator is not None:
        return _pieces(first_line, text.split(rules.separator), rules.separator.count("\n"))
    if rules.text_mode == "file":
        return [Document(line=first_line, texts=((text,),))]
    if rules.text_mode == "line":
        lines = text.split("\n")
        return [
            Document(line=first_line + number, texts=((line,),))
            for number, line in enumerate(lines)
            if line and not line.isspace()
        ]
    return _paragraphs(text, first_line)


def _pieces(first_line: int, pieces: list[str], mark_lines: int) -> list[Document]:
    """Texts between separators, without the line breaks next to them; nothing after the last one is no document."""
    documents: list[Document] = []
    line = first_line
    for number, piece in enumerate(pieces):
        body = piece.strip("\n")
        lead = len(piece) - len(piece.lstrip("\n"))
        if body or number < len(pieces) - 1:
            documents.append(Document(line=line + (lead if body else 0), texts=((body,),)))
        line += piece.count("\n") + mark_lines
    return documents


def _paragraphs(text: str, first_line: int) -> list[Document]:
    documents: list[Document] = []
    lead = LEADING_BLANK_LINES.match(text)
    at = lead.end() if lead else 0
    line = first_line + text.count("\n", 0, at)
    for match in [*BLANK_LINES.finditer(text), None]:
        end = match.start() if match else len(text)
        piece = text[at:end]
        body = piece.strip("\n")
        if body.strip():
            documents.append(Document(line=line, texts=((body,),)))
        if match:
            line += text.count("\n", at, match.end())
            at = match.end()
    return documents


def _read_jsonl(unit: Unit, rules: DocumentRules) -> UnitText:
    documents: list[Document] = []
    problems: list[Problem] = []
    blank = 0
    lines = unit.data.split(b"\n")
    for number, raw in enumerate(lines, start=unit.first_line):
        if not raw or raw.isspace():
            blank += number < unit.first_line + len(lines) - 1
            continue
        found = _json_document(number, raw, rules)
        if isinstance(found, Problem):
            problems.append(found)
        else:
            documents.append(found)
    return UnitText(documents=documents, problems=problems, blank_lines=blank)


def _json_document(line: int, raw: bytes, rules: DocumentRules) -> Document | Problem:
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        return _bad_utf8(line, error)
    except (ValueError, RecursionError) as error:
        return Problem(line=line, reason="not JSON", detail=f"{error}{_array_hint(raw)}")
    if not isinstance(value, dict):
        detail = f"a {type(value).__name__} where an object with {rules.json_keys[0]!r} must be"
        return Problem(line=line, reason="not a JSON object", detail=f"{detail}{_array_hint(raw)}")
    texts: list[tuple[str, ...]] = []
    for key in rules.json_keys:
        found = _text_of(line, value, key)
        if isinstance(found, Problem):
            return found
        texts.append(found)
    return Document(line=line, texts=tuple(texts))


def _array_hint(raw: bytes) -> str:
    if not raw.lstrip().startswith(b"["):
        return ""
    return "; where the file is one array, `jq -c '.[]' FILE` writes its objects one a line"


def _text_of(line: int, value: dict[str, object], key: str) -> tuple[str, ...] | Problem:
    if key not in value:
        keys = ", ".join(map(repr, list(value)[:8])) or "none"
        detail = f"no key {key!r} among {keys}; name the text's key with --json-key"
        return Problem(line=line, reason="key missing", detail=detail)
    text = value[key]
    if isinstance(text, str):
        parts = [text]
    elif isinstance(text, list) and all(isinstance(part, str) for part in text):
        parts = text
    else:
        detail = f"{key!r} is {json.dumps(text)[:60]}, where a string (or a list of them) must be"
        return Problem(line=line, reason="text is not a string", detail=detail)
    if not all(map(_encodable, parts)):
        detail = f"{key!r} has half of a surrogate pair (\\ud800 to \\udfff), which is no character"
        return Problem(line=line, reason="lone surrogate", detail=detail)
    return tuple(parts)


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
