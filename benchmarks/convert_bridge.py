"""`convert import` beside Megatron-Bridge's own import: the same bytes under the same keys, and how long both take.

usage: python benchmarks/convert_bridge.py WORK --bridge PYTHON [--family NAME ...]       bytes, tiny models of every family
       python benchmarks/convert_bridge.py WORK --bridge PYTHON --gigabytes 1.8           seconds, one Qwen3-MoE

PYTHON is the interpreter of an environment with megatron-bridge 0.6.2 and the same torch and megatron-core (docs/convert.md
says how to make one). On a machine without a GPU Bridge builds its models from this project's CPU layers, which
stand where it would put Transformer Engine's; the peak is of the largest resident set.
"""

# ruff: noqa: PLC0415 - one file for two environments
from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

OFF = (
    "moe_permute_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "apply_rope_fusion",
    "cross_entropy_loss_fusion",
    "moe_shared_expert_overlap",
    "moe_router_fusion",
    "perform_initialization",
)
"""What Bridge switches on for a GPU."""
KINDS = {
    "column": (
        "LayerNormColumnParallelLinear",
        "ColumnParallelGroupedLinear",
        "CoreAttention",
        "AcrossHeadsNorm",
    ),
    "row": ("RowParallelGroupedLinear",),
    "replicated": ("Norm", "DuplicatedLinear"),
}
"""How this project's CPU layers are divided, in Bridge's words."""


def inside(hf: str, out: str, *, mtp: bool, grouped: bool) -> None:
    """Runs in Bridge's environment: import `hf` with Bridge and print a line of JSON."""
    _lend_peft_a_stub()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(29000 + os.getpid() % 900))
    warnings.filterwarnings("ignore")
    import torch
    from megatron.bridge import AutoBridge

    from moe_bench.mcore.cpu import embedding

    embedding.install(local_world_size=1)
    from megatron.bridge.models.conversion.param_mapping import AutoMapping
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from moe_bench.mcore.cpu.spec import reference_layers
    from moe_bench.mcore.patches import NO_PHANTOM_QUERY_NORM, NORMS_ACROSS_HEADS

    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    for kind, names in KINDS.items():
        for name in names:
            AutoMapping.register_module_type(name, kind)
    fitting = [NO_PHANTOM_QUERY_NORM]
    if "Olmoe" in (Path(hf) / "config.json").read_text():
        fitting.append(NORMS_ACROSS_HEADS)
    with reference_layers(), contextlib.ExitStack() as stack:
        for patch in fitting:
            stack.enter_context(patch.applied())
        started = time.monotonic()
        bridge = AutoBridge.from_hf_pretrained(hf)
        provider = bridge.to_megatron_provider(load_weights=True)
        _settle(provider, mtp=mtp, grouped=grouped)
        model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
        bridge.save_megatron_model(model, out, hf_tokenizer_path=None, low_memory_save=True)
        seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_bytes": peak}))


def _settle(provider: Any, *, mtp: bool, grouped: bool) -> None:
    for name in OFF:
        if hasattr(provider, name):
            setattr(provider, name, False)
    provider.moe_grouped_gemm = grouped
    provider.cross_entropy_fusion_impl = "native"
    provider.moe_token_dispatcher_type = "allgather"
    provider.use_cpu_initialization = True
    if not mtp:
        provider.mtp_num_layers = None
    provider.finalize()


def _lend_peft_a_stub() -> None:
    """megatron.bridge 0.6.2 imports Transformer Engine in its PEFT modules; only they see these empty classes."""
    import builtins

    import torch

    engine, layers = types.ModuleType("transformer_engine"), types.ModuleType("pytorch")
    for name in ("Linear", "LayerNormLinear", "GroupedLinear", "LayerNorm", "RMSNorm"):
        setattr(layers, name, type(name, (torch.nn.Module,), {}))
    layers.ops = types.SimpleNamespace(Sequential=torch.nn.Sequential)  # type: ignore[attr-defined]
    engine.pytorch = layers  # type: ignore[attr-defined]
    real = builtins.__import__

    def importing(name: str, *more: Any, **named: Any) -> Any:
        scope = named.get("globals", more[0] if more else None) or {}
        asked = named.get("fromlist", more[2] if len(more) > 2 else ())
        asker = scope.get("__name__", "")
        if name.startswith("transformer_engine") and asker.startswith("megatron.bridge.peft"):
            return layers if asked and name != "transformer_engine" else engine
        return real(name, *more, **named)

    builtins.__import__ = importing


def run_bridge(python: Path, hf: Path, out: Path, *, mtp: bool) -> dict[str, Any] | str:
    """Bridge's seconds and peak, or why it did not import.

    Some of its tables know experts one by one, some only grouped ones.
    """
    outcome: dict[str, Any] | str = ""
    for how in ([], ["--grouped"]):
        shutil.rmtree(out, ignore_errors=True)
        outcome = _run_once(python, hf, out, [*how, *(["--mtp"] if mtp else [])])
        if not isinstance(outcome, str) or "you need to" in outcome:
            break
    return outcome


def _run_once(python: Path, hf: Path, out: Path, how: list[str]) -> dict[str, Any] | str:
    command = [str(python), "-W", "ignore", __file__, "--inside", str(hf), str(out)]
    done = subprocess.run(
        [*command, *how],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"},
    )
    for line in done.stdout.splitlines():
        if line.startswith('{"seconds"'):
            found: dict[str, Any] = json.loads(line)
            return found
    lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    raised = [line for line in lines if "Error" in line and not line.startswith(" ")]
    raised = [
        line for line in raised if "FP8GlobalStateManager" not in line
    ]  # said on every import
    last = (raised or lines or ["nothing was said"])[-1]
    return " ".join(line.strip() for line in lines[lines.index(last) :][:3]) if lines else last


def convert(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "moe_bench", "convert", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def compare_bytes(work: Path, python: Path, families: list[str]) -> None:
    """Every tensor of both checkpoints, under Megatron's keys."""
    from tests.ranks import make_hf_models

    for name, config in make_hf_models.configs().items():
        if families and name not in families:
            continue
        hf, theirs, ours = (work / f"{name}-{kind}" for kind in ("hf", "bridge", "ours"))
        for folder in (hf, theirs, ours):
            shutil.rmtree(folder, ignore_errors=True)
        make_hf_models.make(name, config, work, dtype="bfloat16", folder=hf)
        outcome = run_bridge(python, hf, theirs, mtp=False)
        if isinstance(outcome, str):
            print(f"{name:<14} Bridge does not import it: {outcome}", flush=True)
            continue
        keys = "per-layer" if _names_layers(theirs) else "stacked"
        done = convert("import", hf, ours, "--layer-keys", keys)
        if done.returncode:
            print(f"{name:<14} {done.stderr.strip()}", flush=True)
            continue
        said = convert("verify", theirs, ours).stdout.strip().splitlines()
        print(f"{name:<14} {said[-1]}", *said[:-1][:12], sep="\n    ", flush=True)


def _names_layers(checkpoint: Path) -> bool:
    from moe_bench.checkpoint.exporting import detect_layer_keys
    from moe_bench.checkpoint.torch_dist import open_torch_dist

    return detect_layer_keys(open_torch_dist(checkpoint).tensors) == "per-layer"


def compare_speed(work: Path, python: Path, gigabytes: float) -> None:
    """One Qwen3-MoE, cold page cache: Bridge in its process, ours from the command's start to its exit."""
    from benchmarks.convert import QWEN3, cold, make

    hf, theirs, ours = work / "hf", work / "bridge", work / "ours"
    for folder in (hf, theirs, ours):
        shutil.rmtree(folder, ignore_errors=True)
    num_bytes = make(hf, {**QWEN3, "model_type": "qwen3_moe"}, gigabytes, fp8=False)
    cold()
    outcome = run_bridge(python, hf, theirs, mtp=False)
    cold()
    started = time.monotonic()
    done = convert("import", hf, ours)
    seconds = time.monotonic() - started
    if isinstance(outcome, str) or done.returncode:
        raise SystemExit(f"{outcome}\n{done.stderr}")
    print(
        f"{num_bytes / 1e9:.2f} GB of Qwen3-MoE: Megatron-Bridge {outcome['seconds']:.1f} s in its process "
        f"({outcome['peak_bytes'] / 1e9:.2f} GB), convert import {seconds:.2f} s from start to exit: "
        f"{outcome['seconds'] / seconds:.1f} x"
    )
    print(done.stdout)
    print(convert("verify", theirs, ours).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--bridge", type=Path)
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--gigabytes", type=float)
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--mtp", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--grouped", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        inside(*asked.inside, mtp=asked.mtp, grouped=asked.grouped)
        return
    if asked.work is None or asked.bridge is None:
        parser.error("WORK and --bridge are needed")
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.gigabytes:
        compare_speed(asked.work, asked.bridge, asked.gigabytes)
    else:
        compare_bytes(asked.work, asked.bridge, asked.family)


if __name__ == "__main__":
    main()
