"""What runs on a GPU beside Megatron, on CUDA tensors that are shapes and devices only: test_cuda_devices.py runs it.

torch's fake tensors refuse an operation whose tensors are on two devices, as CUDA would. Prints each case that passed.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that Transformer Engine and Apex are missing
    from megatron.core import parallel_state as mpu
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_config import TransformerConfig

    from moe_bench.mcore import wide_norm
    from moe_bench.mcore.cpu import (
        attention,
        context_parallel,
        delta_net,
        experts,
        linear,
        norm,
        optimizer,
        rope,
        sparse_attention,
    )
    from moe_bench.mcore.expert_load import ExpertCounter

BASE: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "attention_dropout": 0.0,
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "perform_initialization": False,
    "use_cpu_initialization": True,
    "num_moe_experts": 2,
    "moe_ffn_hidden_size": 16,
    "normalization": "RMSNorm",
}


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


def attends(mask: torch.Tensor | None = None, **changes: Any) -> torch.Tensor:
    with torch.device("cuda"):
        core = attention.CoreAttention(
            TransformerConfig(**{**BASE, **changes}), 1, AttnMaskType.causal
        )
    heads = (random(16, 2, 4, 8), random(16, 2, 2, 8), random(16, 2, 2, 8))
    mask = None if mask is None else mask.to("cuda")
    return core(*heads, mask, attn_mask_type=None if mask is None else AttnMaskType.padding)


def attends_over_context_parallel_ranks() -> torch.Tensor:
    core = attention.CoreAttention(TransformerConfig(**BASE), 1, AttnMaskType.causal)
    core.cp_group = mpu.get_context_parallel_group()
    return core(random(16, 2, 4, 8), random(16, 2, 2, 8), random(16, 2, 2, 8), None)


def experts_of(**changes: Any) -> torch.Tensor:
    settings = TransformerConfig(**{**BASE, **changes})
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device("cuda"):
        first = experts.ColumnParallelGroupedLinear(
            2,
            32,
            32,
            config=settings,
            init_method=None,
            bias=settings.add_bias_linear,
            skip_bias_add=False,
            pg_collection=groups,
        )
    gate_up, _ = first(random(9, 32), [4, 5])
    return experts.weighted_swiglu(gate_up, random(9, 1))


def norms(**changes: Any) -> torch.Tensor:
    with torch.device("cuda"):
        layer = norm.Norm(TransformerConfig(**{**BASE, **changes}), 32)
    return layer(random(5, 3, 32))


def duplicated_linear() -> torch.Tensor:
    with torch.device("cuda"):
        layer = linear.DuplicatedLinear(
            32,
            8,
            config=TransformerConfig(**BASE),
            init_method=None,
            bias=True,
            skip_bias_add=False,
        )
    return layer(random(5, 3, 32))[0]


def rotation() -> torch.Tensor:
    apply = rope.rotating_in_place(lambda *_args, **_options: None)
    return apply(random(16, 2, 4, 8), torch.randn(16, 1, 1, 8, device="cuda"))


def norm_across_heads() -> torch.Tensor:
    with torch.device("cuda"):
        group = mpu.get_tensor_model_parallel_group()
        layer = wide_norm.AcrossHeadsNorm(TransformerConfig(**BASE), 4, group)
    return layer(random(5, 3, 4, 8))


def counted_experts() -> torch.Tensor:
    options = {"moe_router_load_balancing_type": "none", "moe_router_pre_softmax": True}
    settings = TransformerConfig(**BASE, moe_router_topk=1, **options)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with torch.device("cuda"):
        layer = torch.nn.Module()
        layer.router = TopKRouter(settings, pg_collection=groups)
        layer.router.layer_number = 1
    chunk = torch.nn.ModuleDict({"layer": layer})
    counter = ExpertCounter([chunk], num_layers=1, num_mtp_layers=1, num_experts=2)
    before = counter.table
    layer.router(random(16, 2, 32))
    counter.clear()
    assert counter.table is before, "a CUDA graph would go on writing to the old one"
    return counter.table


def optimizer_states() -> torch.Tensor:
    parameter = torch.nn.Parameter(random(4, 4))
    adam = optimizer.FusedAdam([parameter], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    parameter.grad = random(4, 4)
    adam.step()
    first, second = adam.state[parameter].values()
    return first + second


CASES: dict[str, Callable[[], torch.Tensor]] = {
    "causal attention": attends,
    "attention with a window": lambda: attends(window_size=(5, 0)),
    "attention with sinks": lambda: attends(softmax_type="learnable"),
    "attention off by one": lambda: attends(softmax_type="off-by-one"),
    "attention under a mask": lambda: attends(torch.zeros(1, 1, 16, 16, dtype=torch.bool)),
    "context parallel attention": attends_over_context_parallel_ranks,
    "experts": lambda: experts_of(add_bias_linear=False),
    "experts with biases": lambda: experts_of(add_bias_linear=True),
    "RMSNorm": norms,
    "LayerNorm": lambda: norms(normalization="LayerNorm"),
    "duplicated linear": duplicated_linear,
    "rotation": rotation,
    "norm across heads": norm_across_heads,
    "delta net's convolution": lambda: delta_net.causal_conv1d(
        random(2, 16, 8), random(8, 4), activation="silu"
    )[0],
    "sparse attention's rotation": lambda: sparse_attention.rotate_activation(random(16, 2, 8)),
    "counted experts": counted_experts,
    "optimizer": optimizer_states,
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(str(Path(folder) / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        mpu.initialize_model_parallel()
        # Collectives are gloo's here and take no CUDA tensor: of one rank they change nothing.
        context_parallel.gather_sequence = lambda own, _group: own
        for name, case in CASES.items():
            with FakeTensorMode():
                assert case().device.type == "cuda", (
                    name
                )  # a backward pass would want a real context
            print(name)


if __name__ == "__main__":
    main()
