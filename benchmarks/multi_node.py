"""What a step costs more as a job of two nodes than from the local launcher: `python benchmarks/multi_node.py [pairs]`.

Two nodes of a real Slurm on this machine (tests/cluster) train with one rank each, and the local launcher trains with the
same two ranks. Jobs and local runs alternate, L S S L ..., and each gives the median of its steps after the first ten. What
is printed is the ratio of the medians, and the spread among local runs alone, which is the noise floor. Nothing else should
run meanwhile. Needs Slurm's packages, as tests/cluster does.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_bench.results.reader import read_steps

PROJECT = Path(__file__).parents[1]
CLUSTER = PROJECT / "tests" / "cluster" / "start_slurm.sh"
WARM_UP = 10
STEPS = 40
KNOBS = {"MODEL": "Tiny-Qwen3", "CLUSTER": "local", "RUN_TIME": "00:10:00", "OMP_NUM_THREADS": "1"}
PLACES = {
    "slurm": {"NNODES": "2", "GPUS_PER_NODE": "1", "EXCLUSIVE": "0", "PARTITION": "debug"},
    "local": {"NNODES": "1", "GPUS_PER_NODE": "2"},
}
SCRIPTS = {"slurm": "sbatch_benchmarking.sh", "local": "interactive_benchmarking.sh"}
FLAGS = f"--mock-data --seq-length 128 --eval-iters 0 --eval-interval 100000 --train-iters {STEPS}".split()


def main(pairs: int) -> None:
    """Start the cluster, alternate, and print."""
    with tempfile.TemporaryDirectory() as folder:
        slurm = os.environ | {"SLURM_LOCAL_DIR": f"{folder}/slurm", "SLURM_LOCAL_PORT": "18017"}
        try:
            subprocess.run([CLUSTER, "start"], env=slurm, check=True)
            medians = _medians(pairs, Path(folder))
        finally:
            subprocess.run([CLUSTER, "stop"], env=slurm, check=False)
    _show(medians)


def _medians(pairs: int, folder: Path) -> dict[str, list[float]]:
    medians: dict[str, list[float]] = {"local": [], "slurm": []}
    for pair in range(pairs):
        for place in ("local", "slurm") if pair % 2 == 0 else ("slurm", "local"):
            medians[place].append(_median_step_s(place, folder, f"{place}-{pair}"))
            print(f"{place} {1e3 * medians[place][-1]:.1f} ms", flush=True)
    return medians


def _median_step_s(place: str, folder: Path, name: str) -> float:
    knobs = {**KNOBS, **PLACES[place], "OUTPUT_PATH": str(folder / "runs"), "RUN_ID": name}
    environment = {**os.environ, **knobs, "SLURM_CONF": f"{folder}/slurm/slurm.conf"}
    environment |= {"MOE_BENCH_DEVICE": "cpu", "MOE_BENCH_PYTHON": sys.executable}
    subprocess.run(
        ["bash", str(PROJECT / SCRIPTS[place]), *FLAGS],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    run_dir = folder / "runs" / name
    deadline_s = time.monotonic() + 240
    while len(read_steps(run_dir).records) < STEPS:
        if time.monotonic() > deadline_s:
            sys.exit(f"{name} did not end; see {run_dir}/logs")
        time.sleep(0.5)
    time.sleep(2)  # the ranks' own end
    return statistics.median(step.step_time_s for step in read_steps(run_dir).records[WARM_UP:])


def _show(medians: dict[str, list[float]]) -> None:
    local, slurm = medians["local"], medians["slurm"]
    ratio = statistics.median(slurm) / statistics.median(local)
    print(
        f"step, local launcher   {1e3 * statistics.median(local):7.1f} ms (median of {len(local)} runs)"
    )
    print(
        f"step, Slurm, 2 nodes   {1e3 * statistics.median(slurm):7.1f} ms (median of {len(slurm)} runs)"
    )
    print(f"Slurm / local          {ratio:7.3f}")
    print(
        f"local / local          {max(local) / min(local):7.3f}  (slowest over fastest: the noise floor)"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
