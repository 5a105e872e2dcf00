"""Text to Megatron's indexed dataset: cut into units, encode in several processes, append in order, resume anywhere."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol

from moe_bench.data.documents import CUT_OFF, Unit, units_of
from moe_bench.data.encode import (
    EncodedUnit,
    Encoder,
    EncodingRules,
    encode_in_worker,
    start_worker,
)
from moe_bench.data.index_header import index_path, tokens_path
from moe_bench.data.indexed import TokenDType, token_dtype, write_index
from moe_bench.data.manifest import (
    FORMAT,
    file_sha256,
    is_manifest,
    library_versions,
    manifest_path,
    read_manifest,
    to_bytes,
    tokenizer_entry,
)
from moe_bench.data.sources import Inputs, Source, opened
from moe_bench.data.store import PartialStore, Progress, sync_folder, write_aside, write_error
from moe_bench.data.tokenizer import Tokenizer, load_tokenizer, single_threaded_tokenizers
from moe_bench.errors import DataError, Interrupted

COMMIT_INTERVAL_S = 1.0
"""A crash costs at most this much finished work."""
SOURCES = "sources.sha256"
"""Stream of the hashes of the sources that were read to their end, in order."""
UNITS_AHEAD_PER_WORKER = 2
"""Units cut before their turn: keeps workers busy, and memory bounded when the disk is slow."""


class Watcher(Protocol):
    """Is told how far a preparation is."""

    def begin(self, progress: Progress) -> None:
        """Once, with what an earlier run had stored."""
        ...

    def advance(self, progress: Progress, *, raw_bytes: int) -> None:
        """After each unit; raw_bytes counts what was read of the sources' files."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """What to make."""

    inputs: Inputs
    output: Path
    """Prefix of the files to write."""
    rules: EncodingRules
    skip_problems: bool
    """Count and list what cannot be used, instead of stopping at the first."""
    workers: int
    licence: str | None
    """As the user states it; None when not stated."""
    overwrite: bool
    """Replace another dataset of this name."""
    restart: bool
    """Forget an unfinished preparation of this name."""

    def prefix_of(self, key: str) -> Path:
        """One key writes to the output itself, several to Megatron's `PREFIX_KEY_document`."""
        if len(self.rules.documents.json_keys) == 1:
            return self.output
        return self.output.with_name(f"{self.output.name}_{key}_document")

    @property
    def partial(self) -> Path:
        """Folder of the unfinished output."""
        return self.output.with_name(self.output.name + ".partial")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What was made."""

    manifest: dict[str, Any]
    already_there: bool
    """Nothing had to be done."""


def prepare(preparation: Preparation, watcher: Watcher) -> Prepared:
    """Make `PREFIX.bin`, `PREFIX.idx` and `PREFIX.json`; the index appears last. Raises DataError."""
    single_threaded_tokenizers()
    tokenizer = load_tokenizer(preparation.rules.tokenizer)
    _check_eod(preparation, tokenizer)
    _check_targets(preparation)
    plan = _plan(preparation, tokenizer)
    if preparation.restart:
        shutil.rmtree(preparation.partial, ignore_errors=True)
    existing = _existing(preparation, plan)
    if existing is not None:
        return Prepared(manifest=existing, already_there=True)
    store = PartialStore(preparation.partial, plan=plan, streams=_streams(preparation))
    with store:
        watcher.begin(store.progress)
        try:
            if not store.progress.complete:
                _encode_all(preparation, tokenizer, store, watcher)
            manifest = _finish(preparation, tokenizer, store, plan)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(
                f"stopped; {store.committed_documents} documents are stored in {preparation.partial}: "
                "run the same command to go on from there"
            ) from interrupt
    return Prepared(manifest=manifest, already_there=False)


def _check_eod(preparation: Preparation, tokenizer: Tokenizer) -> None:
    if preparation.rules.append_eod and tokenizer.facts.eod is None:
        raise DataError(
            f"--append-eod: the tokenizer {preparation.rules.tokenizer} names no end token; "
            "name one (eos_token in tokenizer_config.json), or leave --append-eod out"
        )


def _check_targets(preparation: Preparation) -> None:
    """`prepare corpus.json --output corpus` would put its manifest over its text."""
    prefixes = [preparation.prefix_of(key) for key in preparation.rules.documents.json_keys]
    targets = [file(prefix) for prefix in prefixes for file in (tokens_path, index_path)]
    targets += [manifest_path(preparation.output), _skipped_path(preparation.output)]
    written = {target.resolve(): target for target in targets}
    for source in preparation.inputs.sources:
        target = written.get(source.path.resolve()) if source.path is not None else None
        if target is not None:
            raise DataError(
                f"--output {preparation.output}: would write over the input {target}; name another"
            )
    manifest = manifest_path(preparation.output)
    if manifest.exists() and not is_manifest(manifest):
        raise DataError(
            f"--output {preparation.output}: would write its manifest over {manifest}, which is another file; name another"
        )


def _skipped_path(output: Path) -> Path:
    return output.with_name(output.name + ".skipped.jsonl")


def _plan(preparation: Preparation, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the output's bytes; not the number of workers."""
    rules, documents = preparation.rules, preparation.rules.documents
    return {
        "format": FORMAT,
        "tokenizer": tokenizer_entry(tokenizer.facts),
        "options": {
            "json_keys": list(documents.json_keys),
            "text": documents.text_mode,
            "document_separator": documents.separator,
            "max_document_bytes": documents.max_document_bytes,
            "append_eod": rules.append_eod,
            "keep_empty": rules.keep_empty,
            "on_error": "skip" if preparation.skip_problems else "fail",
            "licence": preparation.licence,
        },
        "versions": library_versions(tokenizer.facts),
        "sources": [
            {
                "name": source.name,
                "form": source.form,
                "size": source.size,
                "mtime_ns": source.mtime_ns,
            }
            for source in preparation.inputs.sources
        ],
    }


def _existing(preparation: Preparation, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the very same dataset; an error for another one, unless it may be replaced."""
    keys = preparation.rules.documents.json_keys
    present = [path for key in keys if (path := index_path(preparation.prefix_of(key))).exists()]
    if not present or preparation.partial.exists() or preparation.overwrite:
        return None
    manifest = read_manifest(preparation.output)
    if manifest is not None and manifest["plan_sha256"] == _fingerprint(plan):
        return manifest
    raise DataError(
        f"{present[0]}: exists and was made from something else; choose another --output, or replace it with --overwrite"
    )


def _fingerprint(plan: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _streams(preparation: Preparation) -> tuple[str, ...]:
    keys = range(len(preparation.rules.documents.json_keys))
    kinds = ("bin", "lengths", "documents")
    return (*(f"{key}.{kind}" for key in keys for kind in kinds), "skipped.jsonl", SOURCES)


def _encode_all(
    preparation: Preparation, tokenizer: Tokenizer, store: PartialStore, watcher: Watcher
) -> None:
    """Append every unit that is not stored yet."""
    before = [0, *accumulate(source.size for source in preparation.inputs.sources)]
    committed_at = time.monotonic()
    try:
        with _encoders(preparation, tokenizer) as encode:
            for unit, pending in _in_order(_units_left(preparation, store), encode, preparation):
                _append(preparation, store, unit, pending())
                raw_bytes = before[unit.source_index] + unit.raw_position
                watcher.advance(store.progress, raw_bytes=raw_bytes)
                if time.monotonic() - committed_at >= COMMIT_INTERVAL_S:
                    store.commit()
                    committed_at = time.monotonic()
    except BrokenProcessPool as error:
        store.commit()
        raise DataError(
            "a worker process died, as when the machine runs out of memory; what is stored so far is kept: "
            "run the same command with fewer --workers or a lower --max-document-mib"
        ) from error
    store.progress.complete = True
    store.commit()


def _units_left(preparation: Preparation, store: PartialStore) -> Iterator[Unit]:
    """Units after the stored ones. A source that was read to its end is not opened again."""
    finished = store.progress.sources
    stored, stored_crc = store.progress.source_units, store.progress.crc32
    for source_index, source in enumerate(preparation.inputs.sources[finished:], start=finished):
        units = _units_of_source(source_index, source, preparation)
        crc = 0
        for unit in islice(units, stored):
            crc = zlib.crc32(unit.data, crc)
        if crc != stored_crc:
            raise DataError(
                f"{source.name}: is not what it was when this preparation began; start afresh with --restart"
            )
        yield from units
        stored, stored_crc = 0, 0


def _units_of_source(source_index: int, source: Source, preparation: Preparation) -> Iterator[Unit]:
    with opened(source) as raw:
        yield from units_of(source_index, source, raw, preparation.rules.documents)


type Encode = Callable[[Unit], Callable[[], EncodedUnit]]
"""Starts encoding; what it returns waits for the result."""


@contextmanager
def _encoders(preparation: Preparation, tokenizer: Tokenizer) -> Iterator[Encode]:
    if preparation.workers == 1:
        encoder = Encoder(preparation.rules, tokenizer)
        yield lambda unit: lambda: encoder.encode(unit)
        return
    # fork starts a worker in milliseconds; where it is unsafe (macOS) Python's own default is spawn.
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(
        preparation.workers,
        mp_context=multiprocessing.get_context(method),
        initializer=start_worker,
        initargs=(preparation.rules, os.getpid()),
    )

    def submit(unit: Unit) -> Callable[[], EncodedUnit]:
        future: Future[EncodedUnit] = pool.submit(encode_in_worker, unit)
        return future.result

    try:
        yield submit
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _in_order(
    units: Iterator[Unit], encode: Encode, preparation: Preparation
) -> Iterator[tuple[Unit, Callable[[], EncodedUnit]]]:
    """Units with their results, in order, a bounded number ahead."""
    ahead = UNITS_AHEAD_PER_WORKER * preparation.workers if preparation.workers > 1 else 0
    waiting: deque[tuple[Unit, Callable[[], EncodedUnit]]] = deque()
    for unit in units:
        waiting.append((unit, encode(unit)))
        while len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


def _append(
    preparation: Preparation, store: PartialStore, unit: Unit, encoded: EncodedUnit
) -> None:
    source = preparation.inputs.sources[unit.source_index]
    progress = store.progress
    for problem in encoded.problems:
        if not preparation.skip_problems and problem.reason == CUT_OFF:
            raise DataError(problem.detail)
        if not preparation.skip_problems:
            raise DataError(
                f"{source.name}:{problem.line}: {problem.reason}: {problem.detail}; "
                "mend it and run the same command, which goes on where it was, or pass --on-error skip to leave such "
                "documents out and count them"
            )
        store.append(
            "skipped.jsonl",
            _skip_line(source.name, problem.line, problem.reason, problem.detail),
        )
        progress.skips[problem.reason] = progress.skips.get(problem.reason, 0) + 1
    for number, key in enumerate(encoded.keys):
        store.append(f"{number}.bin", key.tokens)
        store.append(f"{number}.lengths", key.lengths)
        store.append(f"{number}.documents", key.document_sizes)
    progress.units += 1
    progress.documents += encoded.num_documents
    progress.tokens += encoded.num_tokens
    progress.text_bytes += len(unit.data)
    progress.blank_lines += encoded.blank_lines
    progress.source_units += 1
    progress.crc32 = zlib.crc32(unit.data, progress.crc32)
    if unit.source_sha256 is not None:
        store.append(SOURCES, f"{unit.source_sha256}\n".encode())
        progress.sources += 1
        progress.source_units, progress.crc32 = 0, 0


def _skip_line(source: str, line: int, reason: str, detail: str) -> bytes:
    record = {"source": source, "line": line, "reason": reason, "detail": detail}
    return json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n"


def _finish(
    preparation: Preparation, tokenizer: Tokenizer, store: PartialStore, plan: dict[str, Any]
) -> dict[str, Any]:
    """Put everything under its final name, the indexes last. Safe to repeat after a crash anywhere."""
    keys = preparation.rules.documents.json_keys
    dtype = token_dtype(tokenizer.facts.vocab_size)
    if store.progress.documents == 0:
        raise DataError(
            f"{preparation.output}: no document was found in {len(preparation.inputs.sources)} input(s); "
            f"left out: {store.progress.skips or 'none'}; check --format and --text"
        )
    store.close_streams()
    try:
        outputs = {}
        for number, key in enumerate(keys):
            prefix = preparation.prefix_of(key)
            aside = store.path(f"{number}.idx")
            _write_index_aside(aside, store, number, dtype)
            tokens = _whichever_exists(store.path(f"{number}.bin"), tokens_path(prefix))
            outputs[key] = {
                "prefix": prefix.name,
                "dtype": dtype.name,
                "bin_bytes": tokens.stat().st_size,
                "bin_sha256": file_sha256(tokens),
                "idx_sha256": file_sha256(aside),
            }
        manifest = _manifest(preparation, tokenizer, store, plan, outputs)
        _put_in_place(preparation, store, to_bytes(manifest))
        store.remove()
    except OSError as error:
        raise write_error(preparation.output, error) from error
    return manifest


def _write_index_aside(aside: Path, store: PartialStore, number: int, dtype: TokenDType) -> None:
    with aside.open("wb") as target:
        write_index(
            target,
            dtype=dtype,
            lengths_file=store.path(f"{number}.lengths"),
            document_sizes_file=store.path(f"{number}.documents"),
        )
        target.flush()
        os.fsync(target.fileno())


def _whichever_exists(aside: Path, final: Path) -> Path:
    return aside if aside.exists() else final


def _put_in_place(preparation: Preparation, store: PartialStore, manifest: bytes) -> None:
    prefixes = [preparation.prefix_of(key) for key in preparation.rules.documents.json_keys]
    for number, prefix in enumerate(prefixes):
        if store.path(f"{number}.bin").exists():
            index_path(prefix).unlink(missing_ok=True)  # never an old index beside new tokens
            store.path(f"{number}.bin").replace(tokens_path(prefix))
    skipped = _skipped_path(preparation.output)
    if store.progress.skips:
        if store.path("skipped.jsonl").exists():
            store.path("skipped.jsonl").replace(skipped)
    else:
        skipped.unlink(missing_ok=True)
    write_aside(manifest_path(preparation.output), manifest)
    for number, prefix in enumerate(prefixes):
        store.path(f"{number}.idx").replace(index_path(prefix))
    sync_folder(preparation.output.parent)


def _manifest(
    preparation: Preparation,
    tokenizer: Tokenizer,
    store: PartialStore,
    plan: dict[str, Any],
    outputs: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    progress = store.progress
    sources = zip(plan["sources"], store.path(SOURCES).read_text().split(), strict=True)
    return {
        "format": FORMAT,
        "tokenizer": tokenizer_entry(tokenizer.facts),
        "licence": preparation.licence,
        "documents": progress.documents,
        "tokens": progress.tokens,
        "text_bytes": progress.text_bytes,
        "blank_lines": progress.blank_lines,
        "skipped": dict(sorted(progress.skips.items())),
        "outputs": outputs,
        "options": plan["options"],
        "versions": plan["versions"],
        "sources": [
            {"name": source["name"], "size": source["size"], "sha256": sha256}
            for source, sha256 in sources
        ],
        "ignored_files": list(preparation.inputs.ignored),
        "duplicate_files": list(preparation.inputs.duplicates),
        "plan_sha256": _fingerprint(plan),
    }


def available_cores() -> int:
    """Cores this process may use."""
    count = getattr(os, "process_cpu_count", None)
    if count is not None:
        return count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
