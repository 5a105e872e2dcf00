"""A run that starts again goes on from its own newest whole checkpoint; a damaged one is passed over, aloud."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.checkpoint import metadata
from moe_bench.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_(\d{7,})\Z")

_DROPPED = frozenset(
    {"--finetune", "--no-load-optim", "--no-load-rng", "--auto-detect-ckpt-format"}
)
"""Switches for a start from other weights; a continuation needs the optimizer, the random state and the step count."""
_REPLACED = frozenset({"--load", "--ckpt-step", "--pretrained-checkpoint"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Resumption:
    """Where to go on from."""

    step: int
    checkpoint: Path
    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that cannot be trusted, each with the reason."""


def find(checkpoints: Path) -> Resumption | None:
    """The newest whole torch_dist checkpoint under `checkpoints`; None when no save there ever ended.

    Raises CheckpointError when saves have ended and none is whole any more: starting over would bury them.
    """
    passed_over: list[str] = []
    for step, folder in _newest_first(checkpoints):
        reason = damage(folder)
        if reason is None:
            return Resumption(step=step, checkpoint=folder, passed_over=tuple(passed_over))
        passed_over.append(f"{folder}: {reason}")
    if len(passed_over) == len(unfinished(checkpoints)):
        return None
    raise CheckpointError(
        f"{checkpoints}: no checkpoint there is whole ({'; '.join(passed_over)}); "
        "restore one, or move the folder away to start over"
    )


def unfinished(checkpoints: Path) -> tuple[str, ...]:
    """The saves that were broken off before anything described them, each with the reason."""
    return tuple(
        f"{folder}: the save did not end"
        for _, folder in _newest_first(checkpoints)
        if not any((folder / name).exists() for name in ("metadata.json", ".metadata"))
    )


def damage(folder: Path) -> str | None:
    """Why a torch_dist checkpoint cannot be trusted; None when every byte that its metadata names is there."""
    if not (folder / "metadata.json").is_file():
        return "metadata.json, which is written last, is missing: the save did not end"
    try:
        contents = metadata.load(folder / ".metadata")
    except CheckpointError as error:
        return str(error)
    ends: dict[str, int] = {}
    pieces: list[metadata.Box | metadata.ObjectEntry] = [*contents.objects.values()]
    pieces += [box for tensor in contents.tensors.values() for box in tensor.boxes]
    for piece in pieces:
        ends[piece.file] = max(ends.get(piece.file, 0), piece.offset + piece.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            return f"{name} is missing"
        if size < end:
            return f"{name} holds {size} bytes of at least {end}"
    return None


def continued(argv: Sequence[str], checkpoints: Path) -> list[str]:
    """`argv` with the run's own checkpoints as what is loaded, whatever it loaded at first. Pure."""
    kept: list[str] = []
    skipping = False
    for word in argv:
        if word.startswith("--"):
            name, _, _ = word.partition("=")
            skipping = name in _REPLACED
            if skipping or name in _DROPPED:
                continue
        elif skipping:
            continue
        kept.append(word)
    return [*kept, "--load", str(checkpoints)]


def point_tracker(checkpoints: Path, step: int) -> None:
    """Make Megatron's tracker name `step`. For one rank of the job only."""
    tracker = checkpoints / TRACKER
    if tracker.is_file() and tracker.read_text().strip() == str(step):
        return
    aside = tracker.with_name(f".{TRACKER}.{os.getpid()}")
    with aside.open("w") as file:
        file.write(str(step))
        file.flush()
        os.fsync(file.fileno())
    aside.replace(tracker)


def _newest_first(checkpoints: Path) -> list[tuple[int, Path]]:
    if not checkpoints.is_dir():
        return []
    found = [(int(m[1]), p) for p in checkpoints.iterdir() if (m := _ITERATION.match(p.name))]
    return sorted(found, reverse=True)
