"""Megatron's version as preflight names it."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

pytest.importorskip("torch")

from moe_bench.mcore.preflight import load


def test_the_commit_of_the_repository_that_megatron_is_installed_in_is_not_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its package_info asks git where it lies: within a project's virtual environment."""
    arguments = ModuleType("megatron.training.arguments")
    info = ModuleType("megatron.core.package_info")
    vars(info)["__version__"] = "0.19.2+0f4b4cf"
    for module in (arguments, info):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert load() == "0.19.2"
