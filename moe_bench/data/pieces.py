"""Words are encoded once: text is cut where no tokenizer rule looks across, and each piece's ids are remembered.

Why this changes no id. A cut lies between two ASCII characters: at a space, a line feed or a word's end.
- Byte-level BPE merges only within the matches of a regular expression. In GPT-2's and in `KNOWN_SPLITS` no match holds
  a non-space followed by a space, nor a letter followed by other ASCII, and no look-ahead reaches past the next
  non-space: the matches of a text are those of its pieces. NFC joins nothing to ASCII that follows.
- SentencePiece BPE merges neighbours only into pieces of its vocabulary. Between two characters that no piece holds side
  by side nothing merges, and merges on one side do not see the other. Unigram models add up scores along the whole text,
  where rounding could break ties differently: they are not cut.
Anything else - another pattern, another normalizer, a text that holds an added token - goes to the library whole.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

SPACE_MARK = "\u2581"
"""What SentencePiece writes for a space."""
CACHE_CHARACTERS = 48 << 20
"""Characters of remembered pieces: up to some hundred MiB in a worker, then all are forgotten."""
LONGEST_REMEMBERED = 64
"""Longer pieces hardly ever come again."""
WORTHWHILE_SHARE = 0.15
"""Above this share of new pieces the library alone is faster (measured: 5 us a new piece, 0.5 an old one, 1.4 alone)."""
WARM_UP_CALLS = 8
PAUSE_CALLS = 16

# A match that holds a letter takes nothing after its last one but, at most, non-ASCII marks: cut before other ASCII.
_WORD = r"[A-Za-z](?=[ -@\[-`{-~\n]|\Z)"
_ENDS = {
    # GPT-2's pattern never takes a line feed along with what stands before it
    "spaces and lines": rf"(?:{_WORD}|[!-~](?=[ \n]|\Z))",
    # later patterns take line feeds along with punctuation before them, all that there are
    "spaces, and lines after words": rf"(?:{_WORD}|[!-~](?= |\Z)|[0-9](?=\n)|\n(?=[!-~]))",
}


KNOWN_SPLITS = frozenset(
    {
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        # DeepSeek-V3 and R1
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        # Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        # Qwen 2 and 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
)


def _pattern(cuts: str) -> re.Pattern[str]:
    """A plain word, the common case, quickly; else up to the next end."""
    return re.compile(rf"[ \n]*+[A-Za-z]++(?=[ -@\[-`{{-~\n]|\Z)|(?s:.+?{_ENDS[cuts]}|.+)")


def huggingface_pattern(definition: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Where texts may be cut for this tokenizer.json; None where nothing is known."""
    model = definition.get("model") or {}
    added = [str(token["content"]) for token in definition.get("added_tokens") or ()]
    normalizer = definition.get("normalizer")
    plain = normalizer is None or normalizer == {"type": "Sequence", "normalizers": []}
    composed = normalizer == {"type": "NFC"} and all(map(str.isascii, added))
    if model.get("type") != "BPE" or model.get("dropout") or not (plain or composed):
        return None
    return _pattern_of_steps(definition.get("pre_tokenizer") or {})


def _pattern_of_steps(pre: Mapping[str, Any]) -> re.Pattern[str] | None:
    *splits, last = pre.get("pretokenizers") or [pre]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if last.get("use_regex", True):
        return None if splits else _pattern("spaces and lines")
    known = all(
        step.get("type") == "Split"
        and step.get("behavior") == "Isolated"
        and not step.get("invert")
        and step["pattern"].get("Regex") in KNOWN_SPLITS
        for step in splits
    )
    return _pattern("spaces, and lines after words") if splits and known else None


@dataclass(frozen=True, kw_only=True, slots=True)
class SentencePiecePieces:
    """How a SentencePiece BPE model's texts are cut."""

    pattern: re.Pattern[str]
    """For a text after a space, which stands for the mark the model puts first."""
    model: bytes
    """The same model, but without that mark: it encodes a piece as it stands within a text."""


def sentencepiece_pieces(path: Path) -> SentencePiecePieces | None:
    """None where it is not known to be safe: another algorithm, a normalizer, spaces that are collapsed."""
    try:
        # Needs protobuf, which not every environment has: without it, the library alone.
        from sentencepiece import sentencepiece_model_pb2  # noqa: PLC0415
    except ImportError:
        return None
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    model.ParseFromString(path.read_bytes())
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    plain = (
        trainer.model_type == trainer.BPE
        and not trainer.treat_whitespace_as_suffix
        and normalizer.add_dummy_prefix
        and normalizer.escape_whitespaces
        and not normalizer.remove_extra_whitespaces
        and not normalizer.precompiled_charsmap
    )
    pattern = _vocabulary_pattern([one.piece for one in model.pieces]) if plain else None
    if pattern is None:
        return None
    normalizer.add_dummy_prefix = False
    return SentencePiecePieces(pattern=pattern, model=model.SerializeToString())


def _vocabulary_pattern(pieces: Sequence[str]) -> re.Pattern[str] | None:
    """Cut between two characters that no piece of the vocabulary holds side by side: they can never be merged."""
    known = {piece for piece in pieces if len(piece) == 1}
    letters = set(string.ascii_letters)
    texts = [piece.replace(SPACE_MARK, " ") for piece in pieces]
    pairs = {text[at : at + 2] for text in texts for at in range(len(text) - 1)}
    follows = {pair[1] for pair in pairs if pair[0] in letters}
    # Two unknown characters side by side would become one unknown token: both sides must be known.
    free = [
        one for one in string.punctuation + " \n" if one not in follows and _is_known(one, known)
    ]
    if " " not in free or not letters <= known:
        return None
    after_word = "".join(map(re.escape, free))
    return re.compile(
        rf" ?[A-Za-z]++(?=[{after_word}]|\Z)|(?s:.+?[A-Za-z](?=[{after_word}]|\Z)|.+)"
    )


def _is_known(character: str, known: set[str]) -> bool:
    """A space is its mark; a line feed may be a byte token, which merges with nothing."""
    return (SPACE_MARK if character == " " else character) in known or character == "\n"


class PieceCache:
    """Ids of texts by way of their pieces."""

    def __init__(self, pattern: re.Pattern[str], encode_piece: Callable[[str], list[int]]) -> None:
        self._cut, self._encode_piece = pattern.findall, encode_piece
        self._ids: dict[str, list[int]] = {}
        self._room = CACHE_CHARACTERS
        self._calls = 0
        self._paused = 0

    def worthwhile(self) -> bool:
        """Whether the next texts should come here; asks are counted: a pause ends after some of them."""
        self._paused = max(0, self._paused - 1)
        return self._paused == 0

    def ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """One list for each text."""
        pieces = [self._cut(text) for text in texts]
        new = set(chain.from_iterable(pieces)).difference(self._ids)
        for piece in new:
            self._ids[piece] = self._encode_piece(piece)
        known = self._ids.__getitem__
        found = [list(chain.from_iterable(map(known, one))) for one in pieces]
        self._calls += 1
        if self._calls > WARM_UP_CALLS and len(new) > WORTHWHILE_SHARE * sum(map(len, pieces)):
            self._paused = PAUSE_CALLS
        self._forget(new)
        return found

    def _forget(self, new: set[str]) -> None:
        for piece in new:
            if len(piece) > LONGEST_REMEMBERED:
                del self._ids[piece]
            else:
                self._room -= len(piece) + 16
        if self._room < 0:
            self._ids.clear()
            self._room = CACHE_CHARACTERS
