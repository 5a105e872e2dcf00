"""Imports Megatron: the installed megatron-core, or a Megatron-LM checkout in its place."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from moe_bench.errors import ArgumentsError, LaunchError

log = logging.getLogger(__name__)

_HELPER = "megatron.core.datasets.helpers_cpp"


def import_megatron(*, checkout: Path | None, on_cpu: bool) -> None:
    """Import everything that ranks share, so that they can be forked with it.

    The CPU embedding must be in place. Raises ArgumentsError when `checkout` is not a tree that can be imported here.
    """
    if on_cpu:
        for library in GPU_LIBRARIES:
            sys.modules.setdefault(library, None)  # type: ignore[arg-type]  # an import of it fails
    if checkout is None:
        hide_old_resiliency_extension()
    else:
        sys.path.insert(0, str(checkout))
        lend_compiled_helper(checkout)
    with quiet_about_gpu_libraries():
        try:
            for name in _needed(checkout=checkout, on_cpu=on_cpu):
                importlib.import_module(name)
        except ImportError as error:
            raise ArgumentsError(_refusal(checkout, error, on_cpu=on_cpu)) from error


GPU_LIBRARIES = (
    *("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "flash_attn"),
    *("fused_weight_gradient_mlp_cuda", "deep_ep"),
)
"""What Megatron would use of an image made for GPUs, and what then would fail on a CPU rank."""


def hide_old_resiliency_extension() -> None:
    """megatron-core 0.19 cannot be imported beside nvidia-resiliency-ext before 0.6, which images bring.

    megatron/core/fault_injector.py (0.19.2) does without the package, but not without a name that it lacks.
    """
    try:
        version = importlib.metadata.version("nvidia-resiliency-ext")
    except importlib.metadata.PackageNotFoundError:
        return
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (0, 6):
        sys.modules.setdefault("nvidia_resiliency_ext", None)  # type: ignore[arg-type]
        log.warning("nvidia-resiliency-ext %s is left out: megatron-core 0.19 needs 0.6", version)


def has_transformer_engine() -> bool:
    """Whether Megatron will find Transformer Engine. Raises LaunchError where it is installed and cannot be imported.

    Megatron would go on without it then, and end in a place that does not say why.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise LaunchError(
            f"Transformer Engine is installed in {sys.prefix} and cannot be imported: {error}; install the build that fits "
            "this torch and CUDA (pip install --no-build-isolation 'transformer-engine[pytorch]'), or remove it to train "
            "with plain layers"
        ) from error
    return True


CPU_RELEASES = ((0, 17), (0, 19))
"""First and last line of releases that train on CPU ranks: 0.17.0, 0.18.0, 0.19.0 and 0.19.2 were tried."""


def _refusal(checkout: Path | None, error: ImportError, *, on_cpu: bool) -> str:
    where = f"MEGATRON_PATH={checkout}" if checkout else "the installed megatron-core"
    release = _release(checkout)
    if on_cpu and release and not CPU_RELEASES[0] <= release[:2] <= CPU_RELEASES[1]:
        spelt = ".".join(map(str, release))
        return (
            f"{where} is Megatron-Core {spelt}, which does not train on CPU ranks ({error}): the layers for a CPU take "
            "the places of modules as 0.17 to 0.19 have them; give a checkout of one of these (core_v0.17.0, "
            "core_v0.18.0, core_v0.19.0), or unset MEGATRON_PATH"
        )
    if checkout is None and (error.name or "").startswith("megatron"):
        return (
            f"the installed megatron-core {installed_version()} is not the one this entry is made for: {error}; install "
            "megatron-core 0.19.2 (locks/container.txt has it with its hash), or set MEGATRON_PATH to the Megatron-LM "
            "checkout of your release, whose own pretrain_gpt.py then runs"
        )
    return f"{where} cannot be imported here: {error}; install the package that is missing"


def installed_version() -> str:
    """Of the megatron-core wheel, by its metadata."""
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return "(of unknown version)"


def _release(checkout: Path | None) -> tuple[int, ...]:
    """Of a checkout, without importing it; empty when it does not say."""
    file = checkout / "megatron" / "core" / "package_info.py" if checkout else None
    if file is None or not file.is_file():
        return ()
    found = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", file.read_text(), re.MULTILINE))
    return tuple(int(found[part]) for part in ("MAJOR", "MINOR", "PATCH") if part in found)


def _needed(*, checkout: Path | None, on_cpu: bool) -> Iterator[str]:
    yield "megatron.training"
    if checkout is None:
        yield "moe_bench.mcore.entry"
    yield "moe_bench.mcore.recording"
    if on_cpu:
        yield "moe_bench.mcore.cpu.spec"


@contextlib.contextmanager
def quiet_about_gpu_libraries() -> Iterator[None]:
    """Within the block Megatron does not warn that Apex or Transformer Engine is missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Apex|ransformer.?.ngine).*")
        yield


def lend_compiled_helper(checkout: Path) -> None:
    """Give a checkout whose dataset helper is not compiled the one that the megatron-core wheel ships.

    megatron/core/datasets/helpers.cpp has kept its interface from 0.11 to 0.19.
    """
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    folder = checkout / "megatron" / "core" / "datasets"
    if any((folder / f"helpers_cpp{suffix}").exists() for suffix in suffixes):
        return
    for root in sys.path:
        for suffix in suffixes:
            file = Path(root) / "megatron" / "core" / "datasets" / f"helpers_cpp{suffix}"
            if file.is_file():
                _load_as(_HELPER, file)
                return


def _load_as(name: str, file: Path) -> None:
    loader = importlib.machinery.ExtensionFileLoader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[name] = module
