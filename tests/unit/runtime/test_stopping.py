"""A training is told to stop."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_bench.results.records import STOP_FILE
from moe_bench.runtime.stopping import SIGNALS, graceful_stop


@dataclass
class Training:
    """What a recorder shows of itself."""

    training: bool
    stop_requested: bool = False


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_training_asks_for_a_stop_and_ends_nothing(
    number: signal.Signals, tmp_path: Path
) -> None:
    run = Training(training=True)
    with graceful_stop(run, tmp_path):
        os.kill(os.getpid(), number)
        assert run.stop_requested


def test_a_signal_before_the_first_step_ends_the_process(tmp_path: Path) -> None:
    with (
        pytest.raises(SystemExit) as left,
        graceful_stop(Training(training=False), tmp_path),
    ):
        os.kill(os.getpid(), signal.SIGURG)
    assert left.value.code == 143


def test_a_stop_that_was_asked_for_before_anyone_listened_is_heeded(tmp_path: Path) -> None:
    (tmp_path / STOP_FILE).parent.mkdir()
    (tmp_path / STOP_FILE).touch()
    with (
        pytest.raises(SystemExit) as left,
        graceful_stop(Training(training=False), tmp_path),
    ):
        pytest.fail("the block must not begin")
    assert left.value.code == 143


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with graceful_stop(Training(training=True), tmp_path):
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before
