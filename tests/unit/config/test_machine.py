"""CUDA is looked for in /dev, never by importing torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.config.machine import probe


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    return tmp_path


def test_devices_are_counted(devices: Path) -> None:
    machine = probe({}, devices=devices)
    assert (machine.device, machine.gpus) == ("cuda", 2)


@pytest.mark.parametrize(("visible", "gpus"), [("0", 1), ("", 0), ("-1", 0), ("0,1", 2)])
def test_hidden_devices_do_not_count(devices: Path, visible: str, gpus: int) -> None:
    assert probe({"CUDA_VISIBLE_DEVICES": visible}, devices=devices).gpus == gpus


def test_without_devices_it_is_a_cpu(tmp_path: Path) -> None:
    machine = probe({}, devices=tmp_path)
    assert (machine.device, machine.gpus) == ("cpu", 0)
    assert machine.cores >= 1


def test_the_caller_overrides_what_is_found(devices: Path) -> None:
    assert probe({"MOE_BENCH_DEVICE": "cpu"}, devices=devices).device == "cpu"
