"""What a checkpoint to be loaded says about attention norms that Megatron-Core 0.19's flags cannot say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_bench.checkpoint.metadata import TensorEntry
from moe_bench.checkpoint.torch_dist import open_torch_dist
from moe_bench.errors import CheckpointError


def has_no_query_norm(argv: Sequence[str]) -> bool:
    """Whether queries have no norm where Megatron would build one (DeepSeek-V2-Lite, Moonlight)."""
    flags = _flags(argv)
    if "--multi-latent-attention" not in flags or "--q-lora-rank" in flags:
        return False
    keys = _loaded(flags)
    return any(key.endswith(".linear_q_proj.weight") for key in keys) and not any(
        key.endswith(".linear_q_proj.layer_norm_weight") for key in keys
    )


def has_norms_across_heads(argv: Sequence[str]) -> bool:
    """Whether queries and keys are normed over all heads at once, where Megatron norms each head (OLMoE)."""
    flags = _flags(argv)
    heads, hidden = flags.get("--num-attention-heads", ""), flags.get("--hidden-size", "")
    if "--qk-layernorm" not in flags or not (heads.isdecimal() and hidden.isdecimal()):
        return False
    channels = int(flags.get("--kv-channels") or int(hidden) // int(heads))
    norms = [e for key, e in _loaded(flags).items() if key.endswith(".q_layernorm.weight")]
    width = int(heads) * channels
    return bool(norms) and width != channels and all(e.shape[-1] == width for e in norms)


def _flags(argv: Sequence[str]) -> dict[str, str]:
    """Flag -> value or nothing; the last of a kind counts, as for argparse."""
    found: dict[str, str] = {}
    for token, follower in zip(argv, [*argv[1:], "--"], strict=True):
        name, joined, value = token.partition("=")
        if name.startswith("--"):
            found[name] = value if joined else ("" if follower.startswith("--") else follower)
    return found


def _loaded(flags: Mapping[str, str]) -> Mapping[str, TensorEntry]:
    """Tensors of --load; none when it is not there yet or has another format, of which Megatron itself speaks."""
    if not flags.get("--load"):
        return {}
    try:
        return open_torch_dist(Path(flags["--load"])).tensors
    except CheckpointError:
        return {}
