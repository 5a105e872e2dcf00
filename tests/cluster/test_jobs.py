"""Real jobs on a real Slurm: two nodes, srun, gloo."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.conftest import HERE, ROOT, Cluster, start, stop
from tests.cluster.jobs import FLAGS, KNOBS, losses, status, submit, wait_for_step

SECRETS = {
    "WANDB_API_KEY": "planted-wandb-key-1f6e",
    "HF_TOKEN": "planted-hf-token-77aa",
    "MY_SECRET": "planted-secret-9b9b",
    "DB_PASSWORD": "planted-password-c3c3",
}


@dataclass(frozen=True)
class Trained:
    """A job that ran to its end, and what others could see while it ran."""

    job: str
    run_dir: Path
    seen: str
    """Command lines of every process, and all that squeue and scontrol say, taken several times."""


@pytest.fixture(scope="module")
def trained(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Six steps over two nodes, with secrets in the submitter's environment."""
    base = tmp_path_factory.mktemp("trained")
    # W&B stays off: the planted key is none of its own.
    knobs = SECRETS | {"WANDB_MODE": "disabled"}
    job, run_dir = submit(cluster, base, "two-nodes", "--train-iters", "6", **knobs)
    seen = [look(cluster, job)]
    wait_for_step(run_dir, 1)
    seen.append(look(cluster, job))
    cluster.wait_for(job, "COMPLETED")
    seen.append(look(cluster, job))
    return Trained(job=job, run_dir=run_dir, seen="\n".join(seen))


def look(cluster: Cluster, job: str) -> str:
    """What any user of the machine may see."""
    lines = [" ".join(command_line(path)) for path in Path("/proc").glob("[0-9]*/cmdline")]
    lines.append(cluster.show(job))
    lines.append(cluster.run("squeue", "--states=all", "--Format=:all").stdout)
    lines.append(cluster.run("squeue", "--json").stdout)
    return "\n".join(lines)


def command_line(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").split("\0")
    except OSError:  # it has ended
        return []


def test_a_job_over_two_nodes_trains_and_leaves_its_record(
    cluster: Cluster, trained: Trained
) -> None:
    run_dir = trained.run_dir
    assert len(losses(run_dir)) == 6
    assert "NumNodes=2" in cluster.show(trained.job)
    submission = json.loads((run_dir / "job.json").read_text())[-1]
    script = (run_dir / submission["script"]).read_bytes()
    assert submission["script_sha256"] == hashlib.sha256(script).hexdigest()
    assert submission["job_id"] == trained.job
    assert "completed" in status(cluster, run_dir)
    assert (run_dir / "logs" / "rank-0.log").is_file()
    assert (run_dir / "logs" / "rank-1.log").is_file()
    assert (run_dir / "logs" / f"slurm-{trained.job}.log").is_file()


def test_no_secret_is_in_the_run_directory_the_queue_or_a_command_line(trained: Trained) -> None:
    written = [path for path in trained.run_dir.rglob("*") if path.is_file()]
    assert {"run.json", "launch.sh", "job.json", "rank-0.log", "steps.jsonl"} <= {
        path.name for path in written
    }
    for name, secret in SECRETS.items():
        assert secret not in trained.seen, name
        holding = [str(path) for path in written if secret.encode() in path.read_bytes()]
        assert not holding, name


def test_a_secret_and_the_gpus_asked_for_reach_the_ranks_through_their_environment(
    cluster: Cluster, tmp_path: Path
) -> None:
    probe = tmp_path / "python"
    probe.write_text(
        f'#!/bin/bash\nprintenv HF_TOKEN CUDA_VISIBLE_DEVICES > "{tmp_path}/rank-$SLURM_PROCID"\n'
    )
    probe.chmod(0o755)
    # The apptainer of this test runs what follows its image: the words after it are the rank's command.
    apptainer = tmp_path / "apptainer"
    apptainer.write_text(f"#!/bin/bash\nexec {shlex.quote(str(probe))}\n")
    apptainer.chmod(0o755)
    knobs = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HF_TOKEN": SECRETS["HF_TOKEN"]}
    knobs |= {"CONTAINER_RUNTIME": "apptainer", "CONTAINER_IMAGE": "/images/moe.sif"}
    knobs |= {"GRES": "gpu:2", "MEM": "1G", "CPUS_PER_TASK": "2"}
    job, _ = submit(cluster, tmp_path / "runs", "secret", "--train-iters", "6", **knobs)
    cluster.wait_for(job, "COMPLETED")
    assert (tmp_path / "rank-1").read_text().split() == [SECRETS["HF_TOKEN"], "0,1"]
    assert "CPUs/Task=2" in cluster.show(job)


def test_a_dry_run_names_secrets_masked_and_prints_the_bytes_that_a_submission_stores(
    cluster: Cluster, tmp_path: Path
) -> None:
    knobs = KNOBS | SECRETS | {"OUTPUT_PATH": str(tmp_path), "RUN_ID": "same"}
    dry = cluster.submit(*FLAGS, "--train-iters", "6", DRY_RUN="1", **knobs)
    assert not (tmp_path / "same").exists()
    for name, secret in SECRETS.items():
        assert secret not in dry.stdout + dry.stderr
        assert f"{name}=***" in dry.stderr
    job, run_dir = submit(cluster, tmp_path, "same", "--train-iters", "6", **SECRETS)
    cluster.run("scancel", job)
    assert (run_dir / "launch.sh").read_text() == dry.stdout
    assert hashlib.sha256(dry.stdout.encode()).hexdigest() in dry.stderr


def test_a_killed_rank_fails_the_job_and_status_names_it(cluster: Cluster, tmp_path: Path) -> None:
    job, run_dir = submit(cluster, tmp_path, "killed", "--train-iters", "100000")
    wait_for_step(run_dir, 2)
    # Stopped first, lest one rank reports the other's death before it dies itself.
    stop_step(cluster, job, run_dir)
    cluster.run("scancel", "--signal=KILL", f"{job}.0")
    deadline = time.monotonic() + 90
    while cluster.state(job) not in {"FAILED", "CANCELLED"}:
        assert time.monotonic() < deadline, cluster.show(job)
        time.sleep(0.3)
    said = status(cluster, run_dir)
    assert said.startswith("killed  failed"), said
    assert "srun ended with 137" in said
    assert "killed" in said.split("srun ended with 137")[1]


def stop_step(cluster: Cluster, job: str, run_dir: Path) -> None:
    """Stop both ranks of a run where they are."""
    ranks = [
        path.parent
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if command_line(path)[1:3] == ["-m", "moe_bench.runtime.pretrain"]
        and f"MOE_BENCH_RUN_DIR={run_dir}" in command_line(path.with_name("environ"))
    ]
    assert len(ranks) >= 2  # and their data loaders
    cluster.run("scancel", "--signal=STOP", f"{job}.0")
    deadline = time.monotonic() + 60
    while not all("State:\tT" in (rank / "status").read_text() for rank in ranks):
        assert time.monotonic() < deadline, ranks
        time.sleep(0.1)


def test_a_job_that_cannot_start_says_why_and_is_cancelled(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.run("scontrol", "update", "nodename=n[2-3]", "state=drain", "reason=test")
    try:
        job, run_dir = submit(cluster, tmp_path, "waiting", "--train-iters", "6")
        said = wait_for_words(cluster, run_dir, "drained or reserved")
        assert said.startswith("waiting  pending"), said
        cancelled = cluster.moe_bench("cancel", "waiting", "--output-path", str(tmp_path))
        assert f"job {job} cancelled" in cancelled.stdout
        assert cluster.state(job) == "CANCELLED"
        # No log, no record: what `cancel` noted is all that tells once the queue has forgotten the job.
        assert "waiting  cancelled" in status(cluster, run_dir, PATH=without_slurm(tmp_path))
    finally:
        cluster.run("scontrol", "update", "nodename=n[2-3]", "state=resume")


def wait_for_words(cluster: Cluster, run_dir: Path, words: str) -> str:
    """`status`, once the scheduler has looked at the job and given that reason."""
    deadline = time.monotonic() + 60
    while words not in (said := status(cluster, run_dir)):
        assert time.monotonic() < deadline, said
        time.sleep(0.3)
    return said


def without_slurm(folder: Path) -> str:
    """A PATH that leads to no Slurm."""
    empty = folder / "no-slurm"
    empty.mkdir(exist_ok=True)
    return str(empty)


def test_a_partition_that_the_job_does_not_fit_is_named_as_why_it_waits(
    cluster: Cluster, tmp_path: Path
) -> None:
    waits = {
        "nodes": ({"PARTITION": "small"}, "more nodes than the partition allows: lower NNODES"),
        "time": (
            {"PARTITION": "small", "NNODES": "1", "GPUS_PER_NODE": "2"},
            "more time than the partition allows: lower RUN_TIME",
        ),
        "account": ({"PARTITION": "physics", "ACCOUNT": "biology"}, "physics allows physics"),
        "chain": ({"DEPENDENCY": "afterok:{nodes}"}, "waits for another job to end"),
    }
    jobs: dict[str, str] = {}
    for name, (knobs, _) in waits.items():
        filled = {knob: value.format(**jobs) for knob, value in knobs.items()}
        jobs[name], _ = submit(cluster, tmp_path, name, "--train-iters", "6", **filled)
    try:
        for name, (_, words) in waits.items():
            wait_for_words(cluster, tmp_path / name, words)
    finally:
        cluster.run("scancel", *jobs.values())


def test_submissions_at_once_share_no_file(cluster: Cluster, tmp_path: Path) -> None:
    before = tracked_and_loose_files()
    held = {**KNOBS, "OUTPUT_PATH": str(tmp_path), "NODELIST": "n1", "NNODES": "1"}
    first = cluster.run("sbatch", "--hold", "--parsable", "--output=/dev/null", "--wrap=true")
    waits = {"GPUS_PER_NODE": "2", "DEPENDENCY": f"afterany:{first.stdout.strip()}"}
    environment = cluster.environment | held | waits
    command = ["bash", "./sbatch_benchmarking.sh", *FLAGS, "--train-iters", "6"]
    names = ["", "", "one", "one"]  # two of a random name, two that want the same
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | ({"RUN_ID": name} if name else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    said = [process.communicate(timeout=120) for process in started]
    codes = [process.returncode for process in started]
    jobs = re.findall(r"submitted job (\d+)", "".join(out for out, _ in said))
    cluster.run("scancel", first.stdout.strip(), *jobs)
    assert codes[:2] == [0, 0], said
    assert sorted(codes[2:]) == [0, 2], said
    assert "exists already and is left alone" in said[2][1] + said[3][1]
    assert len(set(jobs)) == 3
    run_dirs = sorted(tmp_path.iterdir())
    assert len(run_dirs) == 3, run_dirs  # nothing half-made is left either
    for run_dir in run_dirs:
        script = (run_dir / "launch.sh").read_text()
        assert script.count(f"--output={run_dir}/logs/") == 2
        others = {str(other) for other in run_dirs} - {str(run_dir)}
        assert not any(other in script for other in others)
        (submission,) = json.loads((run_dir / "job.json").read_text())
        assert submission["job_id"] in jobs
        assert submission["script_sha256"] == hashlib.sha256(script.encode()).hexdigest()
    assert tracked_and_loose_files() == before  # nothing is written into the project


def tracked_and_loose_files() -> set[str]:
    """Every file of the project that git does not ignore."""
    said = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name for name in said.stdout.splitlines() if not name.startswith((".git", "tests/"))}


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"PARTITION": "nowhere"}, r"invalid partition specified: nowhere.*sinfo -s"),
        ({"NODELIST": "n9"}, "Invalid node name.*sinfo -N"),
        ({"SEGMENT": "2"}, r"unrecognized option '--segment.*unset SEGMENT"),
        ({"CONSTRAINT": "h100"}, "Invalid feature.*CONSTRAINT"),
        ({"RESERVATION": "tonight"}, "reservation is invalid.*RESERVATION"),
        ({"GRES": "gpu:9"}, "not available.*GRES"),
    ],
)
def test_what_slurm_refuses_is_explained_and_recorded(
    knobs: dict[str, str], said: str, cluster: Cluster, tmp_path: Path
) -> None:
    base = KNOBS | {"OUTPUT_PATH": str(tmp_path), "RUN_ID": "refused"}
    done = cluster.submit(*FLAGS, "--train-iters", "6", check=False, **(base | knobs))
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(said, done.stderr)
    assert "Traceback" not in done.stderr
    shown = status(cluster, tmp_path / "refused")
    assert shown.startswith("refused  refused"), shown
    assert re.search(said, shown)
    cancelled = cluster.moe_bench("cancel", str(tmp_path / "refused"), check=False)
    assert cancelled.returncode == 2
    assert "never became a job" in cancelled.stderr


@pytest.fixture
def strict(tmp_path: Path) -> Iterator[Cluster]:
    """A second, stricter cluster: partition limits are enforced at submission, and one job fills it."""
    template = tmp_path / "slurm.conf.in"
    text = (HERE / "slurm.conf.in").read_text()
    template.write_text(f"{text}\nEnforcePartLimits=ALL\nMaxJobCount=2\n")
    folder = tmp_path / "slurm"
    started = start(folder, SLURM_LOCAL_TEMPLATE=str(template), SLURM_LOCAL_NODES="1")
    try:
        yield started
    finally:
        stop(started)


def test_a_full_queue_and_a_wrong_account_are_refused_in_the_schedulers_words(
    strict: Cluster, tmp_path: Path
) -> None:
    knobs = {"NNODES": "1", "GPUS_PER_NODE": "2", "OUTPUT_PATH": str(tmp_path)}
    knobs = KNOBS | knobs | {"RUN_ID": "account"}
    wrong = {"PARTITION": "physics", "ACCOUNT": "biology"}
    done = strict.submit(*FLAGS, check=False, **(knobs | wrong))
    assert done.returncode == 2, done
    assert "Invalid account" in done.stderr
    assert "set ACCOUNT" in done.stderr
    strict.run("sbatch", "--hold", "--wrap=true")
    done = strict.submit(*FLAGS, check=False, **(knobs | {"RUN_ID": "full"}))
    assert done.returncode == 2, done
    assert "the cluster takes no more jobs" in done.stderr
    assert len(strict.run("squeue", "--noheader").stdout.splitlines()) == 1
    assert status(strict, tmp_path / "full").startswith("full  refused")


def test_a_job_that_left_the_queue_is_told_from_its_files(
    cluster: Cluster, trained: Trained, tmp_path: Path
) -> None:
    """Accounting is off here; squeue forgets a job MinJobAge after its end."""
    # Its ranks fail at once: no node has an apptainer.
    nowhere = {"CONTAINER_RUNTIME": "apptainer", "CONTAINER_IMAGE": "/images/moe.sif"}
    job, failed = submit(cluster, tmp_path, "failed", "--train-iters", "6", **nowhere)
    deadline = time.monotonic() + 60
    while cluster.state(job) != "FAILED":
        assert time.monotonic() < deadline, cluster.show(job)
        time.sleep(0.3)
    while_known = status(cluster, failed)
    forget(cluster, trained.job, job)
    assert status(cluster, trained.run_dir).startswith("two-nodes  completed")
    assert status(cluster, failed) == while_known
    assert while_known.startswith("failed  failed")


def forget(cluster: Cluster, *jobs: str) -> None:
    """Have the controller purge ended jobs, as it does by itself after MinJobAge."""
    conf = cluster.folder / "slurm.conf"
    text = conf.read_text()
    conf.write_text(text.replace("MinJobAge=3600", "MinJobAge=2"))
    cluster.run("scontrol", "reconfigure")
    try:
        deadline = time.monotonic() + 90
        while cluster.run("squeue", "--states=all", "-h", "-j", ",".join(jobs), check=False).stdout:
            assert time.monotonic() < deadline, "the controller forgets nothing"
            time.sleep(0.5)
    finally:
        conf.write_text(text)
        cluster.run("scontrol", "reconfigure")
