"""What proving a converted checkpoint needs of Megatron: load it as training does, and run it forward.

Written against megatron-core 0.19.2. Import after the CPU embedding is installed, inside `reference_layers()`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.training import get_args
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.checkpointing import load_checkpoint
from megatron.training.initialize import initialize_megatron

from moe_bench.errors import CheckpointError
from moe_bench.mcore.entry import embedding_ranks, parse
from moe_bench.mcore.patches import COMPILED_HELPERS


def load_model() -> list[Any]:
    """Build the model that sys.argv describes and fill it from --load with Megatron's own loader.

    Collective: every rank of the layout calls it. Raises CheckpointError naming a parameter that the checkpoint left
    unset; each one is NaN before loading.
    """
    args = parse()
    with COMPILED_HELPERS.applied():
        initialize_megatron(get_embedding_ranks=embedding_ranks)
    config = gpt_config_from_args(args)
    stages: list[Any] = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        wrap_with_ddp=False,
        data_parallel_random_init=False,
    )
    with torch.no_grad():
        for stage in stages:
            for tensor in stage.parameters():
                tensor.fill_(float("nan"))
    load_checkpoint(stages, None, None, strict=True)
    for stage in stages:
        for name, tensor in stage.named_parameters():
            if torch.isnan(tensor).any():
                raise CheckpointError(f"{args.load}: {name!r} was not loaded")
        stage.eval()
    return stages


def logits(stages: list[Any], tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits of `tokens` [b, s] over the true vocabulary, [b, s, v]; None on ranks without the output layer.

    Collective over the whole layout; b is the number of micro-batches.
    """
    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=_iterators(tokens, len(stages)),
            model=stages,
            num_microbatches=len(tokens),
            seq_length=tokens.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not outputs:
            return None
        gathered = [_whole(output) for output in outputs]
    return torch.cat(gathered)[..., : get_args().vocab_size]


def is_first_of_its_stage() -> bool:
    """Whether this rank speaks for all that hold the same pipeline stage."""
    first_replica = torch.distributed.get_rank(mpu.get_data_parallel_group()) == 0
    return first_replica and mpu.get_tensor_model_parallel_rank() == 0


def _iterators(tokens: torch.Tensor, num_stages: int) -> Any:
    feeds: list[Iterator[torch.Tensor]] = [iter(tokens.split(1)) for _ in range(num_stages)]
    return feeds if num_stages > 1 else feeds[0]


def _forward(data_iterator: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    tokens = next(data_iterator)
    positions = torch.arange(tokens.shape[1])[None]
    own = _own_positions(tokens.shape[1])
    output = model(tokens[:, own], positions[:, own], None)
    return output, partial(_keep, output)


def _keep(output: torch.Tensor, *_schedule: Any, **_options: Any) -> torch.Tensor:
    return output


def _own_positions(seq_length: int) -> torch.Tensor:
    """Positions of this context-parallel rank: chunk r and its mirror of 2 x CP (Megatron's zigzag order)."""
    cp, rank = mpu.get_context_parallel_world_size(), mpu.get_context_parallel_rank()
    chunks = torch.arange(seq_length).chunk(2 * cp)
    return torch.arange(seq_length) if cp == 1 else torch.cat([chunks[rank], chunks[-1 - rank]])


def _whole(output: torch.Tensor) -> torch.Tensor:
    """Gather a micro-batch's logits over the vocabulary's ranks, then over the sequence's. [1, s, v]."""
    output = gather_from_tensor_model_parallel_region(output)
    cp = mpu.get_context_parallel_world_size()
    if cp == 1:
        return output
    parts = [torch.empty_like(output) for _ in range(cp)]
    torch.distributed.all_gather(parts, output.contiguous(), group=mpu.get_context_parallel_group())
    chunks: list[Any] = [None] * (2 * cp)
    for rank, part in enumerate(parts):
        chunks[rank], chunks[-1 - rank] = part.chunk(2, dim=1)
    return torch.cat(chunks, dim=1)
