"""Bodies of test_layers.py: each layout of two ranks against one rank. Import under the CPU embedding."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state as mpu, utils
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType

from moe_bench.mcore.cpu.attention import CoreAttention
from tests.ranks import layer_models as models
from tests.ranks.layer_architectures import ARCHITECTURES, GATED_DELTA_NET, GQA, LAYOUTS


def agrees_with_one_rank(architecture: str, layout: str) -> None:
    """Loss and every gradient of the layout are the one-rank model's."""
    changes = ARCHITECTURES[architecture]
    models.start_groups()
    gpt = models.model(models.config(**changes))
    expected_loss, whole = models.loss_and_gradients(gpt)
    if architecture == GATED_DELTA_NET:
        one_rank = shared_folder()
        dist_checkpointing.save(sharded(gpt), one_rank)
    models.start_groups(**LAYOUTS[layout])
    gpt = models.model(models.config(**changes))
    if architecture == GATED_DELTA_NET:  # its sections do not start as parts of one weight
        gpt.load_state_dict(dist_checkpointing.load(sharded(gpt), one_rank))
    loss, gradients = models.loss_and_gradients(gpt)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0.0)
    for name, parameter in gpt.named_parameters():
        if architecture == GATED_DELTA_NET and name.partition("self_attention.")[2]:
            continue  # cut by section; the embedding's gradient has gone through them
        expert = "mlp.experts." in name
        expected = models.own_part(whole[one_rank_name(name)], parameter, expert=expert)
        if expert and not getattr(parameter, "allreduce", True):
            dist.all_reduce(gradients[name], group=mpu.get_expert_data_parallel_group())
            expected = expected * mpu.get_data_parallel_world_size()
        scale = float(whole[one_rank_name(name)].abs().max())
        torch.testing.assert_close(
            gradients[name], expected, rtol=1e-4, atol=3e-6 * scale + 1e-9, msg=name_in(name)
        )


def one_rank_name(name: str) -> str:
    """The parameter's name where one rank holds every expert."""
    before, experts, after = name.partition("local_experts.")
    local, _, rest = after.partition(".")
    first = mpu.get_expert_model_parallel_rank() * (4 // mpu.get_expert_model_parallel_world_size())
    return f"{before}{experts}{first + int(local)}.{rest}" if experts else name


def name_in(name: str) -> Any:
    """A message of assert_close that names the parameter."""
    return lambda message: f"gradient of {name}: {message}"


def grouped_and_sequential_experts_share_checkpoints() -> None:
    """What grouped experts write over EP2, sequential ones read over TP2, to the last bit."""
    models.start_groups(ep=2)
    grouped = models.model(models.config(**GQA))
    expected, _ = models.loss_and_gradients(grouped)
    folder = shared_folder()
    dist_checkpointing.save(sharded(grouped), folder)
    models.start_groups(tp=2, etp=2)
    sequential = models.model(models.config(**GQA, moe_grouped_gemm=False))
    for parameter in sequential.parameters():
        parameter.data.zero_()
    state = dist_checkpointing.load(sharded(sequential), folder)
    sequential.load_state_dict(state)
    loss, _ = models.loss_and_gradients(sequential)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
    again = models.model(models.config(**GQA))
    again.load_state_dict(dist_checkpointing.load(sharded(again), folder))
    loss, _ = models.loss_and_gradients(again)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)


def packed_sequences_in_two_parts_equal_whole_ones() -> None:
    """Under CP2 each packed sequence is cut by itself: context and gradients are one rank's."""
    bounds = [0, 8, 20]
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor(bounds))
    whole = [torch.randn(20, heads, 8) for heads in (4, 2, 2)]
    found = []
    for cp in (1, 2):
        models.start_groups(cp=cp)
        settings = models.config(num_attention_heads=4, num_query_groups=2, kv_channels=8)
        core = CoreAttention(settings, 1, AttnMaskType.causal)
        inputs = [own_of_packed(t, bounds).requires_grad_() for t in whole]
        output = core(*inputs, None, packed_seq_params=packed)
        (output * own_of_packed(torch.arange(20.0)[:, None], bounds)).sum().backward()
        found.append([output, *(t.grad for t in inputs)])
    for expected, own in zip(*found, strict=True):
        torch.testing.assert_close(own, own_of_packed(expected, bounds), rtol=1e-5, atol=1e-5)
    uneven = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 6, 20]))
    with pytest.raises(ValueError, match="pad them to a multiple of 4"):
        core(*inputs, None, packed_seq_params=uneven)


def packed_batches_are_cut_as_attention_cuts_them() -> None:
    """Fine-tuning's batches under CP2: Megatron asks Transformer Engine which tokens of each sequence are this rank's."""
    bounds = [0, 8, 20]
    models.start_groups(cp=2)
    batch = {
        "tokens": torch.arange(20)[None],
        "labels": torch.arange(1, 21)[None],
        "cu_seqlens": torch.tensor([bounds], dtype=torch.int32),
        "cu_seqlens_padded": None,
    }
    own = utils.get_batch_on_this_cp_rank(
        dict(batch), is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )
    for key in ("tokens", "labels"):
        assert own[key][0].equal(own_of_packed(batch[key][0], bounds)), key


def own_of_packed(whole: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """This context-parallel rank's two chunks of each packed sequence; the sequences along dimension 0."""
    parts = [whole[start:end].unsqueeze(0) for start, end in pairwise(bounds)]
    return torch.cat([models.own_of_sequence(part).squeeze(0) for part in parts]).detach().clone()


def shared_folder() -> str:
    """A new folder of which all ranks know."""
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    return folder[0]


def experts_on_disk_look_the_same() -> None:
    """Grouped and sequential experts name and cut the same tensors."""
    for layout in ({"ep": 2}, {"tp": 2, "etp": 2}):
        models.start_groups(**layout)
        pieces = []
        for grouped in (True, False):
            gpt = models.model(models.config(**GQA, moe_grouped_gemm=grouped))
            state = sharded(gpt)
            apply_factories(state)
            pieces.append(sorted(flat_tensors(state)))
        assert pieces[0] == pieces[1], f"{layout}: grouped {pieces[0]} != sequential {pieces[1]}"


def flat_tensors(state: Any) -> list[tuple[object, ...]]:
    """Key, global shape, offset and replica of each sharded tensor below state."""
    if isinstance(state, ShardedTensor):
        return [(state.key, state.global_shape, state.global_offset, state.replica_id)]
    children = state.values() if isinstance(state, dict) else state
    if not isinstance(state, dict | list):
        return []
    return [found for child in children for found in flat_tensors(child)]


def sharded(gpt: Any) -> Any:
    """The model's sharded state dict without its empty extra states."""
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    state = gpt.sharded_state_dict(metadata=metadata)
    return {key: value for key, value in state.items() if not key.endswith("_extra_state")}
