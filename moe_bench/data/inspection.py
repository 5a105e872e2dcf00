"""What a .bin/.idx pair holds, and whether it is whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_bench.data.index_header import index_path, tokens_path
from moe_bench.data.indexed import IndexedDataset, open_dataset
from moe_bench.data.manifest import entry_of, file_sha256, manifest_of
from moe_bench.data.tokenizer import Tokenizer, load_tokenizer
from moe_bench.errors import DataError

SHOWN_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """Facts for a human."""

    dtype: str
    num_documents: int
    num_sequences: int
    num_tokens: int
    empty_documents: int
    shortest: int
    """Tokens of the shortest sequence."""
    longest: int
    largest_id: int
    first_ids: list[int]
    first_text: str | None
    """None when the tokenizer is not known."""
    manifest: dict[str, Any] | None
    verified: bool
    """The manifest's hashes were compared with the files."""


def inspect_dataset(prefix: Path, *, tokenizer: str | None, first: int, verify: bool) -> Inspection:
    """Raises DataError where a file is damaged, cut off or not the one the manifest describes."""
    dataset = open_dataset(prefix)
    manifest = manifest_of(prefix)
    if verify:
        _verify(prefix, manifest)
    known = _tokenizer(tokenizer, manifest)
    largest = _largest_id(dataset)
    if known is not None and largest >= known.facts.vocab_size:
        raise DataError(
            f"{tokens_path(prefix)}: holds the id {largest}, but the tokenizer has only {known.facts.vocab_size} ids: "
            "the data was made with another tokenizer"
        )
    ids = [int(token) for token in dataset.tokens[:first]]
    lengths = dataset.lengths
    return Inspection(
        dtype=dataset.dtype.name,
        num_documents=dataset.header.num_documents,
        num_sequences=dataset.header.num_sequences,
        num_tokens=len(dataset.tokens),
        empty_documents=int(np.count_nonzero(np.diff(dataset.boundaries) == 0)),
        shortest=int(lengths.min()) if len(lengths) else 0,
        longest=int(lengths.max()) if len(lengths) else 0,
        largest_id=largest,
        first_ids=ids,
        first_text=known.decode(ids)[:SHOWN_CHARACTERS] if known is not None else None,
        manifest=manifest,
        verified=verify,
    )


def _verify(prefix: Path, manifest: dict[str, Any] | None) -> None:
    entry = entry_of(manifest, prefix) if manifest is not None else None
    if entry is None:
        raise DataError(f"{prefix}.json: --verify needs the manifest, which is missing")
    for path, key in ((tokens_path(prefix), "bin_sha256"), (index_path(prefix), "idx_sha256")):
        found = file_sha256(path)
        if found != entry[key]:
            raise DataError(
                f"{path}: SHA-256 is {found}, where the manifest says {entry[key]}: damaged; prepare it again"
            )


def _tokenizer(spec: str | None, manifest: dict[str, Any] | None) -> Tokenizer | None:
    if spec is not None:
        return load_tokenizer(spec)
    if manifest is None:
        return None
    entry = manifest["tokenizer"]
    if entry["path"] is None:
        return load_tokenizer(entry["kind"])
    return load_tokenizer(entry["path"]) if Path(entry["path"]).exists() else None


def _largest_id(dataset: IndexedDataset) -> int:
    """In pieces: the tokens may be larger than memory."""
    step = 1 << 24
    tokens = dataset.tokens
    return max((int(tokens[at : at + step].max()) for at in range(0, len(tokens), step)), default=0)
