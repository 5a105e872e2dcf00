"""Logits of a converted model under Megatron beside those of transformers, on CPU ranks of this machine.

torch and Megatron are imported once and the ranks of each layout are forked, as `runtime.local` does. transformers runs
in a process of its own, which never sees the CPU embedding.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_bench.checkpoint.exporting import (
    ExportOptions,
    detect_layer_keys,
    map_checkpoint,
    plan_export,
    run_export,
)
from moe_bench.checkpoint.families import family_of
from moe_bench.checkpoint.flags import megatron_flags
from moe_bench.checkpoint.source import open_hf
from moe_bench.checkpoint.torch_dist import TorchDist, open_torch_dist
from moe_bench.checkpoint.trial import Layout, check_fits, weight_of
from moe_bench.errors import CheckpointError
from moe_bench.runtime.fitting import fitting
from moe_bench.runtime.rank import export_for_cpu, export_forked

BATCH, MAX_TOKENS = 2, 64
DEFAULT_BOUND = 2e-5
"""Of the largest logit: float32 rounding through a real model's depth; a wrong norm shows as 1e-2."""

Arrangement = Literal["te", "local", "megatron"]

CPU_FLAGS = tuple(
    """
    --transformer-impl local --distributed-backend gloo --use-cpu-initialization --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion --no-bias-swiglu-fusion --no-bias-gelu-fusion
    --no-bias-dropout-fusion --attention-backend unfused --micro-batch-size 1 --global-batch-size 64 --train-iters 1
    --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --finetune --no-load-optim --no-load-rng
    --ckpt-format torch_dist --exit-on-missing-checkpoint --moe-token-dispatcher-type alltoall --eval-iters 0
    --make-vocab-size-divisible-by 128 --dist-ckpt-strictness assume_ok_unexpected
    """.split()
)
"""What Megatron needs to run a model forward on a CPU; the model's own flags come first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One layout's outcome."""

    layout: Layout
    largest_difference: float
    """Of any logit; NaN where Megatron gave none."""
    largest_logit: float
    same_greedy: int
    """Positions at which both name the same next token."""
    positions: int
    refusal: str = ""
    """What Megatron said instead of giving logits."""

    def within(self, bound: float) -> bool:
        """Whether every logit agrees to `bound` times the largest one (at least 1)."""
        return self.largest_difference <= bound * max(1.0, self.largest_logit)


def compare_logits(hf: Path, megatron: Path, layouts: Sequence[Layout]) -> Iterator[Measured]:
    """Run both models in float32 on the same random tokens; one `Measured` for each layout, as it is done.

    Raises CheckpointError when they do not fit into memory, or transformers cannot run the model.
    """
    checkpoint = open_torch_dist(megatron)
    source = open_hf(hf)
    check_fits(weight_of(checkpoint), layouts, available_bytes())
    argvs = [_argv(checkpoint, source.config, layout) for layout in layouts]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        root = source.root
        if source.config.get("quantization_config"):
            root = _unquantized(megatron, source.root, folder / "hf")
        child = _fork(lambda: _reference(root, dict(source.config), folder), folder / "hf.log")
        prepare()
        _, status = os.waitpid(child, 0)
        if status:
            raise CheckpointError(f"transformers cannot run {hf}: {_last_line(folder / 'hf.log')}")
        arrangement = arrangement_of(checkpoint, source.config)
        for layout, argv in zip(layouts, argvs, strict=True):
            yield _measure(layout, argv, arrangement, folder)


def available_bytes() -> int:
    """Memory that this machine can still give."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise CheckpointError("/proc/meminfo names no MemAvailable; --logits needs to know")


def arrangement_of(checkpoint: TorchDist, config: Any) -> Arrangement:
    """The layer spec whose keys the checkpoint has; Transformer Engine's where it has both."""
    for tensor in map_checkpoint(checkpoint, config).tensors:
        if tensor.key not in checkpoint.tensors and set(tensor.aliases) & set(checkpoint.tensors):
            return "local"
    return "te"


def _argv(checkpoint: TorchDist, config: Any, layout: Layout) -> list[str]:
    family = family_of(config)
    length = _length(config)
    keys = detect_layer_keys(checkpoint.tensors)
    return [
        *megatron_flags(family, config, keys),
        *CPU_FLAGS,
        *layout.flags(int(config["num_hidden_layers"])),
        *("--seq-length", str(length), "--vocab-size", str(config["vocab_size"])),
        *("--load", str(checkpoint.folder.parent)),
    ]


def _length(config: Any) -> int:
    return min(MAX_TOKENS, int(config.get("max_position_embeddings") or MAX_TOKENS) // 8 * 8)


def prepare() -> None:
    """Import torch and Megatron, the CPU embedding in place: all that ranks can share."""
    export_for_cpu()
    from moe_bench.mcore.cpu import embedding  # noqa: PLC0415

    embedding.install(local_world_size=1)
    import torch  # noqa: PLC0415

    # One thread: a child forked from a process that has used OpenMP must not start its threads anew (libgomp).
    torch.set_num_threads(1)
    from moe_bench.mcore.imports import import_megatron  # noqa: PLC0415

    import_megatron(checkout=None, on_cpu=True)
    for name in ("checkpoint", "wide_norm"):
        importlib.import_module(f"moe_bench.mcore.{name}")


def fork_ranks(world_size: int, body: Callable[[], None], log: Path | None = None) -> list[int]:
    """Run `body` on each rank of a fresh layout; the exit codes. The first that fails ends the others."""
    codes: dict[int, int] = {}
    with socket.create_server(("127.0.0.1", 0)) as meeting:
        for rank in range(world_size):
            codes[_fork(lambda r=rank: _on_rank(body, r, world_size, meeting), log)] = 0  # type: ignore[misc]
    waiting = set(codes)
    while waiting:
        pid, status = os.wait()
        if pid not in waiting:
            continue
        codes[pid] = os.waitstatus_to_exitcode(status)
        waiting.discard(pid)
        if codes[pid]:  # the others would wait for it for ever
            for other in waiting:
                os.kill(other, signal.SIGKILL)
    return list(codes.values())


def _fork(body: Callable[[], None], log: Path | None) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if log is not None:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
        body()
        code = 0
    except BaseException:  # noqa: BLE001 - a forked process must not return into its parent's work
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _on_rank(body: Callable[[], None], rank: int, world_size: int, meeting: socket.socket) -> None:
    from moe_bench.mcore.cpu import embedding  # noqa: PLC0415

    export_forked(rank, world_size, str(meeting.getsockname()[1]))
    embedding.install(local_world_size=world_size)
    with _answering(meeting) if rank == 0 else meeting:
        body()


@contextlib.contextmanager
def _answering(meeting: socket.socket) -> Iterator[None]:
    """Rank 0's store on a socket that listens already, so that no other program can have taken its port meanwhile.

    The one that init_process_group makes, in the same process for the same port, shares its server.
    """
    import torch  # noqa: PLC0415

    host, port = meeting.getsockname()
    store = torch.distributed.TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=meeting.detach(),
    )
    yield
    del store


def _unquantized(megatron: Path, hf: Path, out: Path) -> Path:
    """The model in bfloat16, as an export writes it: transformers runs FP8 and MXFP4 with more packages, or on a GPU."""
    options = ExportOptions()
    run_export(plan_export(megatron, hf, options), out, options)
    return out


def _reference(root: Path, config: dict[str, Any], folder: Path) -> None:
    """Write the logits of transformers' own model, and the tokens they are for."""
    import torch  # noqa: PLC0415

    library: Any = importlib.import_module("transformers")
    model = library.AutoModelForCausalLM.from_pretrained(
        root, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, _length(config))
    tokens = torch.randint(0, int(config["vocab_size"]), shape, generator=generator)
    with torch.no_grad():
        torch.save(model.float()(tokens).logits, folder / "reference.pt")
    torch.save(tokens, folder / "tokens.pt")


def run_model(
    argv: Sequence[str], tokens: Path, out: Path, arrangement: Arrangement = "te"
) -> None:
    """Body of a rank: load the checkpoint as training does, run it forward; the last stage writes its logits to `out`."""
    import torch  # noqa: PLC0415

    from moe_bench.mcore import checkpoint  # noqa: PLC0415
    from moe_bench.mcore.cpu.spec import reference_layers  # noqa: PLC0415

    sys.argv = ["pretrain_gpt.py", *argv]
    with contextlib.ExitStack() as stack:
        if arrangement != "megatron":
            stack.enter_context(reference_layers(arrangement=arrangement))
        for patch, _ in fitting(sys.argv):
            stack.enter_context(patch.applied())
        stages = checkpoint.load_model()
        found = checkpoint.logits(stages, torch.load(tokens, weights_only=True))
        if found is not None and checkpoint.is_first_of_its_stage():
            torch.save(found, out)
        torch.distributed.barrier()


def _measure(
    layout: Layout, argv: Sequence[str], arrangement: Arrangement, folder: Path
) -> Measured:
    import torch  # noqa: PLC0415

    out, log = folder / f"{layout.name}.pt", folder / f"{layout.name}.log"
    codes = fork_ranks(
        layout.world_size, lambda: run_model(argv, folder / "tokens.pt", out, arrangement), log
    )
    reference = torch.load(folder / "reference.pt", weights_only=True)
    positions = reference.shape[0] * reference.shape[1]
    if any(codes) or not out.exists():
        nan = float("nan")
        return Measured(
            layout=layout,
            largest_difference=nan,
            largest_logit=nan,
            same_greedy=0,
            positions=positions,
            refusal=_last_line(log),
        )
    found = torch.load(out, weights_only=True)
    return Measured(
        layout=layout,
        largest_difference=float((found - reference).abs().max()),
        largest_logit=float(reference.abs().max()),
        same_greedy=int((found.argmax(-1) == reference.argmax(-1)).sum()),
        positions=positions,
    )


def _last_line(log: Path) -> str:
    """What the first process to fail said last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    raised = [line for line in lines if line[:1].isalpha() and "Error: " in line.split("(")[0]]
    return (raised or [line for line in lines if line] or ["it ended without a word"])[0]
