"""A run's `run.json` as readers of results see it, and where run directories are found.

`moe_bench.config.run` writes the file. This module reads what it needs of it and takes defaults for the rest, so that
the record of another version can still be summarised and compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from moe_bench.errors import RecordError

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a value was written."""

    layer: str
    place: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Beaten:
    """A value that lost to a layer of higher precedence."""

    value: str
    origin: Place


@dataclass(frozen=True, kw_only=True, slots=True)
class Value:
    """One resolved value, where it came from and what it overrode."""

    value: str
    origin: Place
    overrode: tuple[Beaten, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Substituted:
    """A feature that this machine or a rehearsal replaced."""

    asked: str
    used: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PointOfSweep:
    """Which point of a sweep the run is."""

    sweep_id: str
    number: int
    values: Mapping[str, str]
    """What the sweep varies: {"TP": "2", "--lr": "1e-3"}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What was resolved before the run started."""

    run_id: str
    model: str
    run_dir: str | None = None
    """Where it was when it began, which its values name; it may have been moved since. None where the record does not say."""
    knobs: Mapping[str, Value] = field(default_factory=dict)
    env: Mapping[str, Value] = field(default_factory=dict)
    args: Mapping[str, Value] = field(default_factory=dict)
    substitutions: tuple[Substituted, ...] = ()
    rehearsal: bool = False
    """True when the run is a shrunken stand-in and not the named model."""
    notes: tuple[str, ...] = ()
    point: PointOfSweep | None = None
    """None for a run of its own."""

    @property
    def world_size(self) -> int | None:
        """Ranks of the whole job; None when the record does not say."""
        nodes, per_node = self.knobs.get("NNODES"), self.knobs.get("GPUS_PER_NODE")
        if nodes is None or per_node is None:
            return None
        sizes = (nodes.value, per_node.value)
        return math.prod(map(int, sizes)) if all(map(str.isdecimal, sizes)) else None


_decode = msgspec.json.Decoder(Manifest).decode


def read_manifest(run_dir: Path) -> Manifest:
    """Raises RecordError when the run has none or it cannot be read."""
    path = run_dir / RUN_FILE
    try:
        return _decode(path.read_bytes())
    except FileNotFoundError as error:
        raise RecordError(
            f"{path}: no such file; {run_dir} is not a run directory. "
            "`python -m moe_bench runs` lists those there are"
        ) from error
    except OSError as error:
        raise RecordError(
            f"{path} cannot be read: {error.strerror}; mend what it is, or who may read it"
        ) from error
    except msgspec.MsgspecError as error:
        raise RecordError(f"{path}: not the record of a run: {error}") from error


def locate_run(name: str, *, base: Path) -> Path:
    """The directory of a run given as its path, its id under `base`, an unambiguous part of the id, or `latest`.

    Raises RecordError and names what there is.
    """
    given = Path(name)
    if (given / RUN_FILE).is_file():
        return given.resolve()
    if name == "latest":
        return _latest(base)
    if (base / name / RUN_FILE).is_file():
        return (base / name).resolve()
    matches = sorted(run_dir for run_dir in run_dirs(base) if name in run_dir.name)
    if len(matches) == 1:
        return matches[0].resolve()
    if matches:
        shown = ", ".join(match.name for match in matches[:5])
        more = f" and {len(matches) - 5} more" if len(matches) > 5 else ""
        raise RecordError(
            f"RUN {name!r} fits {len(matches)} runs in {base}: {shown}{more}; say more of one"
        )
    if given.is_dir():
        raise RecordError(f"RUN {name!r} is a directory without {RUN_FILE}, so not a run's")
    raise RecordError(
        f"RUN {name!r} is neither a run directory nor a run in {base}; "
        "`python -m moe_bench runs` lists those there are, `latest` is the newest"
    )


def run_dirs(base: Path) -> Iterator[Path]:
    """Every run directory directly under `base`, in no order."""
    if base.is_dir():
        for run_dir in base.iterdir():
            if (run_dir / RUN_FILE).is_file():
                yield run_dir


def _latest(base: Path) -> Path:
    newest = max(run_dirs(base), key=lambda d: (d / RUN_FILE).stat().st_mtime_ns, default=None)
    if newest is None:
        raise RecordError(
            f"RUN 'latest': there is no run in {base} yet; "
            "start one with: bash ./interactive_benchmarking.sh"
        )
    return newest.resolve()
