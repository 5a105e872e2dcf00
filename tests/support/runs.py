"""Resolved runs for tests of what comes after resolving."""

from __future__ import annotations

from pathlib import Path

from moe_bench.config.run import Origin, ResolvedRun, Setting

PLACE = Origin(layer="environment", place="environment")
KNOBS = {"NNODES": "2", "GPUS_PER_NODE": "4", "RUN_TIME": "00:20:00", "RUN_NAME": "demo"}
FLAGS = {"--num-layers": "4", "--swiglu": "true", "--data-path": "/data/a b/corpus", "--lr": "1e-3"}


def setting(value: str) -> Setting:
    """A value that came from the environment."""
    return Setting(value=value, origin=PLACE)


def make_run(
    run_dir: Path = Path("/runs/20261121-120000-Tiny-Qwen3-0a1b"),
    *,
    args: dict[str, str] | None = None,
    **knobs: str,
) -> ResolvedRun:
    """A small run over two nodes of four ranks; keywords add or replace knobs."""
    return ResolvedRun(
        run_id=run_dir.name,
        model="Tiny-Qwen3",
        run_dir=run_dir,
        knobs={name: setting(value) for name, value in (KNOBS | knobs).items()},
        env={"OMP_NUM_THREADS": setting("1")},
        args={name: setting(value) for name, value in (args or FLAGS).items()},
    )
