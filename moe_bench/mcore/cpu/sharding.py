"""How the reference layers' parameters appear in a torch_dist checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)

type Offsets = tuple[tuple[int, int, int], ...]
"""Megatron's prepended sharding: (axis, position, number of parts) of each outer axis, such as the layer."""


def sharded_parameters(
    module: torch.nn.Module,
    prefix: str,
    offsets: Offsets,
    metadata: dict[str, object] | None,
    *,
    axes: Mapping[str, int] | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
) -> ShardedStateDict:
    """Return the module's own parameters; those named in axes are split over tp_group on that axis."""
    return make_sharded_tensors_for_checkpoint(
        module.state_dict(prefix="", keep_vars=True),
        prefix,
        dict(axes or {}),
        offsets,
        tp_group=tp_group or parallel_state.get_tensor_model_parallel_group(),
        dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
    )
