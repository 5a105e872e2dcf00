"""Core attention for CPU ranks: everything Megatron asks of Transformer Engine's, in plain torch.

Letters in shapes: s query positions of this rank, S key positions of the whole sequence, b batch, n query heads,
g key/value heads (n / g queries share one), d key channels, v value channels.
"""

from __future__ import annotations

import math
import weakref
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention

from moe_bench.mcore.cpu.context_parallel import gather_sequence, own_chunks
from moe_bench.mcore.cpu.sharding import Offsets, sharded_parameters

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class CoreAttention(MegatronModule):
    """Scaled dot-product attention: grouped queries, MLA's unequal channels, windows, sinks, context parallel.

    Stands in for `TEDotProductAttention` and `DotProductAttention`. Keys and values are gathered over the context
    parallel group in Megatron's zigzag order, whichever `cp_comm_type` is named: the result is the same.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_attention_type_v_channels_cp_comm_type: object,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.attn_mask_type = attn_mask_type
        self.tp_group = pg_collection.tp
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(k_channels or config.kv_channels)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window: tuple[int, int] | None = tuple(config.window_size) if windowed else None
        self.softmax_offset = self._build_softmax_offset(config)

    def _build_softmax_offset(self, config: TransformerConfig) -> torch.Tensor | None:
        """Return the logit of the sink that each head may attend to in place of any token."""
        if config.softmax_type == "vanilla":
            return None
        tp_size, tp_rank = self.tp_group.size(), self.tp_group.rank()
        offsets = torch.zeros(config.num_attention_heads, dtype=config.params_dtype)
        if config.softmax_type == "learnable" and config.perform_initialization:
            config.init_method(offsets)
        own = offsets.chunk(tp_size)[tp_rank].clone()
        if config.softmax_type == "off-by-one":
            return own
        parameter = torch.nn.Parameter(own)
        parameter.tensor_model_parallel = tp_size > 1
        parameter.partition_dim = 0
        parameter.partition_stride = 1
        return parameter

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> torch.Tensor:
        """Return the context. query: [s, b, n, d]; key, value: [s, b, g, d or v]; result: [s, b, n * v]."""
        assert attention_bias is None, "attention_bias is not supported by the CPU's core attention"
        mask_type = attn_mask_type or self.attn_mask_type
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if mask_type in CAUSAL and attention_mask is not None and is_causal_mask(attention_mask):
            attention_mask = None
        if self.cp_group is None:
            rows = torch.arange(query.shape[0], device=query.device)
            context = self._attend(query, key, value, rows, mask_type, attention_mask)
            return context.flatten(2)
        return self._context_parallel(query, key, value, mask_type, attention_mask)

    def _context_parallel(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask_type: AttnMaskType,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend from this rank's two chunks of the sequence to all of it."""
        assert self.cp_group is not None
        key, value = gather_sequence(key, self.cp_group), gather_sequence(value, self.cp_group)
        outputs = []
        chunk = query.shape[0] // 2
        for index, number in enumerate(own_chunks(self.cp_group)):
            rows = torch.arange(number * chunk, (number + 1) * chunk, device=query.device)
            own = slice(index * chunk, (index + 1) * chunk)
            mask = None if attention_mask is None else attention_mask[..., own, :]
            reach = (number + 1) * chunk if mask is None and mask_type in CAUSAL else key.shape[0]
            outputs.append(
                self._attend(query[own], key[:reach], value[:reach], rows, mask_type, mask)
            )
        return torch.cat(outputs).flatten(2)

    def _packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packed: PackedSeqParams,
    ) -> torch.Tensor:
        """Attend within each of the sequences packed into one; query: [t, n, d].

        Under context parallel each sequence is cut by itself: this rank holds two chunks of every one.
        """
        bounds = packed.cu_seqlens_q_padded
        bounds = (packed.cu_seqlens_q if bounds is None else bounds).tolist()
        ranks = self.cp_group.size() if self.cp_group is not None else 1
        if ranks > 1 and any(bound % (2 * ranks) for bound in bounds):
            raise ValueError(
                f"packed sequences from {bounds}: each must divide into 2 chunks for each of the {ranks} ranks of context "
                f"parallelism; pad them to a multiple of {2 * ranks}"
            )
        outputs = []
        for start, end in pairwise(bounds):
            own = slice(start // ranks, end // ranks)
            q, k, v = (t[own].unsqueeze(1) for t in (query, key, value))
            if self.cp_group is not None:
                context = self._context_parallel(q, k, v, AttnMaskType.causal, None)
            else:
                rows = torch.arange(end - start, device=query.device)
                context = self._attend(q, k, v, rows, AttnMaskType.causal, None).flatten(2)
            outputs.append(context.squeeze(1))
        return torch.cat(outputs)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: torch.Tensor,
        mask_type: AttnMaskType,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return [s, b, n, v]; rows are the queries' positions, the keys' are 0, 1, ... S - 1."""
        # Megatron keeps the sequence first; torch wants [b, heads, sequence, channels].
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        keys = k.shape[2]
        whole = attention_mask is None and mask_type in CAUSAL
        if whole and self.window is None and rows.shape[0] == keys:
            allowed = None
        else:
            allowed = self._allowed(rows, keys, mask_type, attention_mask)
        if self.softmax_offset is None and not (self.dropout and self.training):
            context = fused_attention(q, k, v, allowed, self.softmax_scale, causal=allowed is None)
        else:
            if allowed is None:
                allowed = self._allowed(rows, keys, mask_type, attention_mask)
            context = self._plain_attention(q, k, v, allowed)
        return context.permute(2, 0, 1, 3)

    def _allowed(
        self,
        rows: torch.Tensor,
        keys: int,
        mask_type: AttnMaskType,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return which keys a query may see, as a boolean broadcastable to [b, n, s, S]."""
        columns = torch.arange(keys, device=rows.device)
        distance = rows[:, None] - columns[None, :]
        allowed = torch.ones_like(distance, dtype=torch.bool)
        if mask_type in CAUSAL:
            allowed = distance >= 0
        if self.window is not None:
            left, right = self.window
            if left >= 0:
                allowed = allowed & (distance <= left)
            if right >= 0:
                allowed = allowed & (distance >= -right)
        if attention_mask is not None:
            return (
                allowed & ~attention_mask
            )  # Megatron's masks are True where attention is forbidden
        return allowed

    def _plain_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor
    ) -> torch.Tensor:
        """Attention written out, for sinks and dropout, which torch's fused kernel lacks."""
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = (q @ k.transpose(-1, -2)).float() * self.softmax_scale
        scores = scores.masked_fill(~allowed, float("-inf"))
        if self.softmax_offset is not None:
            sink = self.softmax_offset.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            probabilities = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
        else:
            probabilities = scores.softmax(dim=-1)
        probabilities = probabilities.to(q.dtype)
        if self.dropout and self.training:
            with self._dropout_generator():
                probabilities = F.dropout(probabilities, self.dropout)
        return probabilities @ v

    def _dropout_generator(self) -> AbstractContextManager[None]:
        """Return Megatron's tensor-parallel random stream, as in its dot_product_attention.py (0.19.2)."""
        if self.config.sequence_parallel:
            return nullcontext()
        return get_cuda_rng_tracker().fork()

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: Offsets = (),
        metadata: dict[str, object] | None = None,
    ) -> ShardedStateDict:
        """Return the learnable sink, split by heads; nothing else here is learned."""
        axes = {"softmax_offset": 0}
        return sharded_parameters(
            self, prefix, sharded_offsets, metadata, axes=axes, tp_group=self.tp_group
        )


def fused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    allowed: torch.Tensor | None,
    scale: float,
    *,
    causal: bool,
) -> torch.Tensor:
    """Attention by torch's fused kernel: q [b, n, s, d], k [b, g, S, d], v [b, g, S, v] -> [b, n, s, v].

    Torch 2.11's CPU kernel takes only equal channels; with fewer value channels (MLA) it falls back to a path
    2.5 times slower, so the values are padded with zeros and the result cut: the same numbers.
    """
    channels, value_channels = q.shape[-1], v.shape[-1]
    if value_channels < channels:
        v = F.pad(v, (0, channels - value_channels))
    context = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=causal, scale=scale, enable_gqa=True
    )
    return context[..., :value_channels]


_last_mask: tuple[weakref.ref[torch.Tensor], bool] | None = None


def is_causal_mask(attention_mask: torch.Tensor) -> bool:
    """Return whether the mask forbids exactly the future, so that it need not be looked at again.

    Every layer of a micro-batch is handed the same tensor, so the last answer is kept.
    """
    global _last_mask  # noqa: PLW0603 - a memo of one entry
    if _last_mask is not None and _last_mask[0]() is attention_mask:
        return _last_mask[1]
    rows, columns = attention_mask.shape[-2:]
    future = torch.ones(rows, columns, dtype=torch.bool, device=attention_mask.device).triu(1)
    answer = rows == columns and bool((attention_mask == future).all())
    _last_mask = (weakref.ref(attention_mask), answer)
    return answer
