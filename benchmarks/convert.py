"""Speed and memory of `convert`, as ratios to `cp -r` with sync of the same files on the same machine.

usage: python benchmarks/convert.py WORK [--model bf16|fp8]... [--gigabytes 3.4] [--rounds 3] [--no-export]

Writes random models of about that size (Qwen3-MoE in bfloat16, DeepSeek-V3 in FP8 blocks) under WORK and removes them
at the end. Each round measures, with a cold page cache where the user may drop it: cp, import, export, cp again; every
time is of the whole command, from start to exit. A round's ratio is to the mean of its two cp's; how far those two are
apart is the noise. Memory is anonymous memory of the parent and its workers, sampled while they run: as /proc/PID/status
counts it (pages shared by fork count once for each process) and as smaps_rollup does (they count once).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from moe_bench.checkpoint.safetensors import build_header  # noqa: E402
from tests.support import hf_models  # noqa: E402

QWEN3 = {
    **hf_models.QWEN3,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 32000,
    "intermediate_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 64,
}
DEEPSEEK = {
    **hf_models.DEEPSEEK_V3,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "vocab_size": 32000,
    "intermediate_size": 2048,
    "moe_intermediate_size": 768,
    "n_routed_experts": 64,
    "first_k_dense_replace": 1,
    "q_lora_rank": 512,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def make(folder: Path, config: dict, gigabytes: float, *, fp8: bool) -> int:
    """A model of about that size; returns its bytes."""
    config = dict(config)
    config["num_hidden_layers"] = 2
    two = sum(n for *_, n in entries(config, fp8=fp8))
    config["num_hidden_layers"] = 3
    layer = sum(n for *_, n in entries(config, fp8=fp8)) - two
    config["num_hidden_layers"] = max(2, round((gigabytes * 1e9 - two) / layer) + 2)
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    pool = chance.integers(0, 2**16, 1 << 20, dtype=np.uint16) & 0xBFFF  # no NaN, no infinity
    codes = (chance.integers(0, 256, 1 << 21, dtype=np.uint8) & 0xF7).tobytes() + b"\0" * 64
    shard: list[tuple[str, str, tuple[int, ...], int]] = []
    total = index = 0
    for entry in [*entries(config, fp8=fp8), None]:
        if entry is None or sum(n for *_, n in shard) > 400e6:
            header, _ = build_header([(name, dtype, shape) for name, dtype, shape, _ in shard])
            with (folder / f"model-{index:05d}.safetensors").open("wb") as file:
                file.write(header)
                for _, dtype, shape, size in shard:
                    file.write(_payload(dtype, shape, size, pool, codes, total))
                    total += size
            index, shard = index + 1, []
        if entry is not None:
            shard.append(entry)
    (folder / "config.json").write_text(json.dumps(config))
    return total


def entries(config: dict, *, fp8: bool) -> list[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, bytes) of every tensor."""
    found = []
    for name, shape in hf_models.shapes(config).items():
        count = int(np.prod(shape))
        if fp8 and "_proj" in name and len(shape) == 2 and "eh_proj" not in name:
            grid = tuple(-(-size // 128) for size in shape)
            found += [(name, "F8_E4M3", shape, count)]
            found += [(name + "_scale_inv", "F32", grid, 4 * grid[0] * grid[1])]
        elif name.endswith("e_score_correction_bias"):
            found.append((name, "F32", shape, 4 * count))
        else:
            found.append((name, "BF16", shape, 2 * count))
    return found


def _payload(
    dtype: str, shape: tuple[int, ...], size: int, pool: np.ndarray, codes: bytes, seed: int
) -> bytes:
    if dtype == "F32":
        return np.full(shape, 0.0012, np.float32).tobytes()
    source = codes if dtype == "F8_E4M3" else pool.tobytes()
    if shape == (32000, 2048):
        seed = 0  # the copies in an MTP layer equal what they copy
    at = seed % 4096 // 2 * 2
    repeated = source[at:-64] * (size // (len(source) - at - 64) + 1)
    return repeated[:size]


def cold() -> None:
    """Write back, and drop the page cache where that is allowed."""
    subprocess.run(["sync"], check=True)
    drop = Path("/proc/sys/vm/drop_caches")
    try:
        drop.write_text("3")
    except OSError:
        print("note: the page cache could not be dropped; these are warm figures", file=sys.stderr)


def timed(action: Callable[[], None]) -> float:
    cold()
    started = time.monotonic()
    action()
    return time.monotonic() - started


class Peak(NamedTuple):
    """Most anonymous bytes at one moment, over all processes of a command."""

    counted: int
    """A page that processes share counts for each of them."""
    physical: int


def watched(command: list[str]) -> Peak:
    """Run a command; return its peak memory."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    counted = physical = samples = 0
    while process.poll() is None:
        pids = [process.pid, *_children(process.pid)]
        counted = max(counted, sum(_kib(p, "status", ("RssAnon", "RssShmem")) for p in pids))
        if samples % 5 == 0:
            physical = max(physical, sum(_kib(p, "smaps_rollup", ("Pss_Anon",)) for p in pids))
        samples += 1
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return Peak(counted << 10, physical << 10)


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _kib(pid: int, file: str, fields: tuple[str, ...]) -> int:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(fields))


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)


class Round(NamedTuple):
    """Seconds of one round, and the memory of its conversions."""

    cp: tuple[float, float]
    seconds: dict[str, float]
    peaks: dict[str, Peak]


def run_round(hf: Path, work: Path, verbs: tuple[str, ...]) -> Round:
    for target in ("cp", "megatron", "back"):
        shutil.rmtree(work / target, ignore_errors=True)
    convert = [sys.executable, "-m", "moe_bench", "convert"]
    places = {"import": (hf, work / "megatron"), "export": (work / "megatron", work / "back")}
    seconds: dict[str, float] = {}
    peaks: dict[str, Peak] = {}

    def run(verb: str) -> None:
        peaks[verb] = watched([*convert, verb, *map(str, places[verb])])

    def copied() -> float:
        taken = timed(lambda: copy(hf, work / "cp"))
        shutil.rmtree(work / "cp")
        return taken

    before = copied()
    for verb in verbs:
        seconds[verb] = timed(lambda v=verb: run(v))
    return Round((before, copied()), seconds, peaks)


def measure(model: str, work: Path, gigabytes: float, rounds: int, verbs: tuple[str, ...]) -> None:
    hf, fp8 = work / model, model == "fp8"
    num_bytes = make(hf, DEEPSEEK if fp8 else QWEN3, gigabytes, fp8=fp8)
    files = sum(1 for _ in hf.glob("*.safetensors"))
    done = [run_round(hf, work, verbs) for _ in range(rounds)]
    written = sum(p.stat().st_size for p in (work / "megatron" / "release").iterdir())
    copies = [cp for one in done for cp in one.cp]
    noise = max(max(one.cp) / min(one.cp) - 1 for one in done)
    print(
        f"\n{model}: {num_bytes / 1e9:.2f} GB in {files} files, {written / 1e9:.2f} GB of torch_dist, {rounds} rounds\n"
        f"  cp -r and sync   {_spread(copies)} s, {num_bytes / statistics.median(copies) / 1e9:.2f} GB/s; "
        f"two of one round differ by up to {noise:.0%}"
    )
    for verb in verbs:
        taken = [one.seconds[verb] for one in done]
        by_source = [statistics.mean(one.cp) / one.seconds[verb] for one in done]
        by_written = [ratio * written / num_bytes for ratio in by_source]
        print(
            f"  {verb:<16} {_spread(taken)} s, {written / statistics.median(taken) / 1e9:.2f} GB/s written; "
            f"of cp's rate, by bytes written {_percent(by_written)}, by time {_percent(by_source)}; "
            f"memory {max(one.peaks[verb].counted for one in done) / 1e6:.0f} MB counted, "
            f"{max(one.peaks[verb].physical for one in done) / 1e6:.0f} MB physical"
        )
    shutil.rmtree(work / model)


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}..{max(values):.2f})"


def _percent(values: list[float]) -> str:
    return f"{statistics.median(values):.0%} ({min(values):.0%}..{max(values):.0%})"


def _place() -> str:
    """What the figures belong to."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"commit {commit}, {len(names)} x {names[0]}, load {Path('/proc/loadavg').read_text().split()[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", action="append", choices=["bf16", "fp8"])
    parser.add_argument("--gigabytes", type=float, default=3.4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-export", action="store_true")
    asked = parser.parse_args()
    work = asked.work / "convert-benchmark"
    shutil.rmtree(work, ignore_errors=True)
    print(_place())
    for model in asked.model or ("bf16", "fp8"):
        verbs = ("import",) if asked.no_export else ("import", "export")
        measure(model, work, asked.gigabytes, asked.rounds, verbs)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
