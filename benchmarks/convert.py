"""Speed and memory of `convert`, as ratios to `cp -r` with sync of the same files on the same machine.

usage: python benchmarks/convert.py WORK [--gigabytes 1.8] [--rounds 3]

Writes random models of about that size (Qwen3-MoE in bfloat16, DeepSeek-V3 in FP8 blocks) under WORK and removes them
at the end. Each round measures, with a cold page cache when the user may drop it: cp, import, export. Peak memory is
the sum of the anonymous memory of the parent and its workers, sampled every 10 ms.
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


def watched(command: list[str]) -> float:
    """Run a command; return its peak anonymous bytes over all its processes."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(map(_anonymous, [process.pid, *_children(process.pid)])))
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return peak


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(
        int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem"))
    )


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)


def measure(name: str, work: Path, gigabytes: float, rounds: int) -> None:
    hf, fp8 = work / name, name == "deepseek fp8"
    num_bytes = make(hf, DEEPSEEK if fp8 else QWEN3, gigabytes, fp8=fp8)
    convert = [sys.executable, "-m", "moe_bench", "convert"]
    rows: dict[str, list[float]] = {"cp": [], "import": [], "export": []}
    peaks: dict[str, list[float]] = {"import": [], "export": []}
    for _ in range(rounds):
        for target in ("cp", "megatron", "back"):
            shutil.rmtree(work / target, ignore_errors=True)
        rows["cp"].append(timed(lambda: copy(hf, work / "cp")))
        shutil.rmtree(work / "cp")
        for verb, a, b in (
            ("import", hf, work / "megatron"),
            ("export", work / "megatron", work / "back"),
        ):
            command = [*convert, verb, str(a), str(b)]
            rows[verb].append(timed(lambda c=command, v=verb: peaks[v].append(watched(c))))
    written = sum(p.stat().st_size for p in (work / "megatron" / "release").iterdir())
    cp = num_bytes / statistics.median(rows["cp"])
    print(
        f"\n{name}: {num_bytes / 1e9:.2f} GB of source, {written / 1e9:.2f} GB of torch_dist, {rounds} rounds"
    )
    print(
        f"  cp -r and sync   {statistics.median(rows['cp']):6.2f} s  {cp / 1e9:.2f} GB/s  (spread {min(rows['cp']):.2f}..{max(rows['cp']):.2f} s)"
    )
    for verb in ("import", "export"):
        seconds = statistics.median(rows[verb])
        rate = written / seconds
        print(
            f"  {verb:<16} {seconds:6.2f} s  {rate / 1e9:.2f} GB/s written, {rate / cp:.0%} of cp's rate; "
            f"peak {max(peaks[verb]) / 1e9:.3f} GB anonymous  (spread {min(rows[verb]):.2f}..{max(rows[verb]):.2f} s)"
        )
    shutil.rmtree(work / name)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--gigabytes", type=float, default=1.8)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    work = asked.work / "convert-benchmark"
    shutil.rmtree(work, ignore_errors=True)
    for name in ("qwen3 bf16", "deepseek fp8"):
        measure(name, work, asked.gigabytes, asked.rounds)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
