"""The Megatron flags that build the model a config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_bench.checkpoint.family import Family, list_of, read_sizes, table_of, whole_number
from moe_bench.checkpoint.mapping import LayerKeys
from moe_bench.errors import CheckpointError


def megatron_flags(
    family: Family, config: Mapping[str, Any], layer_keys: LayerKeys | None = None
) -> list[str]:
    """Flags and values in argv order; with `layer_keys`, those that make Megatron expect such keys.

    Raises CheckpointError for RoPE scaling that has no flag.
    """
    sizes = read_sizes(family, config)
    argv: list[str] = []
    for flag, rule in family.flags.items():
        value = _value(rule, config, sizes.number)
        if value is not None:
            argv += [flag, value] if value else [flag]
    layers = range(sizes.values["L"])
    moe = [int(not family.is_dense(config, layer)) for layer in layers]
    linear = [int(family.is_linear(config, layer)) for layer in layers]
    custom = "per-layer" if family.per_layer_keys or not all(moe) else "stacked"
    if (layer_keys or custom) == "per-layer":
        argv += ["--moe-layer-freq", f"({moe})".replace(" ", "")]
    if any(linear):
        argv += ["--linear-attention-freq", f"({linear})".replace(" ", "")]
    return [*argv, *_window(config), *_rope(config)]


def _value(rule: str, config: Mapping[str, Any], number: Any) -> str | None:
    """`=literal`, `@config key`, `?key` and `!key` (a switch when truthy, falsy), or a size word (absent when 0)."""
    kind, rest = rule[0], rule[1:]
    if kind == "=":
        return rest
    if kind == "@":
        value = config.get(rest)
        return None if value is None else str(value)
    if kind in "?!":
        return "" if bool(config.get(rest)) is (kind == "?") else None
    return str(number(rule)) if number(rule) else None


def _window(config: Mapping[str, Any]) -> list[str]:
    """Sliding windows on every other layer, the last of each pair being full (gpt-oss)."""
    kinds, window = list_of(config, "layer_types"), whole_number(config, "sliding_window")
    if not window or "sliding_attention" not in kinds:
        return []
    if kinds != ["full_attention" if i % 2 else "sliding_attention" for i in range(len(kinds))]:
        raise CheckpointError(
            "config.json: layer_types is not alternately sliding and full; it has no Megatron flags here"
        )
    return ["--window-size", f"{window - 1},0", "--window-attn-skip-freq", "2"]


def _rope(config: Mapping[str, Any]) -> list[str]:
    """RoPE's base and scaling; transformers 5 writes `rope_parameters`, earlier ones `rope_theta` and `rope_scaling`."""
    scaling = {
        "rope_theta": config.get("rope_theta", 10000.0),
        **table_of(config, "rope_scaling"),
        **table_of(config, "rope_parameters"),
    }
    argv = ["--rotary-base", str(int(_number(scaling, "rope_theta")))]
    partial = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        argv += ["--rotary-percent", str(partial)]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        mla = config.get("kv_lora_rank")
        return [*argv, "--rope-type", "rope"] if mla else argv
    if kind != "yarn":
        raise CheckpointError(
            f"config.json: RoPE scaling {kind!r} has no Megatron flags here; only yarn has"
        )
    argv += ["--rotary-scaling-factor", str(_number(scaling, "factor"))]
    for flag, key in (("--mscale", "mscale"), ("--mscale-all-dim", "mscale_all_dim")):
        if scaling.get(key) is not None:
            argv += [flag, str(scaling[key])]
    if config.get("kv_lora_rank"):
        return [*argv, "--rope-type", "yarn", *_latent_yarn(scaling)]
    return [*argv, *_yarn(scaling)]


_LARGEST = 1e15


def _number(scaling: Mapping[str, Any], key: str) -> float:
    value: Any = scaling.get(key)
    if type(value) not in (int, float) or not abs(value) < _LARGEST:
        raise CheckpointError(f"config.json: RoPE's {key} = {value!r} is not a number")
    return float(value)


def _latent_yarn(scaling: Mapping[str, Any]) -> list[str]:
    """Nothing: Megatron-Core 0.19 has no flags for the rest, and takes MLATransformerConfig's defaults."""
    fixed = {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}
    for key, value in fixed.items():
        if scaling.get(key, value) != value:
            raise CheckpointError(
                f"config.json: RoPE scaling with {key} = {scaling[key]} has no Megatron flag beside latent attention; "
                f"only {value} can be run"
            )
    return []


def _yarn(scaling: Mapping[str, Any]) -> list[str]:
    argv = ["--position-embedding-type", "yarn"]
    original = scaling.get("original_max_position_embeddings")
    if original:
        argv += ["--yarn-original-max-position-embeddings", str(original)]
    for flag, key in (("--yarn-beta-fast", "beta_fast"), ("--yarn-beta-slow", "beta_slow")):
        if scaling.get(key) is not None:
            argv += [flag, str(_number(scaling, key))]
    return [
        *argv,
        *([] if scaling.get("truncate", True) else ["--no-yarn-correction-range-round-to-int"]),
    ]
