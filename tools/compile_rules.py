"""Writes the JSON beside lint_rules.yaml and renames.yaml: run it after every change of them."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_bench.arguments.compiled import dump
from moe_bench.arguments.lint import BUILTIN, read_rules
from moe_bench.arguments.schema.renames import RENAMES, read_renames


def main() -> None:
    """Both files, one entry a line."""
    rules = ",\n".join(
        msgspec.json.encode(rule).decode() for rule in read_rules(BUILTIN, "builtin")
    )
    BUILTIN.with_suffix(".json").write_bytes(dump(BUILTIN, f"[\n{rules}\n]"))
    renames = msgspec.json.encode(read_renames()).decode()
    RENAMES.with_suffix(".json").write_bytes(dump(RENAMES, renames.replace("},{", "},\n{")))


if __name__ == "__main__":
    main()
