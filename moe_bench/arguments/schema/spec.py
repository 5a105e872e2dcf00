"""One Megatron flag: how it is spelled and what it accepts."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import Literal

import msgspec

Kind = Literal["value", "true", "false", "boolean", "const", "append"]

PATTERN = re.compile(r"[,\d\[\]()+* ]+")
"""What Megatron's list-expression flags (`--moe-layer-freq "([0]*3+[1]*58)"`) may hold."""


class FlagSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A flag as one release's parser declares it, and as the table holds it."""

    options: tuple[str, ...]
    """Every spelling, as in `--no-x`, `--disable-x`."""
    dest: str
    """The attribute of Megatron's args that it sets."""
    kind: Kind
    """value: takes values; true/false: a bare switch that sets its dest so; boolean: `--x` and `--no-x`."""
    type: str = ""
    """int, float, str, bool, or the name of Megatron's own converter. "" for a switch."""
    nargs: str = ""
    """"" for one value, else argparse's nargs: "+", "*", "?" or a number."""
    choices: tuple[str, ...] = ()
    """Accepted values; empty when anything of the type is."""
    default: object
    """JSON value; source text in {"expr": ...} when only running Megatron would tell."""
    group: str = ""
    """Title of the argument group that declares it."""
    needs: str = ""
    """Package without which the parser does not know the flag; "" for always."""

    @property
    def name(self) -> str:
        """The first spelling."""
        return self.options[0]

    @property
    def is_switch(self) -> bool:
        """Whether the flag stands alone, without a value."""
        return self.kind in ("true", "false", "boolean", "const")


def refusal(spec: FlagSpec, words: Sequence[str]) -> str | None:
    """Why Megatron's parser would refuse these words after the flag, or None when it would take them."""
    if (reason := _count_refusal(spec, len(words), " ".join(words))) is not None:
        return reason
    for word in words:
        if (reason := _word_refusal(spec, word)) is not None:
            return reason
    return None


def _count_refusal(spec: FlagSpec, given: int, text: str) -> str | None:
    if spec.is_switch:
        return f"it is a switch and takes no value, but has {text!r}" if given else None
    match spec.nargs:
        case "":
            wanted = None if given == 1 else "exactly one value"
        case "+":
            wanted = None if given else "at least one value"
        case "?":
            wanted = None if given < 2 else "at most one value"
        case number if number.isdigit():
            wanted = None if given == int(number) else f"exactly {number} values"
        case _:
            wanted = None
    return None if wanted is None else f"it needs {wanted} and has {given or 'none'}"


def _word_refusal(spec: FlagSpec, word: str) -> str | None:
    wanted = _type_refusal(spec.type, word)
    if wanted is not None:
        return f"{word!r} is not {wanted}"
    if spec.choices and _canonical(spec.type, word) not in spec.choices:
        return f"{word!r} is not one of {', '.join(spec.choices)}"
    return None


def _type_refusal(type_name: str, word: str) -> str | None:  # noqa: PLR0911 - one return a case
    match type_name:
        case "int":
            return None if _converts(int, word) else "a whole number"
        case "float":
            return None if _converts(float, word) else "a number"
        case "moe_freq_type" | "la_freq_type" | "no_rope_freq_type":
            fits = _converts(int, word) or ("[" in word and PATTERN.fullmatch(word))
            return None if fits else "a whole number or a list expression such as ([0]*3+[1]*58)"
        case "tuple_type":
            parts = word.strip("()").split(",")
            return None if all(_converts(int, part) for part in parts) else "whole numbers a,b"
        case "signal.Signals":
            return None if word in signal.Signals.__members__ else "a signal such as SIGTERM"
        case "bool":
            unclear = word.lower() in ("false", "no", "off", "0")
            return "taken as false: Megatron reads any text here as true" if unclear else None
    return None


def _converts(kind: type[int] | type[float], word: str) -> bool:
    try:
        kind(word)
    except ValueError:
        return False
    return True


def _canonical(type_name: str, word: str) -> str:
    return str(int(word)) if type_name == "int" else word
