"""Counts which experts the routers chose, without a synchronisation and exactly once for each token."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from moe_bench.results.records import ExpertLoad


class ExpertCounter:
    """Assignments to each expert of each layer of this rank since the last `clear`.

    A hook on every `TopKRouter` adds its routing map up on the router's device. With recomputation a layer runs twice,
    first without gradients: only the run with gradients counts, as in Megatron's own count for the expert bias
    (megatron/core/transformer/moe/router.py, 0.19). The table stays where it is and all that is counted lies in it, so a
    CUDA graph that holds the hook's kernels goes on counting when it is replayed without Python.
    """

    def __init__(
        self,
        model_chunks: Iterable[torch.nn.Module],
        *,
        num_layers: int,
        num_mtp_layers: int,
        num_experts: int,
    ) -> None:
        """`num_layers`: the decoder's, of all stages; MTP layers are numbered after it."""
        routers = list(_routers(model_chunks, num_layers))
        device = routers[0][1].weight.device if routers else None
        self.table = torch.zeros(
            num_layers + num_mtp_layers, num_experts + 1, dtype=torch.float64, device=device
        )
        """By layer: assignments kept by each expert, then assignments offered."""
        self.paused = False
        """True: forwards are not counted."""
        self._handles = [
            router.register_forward_hook(self._hook(self.table[layer - 1]))
            for layer, router in routers
        ]

    def clear(self) -> None:
        """Start anew."""
        self.table.zero_()

    def remove(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, row: torch.Tensor) -> Any:
        kept, offered = row[:-1], row[-1:]

        def count(router: Any, _inputs: Any, output: Any) -> None:
            if self.paused or not router.training or not torch.is_grad_enabled():
                return
            if _is_warming_up_a_graph():
                return
            probs, routing_map = output[0], output[1]
            with torch.no_grad():
                if router.config.moe_pad_expert_input_to_capacity:
                    routing_map = routing_map & (probs != 0)  # padding has no weight
                kept.add_(routing_map.sum(dim=0))
                offered.add_(routing_map.shape[0] * router.topk)

        return count


def _is_warming_up_a_graph() -> bool:
    """Whether Megatron runs a layer in vain, before it captures it in a CUDA graph (--cuda-graph-impl local)."""
    graphs = sys.modules.get("megatron.core.transformer.cuda_graphs")
    is_warmup = getattr(graphs, "is_graph_warmup", None)
    return is_warmup is not None and bool(is_warmup())


def _routers(
    model_chunks: Iterable[torch.nn.Module], num_layers: int
) -> Iterable[tuple[int, torch.nn.Module]]:
    for chunk in model_chunks:
        for name, module in chunk.named_modules():
            if not name.endswith(".router") or not hasattr(module, "topk"):
                continue
            parts = name.split(".")
            if "mtp" in parts:
                depth = int(next(part for part in parts[parts.index("mtp") :] if part.isdigit()))
                yield num_layers + 1 + depth, module
            else:
                yield int(module.layer_number), module


def expert_load(layer: int, tokens_per_expert: Sequence[int], offered: int) -> ExpertLoad:
    """The balance figures of one layer. `offered`: assignments before the capacity factor dropped any."""
    total, experts = sum(tokens_per_expert), len(tokens_per_expert)
    shares = [count / total for count in tokens_per_expert if count] if total else []
    entropy = -sum(share * math.log(share) for share in shares)
    return ExpertLoad(
        layer=layer,
        max_over_mean=max(tokens_per_expert) * experts / total if total else 1.0,
        entropy=entropy / math.log(experts) if experts > 1 else 1.0,
        dead_experts=sum(1 for count in tokens_per_expert if not count),
        dropped_tokens=max(0, offered - total),
        tokens_per_expert=tuple(tokens_per_expert),
    )
