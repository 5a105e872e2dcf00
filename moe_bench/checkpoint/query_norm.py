"""DeepSeek-V2-Lite and Moonlight have no query norm; Megatron-Core 0.19 would build one, and load nothing into it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moe_bench.checkpoint.torch_dist import open_torch_dist
from moe_bench.errors import CheckpointError


def has_no_query_norm(argv: Sequence[str]) -> bool:
    """Whether --load names a checkpoint of a model whose queries have no norm, where Megatron would build one."""
    flags = {token.partition("=")[0] for token in argv}
    if "--multi-latent-attention" not in flags or "--q-lora-rank" in flags or "--load" not in flags:
        return False
    try:
        keys = open_torch_dist(Path(_last_value(argv, "--load"))).tensors
    except CheckpointError:
        return False  # not there yet, or another format: Megatron itself says so
    return any(key.endswith(".linear_q_proj.weight") for key in keys) and not any(
        key.endswith(".linear_q_proj.layer_norm_weight") for key in keys
    )


def _last_value(argv: Sequence[str], name: str) -> str:
    """Of a flag that is given twice, argparse takes the last."""
    value = ""
    for position, token in enumerate(argv):
        flag, joined, rest = token.partition("=")
        if flag == name:
            value = rest if joined else "".join(argv[position + 1 : position + 2])
    return value
