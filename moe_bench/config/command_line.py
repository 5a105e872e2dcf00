"""Trailing words of a command (`--flag value`, `--flag=value`, `--switch`, `--list a b`). Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from moe_bench.errors import ConfigError


class Flag(msgspec.Struct, frozen=True, kw_only=True):
    """One flag with the words that follow it; none for a bare switch."""

    name: str
    words: tuple[str, ...]


def parse(words: Sequence[str], *, place: str = "command line") -> tuple[Flag, ...]:
    """The flags in order. Raises ConfigError for a word that belongs to no flag."""
    flags: list[Flag] = []
    closed = False
    for word in words:
        if word == "--":
            closed = True
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            flags.append(Flag(name=name, words=(value,) if equals else ()))
            closed = bool(equals)
        elif not flags or closed:
            raise ConfigError(_stray(word, flags, place))
        else:
            flags[-1] = Flag(name=flags[-1].name, words=(*flags[-1].words, word))
    return tuple(flags)


def _stray(word: str, flags: list[Flag], place: str) -> str:
    if "=" in word and word.split("=")[0].isupper():
        return f"{word!r} ({place}) comes after the script's name; knobs go before it: {word} bash ./script.sh"
    if word[:1] in "\u2013\u2014" and word:
        return f"{word!r} ({place}) begins with a dash that an editor put there; write -- with two hyphens"
    after = f" after {flags[-1].name}" if flags else ""
    return f"{word!r} ({place}) belongs to no flag{after}; Megatron flags are written --flag value"
