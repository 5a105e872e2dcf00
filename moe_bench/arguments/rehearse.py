"""REHEARSE=1: the run's features and kind of layout at a size that one machine trains. Pure.

Widths, layers, experts, sequence, batch and the sizes of the layout shrink. No feature is taken out: latent attention,
groups of experts, expert bias, shared experts, prediction modules, leading dense layers, windows, uneven and virtual
pipelines, dispatcher, recomputation all stay. Where the ranks do not suffice for every kind of parallelism, one that
is left out is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from moe_bench.arguments.corpus import SOURCES, names_tokenizer
from moe_bench.arguments.sizes import SIZE_FLAGS, check
from moe_bench.config.knobs import whole
from moe_bench.config.layers import EXPLICIT
from moe_bench.config.run import Origin, Overridden, ResolvedRun, Setting, Substitution
from moe_bench.errors import ConfigError, MoeBenchError
from moe_bench.topology.layer_pattern import layer_pattern
from moe_bench.topology.layout import smallest_world
from moe_bench.topology.pipeline import from_layout

DEFAULT_RANKS = 4
MOST_RANKS = 8
STEPS = 20
SEQ_LENGTH = 128
_ORIGIN = Origin(layer="derived", place="REHEARSE=1")
_LAYOUT = "--pipeline-model-parallel-layout"
_FIRST, _LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
_VIRTUAL, _PER_VIRTUAL = (
    "--num-virtual-stages-per-pipeline-rank",
    "--num-layers-per-virtual-pipeline-stage",
)

Changes = dict[str, str | None]
"""New value of each flag; None takes it out."""


def rehearse(run: ResolvedRun, knows: Callable[[str], bool]) -> ResolvedRun:
    """The stand-in, with `rehearsal` set and one Substitution for each change.

    Raises ConfigError for a REHEARSE_RANKS that is not 1 to 8, ArgumentsError for an unreadable layer pattern.
    """
    asked = _Asked(run.args)
    ranks = _ranks(run)
    sizes = _layout(asked, ranks)
    stages = _stages(asked, sizes["pp"])
    changes: Changes = {SIZE_FLAGS[name]: str(size) for name, size in sizes.items()}
    changes |= _network(asked) | _attention(asked) | _experts(asked)
    changes |= _layers(asked, stages)
    changes |= _batch(asked, sizes) | _training(asked) | _data(asked, run)
    if asked.has("--wandb-exp-name"):
        changes["--wandb-exp-name"] = f"REHEARSAL-{asked.text('--wandb-exp-name')}"
    kept = {flag: value for flag, value in changes.items() if _matters(flag, value, run.args)}
    return replace(
        run,
        args=_changed(run.args, kept),
        knobs=_knobs(run.knobs, sizes, stages, kept),
        substitutions=(*run.substitutions, *_said(run, kept, ranks)),
        notes=(*run.notes, *_refused_at_full_size(run, knows)),
        rehearsal=True,
    )


def _refused_at_full_size(run: ResolvedRun, knows: Callable[[str], bool]) -> Iterator[str]:
    """Sizes that do not divide would go unseen in a stand-in that has others."""
    try:
        check(run, knows)
    except MoeBenchError as refusal:
        yield f"at its full size this run would be refused: {refusal}"


class _Asked:
    """The run's flags, as the user and the preset have them."""

    def __init__(self, args: Mapping[str, Setting]) -> None:
        self.args = args

    def has(self, flag: str) -> bool:
        return flag in self.args

    def number(self, flag: str, default: int = 1) -> int:
        """The flag's whole number. Raises ConfigError for anything else."""
        setting = self.args.get(flag)
        if setting is None:
            return default
        found = whole(setting.value)
        if found is None:
            raise ConfigError(
                f"{flag} {setting.value} ({setting.origin.place}) is not a whole number, so it cannot be made small"
            )
        return found

    def text(self, flag: str) -> str:
        return self.args[flag].value if flag in self.args else ""

    def on(self, flag: str) -> bool:
        return self.text(flag) == "true"

    def is_explicit(self, flag: str) -> bool:
        return flag in self.args and self.args[flag].origin.layer in EXPLICIT


def _ranks(run: ResolvedRun) -> int:
    setting = run.knobs.get("REHEARSE_RANKS")
    if setting is None or not setting.value:
        return DEFAULT_RANKS
    if 1 <= (whole(setting.value) or 0) <= MOST_RANKS:
        return int(setting.value)
    raise ConfigError(
        f"REHEARSE_RANKS={setting.value} ({setting.origin.place}) must be a number from 1 to {MOST_RANKS}; "
        f"without it a rehearsal takes up to {DEFAULT_RANKS} ranks"
    )


_GIVEN_UP = ("etp", "tp", "cp", "pp", "ep")
"""Which kind of parallelism goes first where the ranks do not suffice for all."""


def _layout(asked: _Asked, ranks: int) -> dict[str, int]:
    """Two for each kind of parallelism asked for, as far as the ranks go."""
    tp = asked.number(SIZE_FLAGS["tp"])
    sizes = {name: min(asked.number(flag), 2) for name, flag in SIZE_FLAGS.items()}
    sizes["etp"] = min(asked.number(SIZE_FLAGS["etp"], tp), 2)
    for name in _GIVEN_UP:
        if smallest_world(**sizes) > ranks:
            sizes[name] = 1
    return sizes


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stages:
    """The shrunken pipeline."""

    pp: int
    vpp: int
    by_layout: bool
    """Written as a layout string."""
    first: bool
    """The first stage has a number of layers of its own."""
    last: bool

    @property
    def is_uneven(self) -> bool:
        return self.first or self.last


def _stages(asked: _Asked, pp: int) -> _Stages:
    vpp = 2 if pp > 1 and _is_virtual(asked) else 1
    first = pp > 1 and asked.has(_FIRST)
    return _Stages(
        pp=pp,
        vpp=vpp,
        by_layout=pp > 1 and asked.has(_LAYOUT),
        first=first,
        # of two stages, Megatron lays virtual ones out only where one is not named: it is the last with what is left
        last=pp > 1 and asked.has(_LAST) and not (first and vpp > 1),
    )


def _is_virtual(asked: _Asked) -> bool:
    if asked.has(_LAYOUT):
        return _asked_layout(asked) > asked.number(SIZE_FLAGS["pp"])
    return asked.number(_VIRTUAL) > 1 or asked.has(_PER_VIRTUAL)


def _asked_layout(asked: _Asked) -> int:
    """Stages of the layout string. Raises ConfigError for one that cannot be read."""
    pp = asked.number(SIZE_FLAGS["pp"])
    try:
        return len(from_layout(asked.text(_LAYOUT), pp=pp).stages)
    except ValueError as error:
        place = asked.args[_LAYOUT].origin.place
        raise ConfigError(f"{_LAYOUT} {asked.text(_LAYOUT)} ({place}): {error}") from error


def _layers(asked: _Asked, stages: _Stages) -> Changes:
    """Layers, their patterns, and how the pipeline divides them."""
    changes: Changes = {
        _VIRTUAL: None,
        _PER_VIRTUAL: None,
        _LAYOUT: None,
        _FIRST: None,
        _LAST: None,
    }
    count = _layer_count(asked, stages)
    changes["--num-layers"] = str(count)
    if stages.vpp > 1 and not stages.by_layout:
        if asked.has(_PER_VIRTUAL):
            changes[_PER_VIRTUAL] = str(_counted(asked, count) // (stages.pp * stages.vpp))
        else:
            changes[_VIRTUAL] = "2"
    if stages.by_layout:
        changes[_LAYOUT] = _layout_string(asked, stages, count)
    if stages.first:
        changes[_FIRST] = str(_LONG * stages.vpp)
    if stages.last:
        changes[_LAST] = str((_SHORT if stages.first else _LONG) * stages.vpp)
    return changes | _patterns(asked, count)


_LONG, _SHORT = 3, 2
"""Layers of a virtual stage of the two outer pipeline stages, where they differ."""


def _layer_count(asked: _Asked, stages: _Stages) -> int:
    if stages.is_uneven:
        return (_LONG + _SHORT) * stages.vpp
    places = stages.pp * stages.vpp
    wanted = -(-4 // places) * places
    return 2 * places - _ends(asked) if _ends(asked) and places > 1 else wanted


def _ends(asked: _Asked) -> int:
    """Layers whose place the embedding and the output layer take."""
    return asked.on("--account-for-embedding-in-pipeline-split") + asked.on(
        "--account-for-loss-in-pipeline-split"
    )


def _counted(asked: _Asked, count: int) -> int:
    return count + _ends(asked)


def _layout_string(asked: _Asked, stages: _Stages, count: int) -> str:
    """The layers spread over the stages; prediction module and loss stand alone where they did."""
    number = stages.pp * stages.vpp
    alone = asked.text(_LAYOUT).rstrip().endswith("|L")
    last = ("m" if asked.number("--mtp-num-layers", 0) else "") + "L"
    holding = number - 1 if alone else number
    each, more = divmod(count, holding)
    letters = ["t" * (each + (index < more)) for index in range(holding)]
    if alone:
        letters.append("")
        if last == "mL":
            letters[-2] += "m"
            last = "L"
    letters[0] = "E" + letters[0]
    letters[-1] += last
    return "|".join(letters)


def _patterns(asked: _Asked, count: int) -> Changes:
    changes: Changes = {}
    experts = asked.text("--moe-layer-freq")
    if "[" in experts:
        found = layer_pattern(experts, flag="--moe-layer-freq")
        while len(found) > 1 and found[0] == found[1] == 0:
            found = found[1:]
        changes["--moe-layer-freq"] = _written(found, count)
    elif asked.number("--moe-layer-freq") > 2:
        changes["--moe-layer-freq"] = "2"
    for flag in ("--linear-attention-freq", "--window-attn-skip-freq"):
        text = asked.text(flag)
        if "[" in text:
            changes[flag] = _written(layer_pattern(text, flag=flag), count)
        elif asked.number(flag) > 2:
            changes[flag] = "2"
    return changes


def _written(pattern: list[int], count: int) -> str:
    """The pattern's beginning, with both of its kinds in it."""
    kinds = pattern[:count]
    if len(set(kinds)) < len(set(pattern)) and count > 1:
        kinds[-1] = 1 - kinds[-1]
    return "[" + ",".join(map(str, kinds)) + "]"


def _network(asked: _Asked) -> Changes:
    changes: Changes = {"--hidden-size": "128"}
    if asked.has("--ffn-hidden-size"):
        changes["--ffn-hidden-size"] = "256"
    changes["--num-attention-heads"] = "4"
    if asked.on("--group-query-attention") and asked.number("--num-query-groups") > 1:
        grouped = asked.number("--num-query-groups") < asked.number("--num-attention-heads")
        changes["--num-query-groups"] = "2" if grouped else "4"
    if asked.has("--kv-channels"):
        wide = asked.number("--num-attention-heads") * asked.number("--kv-channels")
        changes["--kv-channels"] = "64" if wide > asked.number("--hidden-size") else "32"
    if asked.has("--window-size"):
        changes["--window-size"] = "(31,0)"
    return changes


_LATENT = {
    "--q-lora-rank": "64",
    "--kv-lora-rank": "48",
    "--qk-head-dim": "32",
    "--qk-pos-emb-head-dim": "16",
    "--v-head-dim": "32",
}
_DELTA = {
    "--linear-key-head-dim": "32",
    "--linear-value-head-dim": "32",
    "--linear-num-key-heads": "2",
    "--linear-num-value-heads": "4",
}


def _attention(asked: _Asked) -> Changes:
    changes: Changes = {}
    if asked.on("--multi-latent-attention"):
        changes |= {flag: size for flag, size in _LATENT.items() if asked.has(flag)}
        changes["--kv-channels"] = "32"
    if asked.has("--experimental-attention-variant"):
        changes |= _DELTA
    return changes


def _experts(asked: _Asked) -> Changes:
    if not asked.number("--num-experts", 0):
        return {}
    groups = asked.number("--moe-router-num-groups")
    topk, chosen_groups = (
        asked.number("--moe-router-topk", 2),
        asked.number("--moe-router-group-topk"),
    )
    changes: Changes = {}
    if groups > 1:
        changes["--num-experts"] = "16"
        changes["--moe-router-num-groups"] = "4"
        changes["--moe-router-group-topk"] = "2"
        changes["--moe-router-topk"] = str(2 * min(topk // chosen_groups, 4))
    else:
        changes["--num-experts"] = str(min(asked.number("--num-experts"), 8))
        changes["--moe-router-topk"] = str(min(topk, 2))
    if asked.has("--moe-ffn-hidden-size"):
        changes["--moe-ffn-hidden-size"] = "64"
    if asked.has("--moe-shared-expert-intermediate-size"):
        width = asked.number("--moe-shared-expert-intermediate-size")
        several = width > asked.number("--moe-ffn-hidden-size", width)
        changes["--moe-shared-expert-intermediate-size"] = "128" if several else "64"
    if asked.has("--moe-latent-size"):
        changes["--moe-latent-size"] = "64"
    return changes


def _batch(asked: _Asked, sizes: Mapping[str, int]) -> Changes:
    """Several micro-batches, a multiple of the pipeline's stages, on every data-parallel rank."""
    world = smallest_world(**sizes)
    data_parallel = world // (sizes["tp"] * sizes["cp"] * sizes["pp"])
    size = min(asked.number("--micro-batch-size"), 2)
    return {
        "--seq-length": str(min(asked.number("--seq-length", SEQ_LENGTH), SEQ_LENGTH)),
        "--micro-batch-size": str(size),
        "--global-batch-size": str(size * data_parallel * 2 * sizes["pp"]),
    }


_CHECKPOINTS = (
    "--load",
    "--pretrained-checkpoint",
    "--finetune",
    "--ckpt-convert-save",
    "--ckpt-convert-format",
)


def _training(asked: _Asked) -> Changes:
    """A few steps that learn, from scratch."""
    changes: Changes = dict.fromkeys(flag for flag in _CHECKPOINTS if asked.has(flag))
    if asked.has("--train-samples"):
        for flag in ("--train-samples", "--lr-decay-samples", "--lr-warmup-samples"):
            changes[flag] = None
        changes["--train-iters"] = str(STEPS)
    elif not asked.is_explicit("--train-iters"):
        changes["--train-iters"] = str(STEPS)
    for flag in ("--lr-decay-iters", "--lr-warmup-iters", "--lr-warmup-init"):
        if asked.has(flag) and not asked.is_explicit(flag):
            changes[flag] = None
    if not asked.is_explicit("--lr"):
        changes["--lr"] = "1e-3"
        changes["--min-lr"] = "1e-4"
    changes["--eval-iters"] = "1" if asked.has("--eval-iters") else None
    changes["--num-workers"] = "0" if asked.has("--num-workers") else None
    return changes


def _data(asked: _Asked, run: ResolvedRun) -> Changes:
    """Without the run's own data, or a tokenizer to make mock ones with, the vocabulary of bytes."""
    if any(asked.has(flag) for flag in SOURCES) or not asked.has("--vocab-size"):
        return {}
    if asked.has("--mock-data") and names_tokenizer(run):
        return {}
    return {"--vocab-size": "257", "--make-vocab-size-divisible-by": "64"}


def _matters(flag: str, value: str | None, args: Mapping[str, Setting]) -> bool:
    before = args.get(flag)
    if before is None:
        return value is not None and value != "1"
    return before.value != value


def _changed(args: Mapping[str, Setting], changes: Mapping[str, str | None]) -> dict[str, Setting]:
    changed = {flag: setting for flag, setting in args.items() if changes.get(flag, "") is not None}
    for flag, value in changes.items():
        if value is not None:
            changed[flag] = _replaced(args.get(flag), value)
    return changed


def _replaced(before: Setting | None, value: str) -> Setting:
    lost = () if before is None else (Overridden(value=before.value, origin=before.origin),)
    return Setting(value=value, origin=_ORIGIN, overrode=lost)


_KNOBS = {
    "MBS": "--micro-batch-size",
    "GBS": "--global-batch-size",
    "NUM_LAYERS": "--num-layers",
    "SEQ_LEN": "--seq-length",
    "TRAIN_ITERS": "--train-iters",
    "PP_FIRST": _FIRST,
    "PP_LAST": _LAST,
    "LAYERS_PER_VP": _PER_VIRTUAL,
}


def _knobs(
    knobs: Mapping[str, Setting],
    sizes: Mapping[str, int],
    stages: _Stages,
    changes: Mapping[str, str | None],
) -> dict[str, Setting]:
    """The knobs say the same as the flags."""
    new = {name.upper(): str(size) for name, size in sizes.items()} | {"VPP": str(stages.vpp)}
    new |= {"NNODES": "1", "GPUS_PER_NODE": str(smallest_world(**sizes))}
    for name, flag in _KNOBS.items():
        if flag in changes:
            new[name] = changes[flag] or "false"
    changed = dict(knobs)
    for name, value in new.items():
        before = knobs.get(name)
        if before is not None and before.value != value:
            changed[name] = _replaced(before, value)
    return changed


def _said(
    run: ResolvedRun, changes: Mapping[str, str | None], ranks: int
) -> Iterator[Substitution]:
    yield Substitution(
        asked=run.model,
        used=f"a shrunken stand-in: this is NOT {run.model}",
        reason="REHEARSE=1; its loss and speed say nothing about the real model",
    )
    for name in ("NNODES", "GPUS_PER_NODE"):
        if name in run.knobs and run.knobs[name].origin.layer in EXPLICIT:
            yield Substitution(
                asked=f"{name}={run.knobs[name].value}",
                used="as many ranks as the small layout needs, on this machine",
                reason=f"rehearsal; REHEARSE_RANKS={ranks} is the most",
            )
    parallel = {flag: name for name, flag in SIZE_FLAGS.items()}
    for flag, value in changes.items():
        before = run.args[flag].value if flag in run.args else None
        reason = "rehearsal"
        if flag in parallel and value == "1" and before is not None:
            reason = f"REHEARSE_RANKS={ranks} leaves no room for it; {MOST_RANKS} is the most"
        yield Substitution(
            asked=f"{flag} {before}" if before is not None else f"no {flag}",
            used=f"{flag} {value}" if value is not None else "left out",
            reason=reason,
        )
