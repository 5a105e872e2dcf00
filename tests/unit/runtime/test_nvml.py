"""What a rank reads of its GPU, through the real nvidia-ml-py; only the driver's library is a stub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.nvml import HEALTHY, NvmlStub
from tests.support.projects import REPOSITORY

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler for the stub")

PROGRAM = """
import json, sys
from msgspec import to_builtins
from moe_bench.runtime.nvml import NvmlSampler
sampler = NvmlSampler("aa", rank=3, period_s=0.02)
for _ in sys.stdin:
    print(json.dumps([to_builtins(sampler.latest()), sampler.complaints()]), flush=True)
sampler.close()
"""


class Sampling:
    """A process with a sampler, which tells what it holds when it is asked."""

    def __init__(self, stub: NvmlStub, process: subprocess.Popen[str]) -> None:
        self.stub, self._process, self.complaints = stub, process, []

    def until(self, is_right: Callable[[Any], bool]) -> Any:
        """The first sample that is; fails when none comes."""
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s:
            sample, complaints = self._ask()
            self.complaints += complaints
            if is_right(sample):
                return sample
            time.sleep(0.01)
        raise AssertionError(f"the last sample is {sample}, the complaints {self.complaints}")

    def until_it_complains(self) -> list[str]:
        self.until(lambda _: bool(self.complaints))
        return self.complaints

    def _ask(self) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> NvmlStub:
    return NvmlStub(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def start(stub: NvmlStub) -> Iterator[Callable[[dict[str, str]], Sampling]]:
    processes: list[subprocess.Popen[str]] = []

    def begin(answers: dict[str, str]) -> Sampling:
        stub.answer(answers)
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, **stub.environment, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return Sampling(stub, process)

    yield begin
    for process in processes:
        process.communicate(timeout=20)
        assert process.returncode == 0


def test_every_figure_has_its_unit(start: Callable[..., Sampling]) -> None:
    sampling = start(HEALTHY)
    assert sampling.until(lambda sample: sample is not None) == {
        "rank": 3,
        "power_w": 350.5,
        "sm_clock_mhz": 1980.0,
        "utilization": 0.97,
        "memory_used_gib": 1.5,
    }
    assert sampling.complaints == []


def test_a_mig_instance_tells_its_memory_and_nothing_else(start: Callable[..., Sampling]) -> None:
    whole_gpu_only = ("GPU-aa", "power_mw", "sm_clock_mhz", "utilization", "reasons", "ecc")
    answers = {name: value for name, value in HEALTHY.items() if name not in whole_gpu_only}
    sample = start(answers | {"MIG-aa": "0"}).until(lambda sample: sample is not None)
    assert sample == {
        "rank": 3,
        "power_w": None,
        "sm_clock_mhz": None,
        "utilization": None,
        "memory_used_gib": 1.5,
    }


def test_a_gpu_that_is_lost_has_no_figures_any_more_and_that_is_said(
    start: Callable[..., Sampling],
) -> None:
    sampling = start(HEALTHY)
    sampling.until(lambda sample: sample is not None)
    sampling.stub.answer(HEALTHY | {"power_mw": "!15"})
    sampling.until(lambda sample: sample is None)
    (said,) = sampling.until_it_complains()
    assert said.startswith("GPU of rank 3: no power")
    assert said.endswith("GPU is lost")


def test_an_answer_that_fails_once_is_missing_once(start: Callable[..., Sampling]) -> None:
    sampling = start(HEALTHY)
    sampling.until(lambda sample: sample is not None)
    sampling.stub.answer(HEALTHY | {"power_mw": "!999"})
    sampling.until(lambda sample: sample["power_w"] is None and sample["sm_clock_mhz"] == 1980)
    sampling.stub.answer(HEALTHY)
    sampling.until(lambda sample: sample["power_w"] == 350.5)
    assert sampling.complaints == []


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"reasons": "0x44"}, "clocks are held down by the hardware's thermal limit"),
        ({"ecc": "3"}, "uncorrected memory (ECC) errors since the start"),
    ],
)
def test_a_gpu_that_falls_ill_is_named_once(
    answers: dict[str, str], said: str, start: Callable[..., Sampling]
) -> None:
    sampling = start(HEALTHY)
    sampling.until(lambda sample: sample is not None)
    sampling.stub.answer(HEALTHY | answers)
    assert sampling.until_it_complains() == [f"GPU of rank 3: {said}"]
    time.sleep(0.1)
    sampling.until(lambda sample: sample is not None)
    assert sampling.complaints == [f"GPU of rank 3: {said}"]


def test_a_driver_that_does_not_fit_its_library_is_said(start: Callable[..., Sampling]) -> None:
    (said,) = start(HEALTHY | {"init": "!18"}).until_it_complains()
    assert "RM has detected an NVML/RM version mismatch" in said


def test_without_the_binding_training_goes_on_and_that_is_said(
    start: Callable[..., Sampling], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['pynvml'] = None\n")
    monkeypatch.setattr(f"{__name__}.REPOSITORY", f"{tmp_path}{os.pathsep}{REPOSITORY}")
    sampling = start(HEALTHY)
    assert sampling.until_it_complains()[0].endswith("nvidia-ml-py is not installed")
    sampling.until(lambda sample: sample is None)
