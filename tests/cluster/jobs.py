"""Runs submitted by the tests of this folder."""

from __future__ import annotations

import re
import time
from pathlib import Path

from moe_bench.results.reader import read_events, read_steps
from moe_bench.results.records import Event
from tests.cluster.conftest import Cluster

KNOBS = {
    "MODEL": "Tiny-Qwen3",
    "CLUSTER": "local",
    "PARTITION": "debug",
    "NNODES": "2",
    "GPUS_PER_NODE": "1",
    "EXCLUSIVE": "0",
    "RUN_TIME": "00:10:00",
    "RUN_NAME": "test",
    "NUM_LAYERS": "2",
}
"""One rank on each of the two nodes."""
FLAGS = tuple(
    "--mock-data --eval-iters 0 --eval-interval 100000 --seq-length 64 --hidden-size 64 "
    "--moe-ffn-hidden-size 64 --log-interval 1".split()
)


def submit(
    cluster: Cluster, base: Path, run_id: str, *flags: str, **knobs: str
) -> tuple[str, Path]:
    """(job id, run directory) of a submitted run."""
    knobs = KNOBS | {"OUTPUT_PATH": str(base), "RUN_ID": run_id} | knobs
    said = cluster.submit(*FLAGS, *flags, **knobs)
    found = re.search(r"submitted job (\d+)", said.stdout)
    assert found, said
    return found[1], base / run_id


def losses(run_dir: Path) -> list[float]:
    """Of each step that counts."""
    return [step.losses["lm loss"] for step in read_steps(run_dir).records]


def steps(run_dir: Path) -> list[int]:
    """Numbers of the steps that count."""
    return [step.step for step in read_steps(run_dir).records]


def events(run_dir: Path, name: str) -> list[Event]:
    """The events of that name, in order."""
    return [event for event in read_events(run_dir).records if event.event == name]


def last_step(run_dir: Path) -> int:
    """0 before the first."""
    return max(steps(run_dir), default=0)


def wait_for_step(run_dir: Path, step: int, timeout_s: float = 300) -> None:
    """Until the run has made that step."""
    deadline = time.monotonic() + timeout_s
    while last_step(run_dir) < step:
        if time.monotonic() > deadline:
            logs = "\n".join(
                f"== {path.name}\n{path.read_text()[-3000:]}"
                for path in sorted((run_dir / "logs").glob("*.log"))
            )
            raise AssertionError(f"{run_dir} made {last_step(run_dir)} of {step} steps\n{logs}")
        time.sleep(0.2)


def status(cluster: Cluster, run_dir: Path, **knobs: str) -> str:
    """What `status` prints of the run."""
    words = ("status", run_dir.name, "--output-path", str(run_dir.parent))
    return cluster.moe_bench(*words, **knobs).stdout
