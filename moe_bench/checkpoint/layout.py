"""How Megatron names what is not a weight, and which layer keys a training configuration expects."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from moe_bench.checkpoint.mapping import Dialect

_LINEAR = re.compile(r"(.*(?:linear_\w+|eh_proj))\.weight")
_NORM = re.compile(r"(.*(?:layernorm|enorm|hnorm))\.weight")


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
