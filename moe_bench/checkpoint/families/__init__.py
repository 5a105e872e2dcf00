"""The model families that can be converted, one table each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from moe_bench.checkpoint.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from moe_bench.checkpoint.families.glm import GLM4_MOE
from moe_bench.checkpoint.families.gpt_oss import GPT_OSS
from moe_bench.checkpoint.families.mixtral import MIXTRAL
from moe_bench.checkpoint.families.olmoe import OLMOE
from moe_bench.checkpoint.families.qwen import QWEN2_MOE, QWEN3_MOE
from moe_bench.checkpoint.families.qwen3_next import QWEN3_NEXT
from moe_bench.checkpoint.family import Family, holds, list_of
from moe_bench.errors import CheckpointError

FAMILIES = (
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    QWEN3_NEXT,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GLM4_MOE,
    GPT_OSS,
    OLMOE,
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that config.json's `architectures` names. Raises CheckpointError with the nearest known name."""
    names = list_of(config, "architectures")
    for family in FAMILIES:
        if any(name in family.architectures for name in names):
            _refuse(family, config)
            return family
    known = sorted(name for family in FAMILIES for name in family.architectures)
    asked = str(names[0]) if names else "nothing"
    near = difflib.get_close_matches(asked, known, n=1)
    hint = f"; the nearest known is {near[0]}" if near else ""
    raise CheckpointError(
        f"config.json names the architecture {asked}, which is not one of {', '.join(known)}{hint}; "
        "docs/add_a_family.md shows how to add one"
    )


def _refuse(family: Family, config: Mapping[str, Any]) -> None:
    for condition, reason in family.refuse.items():
        if holds(condition, config):
            key = condition.lstrip("!")
            raise CheckpointError(f"config.json: {key} = {config.get(key)!r}: {reason}")
