"""Training speed on this CPU beside Hugging Face transformers: same architecture, batch, dtype, threads, optimizer.

usage: python benchmarks/cpu_training.py [--model Tiny-Qwen3|Tiny-Mixtral] [--blocks 12] [--steps 4]

Each contender is a process of its own that waits for its turn; the turns alternate, a block of steps each, so that
whatever else the machine does meets all of them. Megatron runs its own `pretrain` (loop, data loader, distributed
optimizer, logging); transformers runs forward, backward, clipping and fused AdamW on random tokens. The noise floor is
the same ratio between the odd and the even blocks of our own contender.
"""

# ruff: noqa: PLC0415, S101 - a contender imports what it is, and no more

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

MICRO_BATCH, SEQUENCE, VOCABULARY = 4, 256, 320
TOKENS = MICRO_BATCH * SEQUENCE
COMMON = f"""
--micro-batch-size {MICRO_BATCH} --global-batch-size {MICRO_BATCH} --seq-length {SEQUENCE}
--max-position-embeddings {SEQUENCE} --num-layers 4 --hidden-size 256 --num-attention-heads 8 --group-query-attention
--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
--untie-embeddings-and-output-weights --rotary-base 1000000 --num-experts 8 --moe-router-topk 2
--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3 --moe-grouped-gemm
--moe-token-dispatcher-type alltoall --use-mcore-models --use-distributed-optimizer --lr 3e-4 --lr-decay-style constant
--adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0 --attention-dropout 0 --hidden-dropout 0 --mock-data
--tokenizer-type NullTokenizer --vocab-size 257 --make-vocab-size-divisible-by 64 --num-workers 0 --split 100,0,0
--no-create-attention-mask-in-dataloader --eval-iters 0 --eval-interval 100000 --log-interval 10 --transformer-impl local
--distributed-backend gloo --use-cpu-initialization --no-rope-fusion --no-bias-swiglu-fusion --no-masked-softmax-fusion
--no-gradient-accumulation-fusion --no-persist-layer-norm --no-bias-dropout-fusion
"""
MEGATRON = {
    "Tiny-Qwen3": "--ffn-hidden-size 768 --num-query-groups 4 --kv-channels 32 --qk-layernorm "
    "--norm-epsilon 1e-6 --moe-ffn-hidden-size 344 --moe-router-dtype fp32",
    "Tiny-Mixtral": "--ffn-hidden-size 352 --num-query-groups 2",
}
CONTENDERS = ("moe_bench", "transformers grouped_mm", "transformers eager")


def main() -> None:
    """Take turns and print the table, or be one of the contenders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(MEGATRON), default="Tiny-Qwen3")
    parser.add_argument("--blocks", type=int, default=12, help="turns of each contender")
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--be", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.be == "moe_bench":
        be_megatron(options)
    elif options.be:
        be_transformers(options)
    else:
        referee(options)


def referee(options: argparse.Namespace) -> None:
    """Start the contenders, give turns, print."""
    children = {name: start(name, options) for name in CONTENDERS}
    blocks: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(options.blocks + 2):
        for name, child in children.items():
            times = [one_step(child) for _ in range(options.steps)]
            if turn >= 2:  # the first two warm caches and allocators
                blocks[name].append(statistics.median(times))
    for child in children.values():
        child.terminate()
        child.wait()
    ours = blocks["moe_bench"]
    commit = subprocess.check_output(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], text=True)
    print(f"{options.model}, fp32, {TOKENS} tokens a step, {options.threads} threads")
    print(f"{platform.processor() or platform.machine()}, {cpu_model()}, commit {commit.strip()}")
    print(f"{'':26}{'tokens/s':>10}{'ours / theirs':>16}")
    for name, times in blocks.items():
        ratio = statistics.median(t / o for t, o in zip(times, ours, strict=True))
        print(f"{name:26}{TOKENS / statistics.median(times):10.0f}{ratio:16.3f}")
    floor = statistics.median(a / b for a, b in zip(ours[::2], ours[1::2], strict=False))
    print(f"noise floor (ours / ours) {floor:26.3f}")


def start(name: str, options: argparse.Namespace) -> subprocess.Popen[str]:
    """One contender, waiting for its first turn."""
    argv = [sys.executable, __file__, "--be", name, "--model", options.model]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "TORCHDYNAMO_DISABLE": "1"}
    return subprocess.Popen(
        [*argv, "--threads", str(options.threads)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def one_step(child: subprocess.Popen[str]) -> float:
    """Let it make one step; its own measure of it in seconds."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    for line in child.stdout:
        if line.startswith('{"step_s"'):
            return float(json.loads(line)["step_s"])
    raise SystemExit(f"{child.args} ended with {child.wait()}")


def turn_taken(begun: float | None) -> float:
    """Report the step begun then, wait for the next turn, return when it begins."""
    if begun is not None:
        print(json.dumps({"step_s": time.perf_counter() - begun}), flush=True)
    if not sys.stdin.readline():
        raise SystemExit
    return time.perf_counter()


def be_megatron(options: argparse.Namespace) -> None:
    """Megatron's own loop; a step lasts from one call of its train_step to the next."""
    from moe_bench.runtime.rank import export_for_cpu

    export_for_cpu()
    from moe_bench.mcore.cpu.embedding import install

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(20000 + os.getpid() % 20000)}
    install(local_world_size=1)
    import torch
    from megatron.training import training

    from moe_bench.mcore import entry
    from moe_bench.mcore.cpu.spec import reference_layers
    from moe_bench.mcore.patches import COMPILED_HELPERS

    torch.set_num_threads(options.threads)
    sys.argv = ["pretrain", *COMMON.split(), *MEGATRON[options.model].split()]
    sys.argv += ["--train-iters", "100000"]
    train_step, begun = training.train_step, [None]

    def when_it_is_our_turn(*args: Any, **kwargs: Any) -> Any:
        begun[0] = turn_taken(begun[0])
        return train_step(*args, **kwargs)

    training.train_step = when_it_is_our_turn
    with reference_layers(), COMPILED_HELPERS.applied():
        entry.train(entry.parse())


def be_transformers(options: argparse.Namespace) -> None:
    """The same network in Hugging Face transformers, trained as its users do."""
    import torch
    from transformers import (
        MixtralConfig,
        MixtralForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    torch.set_num_threads(options.threads)
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "max_position_embeddings": SEQUENCE,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": 1e-3,
        "use_cache": False,
        "tie_word_embeddings": False,
    }
    if options.model == "Tiny-Qwen3":
        config = Qwen3MoeConfig(
            **shared,
            intermediate_size=768,
            num_key_value_heads=4,
            head_dim=32,
            num_experts=8,
            moe_intermediate_size=344,
            norm_topk_prob=True,
        )
        kind = Qwen3MoeForCausalLM
    else:
        config = MixtralConfig(
            **shared, intermediate_size=352, num_key_value_heads=2, num_local_experts=8
        )
        kind = MixtralForCausalLM
    config._experts_implementation = options.be.removeprefix("transformers ")
    model = kind(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    begun: float | None = None
    while True:
        begun = turn_taken(begun)
        tokens = torch.randint(0, 257, (MICRO_BATCH, SEQUENCE))
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def cpu_model() -> str:
    """The processor's name and how many of it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else f"{os.cpu_count()} CPUs"


if __name__ == "__main__":
    main()
