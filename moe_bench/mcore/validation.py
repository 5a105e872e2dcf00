"""Megatron's own parse and validation of sys.argv, without starting anything."""

from __future__ import annotations

import sys
from typing import Any


def validate() -> Any:
    """Parse and validate sys.argv as rank RANK of WORLD_SIZE. Raises what Megatron raises, SystemExit included."""
    from megatron.training.arguments import parse_args, validate_args  # noqa: PLC0415

    args = parse_args()
    validate_args(args, {"tokenizer_type": "GPT2BPETokenizer"})
    entry = sys.modules.get(
        "moe_bench.mcore.entry"
    )  # there unless a checkout's own script will run
    if entry is not None:
        entry.refuse_unserved(args)
    return args
