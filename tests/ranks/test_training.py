"""What a training does between its steps, and what its record says of them. Megatron's own loop, small models."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from moe_bench.errors import ArgumentsError
from moe_bench.results.reader import read_events, read_expert_loads
from tests.support.ranks import run_ranks
from tests.support.training import CPU_FLAGS, DEEPSEEK_LIKE, QWEN3_LIKE, train

DENSE_LAYERS, MOE_LAYERS, EXPERTS, STEPS = 1, 3, 8, 4


def test_expert_bias_moves_against_the_load_of_each_step(tmp_path: Path) -> None:
    rate = 0.05
    argv = [*CPU_FLAGS, *DEEPSEEK_LIKE, "--train-iters", str(STEPS), "--save-interval", str(STEPS)]
    argv += ["--expert-model-parallel-size", "2", "--moe-router-bias-update-rate", str(rate)]
    saved = tmp_path / "checkpoints"
    found = train([*argv, "--save", str(saved)], 2, tmp_path)
    expected = [[0.0] * EXPERTS for _ in range(MOE_LAYERS)]
    for step in found.routing:
        for bias, counts in zip(expected, step, strict=True):
            mean = sum(counts) / EXPERTS
            for expert, count in enumerate(counts):
                bias[expert] += rate * ((count < mean) - (count > mean))
    assert any(any(bias) for bias in expected), "the load was even: nothing to move"
    for layer, bias in enumerate(expected, DENSE_LAYERS):
        assert biases(saved / f"iter_{STEPS:07}")[layer] == pytest.approx(bias, abs=1e-6)


def biases(checkpoint: Path) -> dict[int, list[float]]:
    """By layer, 0-based."""

    def body() -> dict[int, list[float]]:
        from megatron.core import dist_checkpointing

        tensors = dist_checkpointing.load_plain_tensors(str(checkpoint))
        own = {key: value for key, value in tensors.items() if key.endswith("expert_bias")}
        assert own, sorted(tensors)
        return {int(key.split(".")[2]): value.tolist() for key, value in own.items()}

    return run_ranks(body, 1)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "recorded"),
    [
        ("aux_loss", {"load_balancing_loss"}),
        ("seq_aux_loss", {"seq_load_balancing_loss"}),
        ("global_aux_loss", {"global_load_balancing_loss"}),
    ],
)
def test_the_record_has_the_balancing_losses_that_are_asked_for(
    kind: str, recorded: set[str], tmp_path: Path
) -> None:
    argv = [*CPU_FLAGS, *QWEN3_LIKE, "--moe-router-load-balancing-type", kind]
    found = train([*argv, "--train-iters", "1"], 1, tmp_path)
    assert set(found.other_losses) == recorded
    assert all(values[0] > 0.5 for values in found.other_losses.values())


def test_each_choice_of_the_router_is_recorded_once_as_kept_or_dropped(tmp_path: Path) -> None:
    """Recomputation runs each router twice."""
    argv = [*CPU_FLAGS, *QWEN3_LIKE, "--train-iters", "1", "--moe-expert-capacity-factor", "0.5"]
    argv += (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
    )
    train(argv, 1, tmp_path)
    (step,) = read_expert_loads(tmp_path, frozenset({1}))
    assert len(step.expert_load) == 4
    for load in step.expert_load:
        assert load.dropped_tokens > 0
        assert (
            sum(load.tokens_per_expert) + load.dropped_tokens == 8 * 32 * 2
        )  # the best 2 of each token


def test_a_loss_that_is_not_finite_is_recorded_as_what_it_was(tmp_path: Path) -> None:
    argv = [*CPU_FLAGS, *QWEN3_LIKE, "--lr", "1e30", "--no-check-for-nan-in-loss-and-grad"]
    train([*argv, "--train-iters", "3"], 1, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "results/steps.jsonl").open()][1:]
    first, last = lines[0], lines[-1]
    assert first["not_finite"] == {}
    assert last["losses"]["lm loss"] is None
    assert last["not_finite"]["lm loss"] in ("nan", "inf")
    events = [json.loads(line) for line in (tmp_path / "results/events.jsonl").open()]
    said = [event["fields"]["message"] for event in events if event.get("event") == "warning"]
    assert sum("lm loss is" in message for message in said) == 1


def test_what_only_megatrons_own_script_does_is_refused_by_flag() -> None:
    def body() -> str:
        from moe_bench.mcore.entry import UNSERVED, refuse_unserved

        refuse_unserved(SimpleNamespace(**dict.fromkeys(UNSERVED)))
        with pytest.raises(ArgumentsError) as refused:
            refuse_unserved(SimpleNamespace(sft=True, fim_data=True, hybrid_context_parallel=False))
        return str(refused.value)

    said = run_ranks(body, 1)[0]
    assert said.startswith("--sft, --fim-data: ")
    assert "MEGATRON_PATH" in said


def test_a_run_that_megatron_ends_without_a_status_has_failed(tmp_path: Path) -> None:
    """--adlr-autoresume without the package it asks: Megatron says so and leaves, before the first step."""
    with pytest.raises(AssertionError, match="Megatron ended the run"):
        train([*CPU_FLAGS, *QWEN3_LIKE, "--train-iters", "1", "--adlr-autoresume"], 1, tmp_path)


def test_batches_of_worker_processes_are_the_same(tmp_path: Path) -> None:
    argv = [*CPU_FLAGS, *QWEN3_LIKE, "--train-iters", "2"]
    own = train([*argv, "--num-workers", "0"], 1, tmp_path / "own")
    assert train([*argv, "--num-workers", "2"], 1, tmp_path / "workers").losses == own.losses


def test_an_asynchronous_checkpoint_is_told_of_when_it_is_on_disk(tmp_path: Path) -> None:
    def write_from_a_fork() -> None:  # Megatron's persistent writer is for GPUs alone
        from moe_bench.mcore import entry

        parse = entry.parse

        def changed() -> SimpleNamespace:
            args = parse()
            args.use_persistent_ckpt_worker = False
            return args

        entry.parse = changed

    argv = [*CPU_FLAGS, *QWEN3_LIKE, "--train-iters", "3", "--exit-interval", "3"]
    argv += ["--save", str(tmp_path / "checkpoints"), "--save-interval", "2", "--async-save"]
    argv += ["--use-persistent-ckpt-worker", "--async-strategy", "mcore"]
    train(argv, 2, tmp_path, before=write_from_a_fork)
    events = read_events(tmp_path).records
    saved = [event for event in events if event.event == "checkpoint_saved"]
    assert [event.fields["step"] for event in saved] == [2, 3]
    tracker = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "3"
    assert saved[-1].time_unix_s >= tracker.stat().st_mtime
    assert all(event.fields["duration_s"] > 0 for event in saved)


def test_ranks_tell_one_another_memory_times_and_a_wish_to_stop() -> None:
    def body() -> tuple[object, ...]:
        from moe_bench.mcore.step_exchange import TIMERS, RankReading, StepExchange

        rank = int(os.environ["RANK"])
        times = [0.0] * len(TIMERS)
        times[0], times[2] = (1.0, 4.0) if rank else (3.0, 2.0)
        mine = RankReading(
            memory_bytes=(1 + rank) * 2.0**30, stop_requested=rank == 1, gpu=None, timers_s=times
        )
        heard = StepExchange(None).run(mine)
        return heard.memory_gib, heard.stop_requested, heard.timers_s

    expected = ((1.0, 2.0), True, {"forward-backward": 3.0, "forward-compute": 4.0})
    assert run_ranks(body, 2) == [expected, expected]
