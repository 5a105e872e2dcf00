"""Megatron's layer patterns: `([0]*3+[1]*58)` as a list, without Python's eval. Pure."""

from __future__ import annotations

import re

from moe_bench.errors import ArgumentsError

_PATTERN = re.compile(r"[0-9\[\]()+*,\s]+\Z")
_LONGEST, _DEEPEST, _MOST_LAYERS = 4000, 40, 10_000


def layer_pattern(text: str, *, flag: str) -> list[int]:
    """The list that `([0]*3+[1]*58)` means. Raises ArgumentsError for anything but sums and repeats of digit lists."""
    if len(text) > _LONGEST or text.count("(") > _DEEPEST:
        raise ArgumentsError(
            f"{flag} of {len(text)} characters is too long to be read; use ([0]*3+[1]*58)"
        )
    if not _PATTERN.match(text):
        raise ArgumentsError(f"{flag} {text}: only digits, [ ] ( ) + * and commas are read")
    found: list[int] = []
    for term in _split_sum(text.strip()):
        found += _term(term, flag)
        if len(found) > _MOST_LAYERS:
            raise ArgumentsError(f"{flag} {text} is for more than {_MOST_LAYERS} layers")
    return found


def _split_sum(text: str) -> list[str]:
    """The top-level summands, outer parentheses removed."""
    while text.startswith("(") and _closing(text) == len(text) - 1:
        text = text[1:-1].strip()
    terms, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in "([") - (char in ")]")
        if char == "+" and depth == 0:
            terms.append(text[start:index].strip())
            start = index + 1
    return [*terms, text[start:].strip()]


def _closing(text: str) -> int:
    depth = 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return index
    return -1


def _term(term: str, flag: str) -> list[int]:
    """One summand: `[0,1]*40`, `3*[0]`, `([0]+[1])*2`."""
    match = re.fullmatch(r"(?P<left>.*[\])])\s*\*\s*(?P<times>[0-9]{1,5})", term)
    if match:
        return _term_body(match["left"], flag) * int(match["times"])
    match = re.fullmatch(r"(?P<times>[0-9]{1,5})\s*\*\s*(?P<right>[\[(].*)", term)
    if match:
        return _term_body(match["right"], flag) * int(match["times"])
    return _term_body(term, flag)


def _term_body(text: str, flag: str) -> list[int]:
    text = text.strip()
    if re.fullmatch(r"\[[0-9,\s]*\]", text):
        return [int(one) for one in text[1:-1].split(",") if one.strip()]
    if text.startswith("(") and _closing(text) == len(text) - 1:
        return layer_pattern(text, flag=flag)
    raise ArgumentsError(f"{flag}: cannot read {text!r}; write it like ([0]*3+[1]*58)")
