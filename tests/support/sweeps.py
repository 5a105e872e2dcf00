"""Sweeps as they stand on disk after their points ran, written by the project's own writers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moe_bench.results.sweep_record import (
    COMPLETED,
    FAILED,
    Attempt,
    Axis,
    Point,
    Pruned,
    Sweep,
    write_sweep,
)
from moe_bench.sweep.axes import points as points_of
from tests.support.recorded import START_UNIX_S, write_run

AXES = (
    Axis(names=("TP",), values=(("1",), ("2",))),
    Axis(names=("MBS",), values=(("1",), ("2",), ("4",))),
)
STEP_TIME_S: Mapping[tuple[str, str], float] = {
    ("1", "1"): 0.5,
    ("1", "2"): 0.4,
    ("2", "1"): 0.6,
    ("2", "2"): 0.404,
}
"""By (TP, MBS): 1,2 leads 2,2 by one per cent, within the noise of `write_run`; 1,4 failed; 2,4 cannot run."""


def write_measured_sweep(
    folder: Path,
    *,
    step_time_s: Mapping[tuple[str, str], float] = STEP_TIME_S,
    num_steps: int = 40,
    why: str = "out of GPU memory",
    reason: str = "GBS=6 is not a multiple of MBS=4 (--vary)",
    model: str = "Tiny-Qwen3",
) -> Path:
    """Four measured points, one that failed, one that cannot run. Returns `folder`."""
    points: list[Point] = []
    pruned: list[Pruned] = []
    for values in points_of(AXES):
        key = (values["TP"], values["MBS"])
        if key == ("2", "4"):
            pruned.append(Pruned(values=values, reason=reason))
            continue
        number = len(points) + 1
        name = f"{number}-TP{key[0]}-MBS{key[1]}"
        has_figure = key in step_time_s
        if has_figure:
            write_run(
                folder / name, num_steps=num_steps, step_time_s=step_time_s[key], model=model,
                knobs=values,
            )  # fmt: skip
        attempt = Attempt(
            started_unix_s=START_UNIX_S,
            ended_unix_s=START_UNIX_S + 60,
            outcome=COMPLETED if has_figure else FAILED,
            why=None if has_figure else why,
            node_hours=1 / 60,
        )
        points.append(
            Point(
                number=number,
                name=name,
                values=values,
                nodes=1,
                ranks=2,
                run_time_s=300,
                script_sha256="0" * 64,
                states_gib=0.07,
                attempts=(attempt,),
            )
        )
    write_sweep(
        folder,
        Sweep(
            sweep_id=folder.name,
            model=model,
            axes=AXES,
            words=("--train-iters", "40"),
            given={"GBS": "8"},
            where="local",
            created_unix_s=START_UNIX_S,
            points=tuple(points),
            pruned=tuple(pruned),
            budget_node_hours=1.0,
        ),
    )
    return folder
