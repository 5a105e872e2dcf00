"""A run that starts again goes on from its own newest whole checkpoint; a damaged one is passed over, aloud."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.checkpoint import metadata
from moe_bench.checkpoint.layout import TRACKER
from moe_bench.errors import CheckpointError
from moe_bench.results.reader import read_events

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


@dataclass(frozen=True)
class Saved:
    """The checkpoints in a --save folder that a run may go on from."""

    folder: Path
    kind: str = "torch_dist"
    """--ckpt-format."""
    steps: frozenset[int] | None = None
    """Those of other steps are not looked at; None: all are."""

    def newest(self) -> Resumption | None:
        """The newest whole one; None when no save ever ended.

        Raises CheckpointError when saves have ended and none is whole any more: starting over would bury them.
        """
        passed_over: list[str] = []
        for step, folder in self._newest_first():
            reason = damage(folder, self.kind)
            if reason is None:
                return Resumption(step=step, checkpoint=folder, passed_over=tuple(passed_over))
            passed_over.append(f"{folder}: {reason}")
        if len(passed_over) == len(self.unfinished()):
            return None
        raise CheckpointError(
            f"{self.folder}: no checkpoint there is whole ({'; '.join(passed_over)}); "
            "restore one, or move the folder away to start over"
        )

    def unfinished(self) -> tuple[str, ...]:
        """The saves that were broken off before anything described them, each with the reason."""
        return tuple(
            f"{folder}: the save did not end"
            for step, folder in self._newest_first()
            if not _is_described(folder, step)
        )

    def _newest_first(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        found = [(int(m[1]), p) for p in self.folder.iterdir() if (m := _ITERATION.match(p.name))]
        mine = [each for each in found if self.steps is None or each[0] in self.steps]
        return sorted(mine, reverse=True)


def saved_steps(run_dir: Path, folder: Path) -> frozenset[int]:
    """The steps whose checkpoints this run's own record says it has saved to `folder`."""
    return frozenset(
        int(str(event.fields["step"]))
        for event in read_events(run_dir).records
        if event.event == "checkpoint_saved"
        and Path(str(event.fields["path"])).parent.absolute() == folder.absolute()
    )


def damage(folder: Path, kind: str = "torch_dist") -> str | None:
    """Why a checkpoint cannot be trusted; None when every byte that is known to belong to it is there.

    `kind`: --ckpt-format. Of "torch", whose files no list names, Megatron's tracker and each archive's own end tell.
    """
    if _is_of_ranks(folder):
        return _damage_of_archives(folder)
    if kind == "torch_dist" and not (folder / "metadata.json").is_file():
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


def _is_of_ranks(folder: Path) -> bool:
    """--ckpt-format torch: a folder for each tensor, pipeline and expert rank."""
    return next(folder.glob("mp_rank_*"), None) is not None


def _damage_of_archives(folder: Path) -> str | None:
    step = _ITERATION.match(folder.name)
    if step is None or not _is_described(folder, int(step[1])):
        return f"{TRACKER}, which is written last, does not come to it: the save did not end"
    for rank in sorted(folder.glob("mp_rank_*")):
        if not (rank / "model_optim_rng.pt").is_file():
            return f"{rank.name}/model_optim_rng.pt is missing"
        for file in sorted(rank.glob("*.pt")):
            if not zipfile.is_zipfile(file):
                return f"{rank.name}/{file.name} is cut short"
    return None


def _is_described(folder: Path, step: int) -> bool:
    """Whether something that is written after the checkpoint's data says that it is one."""
    if _is_of_ranks(folder):
        tracker = folder.parent / TRACKER
        said = tracker.read_text().strip() if tracker.is_file() else ""
        return said.isdecimal() and int(said) >= step
    return any((folder / name).exists() for name in ("metadata.json", ".metadata"))


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
