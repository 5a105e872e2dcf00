"""The resolved run: every value with its origin. Crosses the process boundary as `run.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a value was written."""

    layer: str
    """One of `moe_bench.config.layers.PRECEDENCE`: flag, environment, cluster, runtime, common, model, derived, default."""
    place: str
    """What the user would open: `model_configs/benchmarking/X.yaml:77`, `environment`, `command line`, or the rule's name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One value, where it came from and what it overrode."""

    value: str
    origin: Origin
    overrode: tuple[Overridden, ...] = ()
    words: tuple[str, ...] | None = None
    """For a flag: the argv words that follow it. None: `value` itself, or nothing for a switch ("true")."""

    @property
    def argv(self) -> tuple[str, ...]:
        """The words that follow a flag with this setting in an argv; none for a switch."""
        if self.words is not None:
            return self.words
        return () if self.value == "true" else (self.value,)

    def spelled(self, flag: str) -> str:
        """`--lr 1e-3`, or `--swiglu`: how every message names a flag."""
        return f"{flag} {self.value}" if self.argv else flag


@dataclass(frozen=True, kw_only=True, slots=True)
class Overridden:
    """A value that lost to a layer of higher precedence."""

    value: str
    origin: Origin


@dataclass(frozen=True, kw_only=True, slots=True)
class Substitution:
    """A feature that this machine or a rehearsal replaces, said aloud before anything starts."""

    asked: str
    used: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPoint:
    """Which point of a sweep a run is."""

    sweep_id: str
    number: int
    """1-based."""
    values: Mapping[str, str]
    """What the sweep varies, as asked: {"TP": "2", "--lr": "1e-3"}."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedRun:
    """Everything that decides what a run does."""

    run_id: str
    """Unique name of this run and of its directory."""
    model: str
    run_dir: Path
    """The run's own directory, absolute."""
    knobs: Mapping[str, Setting]
    """The guide's upper-case knobs (MODEL, TP, GBS, PR, ...)."""
    env: Mapping[str, Setting]
    """Environment variables exported to every rank (the YAML's ENV_VARS and derived ones). No secrets."""
    args: Mapping[str, Setting]
    """Megatron flags (`--num-layers`) in argv order; a bare switch has the value "true"."""
    substitutions: tuple[Substitution, ...] = ()
    rehearsal: bool = False
    """True when this is a shrunken stand-in and not the named model."""
    notes: tuple[str, ...] = field(default=())
    """Warnings of the rules, in the order found."""
    point: SweepPoint | None = None
    """None for a run of its own."""
    commits: Mapping[str, str] = field(default_factory=dict)
    """Of this project and of MEGATRON_PATH when the run's directory was made (moe_bench/commits.py)."""

    @property
    def world_size(self) -> int:
        """Ranks of the whole job: NNODES x GPUS_PER_NODE."""
        return int(self.knobs["NNODES"].value) * int(self.knobs["GPUS_PER_NODE"].value)

    def knob(self, name: str) -> str:
        """The knob's value, "" when it is unset."""
        setting = self.knobs.get(name)
        return setting.value if setting else ""

    def place(self, name: str) -> str:
        """Where the knob was set, for messages."""
        setting = self.knobs.get(name)
        return setting.origin.place if setting else "not set"

    def to_json(self) -> bytes:
        """Indented JSON, stable in order."""
        return msgspec.json.format(msgspec.json.encode(self, enc_hook=_encode_path), indent=2)

    @classmethod
    def from_json(cls, data: bytes) -> ResolvedRun:
        """Inverse of `to_json`. Raises msgspec.ValidationError on another shape."""
        return msgspec.json.decode(data, type=cls, dec_hook=_decode_path)


def _encode_path(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot encode {type(value)}")


def _decode_path(kind: type, value: object) -> object:
    if kind is Path:
        return Path(str(value))
    raise TypeError(f"cannot decode {kind}")
