"""Imports Megatron: the installed megatron-core, or a Megatron-LM checkout in its place."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from moe_bench.errors import ArgumentsError

_HELPER = "megatron.core.datasets.helpers_cpp"


def import_megatron(*, checkout: Path | None, on_cpu: bool) -> None:
    """Import everything that ranks share, so that they can be forked with it.

    The CPU embedding must be in place. Raises ArgumentsError when `checkout` is not a tree that can be imported here.
    """
    if checkout is not None:
        sys.path.insert(0, str(checkout))
        lend_compiled_helper(checkout)
    with quiet_about_gpu_libraries():
        try:
            for name in _needed(checkout=checkout, on_cpu=on_cpu):
                importlib.import_module(name)
        except ImportError as error:
            where = f"MEGATRON_PATH={checkout}" if checkout else "the installed megatron-core"
            raise ArgumentsError(
                f"{where} cannot be used here: {error}; install a missing package, or use a Megatron of the 0.19 line, "
                "which the layers for a CPU are written against"
            ) from error


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
