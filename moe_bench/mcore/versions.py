"""Versions of what a run stands on, read from package metadata without importing anything."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = (
    "moe-bench",
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "deep-ep",
    "transformers",
    "numpy",
)


def versions() -> dict[str, str]:
    """Of Python and of each installed package of PACKAGES."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def megatron_version() -> str:
    """Of the Megatron-Core that `import megatron` finds, as it names itself."""
    from megatron.core.package_info import __version__  # noqa: PLC0415 - the embedding comes first

    return str(__version__).partition("+")[
        0
    ]  # what follows is the commit of whatever repository it runs in
