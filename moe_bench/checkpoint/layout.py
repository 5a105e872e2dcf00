"""How Megatron names what is not a weight, and which layer keys a training configuration expects."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from moe_bench.checkpoint.family import Family
from moe_bench.checkpoint.mapping import Dialect, LayerKeys
from moe_bench.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
"""Names the iteration to load; without it a folder is no checkpoint."""
_LINEAR = re.compile(r"(.*(?:linear_\w+|eh_proj|in_proj|out_proj))\.weight(?:\.query)?")
_NORM = re.compile(r"(.*(?:layernorm|enorm|hnorm|out_norm))\.weight")


def extra_states(key: str, lead: tuple[int, ...], dialect: Dialect) -> Iterator[str]:
    """Object keys that Megatron asks for beside a weight, one for each place on the leading axes.

    Every linear has an `_extra_state`. Transformer Engine's norms and core attention have one too; the local spec's
    do not.
    """
    owners = [match[1] for match in [_LINEAR.fullmatch(key)] if match]
    if dialect != "local":
        owners += [match[1] for match in [_NORM.fullmatch(key)] if match]
        if key.endswith("self_attention.linear_proj.weight"):
            owners.append(key.removesuffix("linear_proj.weight") + "core_attention")
    sizes = lead or (1,)
    for owner in owners:
        for place in itertools.product(*map(range, sizes)):
            yield f"{owner}._extra_state/shard_{_dotted(place)}_{_dotted(sizes)}"


def _dotted(values: tuple[int, ...]) -> str:
    return ".".join(map(str, values))


def choose_layer_keys(
    family: Family, asked: LayerKeys | Literal["auto"], preset: Path | None
) -> LayerKeys:
    """What the user asked for, else what the training configuration implies, else the family's custom.

    Megatron names each layer when --moe-layer-freq or --linear-attention-freq is a list (an all-ones list too) or
    greater than 1.
    """
    if asked != "auto":
        return asked
    if preset is None:
        return "per-layer" if family.per_layer_keys else "stacked"
    arguments = _model_args(preset)
    frequencies = ("--moe-layer-freq", "--linear-attention-freq")
    values = [str(arguments.get(name, 1)).strip() for name in frequencies]
    return "stacked" if values == ["1", "1"] else "per-layer"


def _model_args(preset: Path) -> dict[str, Any]:
    try:
        table = yaml.safe_load(preset.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{preset}: cannot be read: {error}") from error
    arguments = table.get("MODEL_ARGS") if isinstance(table, dict) else None
    if not isinstance(arguments, dict):
        raise CheckpointError(
            f"{preset} has no MODEL_ARGS; name a model YAML such as those of model_configs/"
        )
    return arguments
