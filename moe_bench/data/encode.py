"""What a worker does: one unit in, the bytes to append out."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_bench.data.documents import Document, DocumentRules, Problem, Unit, read_unit
from moe_bench.data.indexed import TokenDType, token_dtype
from moe_bench.data.tokenizer import Tokenizer, load_tokenizer, single_threaded_tokenizers


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodingRules:
    """All that decides the output's bytes beside the input."""

    tokenizer: str
    """As given to load_tokenizer."""
    documents: DocumentRules
    append_eod: bool
    keep_empty: bool
    """An empty document keeps an entry without sequences, as Megatron's tool writes it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedKey:
    """One output's share of a unit."""

    tokens: bytes
    lengths: bytes
    """i32 tokens of each sequence."""
    document_sizes: bytes
    """i32 sequences of each document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedUnit:
    """What a unit adds."""

    keys: tuple[EncodedKey, ...]
    num_documents: int
    num_tokens: int
    blank_lines: int
    problems: tuple[Problem, ...]


class Encoder:
    """A tokenizer with the rules."""

    def __init__(self, rules: EncodingRules, tokenizer: Tokenizer) -> None:
        self._rules, self._tokenizer = rules, tokenizer
        self._dtype = token_dtype(tokenizer.facts.vocab_size)
        self._eod = tokenizer.facts.eod if rules.append_eod else None

    def encode(self, unit: Unit) -> EncodedUnit:
        """The same bytes in any process."""
        text = read_unit(unit, self._rules.documents)
        problems = [*unit.problems, *text.problems]
        documents = text.documents
        if not self._rules.keep_empty:
            documents, empty = _without_empty(documents)
            problems.extend(empty)
        tokenized = [
            _tokenize([document.texts[number] for document in documents], self._tokenizer)
            for number in range(len(self._rules.documents.json_keys))
        ]
        kept = np.ones(len(documents), dtype=bool)
        if not self._rules.keep_empty:
            for one in tokenized:
                kept &= one.tokens_of_document > 0
            problems.extend(_empty(documents[at].line) for at in np.flatnonzero(~kept))
        encoded = [_finish(one, kept, eod=self._eod, dtype=self._dtype) for one in tokenized]
        return EncodedUnit(
            keys=tuple(key for key, _ in encoded),
            num_documents=int(kept.sum()),
            num_tokens=sum(count for _, count in encoded),
            blank_lines=text.blank_lines,
            problems=tuple(sorted(problems, key=lambda problem: problem.line)),
        )


def _empty(line: int) -> Problem:
    return Problem(line=line, reason="empty document", detail="no tokens")


def _without_empty(documents: list[Document]) -> tuple[list[Document], list[Problem]]:
    empty = [not all(any(parts) for parts in document.texts) for document in documents]
    if not any(empty):
        return documents, []
    full = [document for document, is_empty in zip(documents, empty, strict=True) if not is_empty]
    lost = [document for document, is_empty in zip(documents, empty, strict=True) if is_empty]
    return full, [_empty(document.line) for document in lost]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tokenized:
    ids: NDArray[np.int32]
    tokens_of_text: NDArray[np.int64]
    document_of_text: NDArray[np.int64]
    tokens_of_document: NDArray[np.int64]


def _tokenize(texts_of_document: Sequence[tuple[str, ...]], tokenizer: Tokenizer) -> _Tokenized:
    texts = [text for texts in texts_of_document for text in texts]
    sizes = np.fromiter(map(len, texts_of_document), dtype=np.int64, count=len(texts_of_document))
    ids, counts = tokenizer.encode(texts)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    ends = np.concatenate(([0], np.cumsum(counts)))
    last = np.cumsum(sizes)
    totals = ends[last] - ends[last - sizes]
    return _Tokenized(
        ids=ids, tokens_of_text=counts, document_of_text=owner, tokens_of_document=totals
    )


def _finish(
    one: _Tokenized, kept: NDArray[np.bool_], *, eod: int | None, dtype: TokenDType
) -> tuple[EncodedKey, int]:
    """Drop what is not kept, close documents with the end token, and lay out as bytes."""
    text_kept = kept[one.document_of_text] & (one.tokens_of_text > 0)
    token_kept = np.repeat(kept[one.document_of_text], one.tokens_of_text)
    ids = one.ids if kept.all() else one.ids[token_kept]
    lengths = one.tokens_of_text[text_kept]
    sizes = np.bincount(one.document_of_text[text_kept], minlength=len(kept))[kept]
    if eod is not None:
        full = sizes > 0
        ids = np.insert(ids, np.cumsum(one.tokens_of_document[kept][full]), eod)
        lengths = lengths.copy()
        lengths[np.cumsum(sizes)[full] - 1] += 1
    key = EncodedKey(
        tokens=ids.astype(dtype).tobytes(),
        lengths=lengths.astype(np.int32).tobytes(),
        document_sizes=sizes.astype(np.int32).tobytes(),
    )
    return key, len(ids)


_encoder: Encoder | None = None


def start_worker(rules: EncodingRules, parent_pid: int) -> None:
    """Runs once in each worker process."""
    global _encoder  # noqa: PLW0603 - a process pool keeps a worker's state nowhere else
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(parent_pid,), daemon=True).start()
    single_threaded_tokenizers()
    _encoder = Encoder(rules, load_tokenizer(rules.tokenizer))


def encode_in_worker(unit: Unit) -> EncodedUnit:
    """Runs in a worker that start_worker has prepared."""
    if _encoder is None:
        raise RuntimeError("start_worker must run first")
    return _encoder.encode(unit)


def _end_with_parent(parent_pid: int) -> None:
    """A killed parent cannot end its workers, which would wait for work for ever."""
    while os.getppid() == parent_pid:
        time.sleep(0.5)
    os._exit(1)
