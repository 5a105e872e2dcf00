"""One formatter for each unit, so that every page and message writes it the same way."""

from __future__ import annotations

GIB = 2**30
"""Bytes in a GiB."""

GB = 10**9
"""Bytes in a GB."""


def format_bytes(num_bytes: float) -> str:
    """1536 -> '1.5 KiB': binary units, three significant digits."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.0f} B" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_duration(seconds: float) -> str:
    """3725 -> '1:02:05', 65 -> '1:05', 3.21 -> '3.2 s'."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_count(count: float) -> str:
    """12345678 -> '12.3M': decimal suffixes, three significant digits."""
    value = float(count)
    for suffix in ("", "K", "M", "B", "T"):
        if abs(value) < 999.5 or suffix == "T":
            return f"{value:.3g}{suffix}"
        value /= 1000
    raise AssertionError("unreachable")


def format_loss(loss: float) -> str:
    """2.69314 -> '2.6931'; a tiny one, and one that has exploded, in three digits: '3.75e-06', '3.2e+38'."""
    return f"{loss:.4f}" if loss == 0 or 1e-2 <= abs(loss) < 1e5 else f"{loss:.3g}"


def format_rate(tokens_per_s: float) -> str:
    """3300.4 -> '3,300 tokens/s'."""
    return f"{tokens_per_s:,.0f} tokens/s"
