"""`convert`: Hugging Face and Megatron checkpoints, file to file."""

from __future__ import annotations

import gc
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_bench.errors import CheckpointError, Interrupted
from moe_bench.units import GB, format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from moe_bench.checkpoint.plan import Plan
    from moe_bench.checkpoint.trial import Layout

_PATH = click.Path(path_type=Path)
_ESTIMATED_BYTES_PER_S = 1 * GB
"""For the dry run's time; a local disk of 2026."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Convert checkpoints between Hugging Face and Megatron's torch_dist: no model, no GPU, no torch."""
    os.putenv(
        "OPENBLAS_NUM_THREADS", "1"
    )  # workers are forked: numpy's import must start no thread


@command.command("import")
@click.argument("hf", type=_PATH)
@click.argument("out", type=_PATH)
@click.option(
    "--dialect",
    type=click.Choice(["te", "local", "both"]),
    default="te",
    show_default=True,
    help="Keys of Transformer Engine's layer spec (GPUs), of the local spec, or both naming the same bytes.",
)
@click.option(
    "--layer-keys",
    type=click.Choice(["auto", "stacked", "per-layer"]),
    default="auto",
    show_default=True,
    help="One key for all layers, or one for each as when --moe-layer-freq is a list.",
)
@click.option(
    "--preset", type=_PATH, help="Model YAML whose --moe-layer-freq decides --layer-keys."
)
@click.option(
    "--layers",
    type=click.IntRange(1),
    help="Take the first N layers only: a small model with real weights. MTP layers are left out.",
)
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
@click.option("--memory-mib", type=click.IntRange(1), default=512, show_default=True,
              help="Bound on anonymous memory of all processes together.")  # fmt: skip
@click.option(
    "--node",
    default="0/1",
    show_default=True,
    help="I/N: this is machine I (from 0) of N that share OUT.",
)
@click.option("--allow-non-finite", is_flag=True, help="Accept NaN and infinity in the weights.")
@click.option("--dry-run", is_flag=True, help="Print sizes, plan, time and memory; write nothing.")
def import_(hf: Path, out: Path, **asked: Any) -> None:
    """Write the torch_dist checkpoint OUT from the Hugging Face model HF (a folder, a hub cache entry or a file)."""
    from moe_bench.checkpoint.importing import (
        ImportOptions,
        check_memory,
        memory_needed,
        run_import,
    )
    from moe_bench.checkpoint.plan import plan_import

    gc.disable()  # a plan is a million small objects that live to the end; collecting costs a third of its time
    started = time.monotonic()
    names = ("dialect", "layer_keys", "preset", "layers")
    plan = plan_import(hf, **{name: asked[name] for name in names})
    node, nodes = _node(asked["node"])
    options = ImportOptions(
        processes=asked["processes"],
        memory_bytes=asked["memory_mib"] << 20,
        node=node,
        nodes=nodes,
        allow_non_finite=asked["allow_non_finite"],
    )
    _print_plan(plan, time.monotonic() - started)
    if asked["dry_run"]:
        check_memory(options, plan)
        print(f"memory    {format_bytes(memory_needed(options, plan))} anonymous in {options.processes} processes "
              f"(estimated); --memory-mib allows {format_bytes(options.memory_bytes)}")  # fmt: skip
        print(
            f"time      about {format_duration(plan.num_bytes / _ESTIMATED_BYTES_PER_S)} at 1 GB/s (estimated)"
        )
        print("dry run: nothing was written")
        return
    with _resumable():
        result = run_import(plan, out, options, _progress("written"))
    if result.units_elsewhere:
        print(
            f"{result.units_elsewhere} of {len(plan.units)} files are left to other nodes; the last to finish commits"
        )
        return
    print(
        f"wrote     {out}: {result.units_written} files, {format_bytes(result.num_bytes)} in "
        f"{format_duration(result.seconds)}; {result.units_reused} files were already there"
    )
    print(
        f"load it   with Megatron's --load {shlex.quote(str(out))} --ckpt-format torch_dist --finetune --no-load-optim --no-load-rng"
    )


def _node(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise CheckpointError(f"--node {text!r}: expected I/N with I from 0 to N - 1, such as 0/2")
    return int(index), int(count)


def _print_plan(plan: Plan, seconds: float) -> None:
    family = plan.model_map.family.name
    source_bytes = sum(t.num_bytes for t in plan.source.tensors.values())
    parameters = sum(p.tensor.num_elements for p in plan.tensors)
    print(f"source    {plan.source.root}: {family}, {format_count(parameters)} parameters, "
          f"{len(plan.source.tensors)} tensors, {format_bytes(source_bytes)} in {len(plan.source.files)} files")  # fmt: skip
    print(f"plan      {len(plan.tensors)} Megatron tensors in {plan.num_chunks} chunks, {format_bytes(plan.num_bytes)} "
          f"in {len(plan.units)} files; {plan.model_map.dialect} keys, {plan.model_map.layer_keys}; "
          f"planned in {seconds:.2f} s")  # fmt: skip
    for note in plan.notes:
        print(f"note      {note}")


@contextmanager
def _resumable() -> Iterator[None]:
    """Ctrl-C in other words; the workers have ended by then."""
    try:
        yield
    except KeyboardInterrupt as stop:
        print(file=sys.stderr)  # the line that rewrites itself
        raise Interrupted("stopped; run the same command again to go on from there") from stop


def _progress(verb: str) -> Callable[[int, int], None]:
    """Rate and time left on standard error: a line that rewrites itself, or one every ten seconds in a log."""
    started = time.monotonic()
    shown = started
    on_terminal = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < (0.2 if on_terminal else 10) and done < total:
            return
        shown = now
        rate = done / max(1e-6, now - started)
        left = format_duration((total - done) / rate) if rate else "?"
        line = f"{verb} {format_bytes(done)} of {format_bytes(total)}, {rate / GB:.2f} GB/s, {left} left"
        end = "\r" if on_terminal and done < total else "\n"
        print(f"{line:<79}" if on_terminal else line, end=end, file=sys.stderr, flush=True)

    return show


@command.command("export")
@click.argument("megatron", type=_PATH)
@click.argument("out", type=_PATH)
@click.option(
    "--hf",
    type=_PATH,
    help="Folder of config.json and tokenizer; default: what the import carried along.",
)
@click.option(
    "--dtype", type=click.Choice(["BF16", "F32"]), help="Store every weight so; default: as it is."
)
@click.option(
    "--fp8",
    is_flag=True,
    help="Restore the FP8 or MXFP4 weights and scales that an untrained checkpoint came from.",
)
@click.option(
    "--max-shard-gb",
    type=click.FloatRange(0, min_open=True),
    help="Largest file; default: files as the source had them, else of 4.3 GB.",
)
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
@click.option("--dry-run", is_flag=True, help="Print the files and their sizes; write nothing.")
def export(megatron: Path, out: Path, hf: Path | None, dry_run: bool, **asked: Any) -> None:
    """Write the Hugging Face model OUT from the torch_dist checkpoint MEGATRON, whoever wrote it."""
    from moe_bench.checkpoint.exporting import ExportOptions, file_size, plan_export, run_export

    shard_gb = asked.pop("max_shard_gb")
    options = ExportOptions(**asked, shard_bytes=None if shard_gb is None else int(shard_gb * GB))
    plan = plan_export(megatron, hf, options)
    tensors = sum(len(tensors) for tensors in plan.files.values())
    size = f"{tensors} tensors, {format_bytes(plan.num_bytes)} in {len(plan.files)} files"
    if dry_run:
        for name in plan.files:
            print(f"{format_bytes(file_size(plan, name)):>12}  {name}")
        print(f"dry run: {size}; nothing was written")
        return
    started = time.monotonic()
    with _resumable():
        reused = run_export(plan, out, options, _progress("exported"))
    print(
        f"wrote {out}: {size}, {format_duration(time.monotonic() - started)}; {reused} files were already there"
    )


@command.command("inspect")
@click.argument("path", type=_PATH)
@click.option("--tensors", is_flag=True, help="List every tensor.")
def inspect_(path: Path, tensors: bool) -> None:
    """Say what PATH holds: format, model, size, keys, and the Megatron flags of its configuration."""
    from moe_bench.checkpoint.inspecting import inspect

    found = inspect(path)
    print(f"{found.place}: {found.format}, {format_count(found.parameters)} parameters, {format_bytes(found.num_bytes)}, "
          f"{len(found.tensors)} tensors")  # fmt: skip
    for label, value in found.facts.items():
        print(f"{label:<16}{value}")
    if found.flags:
        print("Megatron flags  " + " ".join(found.flags))
    if tensors:
        for name, (dtype, shape) in found.tensors.items():
            print(f"{dtype:<8} {shape!s:<24} {name}")


@command.command("verify")
@click.argument("a", type=_PATH)
@click.argument("b", type=_PATH)
@click.option("--logits", is_flag=True,
              help="Also run both on a CPU, Megatron beside transformers, and compare logits; for models that fit.")  # fmt: skip
@click.option(
    "--layout",
    "layouts",
    multiple=True,
    help="With --logits: 1, EP2, PP2VPP2, TP2EP2 ...; may be repeated. Default: 1, EP2, PP2.",
)
@click.option(
    "--bound",
    type=click.FloatRange(0, min_open=True),
    help="With --logits: largest difference allowed, over the largest logit. Default: 2e-5.",
)
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True)
def verify_(
    a: Path, b: Path, logits: bool, layouts: tuple[str, ...], bound: float | None, processes: int
) -> None:
    """Compare every weight of A and B, each a Hugging Face model or a torch_dist checkpoint. Exit 1 if they differ."""
    from moe_bench.checkpoint.verifying import verify

    if (layouts or bound) and not logits:
        raise CheckpointError("--layout and --bound belong to --logits")
    trial = _Trial.of(a, b, layouts or ("1", "EP2", "PP2"), bound) if logits else None
    verdict = verify(a, b, processes=processes, on_progress=_progress("compared"))
    for difference in verdict.differences[:20]:
        print(f"DIFFERENT {difference.name}: {difference.reason}")
    if len(verdict.differences) > 20:
        print(f"... and {len(verdict.differences) - 20} more")
    print(
        f"{verdict.tensors} tensors, {format_bytes(verdict.num_bytes)} compared, {verdict.chunks_checked} chunk checksums: "
        f"{'the same' if not verdict.differences else f'{len(verdict.differences)} differences'}"
    )
    agree = trial.run() if trial is not None else True
    if verdict.differences or not agree:
        sys.exit(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trial:
    """A comparison of logits that was found possible."""

    hf: Path
    megatron: Path
    layouts: tuple[Layout, ...]
    bound: float

    @classmethod
    def of(cls, a: Path, b: Path, layouts: tuple[str, ...], bound: float | None) -> _Trial:
        """Raises CheckpointError when there is no such pair, or not enough memory."""
        from moe_bench.checkpoint.torch_dist import is_torch_dist, open_torch_dist
        from moe_bench.checkpoint.trial import check_fits, parse_layout, weight_of
        from moe_bench.runtime.logits import DEFAULT_BOUND, available_bytes

        if is_torch_dist(a) == is_torch_dist(b):
            raise CheckpointError(
                "--logits compares a Hugging Face model with a torch_dist checkpoint"
            )
        megatron, hf = (a, b) if is_torch_dist(a) else (b, a)
        parsed = tuple(parse_layout(text) for text in layouts)
        check_fits(weight_of(open_torch_dist(megatron)), parsed, available_bytes())
        return cls(hf=hf, megatron=megatron, layouts=parsed, bound=bound or DEFAULT_BOUND)

    def run(self) -> bool:
        """Print a line for each layout; whether all agree."""
        from moe_bench.runtime.logits import compare_logits

        agree = True
        for found in compare_logits(self.hf, self.megatron, self.layouts):
            good = found.within(self.bound)
            agree = agree and good
            name = f"logits {found.layout.name:<10} {found.layout.world_size} ranks  "
            if found.refusal:
                print(f"{name}Megatron gave none: {found.refusal}", flush=True)
                continue
            print(
                f"{name}largest difference {found.largest_difference:.1e} of logits up to {found.largest_logit:.1f}; "
                f"{found.same_greedy} of {found.positions} greedy tokens the same: "
                f"{'agree' if good else 'DIFFERENT'}",
                flush=True,
            )
        if not agree:
            self._explain()
        return agree

    def _explain(self) -> None:
        from moe_bench.checkpoint.families import family_of
        from moe_bench.checkpoint.source import open_hf

        config = open_hf(self.hf).config
        reason = family_of(config).divergence(config)
        if reason:
            print(f"note: {reason}")
