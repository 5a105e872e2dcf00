"""Which Megatron-Core release a run's flags belong to."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from moe_bench.config.run import Origin, Setting
from moe_bench.errors import ConfigError

_DIST_INFO = re.compile(r"megatron_core-([0-9][^-]*)\.dist-info\Z")
_SPELLING = re.compile(r"(?:core_)?v?(?:ersion)?(\d+)\.(\d+)(?:\.(\d+))?(?P<rest>[a-z0-9.+-]*)\Z")
BUILT_FOR = "0.19.2"
"""The release the project is locked to: used where none is installed (a login node)."""


def find_release(said: Setting | None, megatron_path: Setting | None) -> Setting:
    """The release, as `0.19.2` or `0.19`: MCORE_RELEASE_VERSION, else what MEGATRON_PATH holds, else what is installed."""
    if said is not None and said.value:
        return Setting(value=normal(said), origin=said.origin, overrode=said.overrode)
    if megatron_path is not None and megatron_path.value:
        found = of_checkout(Path(megatron_path.value))
        if found:
            return _derived(found, "MEGATRON_PATH's megatron/core/package_info.py")
    found = installed_here()
    if found:
        return _derived(found, "the installed megatron-core")
    return _derived(BUILT_FOR, "the release this project is locked to")


def _derived(value: str, place: str) -> Setting:
    return Setting(value=value, origin=Origin(layer="default", place=place))


def normal(said: Setting) -> str:
    """`v0.11.0`, `core_v0.11.0` -> `0.11.0`; `0.11` stays. Raises ConfigError for anything else."""
    match = _SPELLING.match(said.value)
    if not match:
        raise ConfigError(
            f"MCORE_RELEASE_VERSION={said.value} ({said.origin.place}) is not a Megatron-Core release; "
            "write it like 0.11.0 or 0.19"
        )
    return ".".join(part for part in match.groups()[:3] if part is not None)


def of_checkout(path: Path) -> str | None:
    """The release of a Megatron-LM checkout from its package_info.py; None when it holds none."""
    try:
        text = (path / "megatron" / "core" / "package_info.py").read_text()
    except OSError:
        return None
    parts: Mapping[str, str] = dict(
        re.findall(r"^(MAJOR|MINOR|PATCH)\s*=\s*(\d+)", text, re.MULTILINE)
    )
    if {"MAJOR", "MINOR", "PATCH"} - parts.keys():
        return None
    return f"{parts['MAJOR']}.{parts['MINOR']}.{parts['PATCH']}"


def installed_here() -> str | None:
    """The megatron-core that this interpreter would import."""
    return _kept(tuple(sys.path))


@lru_cache
def _kept(search_path: tuple[str, ...]) -> str | None:
    """What is installed does not change while a program runs, and a sweep asks for each of its points."""
    return installed(search_path)


def installed(search_path: Iterable[str]) -> str | None:
    """The installed megatron-core's version, found by its folder's name: nothing is imported."""
    for entry in search_path:
        folder = Path(entry or ".")
        if not folder.is_dir():
            continue
        for name in folder.glob("megatron_core-*.dist-info"):
            match = _DIST_INFO.match(name.name)
            if match:
                return match[1]
    return None
