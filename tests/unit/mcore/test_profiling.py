"""A profile covers the steps that are asked for, whichever the first step of a start is."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.mcore.profiling import StepProfiler


@pytest.mark.parametrize(
    ("asked", "made", "profiled"),
    [
        ((3, 4), range(1, 6), (3, 4)),
        ((1, 2), range(1, 6), (1, 2)),
        ((3, 4), range(4, 6), (4, 4)),  # it went on from a checkpoint of step 3
        ((3, 4), range(7, 12), (7, 8)),  # ... of step 6
        ((3, 9), range(1, 6), (3, 5)),
        ((7, 9), range(1, 6), None),
    ],
)
def test_the_steps_that_are_profiled(
    asked: tuple[int, int],
    made: range,
    profiled: tuple[int, int] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began: list[int] = []
    ended: list[int] = []
    step = made[0]

    class Stopwatch:
        """In place of torch's profiler, which says nothing of steps."""

        def __init__(self, **_: object) -> None: ...

        def start(self) -> None:
            began.append(step)

        def stop(self) -> None:
            ended.append(step)

        def export_chrome_trace(self, path: str) -> None:
            Path(path).touch()

        def key_averages(self) -> Stopwatch:
            return self

        def table(self, **_: object) -> str:
            return ""

    monkeypatch.setattr("torch.profiler.profile", Stopwatch)
    profiler = StepProfiler(
        kind="torch",
        folder=tmp_path,
        rank=0,
        first=asked[0],
        last=asked[1],
        memory_bytes=lambda: 0.0,
        tell=lambda _kind, _path: None,
    )
    profiler.before_first_step(made[0])
    for step in made:
        profiler.after_step(step)
    profiler.finish()
    assert profiler.has_written == (profiled is not None)
    # started after a step, or before the first
    expected = None if profiled is None else (max(profiled[0] - 1, made[0]), profiled[1])
    assert ((began[0], ended[0]) if began else None) == expected
