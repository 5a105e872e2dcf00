"""Megatron's own GPT pretraining: the part of `pretrain_gpt.py` that the megatron-core wheel does not ship.

Written against megatron-core 0.19.2: `megatron.training.pretrain`, its parser, schedules, optimizer and checkpoints do
the work. Import after the CPU embedding is installed. Goes when the wheel ships an entry.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    StragglerDetector,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_timers, pretrain, set_startup_timestamps
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from moe_bench.errors import ArgumentsError

BATCH = ("attention_mask", "labels", "loss_mask", "position_ids", "tokens")


UNSERVED = {
    "sft": "--sft",
    "dataloader_inter_document_masking": "--dataloader-inter-document-masking",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "fim_data": "--fim-data",
    "per_dataset_sequences_path": "--per-dataset-sequences-path",
    "logits_load_dir": "--logits-load-dir",
    "inprocess_restart": "--inprocess-restart",
}
"""What Megatron-LM's pretrain_gpt.py (0.19.0) does besides pretraining, by attribute and flag."""
SPIKE = 10
"""A loss so many times the largest so far is a spike, for --check-for-spiky-loss."""
stragglers = StragglerDetector()


def parse() -> Any:
    """Megatron's arguments from sys.argv, validated and made global by Megatron itself.

    Raises ArgumentsError for what only Megatron-LM's script does.
    """
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    refuse_unserved(args)
    return args


def refuse_unserved(args: Any) -> None:
    """Raise ArgumentsError when `args` ask for more than this entry does."""
    asked = [flag for attribute, flag in UNSERVED.items() if getattr(args, attribute, None)]
    if asked:
        raise ArgumentsError(
            f"{', '.join(asked)}: not done by moe_bench's own entry, which pretrains; set MEGATRON_PATH to a Megatron-LM "
            "checkout, whose pretrain_gpt.py then runs"
        )


def train(args: Any, *, model_config: Callable[[Any], Any] = gpt_config_from_args) -> None:
    """Run Megatron's `pretrain` on `args`. Collective: every rank calls it."""
    now = time.time()
    set_startup_timestamps(program_start=now, main_entry=now)
    setattr(datasets_provider, "is_distributed", True)  # noqa: B010 - Megatron reads it from the function
    pretrain(
        pretrain_cfg_container_from_args(args, model_config(args)),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        get_embedding_ranks=embedding_ranks,
    )


def forward_step(
    data_iterator: Any, model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Callable[..., Any]]:
    """One micro-batch through `model`: its output, and the function that turns it into a loss."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with stragglers(bdata=True):
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    timers("batch-generator").stop()
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    loss = partial(loss_func, batch["loss_mask"])
    compute = model.build_schedule_plan if return_schedule_plan else model
    with stragglers:
        return compute(*inputs, labels=batch["labels"], loss_mask=batch["loss_mask"]), loss


def loss_func(
    loss_mask: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of this rank's token losses, their number, and both for the log. `output`: [b, s/cp]."""
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    if get_args().check_for_nan_in_loss_and_grad:
        for reject, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=reject,
                message=f"found {what} in local forward loss calculation",
                tolerance=0.0,
                fatal=True,
            )
    if get_args().check_for_spiky_loss:
        machine = get_rerun_state_machine()
        machine.validate_result(
            result=loss,
            rejection_func=partial(machine.is_unexpectedly_large, threshold=SPIKE, context="loss"),
            message="Spiky loss",
            tolerance=0.0,
            fatal=False,
        )
    report = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def get_batch(data_iterator: Any, vp_stage: int | None) -> dict[str, torch.Tensor | None]:
    """This rank's share of the next micro-batch; all None on a middle pipeline stage. Collective over TP."""
    args = get_args()
    mtp_here = _mtp_here(vp_stage)
    if not is_first_or_last_pipeline_stage(vp_stage) and not mtp_here:
        return dict.fromkeys(BATCH)
    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        batch = dict.fromkeys(_BROADCAST_KEYS)
        for key in BATCH:
            if sample.get(key) is not None:
                batch[key] = sample[key].cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=False,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp_here,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        hybrid_cp_group_func=None,
        use_per_sequence_balancing=False,
    )
    return {key: batch[key] for key in BATCH}


_BROADCAST_KEYS = (
    *BATCH,
    "cu_seqlens",
    "cu_seqlens_padded",
    "hybrid_cp_group",
    "local_cp_size",
    "max_seqlen",
)


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Train, validation and test datasets: blended from --data-path, or mock ones."""
    args = get_args()
    kind = MockGPTDataset if args.mock_data else GPTDataset
    here = partial(_builds_dataset, vp_stage)
    return BlendedMegatronDatasetBuilder(kind, num_samples, here, _dataset_config(args)).build()


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Ranks of a pipeline that hold the word embedding: first, last when tied, and MTP's."""
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def _builds_dataset(vp_stage: int | None) -> bool:
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    return is_first_or_last_pipeline_stage(vp_stage) or _mtp_here(vp_stage)


def _mtp_here(vp_stage: int | None) -> bool:
    args = get_args()
    if not args.mtp_num_layers:
        return False
    config = core_transformer_config_from_args(args)
    return bool(
        mtp_on_this_rank(
            layout=config.pipeline_model_parallel_layout,
            mtp_num_layers=config.mtp_num_layers,
            ignore_virtual=False,
            vp_stage=vp_stage,
        )
    )


def _dataset_config(args: Any) -> GPTDatasetConfig:
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
    )
