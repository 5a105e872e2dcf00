"""Identity of this converter, stated in ledgers and manifests."""

from __future__ import annotations

import hashlib
import json

VERSION = "0.1.0"
FORMAT = 1
"""Raised when the bytes that a plan produces change."""


def tool() -> dict[str, str | int]:
    """Name and versions of the writer."""
    return {"name": "moe_bench convert", "version": VERSION, "format": FORMAT}


def digest(value: object) -> str:
    """SHA-256 of a value's canonical JSON."""
    raw = json.dumps(value, sort_keys=True, separators=(",", ":"), default=list)
    return hashlib.sha256(raw.encode()).hexdigest()
