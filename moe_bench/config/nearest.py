"""The names a misspelt one may have meant."""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Up to `count` known names that look like `name`, best first; letter case does not matter."""
    import difflib  # noqa: PLC0415 - only on the way to an error message

    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.55)
    return [by_lower[one] for one in close]
