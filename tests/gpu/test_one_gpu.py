"""One GPU: it trains as the CPU does, is measured, goes on from its checkpoint, is profiled, and gives its weights away."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.conftest import (
    CALLER,
    STEPS,
    Reference,
    Train,
    farthest,
    need_gpus,
    need_transformer_engine,
)
from tests.support.projects import REPOSITORY

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]
TOKENS, TOP_K, MOE_LAYERS = 8 * 256, 2, 4
"""Of one step of Tiny-Qwen3."""


@pytest.fixture(autouse=True)
def _gpu() -> None:
    need_gpus(1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["Tiny-Qwen3", "Tiny-DeepSeek-V3", "Tiny-Mixtral"])
def test_the_losses_are_the_cpus(
    model: str,
    precision: str,
    layers: str,
    train: Train,
    reference_of: Callable[[str], Reference],
) -> None:
    reference = reference_of(model)
    name = f"{model}-{layers}-{precision}"
    run = train(name, reference.start, layers=layers, MODEL=model, PR=precision)
    assert len(run.losses) == STEPS
    assert farthest(run.losses, reference.fp32) <= reference.bound(precision), (
        run.losses,
        reference.fp32,
    )


def test_the_default_run_of_a_gpu_is_recorded_with_what_the_gpu_did(train: Train) -> None:
    run = train("default", TRAIN_ITERS="60")
    (start,) = run.events("start")
    assert start.fields["device"] != "cpu"
    assert "--bf16" in (run.run_dir / "launch.sh").read_text()
    steps = run.steps
    assert len(steps) == 60
    assert all(0 < step.memory_gib[0] < 40 and step.tflops_per_gpu > 0 for step in steps)
    (gpu,) = steps[-1].gpus
    assert gpu.power_w is None or 10 < gpu.power_w < 3000  # a MIG instance does not tell it
    assert gpu.memory_used_gib is not None
    assert gpu.memory_used_gib >= steps[-1].memory_gib[0]
    for step in steps:
        assert [load.layer for load in step.expert_load] == list(range(1, MOE_LAYERS + 1))
        assert {sum(load.tokens_per_expert) for load in step.expert_load} == {TOKENS * TOP_K}
    assert run.losses[-1] < run.losses[0]
    assert [event.fields["outcome"] for event in run.events("end")] == ["completed"]


def test_experts_are_counted_in_a_cuda_graph(train: Train) -> None:
    need_transformer_engine()
    graphs = ["--cuda-graph-impl", "transformer_engine", "--cuda-graph-modules", "attn"]
    run = train("graphs", [*graphs, "moe_router", "--cuda-graph-warmup-steps", "3"])
    for step in run.steps[4:]:
        assert {sum(load.tokens_per_expert) for load in step.expert_load} == {TOKENS * TOP_K}
        assert len(step.expert_load) == MOE_LAYERS


def test_a_run_that_was_cut_short_goes_on_as_if_it_had_not_been(layers: str, train: Train) -> None:
    whole = train(f"whole-{layers}", layers=layers, PR="fp32")
    half = {"save_every": 5, "layers": layers, "PR": "fp32"}
    first = train(f"first-{layers}", ["--exit-interval", "5"], **half)
    on = ["--load", str(first.checkpoints)]
    rest = train(f"rest-{layers}", on, layers=layers, PR="fp32")
    assert [step.step for step in rest.steps] == list(range(6, STEPS + 1))
    # Sums over atomics differ from run to run; a lost moment or step count of Adam shows as 1e-2.
    assert farthest(first.losses + rest.losses, whole.losses) <= 1e-3


@pytest.mark.parametrize("kind", ["torch", "memory", "nsys"])
def test_a_profile_shows_the_gpu(kind: str, train: Train) -> None:
    if kind == "nsys" and shutil.which("nsys") is None:
        pytest.skip("nsys is not on PATH")
    run = train(f"profile-{kind}", PROFILE=kind)
    if kind == "torch":
        (trace,) = run.run_dir.rglob("rank-0.json.gz")
        with gzip.open(trace) as file:
            kinds = {event.get("cat") for event in json.load(file)["traceEvents"]}
        assert "kernel" in kinds
    else:
        end = "*.pickle" if kind == "memory" else "*.nsys-rep"
        (report,) = (run.run_dir / "profiles").glob(end)
        assert report.stat().st_size > 10_000


HF_CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 256, "head_dim": 32,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 768,
    "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 344, "norm_topk_prob": True,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 257, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "max_position_embeddings": 2048, "attention_bias": False, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
"""Tiny-Qwen3 as transformers describes it."""


def test_what_it_trained_becomes_a_hugging_face_model(
    layers: str, train: Train, tmp_path: Path
) -> None:
    run = train(f"exported-{layers}", save_every=STEPS, layers=layers)
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    checkpoint, out = str(run.checkpoints), str(tmp_path / "hf")
    convert = [sys.executable, "-m", "moe_bench", "convert"]
    for words in (["export", checkpoint, out, "--hf", str(tmp_path)], ["verify", out, checkpoint]):
        done = subprocess.run(
            [*convert, *words],
            env=CALLER | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
