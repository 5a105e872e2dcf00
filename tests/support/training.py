"""Whole trainings through Megatron's own loop, forked from the test's process and read from their records."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moe_bench.results.reader import read_events, read_expert_loads, read_steps
from tests.support.ranks import run_ranks

CPU_FLAGS = """
--distributed-backend gloo --use-cpu-initialization --transformer-impl local --no-persist-layer-norm
--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion
--no-rope-fusion --attention-dropout 0 --hidden-dropout 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 127
--make-vocab-size-divisible-by 64 --num-workers 0 --no-create-attention-mask-in-dataloader --log-interval 1
--eval-iters 0 --eval-interval 1000 --lr 1e-3 --lr-decay-style constant --ckpt-format torch_dist
--seq-length 32 --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 8
""".split()
"""What every training of a test shares: a CPU, random text, no dropout."""

QWEN3_LIKE = """
--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 8 --group-query-attention
--num-query-groups 4 --kv-channels 8 --qk-layernorm --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 32
--moe-grouped-gemm --moe-token-dispatcher-type alltoall --moe-aux-loss-coeff 1e-2 --moe-router-dtype fp32 --swiglu
--normalization RMSNorm --position-embedding-type rope --disable-bias-linear --untie-embeddings-and-output-weights
""".split()
"""GQA with q/k norms, softmax router with an auxiliary loss, every layer a MoE."""

DEEPSEEK_LIKE = """
--num-layers 4 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 --multi-latent-attention --q-lora-rank 24
--kv-lora-rank 16 --qk-head-dim 8 --qk-pos-emb-head-dim 4 --v-head-dim 8 --qk-layernorm --rotary-scaling-factor 4
--mscale 1.0 --mscale-all-dim 1.0 --num-experts 8 --moe-layer-freq ([0]*1+[1]*3) --moe-router-topk 2
--moe-ffn-hidden-size 32 --moe-shared-expert-intermediate-size 32 --moe-router-num-groups 4 --moe-router-group-topk 2
--moe-router-score-function sigmoid --moe-router-enable-expert-bias --moe-router-topk-scaling-factor 2.5
--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-2 --moe-router-dtype fp32 --moe-grouped-gemm
--moe-token-dispatcher-type alltoall --swiglu --normalization RMSNorm --position-embedding-type rope
--disable-bias-linear --untie-embeddings-and-output-weights
""".split()
"""MLA with q-LoRA and YaRN, a leading dense layer, a shared expert, group-limited sigmoid routing with expert bias."""


@dataclass(frozen=True)
class Training:
    """What a training's record says of each step."""

    losses: list[float]
    grad_norms: list[float]
    routing: list[list[tuple[int, ...]]]
    """By step and MoE layer: assignments to each expert over the whole global batch."""
    other_losses: dict[str, list[float]]
    """By name: auxiliary and multi-token-prediction losses."""
    parameters: tuple[int, int]
    """All, and those of one token, as the record's start tells."""


def train(
    argv: list[str], world_size: int, run_dir: Path, *, before: Callable[[], None] | None = None
) -> Training:
    """Run Megatron's pretraining on `world_size` ranks; `run_dir` gets its record. Each rank calls `before` first."""
    run_dir.mkdir(parents=True, exist_ok=True)

    def body() -> None:
        from moe_bench.mcore.cpu.embedding import install
        from moe_bench.runtime import pretrain
        from moe_bench.runtime.rank import export_for_cpu, rank_context

        os.environ["MOE_BENCH_RUN_DIR"] = str(run_dir)
        os.environ["OMP_NUM_THREADS"] = "1"
        _log_to(run_dir / f"rank-{os.environ['RANK']}.log")
        export_for_cpu()
        context = rank_context()
        if before is not None:
            before()
        pretrain.train(context, argv, install(local_world_size=context.local_world_size))

    run_ranks(body, world_size)
    return read(run_dir)


def read(run_dir: Path) -> Training:
    """A finished training's record."""
    steps = read_steps(run_dir).records
    full = read_expert_loads(run_dir, frozenset(step.step for step in steps))
    start = next(event.fields for event in read_events(run_dir).records if event.event == "start")
    return Training(
        losses=[step.losses["lm loss"] for step in steps],
        grad_norms=[float("nan") if step.grad_norm is None else step.grad_norm for step in steps],
        routing=[[load.tokens_per_expert for load in step.expert_load] for step in full],
        other_losses={
            name: [step.losses[name] for step in steps]
            for name in steps[0].losses
            if name != "lm loss"
        },
        parameters=(int(start["num_parameters"]), int(start["num_active_parameters"])),
    )


def initial_weights(model: list[str], folder: Path) -> list[str]:
    """A torch_dist checkpoint of one rank's random weights, and the flags that start from it.

    Megatron seeds initial weights by rank, so layouts are comparable only from one checkpoint.
    """
    argv = [
        *CPU_FLAGS,
        *model,
        "--train-iters",
        "1",
        "--lr",
        "1e-30",
        "--save",
        str(folder / "weights"),
    ]
    train([*argv, "--save-interval", "1", "--no-save-optim", "--no-save-rng"], 1, folder / "making")
    return ["--load", str(folder / "weights"), "--finetune", "--no-load-optim", "--no-load-rng"]


def _log_to(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
