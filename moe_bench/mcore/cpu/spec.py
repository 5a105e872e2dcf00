"""Which layer Megatron builds on a CPU in place of one that needs a GPU library, and why.

Megatron chooses layers through a `BackendSpecProvider` (megatron/core/models/backends.py, 0.19.2). `CpuSpecProvider`
is the one for CPU ranks; its arrangement of layers, and so the names in a checkpoint, is Transformer Engine's.
`reference_layers()` puts it wherever Megatron would take its local or Transformer Engine's provider.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules

from moe_bench.mcore.cpu.attention import CoreAttention
from moe_bench.mcore.cpu.capacity import dropping_the_latest
from moe_bench.mcore.cpu.chunks import leaving_sorted_chunks
from moe_bench.mcore.cpu.context_parallel import packed_indices
from moe_bench.mcore.cpu.delta_net import causal_conv1d, l2norm
from moe_bench.mcore.cpu.experts import (
    ColumnParallelGroupedLinear,
    GroupedMLP,
    RowParallelGroupedLinear,
    SequentialExperts,
)
from moe_bench.mcore.cpu.linear import (
    DuplicatedLinear,
    LayerNormColumnParallelLinear,
    add_weight_gradient,
)
from moe_bench.mcore.cpu.norm import Norm
from moe_bench.mcore.cpu.optimizer import FusedAdam, l2_norm, scale_tensors, skipping_alone
from moe_bench.mcore.cpu.recompute import NoFp8, no_fp8_context, without_compiler
from moe_bench.mcore.cpu.rope import packed_rope, rope, rotating_in_place
from moe_bench.mcore.cpu.sparse_attention import rotate_activation

SPECS = "megatron.core.models.gpt.gpt_layer_specs"
VARIANTS = "megatron.core.models.gpt.experimental_attention_variant_module_specs"
MOE_LAYER = "megatron.core.transformer.moe.moe_layer"
ABSORBED_MLA = "megatron.core.transformer.experimental_attention_variant.absorbed_mla"
MLA = "megatron.core.transformer.multi_latent_attention"


class CpuSpecProvider(BackendSpecProvider):
    """The layers of a transformer that trains on CPU ranks."""

    def linear(self) -> type:
        """Return the linear layer that every tensor-parallel rank holds whole."""
        return DuplicatedLinear

    def column_parallel_linear(self) -> type:
        """Return Megatron's own column-parallel linear layer."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Return Megatron's own row-parallel linear layer."""
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Return True: a norm belongs to the linear layer after it, as with Transformer Engine."""
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        """Return the norm and column-parallel linear layer in one module."""
        return LayerNormColumnParallelLinear

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> type:
        """Return the norm; it reads config.normalization, as Transformer Engine's does."""
        del rms_norm, for_qk, has_residual
        return Norm

    def core_attention(self) -> type:
        """Return scaled dot-product attention."""
        return CoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Callable[..., Any]:
        """Return the builder of the routed experts, grouped or one after the other."""
        if moe_use_grouped_gemm:
            grouped = GroupedMLPSubmodules(
                linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear
            )
            return partial(GroupedMLP, submodules=grouped)
        sequential = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return partial(SequentialExperts, submodules=sequential)

    def activation_func(self) -> None:
        """Return None: the activation is config.activation_func."""


def layer_spec(
    num_experts: int | None = None,
    moe_grouped_gemm: bool | None = False,
    qk_layernorm: bool | None = False,
    multi_latent_attention: bool | None = False,
    *_ignored: object,
    qk_l2_norm: bool | None = False,
    **_choices_of_a_gpu_library: object,
) -> Any:
    """Return one decoder layer's spec. Stands in for `get_gpt_layer_local_spec`, with its parameters."""
    specs = importlib.import_module(SPECS)
    return specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts, moe_grouped_gemm, qk_layernorm, multi_latent_attention, qk_l2_norm=qk_l2_norm
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Replacement:
    """One thing of Megatron's that the reference layers stand in for."""

    name: str
    """What is replaced, as Megatron calls it."""
    upstream: str
    """File and version in which it was read."""
    why: str
    """What stops it on a CPU."""
    by: Any
    """What stands in its place."""
    module: str
    """Where the original is found; if it is Megatron's own, every module that imported it is changed too."""
    attribute: str
    wraps: bool = False
    """Whether `by` makes the stand-in from the original rather than being it."""
    adds: bool = False
    """Whether the module lacks the name without the GPU library."""
    arranges: bool = False
    """Whether it makes the layers' arrangement, and so a checkpoint's names, Transformer Engine's."""

    @property
    def by_name(self) -> str:
        """The stand-in's name for people."""
        return getattr(self.by, "__name__", repr(self.by))


def _cpu_backend(*_args: object, **_options: object) -> CpuSpecProvider:
    """Return the CPU's provider, whatever transformer_impl says."""
    return CpuSpecProvider()


def _replacement(
    module: str,
    attribute: str,
    by: Any,
    why: str,
    *,
    wraps: bool = False,
    adds: bool = False,
    arranges: bool = False,
) -> Replacement:
    """Describe a replacement whose name is its attribute's and whose file is its module's."""
    upstream = f"{module.replace('.', '/')}.py, megatron-core 0.19.2"
    return Replacement(
        name=attribute,
        upstream=upstream,
        why=why,
        by=by,
        module=module,
        attribute=attribute,
        wraps=wraps,
        adds=adds,
        arranges=arranges,
    )


_ABSENT = object()
NO_TE = "Transformer Engine needs a GPU"
_LAYERS: tuple[Replacement, ...] = (
    _replacement(
        "megatron.core.models.backends",
        "LocalSpecProvider",
        CpuSpecProvider,
        "its norm asserts no sequence parallelism, its attention no context parallelism",
        arranges=True,
    ),
    _replacement(
        "megatron.core.models.backends",
        "get_backend",
        _cpu_backend,
        "it would choose a provider by transformer_impl",
        arranges=True,
    ),
    _replacement(
        "megatron.core.transformer.torch_norm",
        "WrappedTorchNorm",
        Norm,
        "it asserts no sequence parallelism, no zero-centered gamma, no persist_layer_norm",
    ),
    _replacement(
        "megatron.core.transformer.dot_product_attention",
        "DotProductAttention",
        CoreAttention,
        "it asserts no context parallelism and takes no k_channels (MLA)",
    ),
    _replacement(
        SPECS,
        "get_gpt_layer_local_spec",
        layer_spec,
        "its parameter names on disk are not those of a GPU run with Transformer Engine",
        arranges=True,
    ),
    _replacement(SPECS, "TESpecProvider", CpuSpecProvider, NO_TE),
    _replacement(SPECS, "TENorm", Norm, NO_TE),
    _replacement(MLA, "TELinear", DuplicatedLinear, NO_TE),
    _replacement(ABSORBED_MLA, "TELinear", DuplicatedLinear, NO_TE),
    _replacement(MOE_LAYER, "TELinear", DuplicatedLinear, NO_TE),
    _replacement(
        MOE_LAYER, "HAVE_TE", by=True, why="latent projections ask for it, and for nothing else"
    ),
    _replacement(
        "megatron.core.transformer.experimental_attention_variant.dsa",
        "rotate_activation",
        rotate_activation,
        "the package fast_hadamard_transform needs a GPU",
    ),
    _replacement(
        "megatron.core.utils",
        "tex",
        SimpleNamespace(thd_get_partitioned_indices=packed_indices),
        NO_TE,
    ),
    _replacement(
        VARIANTS,
        "_get_backend_spec_provider",
        _cpu_backend,
        "it asserts transformer_impl == 'transformer_engine'",
    ),
    *(
        _replacement(
            "megatron.core.tensor_parallel.random",
            attribute,
            by,
            "recomputing without the output asks Transformer Engine whether FP8 is on",
            adds=True,
        )
        for attribute, by in (
            ("FP8GlobalStateManager", NoFp8),
            ("activation_recompute_forward", no_fp8_context),
            ("fp8_autocast", no_fp8_context),
        )
    ),
    _replacement(
        "megatron.core.tensor_parallel.random",
        "_get_share_storage",
        without_compiler,
        "it compiles C++ in the first backward pass, and hangs where a compilation was killed",
    ),
    *(
        _replacement(module, attribute, by, "flash-linear-attention needs a GPU")
        for module in (
            "megatron.core.ssm.gated_delta_net.common",
            "megatron.core.ssm.gated_delta_net.gdn",
            "megatron.core.ssm.gated_delta_net",  # one file up to 0.18
        )
        for attribute, by in (
            ("HAVE_FLA", True),
            ("l2norm", l2norm),
            ("causal_conv1d", causal_conv1d),
            ("chunk_gated_delta_rule", torch_chunk_gated_delta_rule),
        )
    ),
)
_OPTIMIZER: tuple[Replacement, ...] = (
    _replacement(
        "megatron.core.optimizer",
        "Adam",
        FusedAdam,
        "slow on a CPU: ten passes over each tensor; and Megatron cannot load a checkpoint with it",
    ),
    *(
        _replacement(
            module, attribute, by, "it says that Adam has torch's interface and not Apex's"
        )
        for module, attribute, by in (
            ("megatron.core.optimizer", "USING_PYTORCH_OPTIMIZER", False),
            ("megatron.core.optimizer.distrib_optimizer", "Adam", FusedAdam),
            ("megatron.core.optimizer.distrib_optimizer", "HAVE_APEX_OR_TE", True),
            ("megatron.core.optimizer.distrib_optimizer", "USING_APEX_OPTIMIZER", True),
        )
    ),
)
_ON_A_CPU: tuple[Replacement, ...] = (
    _replacement(
        "megatron.core.transformer.moe.moe_utils",
        "apply_router_token_dropping",
        dropping_the_latest,
        "torch.topk picks among equals as it likes on a CPU, and drop policy position counts on the first",
        wraps=True,
    ),
    _replacement(
        "megatron.core.transformer.moe.moe_utils",
        "sort_chunks_by_idxs",
        leaving_sorted_chunks,
        "slow: it copies every token twice a layer where the chunks are in order already (EP and ETP of 1)",
        wraps=True,
    ),
    _replacement(
        "megatron.core.models.common.embeddings.rope_utils",
        "fused_apply_rotary_pos_emb",
        rope,
        "Transformer Engine needs a GPU",
    ),
    _replacement(
        "megatron.core.models.common.embeddings.rope_utils",
        "fused_apply_rotary_pos_emb_thd",
        packed_rope,
        "Transformer Engine needs a GPU",
    ),
    _replacement(
        "megatron.core.tensor_parallel.layers",
        "_grad_accum_fusion_available",
        by=True,
        why="Apex needs a GPU",
    ),
    _replacement(
        "megatron.core.tensor_parallel.layers",
        "fused_weight_gradient_mlp_cuda",
        SimpleNamespace(
            wgrad_gemm_accum_fp32=add_weight_gradient, wgrad_gemm_accum_fp16=add_weight_gradient
        ),
        "Apex needs a GPU",
        adds=True,
    ),
    _replacement(
        "megatron.core.models.common.embeddings.rope_utils",
        "_apply_rotary_pos_emb_bshd",
        rotating_in_place,
        "slow: eight passes over queries and keys",
        wraps=True,
    ),
    _replacement(
        "megatron.core.utils",
        "local_multi_tensor_l2_norm",
        l2_norm,
        "torch's norm of a large tensor is off by 1e-4 relative and slow: gradients would be clipped to another norm",
    ),
    _replacement(
        "megatron.core.utils",
        "local_multi_tensor_scale",
        scale_tensors,
        "slow: clipping makes a temporary of every gradient",
    ),
    _replacement(
        "megatron.core.distributed.param_and_grad_buffer",
        "dist_reduce_scatter_func",
        skipping_alone,
        "slow: gloo copies all gradients even in a group of one rank",
        wraps=True,
    ),
    _replacement(
        "megatron.core.distributed.param_and_grad_buffer",
        "dist_all_gather_func",
        skipping_alone,
        "slow: gloo copies all parameters even in a group of one rank",
        wraps=True,
    ),
)
"""A GPU without Transformer Engine keeps Megatron's own of these, NCCL's collectives among them."""
REPLACEMENTS = (*_LAYERS, *_OPTIMIZER, *_ON_A_CPU)


def _of_a_plain_gpu() -> tuple[Replacement, ...]:
    """For a GPU without Transformer Engine: Apex's optimizer stays where there is one."""
    optimizer = importlib.import_module("megatron.core.optimizer")
    return (*_LAYERS, *_OPTIMIZER) if optimizer.USING_PYTORCH_OPTIMIZER else _LAYERS


@contextmanager
def reference_layers(
    *, arrangement: Literal["te", "local"] = "te", on_cpu: bool = True
) -> Iterator[tuple[Replacement, ...]]:
    """Make Megatron build the reference layers; undone on exit. Yields what was replaced, to be announced.

    They are arranged, and so named in a checkpoint, as by Transformer Engine's layer spec; `local` keeps Megatron's own
    local spec, to read a checkpoint that was written with it.

    Enter before a script that imports Megatron's spec functions by name is loaded, or after: modules that already
    hold an original are found and changed.
    """
    undo: list[tuple[ModuleType, str, Any]] = []
    done = []
    try:
        for replacement in REPLACEMENTS if on_cpu else _of_a_plain_gpu():
            if replacement.arranges and arrangement == "local":
                continue
            home = _home(replacement.module)
            if home is None or hasattr(home, replacement.attribute) == replacement.adds:
                continue  # another release of Megatron
            undo.extend(_replace(home, replacement))
            done.append(replacement)
        yield tuple(done)
    finally:
        for module, attribute, original in reversed(undo):
            if original is _ABSENT:
                delattr(module, attribute)
            else:
                setattr(module, attribute, original)


def _home(module: str) -> ModuleType | None:
    """Return the module; None when this release of Megatron lacks it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None


def _replace(home: ModuleType, replacement: Replacement) -> list[tuple[ModuleType, str, Any]]:
    """Set the stand-in at home and wherever the original was imported by name; return what to restore."""
    original = getattr(home, replacement.attribute, _ABSENT)
    stand_in = replacement.by(original) if replacement.wraps else replacement.by
    places = [(home, replacement.attribute)]
    if str(getattr(original, "__module__", None)).partition(".")[0] == "megatron":
        places += [
            (module, attribute)
            for module in _modules_that_use_megatron()
            for attribute, value in list(vars(module).items())
            if value is original and (module, attribute) != places[0]
        ]
    for module, attribute in places:
        setattr(module, attribute, stand_in)
    return [(module, attribute, original) for module, attribute in places]


def _modules_that_use_megatron() -> list[ModuleType]:
    """Return the loaded modules of Megatron-LM, the scripts at its root among them."""
    roots = ("megatron", "pretrain_gpt", "gpt_builders", "model_provider")
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] in roots and isinstance(module, ModuleType)
    ]
