"""A sweep's ranking: who wins, whether that is more than noise, and what became of the rest."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from moe_bench.cli import runs, status
from moe_bench.cli.summarize import command
from moe_bench.errors import RecordError
from moe_bench.results.sweep_record import find_sweep, read_sweep
from moe_bench.results.sweep_summary import summarize_sweep
from moe_bench.results.sweep_text import print_sweep
from tests.support.recorded import write_manifest, write_run
from tests.support.sweeps import STEP_TIME_S, write_measured_sweep


def shown(folder: Path) -> str:
    text = io.StringIO()
    print_sweep(summarize_sweep(folder), Console(file=text, width=160))
    return text.getvalue()


def test_points_are_ranked_by_the_median_of_their_steady_state(tmp_path: Path) -> None:
    summary = summarize_sweep(write_measured_sweep(tmp_path / "s"))
    assert [one.point.number for one in summary.ranked] == [2, 5, 1, 4]
    speeds = [one.tokens_per_s_per_gpu.median for one in summary.ranked]
    assert speeds == sorted(speeds, reverse=True)
    # 2,048 tokens a step over 2 ranks; the median of the steps after warm-up takes 1.04 times the step time
    assert speeds[0] == pytest.approx(2048 / 2 / (0.4 * 1.04), rel=0.01)


def test_a_lead_within_the_noise_is_said_to_be_none(tmp_path: Path) -> None:
    text = shown(write_measured_sweep(tmp_path / "s"))
    assert "winner: point 2 (TP=1 MBS=2)" in text
    assert "NOT larger than the uncertainty: the two cannot be told apart" in text


def test_a_lead_beyond_the_noise_counts(tmp_path: Path) -> None:
    times = dict(STEP_TIME_S) | {("2", "2"): 0.5}
    text = shown(write_measured_sweep(tmp_path / "s", step_time_s=times))
    assert ", larger than the uncertainty" in text
    assert "ratio of the medians; its bounds divide the ends of the two 95 % intervals" in text


def test_too_few_steps_for_an_interval_leave_the_lead_open(tmp_path: Path) -> None:
    text = shown(write_measured_sweep(tmp_path / "s", num_steps=7))
    assert "of unknown certainty" in text
    assert "raise --train-iters" in text


def test_failed_and_pruned_points_are_listed_with_their_reasons(tmp_path: Path) -> None:
    text = shown(write_measured_sweep(tmp_path / "s"))
    assert "point 3 (TP=1 MBS=4) failed: out of GPU memory" in text
    assert "cannot run: TP=2 MBS=4: GBS=6 is not a multiple of MBS=4 (--vary)" in text
    assert "of 1 node-hours" in text


def test_other_workloads_are_not_ranked_against_the_winner(tmp_path: Path) -> None:
    folder = write_measured_sweep(tmp_path / "s")
    path = folder / "1-TP1-MBS1" / "run.json"
    run = json.loads(path.read_text())
    run["args"]["--num-layers"]["value"] = "8"
    path.write_text(json.dumps(run))
    summary = summarize_sweep(folder)
    assert summary.ranked[-1].point.number == 1
    assert summary.ranked[-1].to_winner is None
    assert any("another workload and not ranked" in line for line in summary.verdict)


def test_summarize_takes_a_sweep_where_it_takes_a_run(tmp_path: Path) -> None:
    write_measured_sweep(tmp_path / "sweeps" / "Tiny-Qwen3-abc")
    write_run(tmp_path / "Tiny-Qwen3-run", num_steps=10)
    base = ["--output-path", str(tmp_path)]
    by_id = CliRunner().invoke(command, ["Tiny-Qwen3-abc", *base])
    assert "winner: point 2" in by_id.output
    assert "winner" not in CliRunner().invoke(command, ["Tiny-Qwen3-run", *base]).output
    assert "winner" not in CliRunner().invoke(command, ["latest", *base]).output
    as_json = CliRunner().invoke(command, ["Tiny-Qwen3-abc", "--json", *base])
    assert json.loads(as_json.output)["ranked"][0]["point"]["number"] == 2


def test_a_part_of_an_id_means_the_run_where_it_fits_one(tmp_path: Path) -> None:
    folder = write_measured_sweep(tmp_path / "sweeps" / "Tiny-Qwen3-abc")
    assert find_sweep("Qwen3", base=tmp_path) == folder
    write_run(tmp_path / "Tiny-Qwen3-run", num_steps=2)
    assert find_sweep("Qwen3", base=tmp_path) is None
    assert find_sweep("Qwen3", base=tmp_path, beside_runs=False) == folder
    write_measured_sweep(tmp_path / "sweeps" / "Tiny-Qwen3-abd")
    with pytest.raises(RecordError, match="fits 2 sweeps"):
        find_sweep("Qwen3-ab", base=tmp_path, beside_runs=False)


def test_a_damaged_sweep_file_is_named(tmp_path: Path) -> None:
    folder = write_measured_sweep(tmp_path / "s")
    (folder / "sweep.json").write_text("{")
    with pytest.raises(RecordError, match=r"sweep\.json: not the record of a sweep"):
        read_sweep(folder)


def test_status_shows_each_point_of_a_sweep_and_runs_names_it(tmp_path: Path) -> None:
    folder = write_measured_sweep(tmp_path / "sweeps" / "s")
    write_manifest(folder / "3-TP1-MBS4")  # the one that failed
    shown = CliRunner().invoke(status.command, ["s", "--output-path", str(tmp_path)])
    assert [line.split()[0] for line in shown.output.splitlines()] == [
        "1-TP1-MBS1", "2-TP1-MBS2", "3-TP1-MBS4", "4-TP2-MBS1", "5-TP2-MBS2",
    ]  # fmt: skip
    listed = CliRunner().invoke(runs.command, ["--output-path", str(tmp_path)])
    assert listed.output.endswith("sweeps, for status, summarize and report: s\n")
