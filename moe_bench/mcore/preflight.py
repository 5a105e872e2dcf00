"""Megatron's own parser, argument validation and model configuration, run for one rank of a job of any size, without a job.

Nothing is decided here: `validate` calls what Megatron itself calls before it builds a model (parse_args, validate_args,
core_transformer_config_from_args, and from 0.17 on gpt_config_from_args and pretrain_cfg_container_from_args), under the CPU
embedding, and reports what Megatron says. What this machine lacks is assumed by name (`assumed`).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import logging
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from packaging.version import Version

from moe_bench.errors import ArgumentsError
from moe_bench.mcore.validation import (
    REFUSALS,
    Refusal,
    configured,
    own_frame,
    refusal,
    short,
)
from moe_bench.mcore.versions import megatron_version

_TE_NAMES = {
    "megatron.core.transformer.moe.moe_utils": (
        "fused_permute", "fused_permute_with_probs", "fused_permute_and_pad_with_probs", "fused_sort_chunks_by_index",
        "fused_sort_chunks_by_index_with_probs", "fused_unpermute",
    ),
    "megatron.core.models.common.embeddings.rope_utils": (
        "fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd",
    ),
}  # fmt: skip
"""Names that are None in Megatron while Transformer Engine is missing, and that its configuration asks for."""
_PERMUTE_SINCE = (2, 1)
"""Transformer Engine that brought the fused permutation."""
_ADAM_SINCE = (2, 0)
"""Transformer Engine whose FusedAdam keeps its states in the precisions asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """What Megatron made of the arguments of one rank."""

    data_parallel_size: int
    num_microbatches: int
    layers: tuple[tuple[int, ...], ...]
    """Decoder layers of each (pipeline stage, virtual stage); empty where the release cannot say without a job."""
    num_layers: int
    warnings: tuple[str, ...]


def load() -> str:
    """Import Megatron's arguments and return its version. Raises ArgumentsError where this machine cannot import them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # that Apex and Transformer Engine are missing is said by the caller
            importlib.import_module("megatron.training.arguments")
            return megatron_version()
    except (
        ImportError,
        IndexError,
    ) as error:  # IndexError: 0.15 compiles its fused kernels' flags at import
        frame = own_frame(error)
        where = "" if frame is None else f" ({short(frame.filename)}:{frame.lineno})"
        raise ArgumentsError(
            f"Megatron cannot be imported here{where}: {error}; install what it names, or run preflight where "
            "this Megatron-LM runs"
        ) from error


def transformer_engine_is_here() -> bool:
    """Whether Megatron would find the real one."""
    return importlib.util.find_spec("transformer_engine") is not None


@contextlib.contextmanager
def assumed(*, transformer_engine: str, compute: tuple[int, int]) -> Iterator[None]:
    """Within the block Megatron's probes answer for the target: its Transformer Engine version and GPU.

    The real Transformer Engine, where installed, is left alone. Only probes answer; nothing can be computed with it.
    """
    utils = importlib.import_module("megatron.core.utils")
    version = Version(transformer_engine)
    with contextlib.ExitStack() as stack:
        if not transformer_engine_is_here():
            if hasattr(
                utils, "_te_version"
            ):  # what get_te_version keeps, under whichever name it was imported
                stack.enter_context(_replaced(utils, "_te_version", version))
            stack.enter_context(_replaced(utils, "get_te_version", lambda: version))
            if version.release[:2] >= _ADAM_SINCE:
                stack.enter_context(_fused_adam())
            for module, names in _TE_NAMES.items():
                has = module.endswith("rope_utils") or version.release[:2] >= _PERMUTE_SINCE
                for name in names if has else ():
                    stack.enter_context(_filled(importlib.import_module(module), name))
        properties = torch.cuda.get_device_properties
        stack.enter_context(
            _replaced(torch.cuda, "get_device_capability", lambda *_a, **_k: compute)
        )
        stack.enter_context(
            _replaced(
                torch.cuda,
                "get_device_properties",
                lambda *a, **k: _as_target(properties(*a, **k), compute),
            )
        )
        yield


def validate(argv: Sequence[str]) -> Accepted | Refusal:
    """What Megatron says of these flags. RANK, WORLD_SIZE and the run's variables must be in the environment already."""
    said = io.StringIO()
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            _argv(argv),
            _quiet(),
        ):
            warnings.simplefilter("always")
            return _accepted(configured(), caught)
    except REFUSALS as error:
        if own_frame(error) is None:
            raise
        return refusal(error, said.getvalue())
    finally:
        _forget()


def _accepted(
    configured: tuple[Any, Any], caught: Sequence[warnings.WarningMessage]
) -> Accepted | Refusal:
    from megatron.core.num_microbatches_calculator import get_num_microbatches  # noqa: PLC0415 - the embedding comes first

    args, config = configured
    layers = _layers(config)
    held = sum(map(sum, layers))
    if layers and held != args.num_layers:
        return Refusal(
            message=f"the stages would hold {held} layers, and --num-layers is {args.num_layers}: not this model",
            where="megatron/core/transformer/transformer_block.py",
            source="decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers",
        )
    told = dict.fromkeys(
        str(one.message).splitlines()[0] for one in caught if one.category is UserWarning
    )
    return Accepted(
        data_parallel_size=args.data_parallel_size,
        num_microbatches=get_num_microbatches(),
        layers=layers,
        num_layers=args.num_layers,
        warnings=tuple(told),
    )


def _layers(config: Any) -> tuple[tuple[int, ...], ...]:
    stages = range(config.pipeline_model_parallel_size)
    layout = getattr(config, "pipeline_model_parallel_layout", None)
    if layout is not None:
        from megatron.core.transformer.enums import LayerType  # noqa: PLC0415 - the embedding comes first

        return tuple(
            tuple(virtual.count(LayerType.decoder) for virtual in layout.layout[stage])
            for stage in stages
        )
    from megatron.core.transformer.transformer_block import get_num_layers_to_build  # noqa: PLC0415 - the embedding comes first

    if "pp_rank" not in inspect.signature(get_num_layers_to_build).parameters:
        return ()
    virtual = config.virtual_pipeline_model_parallel_size
    return tuple(
        tuple(
            get_num_layers_to_build(config, vp_stage=stage_of, pp_rank=stage)
            for stage_of in ([None] if virtual is None else range(virtual))
        )
        for stage in stages
    )


def _forget() -> None:
    from megatron.core import num_microbatches_calculator as calculator  # noqa: PLC0415 - the embedding comes first

    calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR = None


@contextlib.contextmanager
def _argv(words: Sequence[str]) -> Iterator[None]:
    before = sys.argv
    sys.argv = ["pretrain_gpt.py", *words]
    try:
        yield
    finally:
        sys.argv = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron's log lines of a rank are not this verdict's."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _filled(owner: Any, name: str) -> Iterator[None]:
    """A name that Megatron left None, with something that is not None and refuses to be used."""
    if getattr(owner, name, None) is not None:
        yield
        return
    absent = name not in vars(owner)  # 0.16 and older leave it undefined without Transformer Engine
    setattr(owner, name, _only_assumed)
    try:
        yield
    finally:
        if absent:
            delattr(owner, name)
        else:
            setattr(owner, name, None)


class _FusedAdam:
    """Has the parameters that OptimizerConfig looks for (megatron/core/optimizer/optimizer_config.py:450, 0.19.2)."""

    def __init__(
        self,
        params: Any,
        master_weight_dtype: Any = None,
        exp_avg_dtype: Any = None,
        exp_avg_sq_dtype: Any = None,
        use_decoupled_grad: bool = False,
    ) -> None:
        _only_assumed(
            params, master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype, use_decoupled_grad
        )


@contextlib.contextmanager
def _fused_adam() -> Iterator[None]:
    """`from transformer_engine.pytorch.optimizers import FusedAdam` works within the block; no other name does."""
    optimizers = types.ModuleType("transformer_engine.pytorch.optimizers")
    vars(optimizers)["FusedAdam"] = _FusedAdam
    added = {
        "transformer_engine": types.ModuleType("transformer_engine"),
        "transformer_engine.pytorch": types.ModuleType("transformer_engine.pytorch"),
        "transformer_engine.pytorch.optimizers": optimizers,
    }
    sys.modules.update(added)
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


def _only_assumed(*_args: Any, **_kwargs: Any) -> None:
    raise AssertionError("Transformer Engine is only assumed here: nothing can be computed with it")


def _as_target(properties: Any, compute: tuple[int, int]) -> Any:
    if is_dataclass(properties) and not isinstance(properties, type):
        return replace(properties, major=compute[0], minor=compute[1])
    return properties
