"""From what a user asked for to the points that can run, their scripts, and why the others cannot."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from moe_bench.arguments.flags import Flags
from moe_bench.arguments.resolve import Identity, output_folder, resolve_gathered
from moe_bench.config import model_file
from moe_bench.config.expand import names_in as names_in_value
from moe_bench.config.gather import Gathered, Request, gather_each
from moe_bench.config.knobs import KNOBS
from moe_bench.config.machine import Machine
from moe_bench.config.run import Origin, ResolvedRun, Setting, SweepPoint
from moe_bench.errors import ConfigError, MoeBenchError
from moe_bench.launch import time_limit
from moe_bench.launch.launcher import Launcher, LaunchPlan
from moe_bench.planner.memory import states
from moe_bench.results.sweep_record import (
    SWEEPS_FOLDER,
    Axis,
    Point,
    Pruned,
    grouped,
    label,
)
from moe_bench.sweep import axes as axes_of

MOST_POINTS = 20_000
_LABEL = re.compile(r"[^A-Za-z0-9._+-]+")
_NUMBERS = re.compile(r"-?[\d.]+( +-?[\d.]+)+")
_GROUP = Origin(layer="derived", place="the sweep's id")


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A sweep as the user described it."""

    request: Request
    """What all points share."""
    axes: tuple[Axis, ...]
    where: str
    """local or slurm."""
    sweep_id: str | None = None
    """None: made from everything else, so that the same command finds its sweep again."""

    @property
    def given(self) -> dict[str, str]:
        """Knobs of the environment that decide what the points are."""
        varied = {name for axis in self.axes for name in axis.names}
        found = self.request.environment
        return {
            name: found[name]
            for name in KNOBS
            if found.get(name) and name not in varied and name not in _NOT_OF_THE_POINTS
        }


_NOT_OF_THE_POINTS = frozenset({"RUN_ID", "DRY_RUN", "OUTPUT_PATH", "LAUNCHER"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One legal combination, ready to start."""

    point: Point
    run: ResolvedRun
    plan: LaunchPlan


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """Everything decided before anything starts."""

    sweep_id: str
    asked: Asked
    model: str
    candidates: tuple[Candidate, ...]
    pruned: tuple[Pruned, ...]


type Check = Callable[[ResolvedRun], str | None]
"""Why a run would be refused, by a further authority; None when it would not."""


def plan(
    asked: Asked, machine: Machine, launcher: Launcher, check: Check | None = None
) -> SweepPlan:
    """Resolve every point as a launch would, keep the legal ones and render them. Raises ConfigError when none is.

    Nothing is written or started.
    """
    values = axes_of.points(asked.axes)
    if len(values) > MOST_POINTS:
        raise ConfigError(
            f"--vary makes {len(values):,} points; a sweep has at most {MOST_POINTS:,}, so vary less at once"
        )
    requests = [_request(asked, one) for one in values]
    points = _Points(asked, machine, launcher, check, width=len(str(len(values))))
    for one, request, found in zip(values, requests, gather_each(requests), strict=True):
        points.add(one, request, found)
    return points.plan()


class _Points:
    """Takes the points one after another: the legal ones get numbers, the others a reason."""

    def __init__(
        self, asked: Asked, machine: Machine, launcher: Launcher, check: Check | None, *, width: int
    ) -> None:
        self._asked, self._machine, self._launcher, self._check = asked, machine, launcher, check
        self._width = width
        self._flags_of = _FlagsOnce()
        self._place: _Place | None = None
        self._candidates: list[Candidate] = []
        self._pruned: list[Pruned] = []
        self._seen: dict[bytes, Point] = {}

    def plan(self) -> SweepPlan:
        """Of the points taken so far."""
        place = self._place or _Place.of(self._asked, None)
        return SweepPlan(
            sweep_id=place.sweep_id,
            asked=self._asked,
            model=place.model,
            candidates=tuple(self._candidates),
            pruned=tuple(self._pruned),
        )

    def add(
        self, values: Mapping[str, str], request: Request, found: Gathered | ConfigError
    ) -> None:
        """The next point."""
        try:
            if isinstance(found, ConfigError):
                raise found
            self._add_legal(values, request, found)
        except MoeBenchError as error:
            self._pruned.append(Pruned(values=values, reason=str(error)))

    def _add_legal(self, values: Mapping[str, str], request: Request, found: Gathered) -> None:
        self._place = self._place or _Place.of(self._asked, found)
        number = len(self._candidates) + 1
        name = f"{number:0{self._width}d}-{_name(values)}"
        identity = Identity(run_id=name, folder=self._place.folder)
        run = resolve_gathered(found, request, self._machine, identity, self._flags_of(found))
        run = _of_sweep(run, self._place.sweep_id, number, values)
        key = fingerprint(run)
        if key in self._seen:
            first = self._seen[key]
            raise ConfigError(
                f"it is the same run as point {first.number} ({first.label}): what differs changes nothing here"
            )
        if self._check is not None and (refusal := self._check(run)) is not None:
            raise ConfigError(refusal)
        rendered = self._launcher.render(run)
        point = _point(run, rendered, number, values)
        self._candidates.append(Candidate(point=point, run=run, plan=rendered))
        self._seen[key] = point


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """What the sweep is called and where it lies."""

    model: str
    sweep_id: str
    folder: Path

    @classmethod
    def of(cls, asked: Asked, found: Gathered | None) -> _Place:
        """`found`: any point whose files could be read."""
        project = asked.request.project
        model = found.model if found else asked.request.environment.get("MODEL", "sweep")
        sweep_id = asked.sweep_id or _sweep_id(asked, model)
        base = output_folder(found.knobs, project) if found else project / "runs"
        return cls(model=model, sweep_id=sweep_id, folder=base / SWEEPS_FOLDER / sweep_id)


def known_names(request: Request) -> frozenset[str]:
    """Names beside the knobs that this run's files read: variables of the .conf files and ${NAME} of the model's YAML.

    Empty where the files cannot be read as they stand: the points then say why.
    """
    [found] = gather_each([request])
    if not isinstance(found, Gathered):
        return frozenset()
    return frozenset(found.exported) | names_read(found.file)


def names_read(file: model_file.ModelFile) -> frozenset[str]:
    """The variables that a model's YAML sets or refers to."""
    entries = (*file.env_vars, *file.defaults, *file.model_args)
    referred = {name for entry in entries for word in entry.words for name in names_in_value(word)}
    return frozenset(referred | {one.name for one in (*file.env_vars, *file.defaults)})


def fingerprint(run: ResolvedRun) -> bytes:
    """Equal for two runs that would do the same, whatever they are called."""
    own = str(run.run_dir)
    size = {
        name: run.knobs[name].value
        for name in ("NNODES", "GPUS_PER_NODE", "RUN_TIME")
        if name in run.knobs
    }
    layers: tuple[Mapping[str, str], ...] = (
        size,
        _values(run.args, own),
        {
            name: value
            for name, value in _values(run.env, own).items()
            if name != "MOE_BENCH_RUN_ID"
        },
    )
    return hashlib.sha256(msgspec.json.encode(layers, order="sorted")).digest()


def _values(settings: Mapping[str, Setting], own: str) -> dict[str, str]:
    return {
        name: value.replace(own, "") if own in (value := setting.value) else value
        for name, setting in settings.items()
    }


class _FlagsOnce:
    """A release's flags, read once: those of a checkout take longer than all else of a point."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, ...], Flags] = {}

    def __call__(self, found: Gathered) -> Flags:
        knobs = ("MCORE_RELEASE_VERSION", "MEGATRON_PATH")
        key = tuple(found.knobs[name].value if name in found.knobs else "" for name in knobs)
        if key not in self._read:
            self._read[key] = Flags.of_release(found.knobs)
        return self._read[key]


def _request(asked: Asked, values: Mapping[str, str]) -> Request:
    flags = [
        word for name, value in values.items() if name[0] == "-" for word in _words(name, value)
    ]
    knobs = {name: value for name, value in values.items() if name[0] != "-"}
    return replace(
        asked.request,
        environment={**asked.request.environment, **knobs},
        words=(*asked.request.words, *flags),
        places=dict.fromkeys(values, "--vary"),
    )


def _words(flag: str, value: str) -> tuple[str, ...]:
    """Numbers with blanks between are the items of a list: `--vary=--window-size="128 0,256 0"`. All else is one word."""
    return (flag, *value.split()) if _NUMBERS.fullmatch(value) else (f"{flag}={value}",)


def _of_sweep(
    run: ResolvedRun, sweep_id: str, number: int, values: Mapping[str, str]
) -> ResolvedRun:
    """The run as this point of the sweep: one group in W&B, unless the caller has one."""
    group = Setting(value=sweep_id, origin=_GROUP)
    return replace(
        run,
        env={"WANDB_RUN_GROUP": group, **run.env},
        point=SweepPoint(sweep_id=sweep_id, number=number, values=values),
    )


def _sweep_id(asked: Asked, model: str) -> str:
    """The same for the same command and environment."""
    everything = (asked.axes, asked.request.words, asked.given, asked.where)
    digest = hashlib.sha256(msgspec.json.encode(everything, order="sorted")).hexdigest()
    return f"{_LABEL.sub('_', model)}-{digest[:8]}"


def _name(values: Mapping[str, str]) -> str:
    """Short enough for a directory, and readable: `TP2-MBS4-lr1e-3`."""
    parts = (f"{name.lstrip('-')}{value}" for name, value in values.items())
    return _LABEL.sub("_", "-".join(parts))[:80].rstrip("._-")


def _point(run: ResolvedRun, rendered: LaunchPlan, number: int, values: Mapping[str, str]) -> Point:
    return Point(
        number=number,
        name=run.run_id,
        values=values,
        nodes=int(run.knobs["NNODES"].value),
        ranks=run.world_size,
        run_time_s=time_limit.seconds(run),
        script_sha256=rendered.sha256,
        states_gib=_states_gib(run),
    )


def _states_gib(run: ResolvedRun) -> float | None:
    try:
        return max(one.gib for one in states(run))
    except (
        MoeBenchError
    ):  # a model of a user's own may leave sizes to Megatron's defaults: no rule of a launch
        return None


def refuse_none_legal(found: SweepPlan) -> None:
    """Raises ConfigError with every reason when no point can run."""
    if found.candidates:
        return
    lines = "\n".join(f"  {line}" for line in reasons(found.pruned))
    raise ConfigError(
        f"none of the {len(found.pruned)} points can run:\n{lines}\nvary other values, or mend what they name"
    )


def reasons(pruned: Sequence[Pruned], most: int = 3) -> Iterable[str]:
    """One line for each group: which combinations, and why."""
    for reason, members in grouped(pruned):
        shown = "; ".join(label(one.values) for one in members[:most])
        more = f" and {len(members) - most} more" if len(members) > most else ""
        first = (
            " (the first's reason; the others differ in its numbers)"
            if len({m.reason for m in members}) > 1
            else ""
        )
        yield f"{shown}{more}: {reason}{first}".replace("\n", "\n    ")
