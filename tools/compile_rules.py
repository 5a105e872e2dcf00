"""Writes moe_bench/arguments/lint_rules.json from lint_rules.yaml: run it after every change of the rules."""

from __future__ import annotations

import sys
from binascii import crc32
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_bench.arguments.lint import BUILTIN, COMPILED, Compiled, read_rules


def compiled() -> bytes:
    """The JSON's bytes, one rule a line."""
    rules = [msgspec.json.encode(rule).decode() for rule in read_rules(BUILTIN, "builtin")]
    head = f'{{"yaml_crc32":{crc32(BUILTIN.read_bytes())},"rules":['
    text = head + "\n" + ",\n".join(rules) + "\n]}\n"
    msgspec.json.decode(text, type=Compiled)
    return text.encode()


if __name__ == "__main__":
    COMPILED.write_bytes(compiled())
