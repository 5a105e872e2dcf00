"""`PREFIX.json`: what the dataset was made of, and the flags that train on it. The same inputs give the same bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_bench.errors import DataError

if TYPE_CHECKING:  # a manifest is read without numpy
    from moe_bench.data.tokenizer import TokenizerFacts

FORMAT = 1
_HEAD = b'{\n  "format": '


def manifest_path(prefix: Path) -> Path:
    """Beside the dataset."""
    return prefix.with_name(prefix.name + ".json")


def read_manifest(prefix: Path) -> dict[str, Any] | None:
    """None when there is none. Raises DataError when it is damaged."""
    path = manifest_path(prefix)
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a manifest: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise DataError(f"{path}: not a manifest of format {FORMAT}; prepare the data again")
    return value


def manifest_of(prefix: Path) -> dict[str, Any] | None:
    """The manifest that describes a dataset: its own, or the one it shares with other keys (`PREFIX_KEY_document`)."""
    parts = prefix.name.removesuffix("_document").split("_")
    shared = ["_".join(parts[:end]) or "_" for end in range(len(parts) - 1, 0, -1)]
    for candidate in (prefix, *map(prefix.with_name, shared)):
        manifest = read_manifest(candidate) if is_manifest(manifest_path(candidate)) else None
        if manifest is not None and entry_of(manifest, prefix) is not None:
            return manifest
    return None


def is_manifest(path: Path) -> bool:
    """By its first bytes: a file of that name may as well be the text that the data was made of."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(_HEAD)) == _HEAD
    except OSError:
        return False


def entry_of(manifest: Mapping[str, Any], prefix: Path) -> dict[str, Any] | None:
    """What a manifest says about one dataset's files; None when it does not describe them."""
    outputs = manifest["outputs"].values()
    return next((entry for entry in outputs if entry["prefix"] == prefix.name), None)


def tokenizer_entry(facts: TokenizerFacts) -> dict[str, Any]:
    """The manifest's `tokenizer` and `megatron_arguments`."""
    return {
        "kind": facts.kind,
        "path": facts.path,
        "sha256": facts.sha256,
        "vocab_size": facts.vocab_size,
        "eod": facts.eod,
        "megatron_arguments": list(facts.megatron_arguments),
        "megatron_arguments_before_0.18": list(facts.megatron_arguments_before_018),
    }


def library_versions(facts: TokenizerFacts) -> dict[str, str]:
    """Of what decides the bytes."""
    library = {"huggingface": "tokenizers", "sentencepiece": "sentencepiece"}.get(facts.kind)
    names = ["numpy", *([library] if library else [])]
    return {name: _version(name) for name in names}


def file_sha256(path: Path) -> str:
    """Read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def to_bytes(manifest: Mapping[str, Any]) -> bytes:
    """Readable, stable."""
    return (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - 15 ms, for writers only

    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
