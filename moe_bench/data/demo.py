"""The demo corpus as it stands on disk: found without importing anything heavy."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_bench.data.manifest import read_manifest
from moe_bench.errors import DataError

BPE_TOKENIZER = re.compile(r"bpe-(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoRequest:
    """Which corpus, in which tokens, where."""

    output: Path
    """Folder of everything that is downloaded and made."""
    tokenizer: str
    """`bytes`, or `bpe-N`: a byte-level BPE of N tokens trained on the corpus."""
    corpus: Path | None
    """Folder of .txt files to use instead; None for Shakespeare's plays and poems."""

    def __post_init__(self) -> None:
        """Refuse what is not a tokenizer or not a folder of text."""
        if self.tokenizer != "bytes" and not BPE_TOKENIZER.fullmatch(self.tokenizer):
            raise DataError(f"--tokenizer {self.tokenizer}: give bytes, or bpe-N, such as bpe-4096")
        if self.bpe_size is not None and not 300 <= self.bpe_size <= 65000:
            raise DataError(f"--tokenizer {self.tokenizer}: N must be 300 to 65000")
        if self.corpus is not None and not any(self.corpus.glob("*.txt")):
            raise DataError(f"MOE_BENCH_CORPUS={self.corpus}: is no folder with .txt files")

    @property
    def bpe_size(self) -> int | None:
        """None for bytes."""
        match = BPE_TOKENIZER.fullmatch(self.tokenizer)
        return int(match[1]) if match else None

    @property
    def name(self) -> str:
        """`shakespeare`, or the folder's name with a mark of its files' names, sizes and times."""
        if self.corpus is None:
            return "shakespeare"
        files = sorted(self.corpus.glob("*.txt"))
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        mark = hashlib.sha256(repr((str(self.corpus.resolve()), stats)).encode()).hexdigest()[:8]
        return f"{self.corpus.resolve().name}-{mark}"

    @property
    def prefix(self) -> Path:
        """Of the dataset."""
        return (self.output / f"{self.name}-{self.tokenizer}").absolute()


def find_demo(request: DemoRequest) -> dict[str, Any] | None:
    """What training must be told, when the dataset is there and whole; else None."""
    manifest = read_manifest(request.prefix)
    if manifest is None:
        return None
    tokens, index = (
        request.prefix.with_name(request.prefix.name + end) for end in (".bin", ".idx")
    )
    (entry,) = manifest["outputs"].values()
    if not index.exists() or not tokens.exists() or tokens.stat().st_size != entry["bin_bytes"]:
        return None
    tokenizer = manifest["tokenizer"]
    if tokenizer["path"] is not None and not Path(tokenizer["path"]).exists():
        return None
    arguments = tokenizer["megatron_arguments"]
    return {
        "data_prefix": str(request.prefix),
        "tokenizer_type": arguments[arguments.index("--tokenizer-type") + 1],
        "tokenizer_args": arguments,
        "tokenizer_args_before_0.18": tokenizer["megatron_arguments_before_0.18"],
        "vocab_size": tokenizer["vocab_size"],
        "eod": tokenizer["eod"],
        "documents": manifest["documents"],
        "tokens": manifest["tokens"],
    }
