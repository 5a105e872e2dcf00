"""YAML that comes with the project, kept beside it as JSON that loads in a millisecond.

tools/compile_rules.py writes the JSON. It holds the YAML's checksum: after an edit, the YAML itself is read.
"""

from __future__ import annotations

from binascii import crc32
from pathlib import Path

import msgspec


class _Compiled(msgspec.Struct, frozen=True):
    yaml_crc32: int
    content: msgspec.Raw


def load[T](path: Path, kind: type[T]) -> T | None:
    """What the YAML at `path` says, from its JSON; None where that is not the JSON of these bytes."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return None
    compiled = msgspec.json.decode(beside.read_bytes(), type=_Compiled)
    if compiled.yaml_crc32 != crc32(path.read_bytes()):
        return None
    return msgspec.json.decode(compiled.content, type=kind)


def dump(path: Path, content: str) -> bytes:
    """The bytes of the JSON beside `path`, from the JSON text of what it says."""
    return f'{{"yaml_crc32":{crc32(path.read_bytes())},"content":{content}}}\n'.encode()
