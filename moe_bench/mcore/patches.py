"""Changes to Megatron's own functions: each is a context manager that cites its upstream file and version."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from moe_bench.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Patch:
    """One replaced attribute of a Megatron module."""

    module: str
    attribute: str
    """`function`, or `Class.method`."""
    make: Callable[[Any], Any]
    """From the original to what takes its place."""
    upstream: str
    """File and version it was written against."""
    reason: str
    remove_when: str

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Replace within the block. A module or attribute that this release lacks is left alone."""
        *path, name = self.attribute.split(".")
        owner: Any = importlib.import_module(self.module)
        for part in path:
            owner = getattr(owner, part, None)
        original = getattr(owner, name, None)
        if original is None:
            yield
            return
        setattr(owner, name, self.make(original))
        try:
            yield
        finally:
            setattr(owner, name, original)


def _no_compile(original: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(original)
    def compile_helpers() -> None:
        name = "megatron.core.datasets.helpers_cpp"
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            original()

    return compile_helpers


COMPILED_HELPERS = Patch(
    module="megatron.core.datasets.utils",
    attribute="compile_helpers",
    make=_no_compile,
    upstream="megatron/core/datasets/utils.py compile_helpers, 0.11 to 0.19.2",
    reason="it runs make, which needs a Makefile that the wheel lacks; the wheel's helper is compiled already",
    remove_when="compile_helpers accepts a helper that is importable",
)


def _without_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        import torch  # noqa: PLC0415 - known only where Megatron is

        with torch.no_grad():
            return original(*args, **kwargs)

    return load_checkpoint


LOAD_WITHOUT_GRADIENTS = Patch(
    module="megatron.training.training",
    attribute="load_checkpoint",
    make=_without_gradients,
    upstream="megatron/core/optimizer/distrib_optimizer.py _set_main_param_and_optimizer_states, 0.19.2",
    reason="it copies into fp32 parameters in place, which torch refuses while gradients are recorded",
    remove_when="the copy is made under no_grad",
)


def _saving_whole_files(original: ModuleType) -> ModuleType:
    numpy: Any = ModuleType(original.__name__)
    vars(numpy).update(vars(original))

    def save(file: str, *args: Any, **kwargs: Any) -> None:
        aside = Path(f"{file}.{uuid.uuid4().hex}.tmp")
        try:
            with aside.open("wb") as stream:
                original.save(stream, *args, **kwargs)
                stream.flush()
                os.fsync(stream.fileno())
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)

    numpy.save = save
    return numpy


WHOLE_INDEX_FILES = tuple(
    Patch(
        module=f"megatron.core.datasets.{name}",
        attribute="numpy",
        make=_saving_whole_files,
        upstream=f"megatron/core/datasets/{name}.py, 0.11 to 0.19.2",
        reason="it saves an index under the name by whose mere presence other runs take --data-cache-path for filled: "
        "one that starts meanwhile reads half a file",
        remove_when="the files are written aside and renamed",
    )
    for name in ("gpt_dataset", "blended_dataset")
)


def _of_no_tokens(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def _get_num_epochs(self: Any, num_tokens_per_epoch: int) -> int:
        if num_tokens_per_epoch == 0 and self.num_samples is not None:
            share, prefix = self.index_split.name, self.dataset.path_prefix
            raise DataError(
                f"{prefix}: --split leaves no token for its {share} share, on which Megatron would count epochs for ever; "
                "cut the text into more documents (python -m moe_bench data prepare --text paragraph or line), or train on "
                "all of it with --split 100,0,0 --eval-iters 0"
            )
        return original(self, num_tokens_per_epoch)

    return _get_num_epochs


NO_ENDLESS_COUNT = Patch(
    module="megatron.core.datasets.gpt_dataset",
    attribute="GPTDataset._get_num_epochs",
    make=_of_no_tokens,
    upstream="megatron/core/datasets/gpt_dataset.py GPTDataset._get_num_epochs, 0.11 to 0.19.2",
    reason="it adds no tokens to no tokens until there are enough; a launch refuses such data where it sees them",
    remove_when="it raises",
)


def _without_query_norm(original: type) -> type:
    class WithoutPhantomQueryNorm(original):
        """A query that is not compressed has no norm of its own, as in DeepSeek-V2-Lite and Moonlight."""

        def __init__(self, config: Any, submodules: Any) -> None:
            if (
                config.q_lora_rank is None
            ):  # Megatron's local spec names a norm that nothing would use
                submodules = dataclasses.replace(submodules, q_layernorm=None)
            super().__init__(config, submodules)

        def _mla_fused_linear_or_default(self, module_spec: Any, module_name: str) -> Any:
            if module_name == "linear_q_proj":
                return self.linear_impl
            return super()._mla_fused_linear_or_default(module_spec, module_name)

    return WithoutPhantomQueryNorm


NO_PHANTOM_QUERY_NORM = Patch(
    module="megatron.core.transformer.multi_latent_attention",
    attribute="QKNormConfigResolver",
    make=_without_query_norm,
    upstream="megatron/core/transformer/mla_qk_norm_config.py, 0.19.2",
    reason="with --qk-layernorm and no --q-lora-rank it fuses a norm into linear_q_proj that DeepSeek-V2-Lite and "
    "Moonlight do not have; set to ones it shifts the logits by 0.2 and changes no greedy token",
    remove_when="Megatron lets a layer spec keep linear_q_proj without a norm",
)


def _across_heads(original: type) -> type:
    from moe_bench.mcore.wide_norm import with_norms_across_heads  # noqa: PLC0415 - imports Megatron

    return with_norms_across_heads(original)


NORMS_ACROSS_HEADS = Patch(
    module="megatron.core.models.gpt.gpt_layer_specs",
    attribute="SelfAttention",
    make=_across_heads,
    upstream="megatron/core/transformer/attention.py SelfAttention, 0.19.2",
    reason="it norms each head's query and key; OLMoE norms all heads together",
    remove_when="a flag or a layer spec says so",
)


ALWAYS = (COMPILED_HELPERS, LOAD_WITHOUT_GRADIENTS, *WHOLE_INDEX_FILES, NO_ENDLESS_COUNT)
"""Those that every training run has."""
