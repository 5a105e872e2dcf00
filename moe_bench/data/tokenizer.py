"""Text to token ids, exactly as Megatron's own tokenizer of the same name does, without importing Megatron."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moe_bench.data.pieces import PieceCache, huggingface_pattern, sentencepiece_pieces
from moe_bench.errors import DataError, MissingExtraError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer as FastTokenizer

BYTE_VOCAB_SIZE = 257
"""256 bytes and the end-of-document token."""
WORD_CACHE_ITEMS = 1_000_000
"""Words whose merges the BPE model remembers; the library's default is 10,000."""
BATCH_CHARACTERS = 1 << 19
"""Characters handed to a library at a time: bounds the memory of its per-token records."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerFacts:
    """What a manifest says about the tokenizer and what training must be told."""

    kind: str
    """bytes, huggingface or sentencepiece."""
    path: str | None
    """Where its files are; None for bytes."""
    sha256: str | None
    """Of its files' bytes, in the order of their names; None for bytes."""
    vocab_size: int
    eod: int | None
    """Id of the end-of-document token; None when the tokenizer names none."""
    megatron_arguments: tuple[str, ...]
    """Flags to train on this data with Megatron-Core 0.18 or newer."""
    megatron_arguments_before_018: tuple[str, ...]
    """The same for 0.11 to 0.17, whose NullTokenizer adds the end-of-document token to --vocab-size itself."""


class Tokenizer(Protocol):
    """Encodes many texts at once."""

    @property
    def facts(self) -> TokenizerFacts:
        """What it is."""
        ...

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """All ids in order, and how many belong to each text. Without an end-of-document token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of these ids, for a human's eye."""
        ...


def load_tokenizer(spec: str) -> Tokenizer:
    """`bytes`, a folder with tokenizer.json, a tokenizer.json, or a SentencePiece .model. Raises DataError."""
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec)
    if path.is_dir():
        inside = [path / "tokenizer.json", path / "tokenizer.model"]
        found = next((file for file in inside if file.is_file()), None)
        if found is None:
            raise DataError(
                f"--tokenizer {spec}: the folder has neither tokenizer.json nor tokenizer.model; "
                "a Hugging Face folder without them can be converted by AutoTokenizer(...).save_pretrained(FOLDER)"
            )
        path = found
    if not path.is_file():
        raise DataError(
            f"--tokenizer {spec}: no such file; give `bytes`, a folder with tokenizer.json, or a SentencePiece .model"
        )
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    if path.suffix == ".model" or path.name.startswith("tokenizer.model"):
        return SentencePieceTokenizer(path)
    raise DataError(
        f"--tokenizer {spec}: {path.suffix or 'no suffix'} is not known; "
        "Hugging Face files end in .json, SentencePiece files in .model"
    )


class ByteTokenizer:
    """UTF-8 bytes, and 256 for the end of a document: Megatron's NullTokenizer with 257 ids fits it."""

    facts = TokenizerFacts(
        kind="bytes",
        path=None,
        sha256=None,
        vocab_size=BYTE_VOCAB_SIZE,
        eod=BYTE_VOCAB_SIZE - 1,
        megatron_arguments=("--tokenizer-type", "NullTokenizer", "--vocab-size", "257"),
        megatron_arguments_before_018=("--tokenizer-type", "NullTokenizer", "--vocab-size", "256"),
    )

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """One id for each byte."""
        encoded = [text.encode() for text in texts]
        counts = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        return np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.int32), counts

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes that do not form a character become U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class HuggingFaceTokenizer:
    """A fast tokenizer (tokenizer.json), called as transformers calls it: special tokens on, no truncation."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers  # noqa: PLC0415 - only who asks for this kind pays for the import
        except ModuleNotFoundError as error:
            raise MissingExtraError("tokenizers", extra="train", needed_for=f"{path}") from error
        try:
            # The library raises bare Exception for a damaged file: no narrower class to name.
            self._tokenizer: FastTokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise DataError(f"{path}: not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        resize = getattr(self._tokenizer.model, "_resize_cache", None)
        if resize is not None:
            resize(WORD_CACHE_ITEMS)
        self._pieces: PieceCache | None = None
        self._added: re.Pattern[str] | None = None
        self._prepare_pieces(_read_json(path))
        config = _read_json(path.with_name("tokenizer_config.json"))
        self._check_bos(path, config)
        arguments = (
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            str(path.parent.resolve()),
        )
        self.facts = TokenizerFacts(
            kind="huggingface",
            path=str(path.resolve()),
            sha256=_sha256_of(path, path.with_name("tokenizer_config.json")),
            vocab_size=self._tokenizer.get_vocab_size(with_added_tokens=True),
            eod=self._eod(path, config),
            megatron_arguments=arguments,
            megatron_arguments_before_018=arguments,
        )

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """As `transformers` would, in batches of bounded size."""
        return _flat(self._batch(batch) for batch in batches_of(texts, BATCH_CHARACTERS))

    def _batch(self, texts: list[str]) -> list[list[int]]:
        if self._pieces is None or not self._pieces.worthwhile():
            return self._whole(texts)
        special = self._added.search if self._added is not None else _finds_nothing
        whole = [special(text) is not None for text in texts]
        held = [text for text, is_whole in zip(texts, whole, strict=True) if is_whole]
        cut = [text for text, is_whole in zip(texts, whole, strict=True) if not is_whole]
        by_library = iter(self._whole(held) if held else ())
        by_pieces = iter(self._pieces.ids_of(cut))
        return [
            next(by_library) if is_whole else [*self._start, *next(by_pieces)] for is_whole in whole
        ]

    def _whole(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self._tokenizer.encode_batch_fast(texts)]

    def _piece(self, piece: str) -> list[int]:
        return self._tokenizer.encode(piece, add_special_tokens=False).ids

    def _prepare_pieces(self, definition: dict[str, Any]) -> None:
        """Encode by pieces where that is known to give the same ids."""
        pattern = huggingface_pattern(definition)
        self._start = self._tokenizer.encode("").ids
        probe = self._piece("a b")
        if pattern is None or self._tokenizer.encode("a b").ids != [*self._start, *probe]:
            return
        contents = [re.escape(token["content"]) for token in definition.get("added_tokens") or ()]
        self._added = re.compile("|".join(contents)) if contents else None
        self._pieces = PieceCache(pattern, self._piece)

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are shown."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def _eod(self, path: Path, config: dict[str, Any]) -> int | None:
        token = config.get("eos_token", config.get("sep_token"))
        if token is None:
            special = _read_json(path.with_name("special_tokens_map.json"))
            token = special.get("eos_token", special.get("sep_token"))
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            return None
        eod = self._tokenizer.token_to_id(str(text))
        if eod is None:
            raise DataError(
                f"{path}: its configuration names {text!r} as end token, which is not in the vocabulary"
            )
        return eod

    def _check_bos(self, path: Path, config: dict[str, Any]) -> None:
        """Some transformers classes add the start token by configuration alone, where tokenizer.json does not."""
        wanted = config.get("add_bos_token")
        if wanted is None:
            return
        adds = len(self._tokenizer.encode("").ids) > 0
        if bool(wanted) != adds:
            raise DataError(
                f"{path}: tokenizer_config.json says add_bos_token={wanted}, but tokenizer.json "
                f"{'adds' if adds else 'does not add'} a start token, so training would see other ids; "
                "write both anew with AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)"
            )


class SentencePieceTokenizer:
    """A SentencePiece model, as Megatron's GPTSentencePieceTokenizer calls it: no start and no end token."""

    def __init__(self, path: Path) -> None:
        try:
            import sentencepiece  # noqa: PLC0415 - only who asks for this kind pays for the import
        except ModuleNotFoundError as error:
            raise MissingExtraError("sentencepiece", extra="train", needed_for=f"{path}") from error
        self._processor: SentencePieceProcessor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise DataError(f"{path}: not a SentencePiece model: {error}") from error
        self._pieces: PieceCache | None = None
        cut = sentencepiece_pieces(path)
        if cut is not None:
            inner = sentencepiece.SentencePieceProcessor(model_proto=cut.model)
            self._pieces = PieceCache(cut.pattern, inner.encode_as_ids)
        eod = int(self._processor.eos_id())
        # The name that all releases from 0.11 know and give no extra tokens.
        arguments = (
            "--tokenizer-type",
            "GPTSentencePieceTokenizer",
            "--tokenizer-model",
            str(path.resolve()),
        )
        self.facts = TokenizerFacts(
            kind="sentencepiece",
            path=str(path.resolve()),
            sha256=_sha256_of(path),
            vocab_size=int(self._processor.get_piece_size()),
            eod=eod if eod >= 0 else None,
            megatron_arguments=arguments,
            megatron_arguments_before_018=arguments,
        )

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """One thread: the processes are the parallelism."""
        return _flat(self._batch(batch) for batch in batches_of(texts, BATCH_CHARACTERS))

    def _batch(self, texts: list[str]) -> list[list[int]]:
        if self._pieces is not None and self._pieces.worthwhile():
            # The mark the model puts before a text is what a space becomes.
            return self._pieces.ids_of([" " + text if text else "" for text in texts])
        return [self._processor.encode_as_ids(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Plain text."""
        return str(self._processor.decode(list(ids)))


def batches_of(texts: Sequence[str], max_characters: int) -> list[list[str]]:
    """Neighbouring texts together, up to this many characters; a longer text is alone."""
    batches: list[list[str]] = []
    room = 0
    for text in texts:
        if not batches or len(text) > room:
            batches.append([])
            room = max_characters
        batches[-1].append(text)
        room -= len(text)
    return batches


def single_threaded_tokenizers() -> None:
    """Keep the Hugging Face library off other cores in this process: the workers are the parallelism."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # noqa: TID251 - the library has no other switch


def _flat(
    batches: Iterable[list[list[int]]],
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    counts: list[int] = []
    parts: list[NDArray[np.int32]] = []
    for ids in batches:
        sizes = [len(one) for one in ids]
        counts.extend(sizes)
        parts.append(np.fromiter(chain.from_iterable(ids), dtype=np.int32, count=sum(sizes)))
    joined = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return joined, np.array(counts, dtype=np.int64)


def _finds_nothing(text: str) -> None:
    """In place of a search, where there is nothing to search for."""


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _sha256_of(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()
