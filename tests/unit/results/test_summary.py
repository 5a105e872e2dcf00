"""Figures of a run are those of its steady state, and say what qualifies them."""

from __future__ import annotations

import io
import math
import os
import random
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from moe_bench.config.run import Substitution
from moe_bench.results.compare import compare
from moe_bench.results.compare_text import verdicts
from moe_bench.results.distribution import distribution, median_interval
from moe_bench.results.listing import list_runs, listing_lines
from moe_bench.results.live import follow
from moe_bench.results.records import Event
from moe_bench.results.summary import summarize
from moe_bench.results.summary_text import print_summary
from moe_bench.results.writer import RunWriter
from moe_bench.units import format_loss
from tests.support.recorded import say, step_record, write_manifest, write_run


def text_of(run_dir: Path) -> str:
    out = io.StringIO()
    print_summary(summarize(run_dir), Console(file=out, width=160))
    return out.getvalue()


def test_slow_first_steps_do_not_count(tmp_path: Path) -> None:
    summary = summarize(write_run(tmp_path / "a", num_steps=40, step_time_s=0.5))
    assert summary.warmup_steps == 4
    assert summary.step_time_s is not None
    assert summary.step_time_s.count == 36
    assert summary.step_time_s.median == pytest.approx(0.52)
    assert summary.step_time_s.largest < 0.6


def test_a_run_shorter_than_the_warmup_says_so(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a", num_steps=3)
    summary = summarize(run_dir)
    assert not summary.steady
    assert summary.step_time_s is not None
    assert summary.step_time_s.interval is None
    assert "all 3 steps are warm-up" in text_of(run_dir)


def test_a_run_that_went_on_from_a_checkpoint_says_where(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    writer = RunWriter(tmp_path)
    for step in (5, 6):
        writer.step(step_record(step, train_steps=6, step_time_s=0.5))
    writer.close()
    assert "2 of 6 steps, from step 5 on" in text_of(tmp_path)


def test_the_start_up_is_that_of_the_start_that_made_the_first_step(tmp_path: Path) -> None:
    write_manifest(tmp_path)
    writer = RunWriter(tmp_path)
    first = step_record(1)
    for began_s in (first.time_unix_s - 3600, first.time_unix_s - 10, first.time_unix_s + 90):
        fields = {"began_unix_s": began_s}
        writer.event(Event(event="start", time_unix_s=began_s + 5, fields=fields))
    writer.step(first)
    writer.close()
    assert summarize(tmp_path).startup_s == pytest.approx(10)


def test_every_checkpoint_counts_and_commits_are_versions(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, start={"commits": {"moe_bench": "0f4b4cf-dirty"}})
    writer = RunWriter(run_dir)
    for step in (20, 40):
        say(writer, "checkpoint_saved", 50, step=step, path=f"/ck/iter_{step:07d}")
    writer.close()
    summary = summarize(run_dir)
    assert summary.checkpoints == ("/ck/iter_0000020", "/ck/iter_0000040")
    assert summary.versions["moe_bench commit"] == "0f4b4cf-dirty"


def test_a_run_that_made_no_step_is_still_summarised(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a", num_steps=0, finished=False)
    summary = summarize(run_dir)
    assert (summary.num_steps, summary.tokens_per_s, summary.balance) == (0, None, None)
    assert "0 steps" in text_of(run_dir)


def test_the_worst_layer_and_the_largest_rank_are_named(tmp_path: Path) -> None:
    summary = summarize(write_run(tmp_path / "a"))
    assert summary.balance is not None
    assert summary.balance.worst_layer == 3
    assert summary.balance.worst_max_over_mean > 2
    assert summary.memory_gib == (1.1, 1.25)


def test_steps_after_a_restart_are_warm_up_again(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a", num_steps=20, finished=False)
    writer = RunWriter(run_dir)
    for step in range(16, 31):
        writer.step(step_record(step))
    writer.close()
    summary = summarize(run_dir)
    assert (summary.attempts, summary.rolled_back_steps, summary.num_steps) == (2, 5, 30)
    assert summary.warmup_steps == 6


def test_a_rehearsal_is_loudly_not_the_real_model(tmp_path: Path) -> None:
    swap = Substitution(asked="--hidden-size 7168", used="256", reason="rehearsal")
    text = text_of(write_run(tmp_path / "a", rehearsal=True, substitutions=(swap,)))
    assert "NOT THE REAL MODEL" in text
    assert "--hidden-size 7168 -> 256 (rehearsal)" in text


def test_a_loss_that_became_nan_is_not_hidden(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a")
    writer = RunWriter(tmp_path / "a")
    for step in range(1, 9):
        lost = {"lm loss": math.nan} if step > 6 else {"lm loss": 3.0}
        writer.step(replace(step_record(step), losses=lost))
    text = text_of(tmp_path / "a")
    assert "3.0000 -> not finite" in text
    assert "lm loss was not finite in 2 steps" in text


def test_forced_routing_is_read_from_the_flags_where_the_run_did_not_say(tmp_path: Path) -> None:
    write_manifest(tmp_path / "a", args={"--moe-router-force-load-balancing": "true"})
    assert summarize(tmp_path / "a").routing_mode == "forced-random"


def test_the_interval_of_the_median_covers_it_as_often_as_it_says() -> None:
    chance = random.Random(7)
    covered = 0
    for _ in range(2000):
        interval = median_interval(sorted(chance.expovariate(1.0) for _ in range(25)))
        assert interval is not None
        covered += interval[0] <= math.log(2) <= interval[1]
    # Conover's table for n = 25: the 8th and 18th value, coverage 0.9567; 4 standard errors are 0.018.
    assert 0.938 < covered / 2000 < 0.975


@pytest.mark.parametrize(("n", "expected"), [(5, None), (6, (0, 5)), (10, (1, 8)), (25, (7, 17))])
def test_the_interval_takes_the_order_statistics_of_the_tables(
    n: int, expected: tuple[int, int] | None
) -> None:
    assert median_interval(list(range(n))) == expected


def test_quartiles_agree_with_the_standard_library() -> None:
    values = [-0.5, 4.0, 1.0, 7.5, 2.0, 9.0, 3.5]
    found = distribution(values)
    assert found is not None
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    assert (found.lower_quartile, found.median, found.upper_quartile) == pytest.approx(
        (lower, median, upper)
    )


def test_compare_names_each_difference_with_its_origin(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    b = write_run(
        tmp_path / "b", step_time_s=0.4, knobs={"EP": "1"}, start={"versions": {"torch": "2.12.0"}}
    )
    found = {(d.kind, d.name): d for d in compare([a, b]).differences}
    assert found["knob", "EP"].values == ("2", "1")
    assert found["knob", "EP"].places[1] == "command line"
    assert found["version", "torch"].values == ("2.11.0", "2.12.0")
    assert ("knob", "GBS") not in found


def test_compare_ranks_equal_workloads_with_bounds(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", step_time_s=0.5), write_run(tmp_path / "b", step_time_s=0.4)
    comparison = compare([a, b])
    ratio = comparison.tokens_per_s[1]
    assert ratio is not None
    assert ratio.bounds is not None
    assert ratio.ratio == pytest.approx(1.25)
    assert ratio.bounds[0] < 1.25 < ratio.bounds[1]
    assert next(verdicts(comparison)).startswith("B against A: faster, 1.250x")


def test_a_run_compared_with_itself_is_not_faster(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    assert "no difference beyond the noise" in next(verdicts(compare([a, a])))


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"start": {"routing_mode": "forced-random"}}, "another routing mode"),
        ({"model": "Tiny-Mixtral"}, "another model"),
        ({"rehearsal": True}, "NOT THE REAL MODEL"),
        ({"args": {"--num-layers": "8"}}, "--num-layers 8 against 4"),
        ({"num_steps": 2}, "no steps beyond the warm-up in b ("),
    ],
)
def test_unlike_runs_are_not_ranked(tmp_path: Path, other: dict[str, object], reason: str) -> None:
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", **other)
    said = "\n".join(verdicts(compare([a, b])))
    assert said.startswith("B against A: NOT RANKED: ")
    assert reason in said


def test_without_bounds_nothing_is_claimed(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", num_steps=7, step_time_s=0.6)
    comparison = compare([a, b])
    assert comparison.summaries[1].steady
    assert next(verdicts(comparison)).startswith("B against A: too few steps to tell, one of the")


def test_a_hundred_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for index in range(100):
        run_dir = write_run(tmp_path / f"run-{index:03d}", num_steps=10)
        stamp = 1_000_000 + index
        os.utime(run_dir / "run.json", (stamp, stamp))
    runs = list_runs(tmp_path)
    assert [run.run_id for run in runs[:2]] == ["run-099", "run-098"]
    assert {(run.state, run.step, run.train_steps) for run in runs} == {("completed", 10, 10)}


def test_a_damaged_run_is_listed_as_such_beside_the_others(tmp_path: Path) -> None:
    write_run(tmp_path / "good", num_steps=2)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text("{")
    states = {run.run_id: run.state for run in list_runs(tmp_path)}
    assert states == {"good": "completed", "bad": "unreadable"}


def test_states_are_told_from_the_files_alone(tmp_path: Path) -> None:
    write_run(tmp_path / "running", num_steps=2, finished=False)
    failed = write_run(tmp_path / "failed", num_steps=2, finished=False)
    say(RunWriter(failed, rank=3), "error", 20, message="boom")
    write_manifest(tmp_path / "waiting")
    states = {run.run_id: run.state for run in list_runs(tmp_path)}
    assert states == {"running": "running", "failed": "failed", "waiting": "not started"}


def test_following_a_process_that_dies_shows_what_it_wrote(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a", num_steps=5, finished=False)
    say(RunWriter(run_dir), "warning", 13, message="[bold]odd[/bold] <b>")
    say(RunWriter(run_dir, rank=1), "warning", 13, message="[bold]odd[/bold] <b>")
    out = io.StringIO()
    process = subprocess.Popen(["/bin/sh", "-c", "kill -9 $$"])
    assert follow(run_dir, process, console=Console(file=out, width=200)) == -9
    shown = out.getvalue()
    assert "importing torch and Megatron ..." in shown
    assert "step 5/5  loss " in shown
    assert shown.count("warning: [bold]odd[/bold] <b>") == 1


def test_following_on_a_terminal_draws_the_bar(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a", num_steps=5)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    assert follow(run_dir, subprocess.Popen(["true"]), console=console) == 0
    assert "step 5/5" in out.getvalue()
    assert "100 %" in out.getvalue()


def test_a_run_that_was_moved_keeps_its_own_paths_and_is_listed_by_what_finds_it(
    tmp_path: Path,
) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, args={"--save": f"{tmp_path / name}/checkpoints"})
    moved = (tmp_path / "b").rename(tmp_path / "kept for the paper")
    assert compare([tmp_path / "a", moved]).differences == ()
    assert {run.run_id for run in list_runs(tmp_path)} == {"a", "kept for the paper"}


def test_a_list_of_runs_is_a_line_a_run_however_much_is_wrong_with_one(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "a", num_steps=5, spike=5)
    (run_dir / "results" / "events-rank-1.jsonl").mkdir()
    write_run(tmp_path / "b", num_steps=5)
    lines = list(listing_lines(list_runs(tmp_path)))
    assert sorted(len(line.split()) for line in lines[1:] if not line.startswith(" ")) == [6, 7]
    [said] = [line for line in lines if line.startswith(" ")]
    assert "events-rank-1.jsonl cannot be read: Is a directory" in said


def test_a_loss_that_exploded_stays_short() -> None:
    losses = (2.69314, 3.2e38, 3.745e-6, 0.0, math.nan)
    assert [format_loss(one) for one in losses] == [
        "2.6931",
        "3.2e+38",
        "3.75e-06",
        "0.0000",
        "nan",
    ]
