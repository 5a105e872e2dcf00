"""A sweep's directory is found again by the same arguments, and refused to others with what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moe_bench.errors import ConfigError
from moe_bench.results.sweep_record import Axis, Sweep, read_sweep, write_sweep
from moe_bench.sweep.directory import again
from tests.support.sweeps import write_measured_sweep


@pytest.fixture
def there(tmp_path: Path) -> tuple[Path, Sweep]:
    folder = write_measured_sweep(tmp_path / "s")
    return folder, read_sweep(folder)


def test_the_same_arguments_go_on_with_what_was_done(there: tuple[Path, Sweep]) -> None:
    folder, sweep = there
    fresh = tuple(replace(point, attempts=()) for point in sweep.points)
    found = again(folder, replace(sweep, points=fresh, budget_node_hours=2.0))
    assert found.points == sweep.points
    assert found.budget_node_hours == 2.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"words": ("--lr", "1e-3")}, "flags --train-iters 40 then, --lr 1e-3 now"),
        ({"given": {"GBS": "16"}}, "GBS 8 then, 16 now"),
        ({"given": {}}, "GBS 8 then, unset now"),
        ({"where": "slurm"}, "run on local then, slurm now"),
        (
            {"axes": (Axis(names=("TP",), values=(("1",),)),)},
            "--vary TP=1,2 MBS=1,2,4 then, TP=1 now",
        ),
        ({"points": ()}, "5 points could run then, 0 can now: a preset, a .conf"),
    ],
)
def test_other_arguments_are_named(
    there: tuple[Path, Sweep], change: dict[str, object], said: str
) -> None:
    folder, sweep = there
    with pytest.raises(ConfigError) as raised:
        again(folder, replace(sweep, **change))
    assert said in str(raised.value)
    assert "--resume s" in str(raised.value)
    assert "--id NAME" in str(raised.value)


def test_a_point_that_resolves_to_another_run_now_is_named(there: tuple[Path, Sweep]) -> None:
    folder, sweep = there
    first = replace(sweep.points[0], script_sha256="1" * 64)
    with pytest.raises(ConfigError, match=r"point 1 \(TP=1 MBS=1\) resolves to another run now"):
        again(folder, replace(sweep, points=(first, *sweep.points[1:])))


def test_a_sweep_of_a_newer_format_is_refused(there: tuple[Path, Sweep]) -> None:
    folder, sweep = there
    write_sweep(folder, replace(sweep, format_version=99))
    with pytest.raises(Exception, match="format 99 is newer"):
        read_sweep(folder)
