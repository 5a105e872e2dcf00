"""`data prepare` against Megatron-LM's tools/preprocess_data.py: the same tokenizer, the same text, one worker each.

    python benchmarks/data_prepare.py --megatron-lm CHECKOUT --input TEXT.jsonl --tokenizer DIR_OR_MODEL... [--rounds 3]

Both run in turn (ours, theirs, ours) in each round, first on a few lines, then on the whole input; the difference is the
work without start-up. Rates are MB (10**6 bytes) of input text per second of CPU of all processes - one core's worth -
and per second of wall clock. The two runs of ours in a round give the noise floor. The outputs are compared byte by byte.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from moe_bench.data.tokenizer import load_tokenizer

FEW_LINES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Of one program."""

    wall_s: float
    cpu_s: float

    def __sub__(self, other: Cost) -> Cost:
        return Cost(wall_s=self.wall_s - other.wall_s, cpu_s=self.cpu_s - other.cpu_s)


def cost_of(command: list[str]) -> Cost:
    """Run it to its end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall_s=wall, cpu_s=cpu)


def ours(source: Path, tokenizer: str, output: Path) -> Cost:
    """Our verb."""
    command = [sys.executable, "-m", "moe_bench", "data", "prepare", str(source)]
    options = ["--output", str(output), "--tokenizer", tokenizer, "--workers", "1", "--restart"]
    return cost_of([*command, *options, "--append-eod", "--overwrite"])


def theirs(source: Path, tokenizer: str, output: Path, checkout: Path) -> Cost:
    """Megatron-LM's tool."""
    tool = str(checkout / "tools" / "preprocess_data.py")
    command = [sys.executable, tool, "--input", str(source), "--output-prefix", str(output)]
    arguments = load_tokenizer(tokenizer).facts.megatron_arguments
    return cost_of([*command, "--workers", "1", "--append-eod", *arguments])


def measure(arguments: argparse.Namespace, tokenizer: str, folder: Path) -> None:
    """Print one table row for each kind of second."""
    few = folder / "few.jsonl"
    lines = arguments.input.read_bytes().splitlines(keepends=True)
    few.write_bytes(b"".join(lines[:FEW_LINES]))
    megabytes = (arguments.input.stat().st_size - few.stat().st_size) / 1e6
    start_ours = ours(few, tokenizer, folder / "few")
    start_theirs = theirs(few, tokenizer, folder / "few-theirs", arguments.megatron_lm)
    first, second, tool = [], [], []
    for _ in range(arguments.rounds):
        first.append(ours(arguments.input, tokenizer, folder / "o") - start_ours)
        run = theirs(arguments.input, tokenizer, folder / "t", arguments.megatron_lm)
        tool.append(run - start_theirs)
        second.append(ours(arguments.input, tokenizer, folder / "o") - start_ours)
    for end in ("bin", "idx"):
        same = filecmp.cmp(folder / f"o.{end}", folder / f"t_text_document.{end}", shallow=False)
        if not same:
            raise SystemExit(f"{tokenizer}: the .{end} files differ")
    print(
        f"{tokenizer}: same bytes; start-up {start_ours.wall_s:.1f} s, theirs {start_theirs.wall_s:.1f} s"
    )
    for name in ("cpu_s", "wall_s"):
        a, b, t = ([getattr(one, name) for one in runs] for runs in (first, second, tool))
        ratios = [2 * theirs_s / (x + y) for x, y, theirs_s in zip(a, b, t, strict=True)]
        noise = max(abs(x / y - 1) for x, y in zip(a, b, strict=True))
        print(
            f"  per {name[:-2]} second: ours {megabytes / statistics.median(a + b):.2f} MB/s, "
            f"theirs {megabytes / statistics.median(t):.2f} MB/s, ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}), noise floor {noise:.1%}",
            flush=True,
        )


def main() -> None:
    """Measure each tokenizer in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megatron-lm", type=Path, required=True)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--tokenizer", action="append", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    names = ("tokenizers", "sentencepiece", "transformers", "megatron-core")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}"
    )
    print(f"{arguments.input.name}: {arguments.input.stat().st_size / 1e6:.1f} MB")
    with tempfile.TemporaryDirectory() as folder:
        for tokenizer in arguments.tokenizer:
            measure(arguments, tokenizer, Path(folder))


if __name__ == "__main__":
    main()
