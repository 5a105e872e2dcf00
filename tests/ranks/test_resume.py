"""A training that stops and goes on from its checkpoint makes the steps that an unbroken one makes, bit for bit."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moe_bench.results.reader import read_events
from moe_bench.results.records import STEPS_LEFT_FILE
from tests.support.training import CPU_FLAGS, QWEN3_LIKE, train

STEPS, SAVED_AT = 6, 4
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
WAYS = {
    "one-rank": (1, ""),
    "ep2-distributed-optimizer-bf16": (2, f"--expert-model-parallel-size 2 {DISTRIBUTED} --bf16"),
    "stage-without-experts": (
        4,
        "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --use-distributed-optimizer "
        "--moe-layer-freq [0,0,1,1]",
    ),
    "ep2-fully-reshardable": (
        2,
        f"--expert-model-parallel-size 2 {DISTRIBUTED} --dist-ckpt-optim-fully-reshardable",
    ),
}
MORE_WAYS = {
    "ep2-bf16": (2, "--expert-model-parallel-size 2 --bf16"),
    "ep2-distributed-optimizer": (2, f"--expert-model-parallel-size 2 {DISTRIBUTED}"),
    "dp2-distributed-optimizer-bf16": (2, "--use-distributed-optimizer --bf16"),
}


@pytest.mark.parametrize(
    "way", [*WAYS, *(pytest.param(way, marks=pytest.mark.slow) for way in MORE_WAYS)]
)
def test_going_on_from_a_checkpoint_equals_never_stopping(way: str, tmp_path: Path) -> None:
    world_size, flags = (WAYS | MORE_WAYS)[way]
    argv = [*CPU_FLAGS, *QWEN3_LIKE, *flags.split(), "--train-iters", str(STEPS)]
    unbroken = train(argv, world_size, tmp_path / "unbroken")
    broken = tmp_path / "broken"
    saving = [*argv, "--save", str(broken / "checkpoints"), "--save-interval", str(SAVED_AT)]
    train([*saving, "--exit-interval", str(SAVED_AT)], world_size, broken)
    resumed = train(saving, world_size, broken)  # loads its own checkpoint without being told
    assert len(resumed.losses) == STEPS
    assert resumed == unbroken


@pytest.mark.parametrize("kind", ["torch_dist", "torch"])
def test_it_goes_on_from_what_it_saved_itself_to_a_folder_that_others_use(
    kind: str, tmp_path: Path
) -> None:
    argv = [*CPU_FLAGS, *QWEN3_LIKE, "--train-iters", str(STEPS), "--ckpt-format", kind]
    saving = [*argv, "--save", str(tmp_path / "shared"), "--save-interval", "2"]
    unbroken = train(saving, 1, tmp_path / "another")  # its checkpoints go up to the last step
    train([*saving, "--exit-interval", str(SAVED_AT)], 1, tmp_path / "broken")
    resumed = train(saving, 1, tmp_path / "broken")
    loaded = [e for e in read_events(tmp_path / "broken").records if e.event == "checkpoint_loaded"]
    assert [event.fields["step"] for event in loaded] == [SAVED_AT]
    assert resumed == unbroken


def test_megatrons_own_signal_handler_stops_a_run_that_goes_on(tmp_path: Path) -> None:
    def send_sigterm_after_step_2() -> None:
        from moe_bench.mcore.recording import Recorder

        record = Recorder._record

        def told(self: Recorder, call: Mapping[str, Any], timers_s: list[float]) -> None:
            record(self, call, timers_s)
            if int(call["iteration"]) == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

        Recorder._record = told

    argv = [*CPU_FLAGS, *QWEN3_LIKE, "--train-iters", "3", "--exit-signal-handler"]
    argv += ["--save", str(tmp_path / "checkpoints"), "--save-interval", "1000"]
    train(argv, 2, tmp_path, before=send_sigterm_after_step_2)
    end = read_events(tmp_path).records[-1]
    assert (end.event, dict(end.fields)) == ("end", {"outcome": "stopped", "step": 2})
    assert (tmp_path / STEPS_LEFT_FILE).exists()
    assert len(train(argv, 2, tmp_path).losses) == 3
    assert not (tmp_path / STEPS_LEFT_FILE).exists()


def test_a_finished_run_that_is_started_again_evaluates_at_its_last_step(tmp_path: Path) -> None:
    argv = [*CPU_FLAGS, *QWEN3_LIKE, "--train-iters", "2", "--eval-iters", "1"]
    argv += ["--save", str(tmp_path / "checkpoints"), "--save-interval", "2"]
    for _ in range(2):
        train(argv, 1, tmp_path)
    told = [e for e in read_events(tmp_path).records if e.event in ("evaluation", "end")]
    assert {event.fields["step"] for event in told} == {2}
    assert len(told) >= 4


def test_a_checkpoint_that_is_not_there_is_not_called_loaded(tmp_path: Path) -> None:
    argv = [*CPU_FLAGS, *QWEN3_LIKE, "--train-iters", "1", "--load", str(tmp_path / "empty")]
    train(argv, 1, tmp_path / "run")
    events = read_events(tmp_path / "run").records
    assert "checkpoint_loaded" not in {event.event for event in events}
    with pytest.raises(AssertionError, match="could not read the checkpoint"):
        train([*argv, "--exit-on-missing-checkpoint"], 1, tmp_path / "demanding")
