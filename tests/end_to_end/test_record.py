"""What a run leaves on disk: trained by Megatron's own loop on forked CPU ranks, read back from its record."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("runtime.local is for machines without CUDA", allow_module_level=True)

ROOT = Path(__file__).parents[2]
LAYERS, EXPERTS, TOP_K, SEQ, GBS = 2, 4, 2, 64, 4
FLAGS = f"""
--num-layers {LAYERS} --hidden-size 64 --ffn-hidden-size 64 --moe-ffn-hidden-size 32 --num-attention-heads 4
--seq-length {SEQ} --max-position-embeddings {SEQ} --micro-batch-size 1 --global-batch-size {GBS} --lr 1e-3
--lr-decay-style constant --num-experts {EXPERTS} --moe-router-topk {TOP_K} --moe-router-load-balancing-type aux_loss
--moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall --swiglu --disable-bias-linear --normalization RMSNorm
--position-embedding-type rope --untie-embeddings-and-output-weights --tokenizer-type NullTokenizer --vocab-size 100
--distributed-backend gloo --use-cpu-initialization --transformer-impl local --no-bias-swiglu-fusion
--no-bias-dropout-fusion --no-rope-fusion --no-masked-softmax-fusion --no-gradient-accumulation-fusion
--no-persist-layer-norm --attention-dropout 0 --hidden-dropout 0 --log-interval 1 --eval-iters 1 --num-workers 0
--expert-model-parallel-size 2
""".split()


@dataclass(frozen=True)
class Ended:
    code: int
    said: str
    run_dir: Path

    def lines(self, name: str) -> list[dict[str, Any]]:
        file = self.run_dir / "results" / name
        return [json.loads(line) for line in file.read_text().splitlines()][1:]

    def events(self, name: str, *, file: str = "events.jsonl") -> list[dict[str, Any]]:
        return [line["fields"] for line in self.lines(file) if line["event"] == name]


def start(run_dir: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
    run_dir.mkdir(parents=True)
    variables = os.environ | {
        "MOE_BENCH_RUN_DIR": str(run_dir),
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "moe_bench.runtime.local", "--nproc", "2", "--"]
    return subprocess.Popen(
        [*command, *FLAGS, *flags],
        cwd=ROOT,
        env=variables | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], run_dir: Path) -> Ended:
    said, _ = process.communicate(timeout=300)
    return Ended(process.returncode, said, run_dir)


@pytest.fixture(scope="module")
def completed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    run_dir = tmp_path_factory.mktemp("runs") / "completed"
    flags = ["--mock-data", "--train-iters", "5", "--eval-interval", "4"]
    saving = ["--save", str(run_dir / "checkpoints"), "--save-interval", "5"]
    ended = finish(start(run_dir, *flags, *saving, MOE_BENCH_PROFILE="torch"), run_dir)
    assert ended.code == 0, ended.said
    return ended


def test_every_step_is_on_record_with_finite_figures(completed: Ended) -> None:
    steps = completed.lines("steps.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5]
    for step in steps:
        assert step["consumed_tokens"] == step["step"] * GBS * SEQ
        assert 3 < step["losses"]["lm loss"] < 6
        assert 0.5 < step["losses"]["load_balancing_loss"] < 2
        assert step["grad_norm"] > 0
        assert step["tokens_per_s"] == pytest.approx(GBS * SEQ / step["step_time_s"])
        assert step["tflops_per_gpu"] > 0
        assert len(step["memory_gib"]) == 2
        assert all(0.1 < gib < 4 for gib in step["memory_gib"])
    assert steps[-1]["losses"]["lm loss"] < steps[0]["losses"]["lm loss"]


def test_losses_equal_those_that_megatron_printed(completed: Ended) -> None:
    log = (completed.run_dir / "logs" / "rank-1.log").read_text()
    printed = [
        float(line.partition(" lm loss: ")[2].partition(" |")[0])
        for line in log.splitlines()
        if " iteration " in line and "elapsed time per iteration" in line
    ]
    recorded = [step["losses"]["lm loss"] for step in completed.lines("steps.jsonl")]
    # Megatron averages the first two steps' losses in its second line.
    assert printed[0] == pytest.approx(recorded[0], rel=1e-6)
    assert printed[2:] == pytest.approx(recorded[2:], rel=1e-6)


def test_expert_load_accounts_for_every_token_once(completed: Ended) -> None:
    for step in completed.lines("steps.jsonl"):
        assert [load["layer"] for load in step["expert_load"]] == list(range(1, LAYERS + 1))
        for load in step["expert_load"]:
            assert sum(load["tokens_per_expert"]) == GBS * SEQ * TOP_K
            assert load["dropped_tokens"] == 0


def test_events_tell_the_run_from_start_to_end(completed: Ended) -> None:
    (begun,) = completed.events("start")
    assert begun["world_size"] == 2
    assert begun["layout"]["ep"] == 2
    assert begun["device"] == "cpu"
    assert begun["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert "num_floating_point_operations" in begun["flop_formula"]
    assert "torch.cuda.current_device" in completed.events("embedding")[0]["replaced"]
    (saved,) = completed.events("checkpoint_saved")
    assert saved["step"] == 5
    assert saved["duration_s"] > 0
    evaluations = completed.events("evaluation", file="events-rank-1.jsonl")
    assert evaluations[0]["step"] == 4
    assert [e["split"] for e in evaluations] == ["validation", "validation", "test"]
    assert 3 < evaluations[0]["losses"]["lm loss"] < 6
    assert completed.events("end") == [{"outcome": "completed", "step": 5}]


def test_num_parameters_are_the_model_s(completed: Ended) -> None:
    hidden, heads_width, vocab = 64, 64, 128
    attention = 4 * hidden * heads_width
    expert = 3 * hidden * 32
    dense = LAYERS * (attention + EXPERTS * hidden + 2 * hidden) + 2 * vocab * hidden + hidden
    (begun,) = completed.events("start")
    assert begun["num_parameters"] == dense + LAYERS * EXPERTS * expert
    assert begun["num_active_parameters"] == dense + LAYERS * TOP_K * expert


def test_a_profile_holds_a_trace_of_each_rank_and_the_phases_of_a_step(completed: Ended) -> None:
    for rank in (0, 1):
        with gzip.open(completed.run_dir / "profiles" / f"torch-rank-{rank}.json.gz", "rt") as file:
            names = {event.get("name", "") for event in json.load(file)["traceEvents"]}
        assert any("aten::mm" in name or "aten::addmm" in name for name in names)
    timers = completed.lines("steps.jsonl")[-1]["timers_s"]
    assert {"forward-compute", "backward-compute", "optimizer"} <= timers.keys()
    assert all(0 < seconds < 60 for seconds in timers.values())


def test_a_stopped_run_ends_all_ranks_after_the_same_step_and_says_so(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, "--mock-data", "--train-iters", "100000", "--eval-interval", "100000")
    steps = run_dir / "results" / "steps.jsonl"
    deadline = time.monotonic() + 240
    while not (steps.exists() and len(steps.read_text().splitlines()) > 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no step within 240 s"
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    ended = finish(process, run_dir)
    assert ended.code == 128 + signal.SIGTERM, ended.said
    assert "Traceback" not in ended.said
    (end,) = ended.events("end")
    assert end["outcome"] == "stopped"
    assert end["step"] == ended.lines("steps.jsonl")[-1]["step"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--fp8-format", "hybrid"), "--fp8-format hybrid: cannot work on a CPU"),
        (("--no-such-flag",), "unrecognized arguments: --no-such-flag"),
        (("--tensor-model-parallel-size", "3"), "3"),
    ],
)
def test_what_cannot_run_is_said_once_before_any_rank_starts(
    tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    run_dir = tmp_path / "run"
    ended = finish(start(run_dir, "--mock-data", "--train-iters", "1", *flags), run_dir)
    assert ended.code == 2, ended.said
    assert words in ended.said
    assert "Traceback" not in ended.said
    assert not (run_dir / "logs").exists()
