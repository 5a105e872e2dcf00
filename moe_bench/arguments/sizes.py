"""Sizes that must divide one another, said in the user's spelling before any rank starts. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import msgspec

from moe_bench.config.knobs import BOUND, KNOBS, says, whole
from moe_bench.config.layers import EXPLICIT
from moe_bench.config.machine import Machine
from moe_bench.config.run import Origin, Overridden, ResolvedRun, Setting, Substitution
from moe_bench.errors import ConfigError
from moe_bench.topology import pipeline
from moe_bench.topology.layer_pattern import layer_pattern
from moe_bench.topology.layout import divisors, smallest_world

SIZE_FLAGS = {
    "tp": "--tensor-model-parallel-size",
    "cp": "--context-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
}
_MAX_LOCAL_RANKS = 64


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """A number with the words that name it in a message."""

    number: int
    said: str


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a run that have to fit together."""

    tp: Size
    cp: Size
    pp: Size
    ep: Size
    etp: Size
    world: Size

    @classmethod
    def of(cls, run: ResolvedRun) -> Sizes:
        """Read from the flags, as Megatron will; an absent --expert-tensor-parallel-size is TP."""
        tp = _size(run, SIZE_FLAGS["tp"], 1)
        return cls(
            tp=tp,
            cp=_size(run, SIZE_FLAGS["cp"], 1),
            pp=_size(run, SIZE_FLAGS["pp"], 1),
            ep=_size(run, SIZE_FLAGS["ep"], 1),
            etp=_size(run, SIZE_FLAGS["etp"], tp.number),
            world=_world(run),
        )

    @property
    def smallest_world(self) -> int:
        """The fewest ranks this layout fits."""
        return smallest_world(
            tp=self.tp.number,
            cp=self.cp.number,
            pp=self.pp.number,
            ep=self.ep.number,
            etp=self.etp.number,
        )


def with_local_world(run: ResolvedRun, machine: Machine, given: Mapping[str, str]) -> ResolvedRun:
    """NNODES and GPUS_PER_NODE of this machine where the caller did not say: one node, as many ranks as the layout needs.

    A model that is made for GPUs gets all of them; a Tiny preset or a rehearsal as many as on a CPU, if there are so many.
    """
    if machine.device == "cuda":
        run = _on_fewer_gpus(run, machine.gpus)
    sizes = Sizes.of(run)
    nodes = _local("NNODES", "1", "this machine", run, given)
    if nodes.value != "1":
        _refuse_several_machines(run, nodes, machine)
    if machine.device == "cuda":
        count, why = _gpu_ranks(run, machine.gpus, sizes.smallest_world)
        ranks = _local("GPUS_PER_NODE", str(count), why, run, given)
        if int(ranks.value) < machine.gpus and not run.rehearsal:
            used = f"{ranks.value} of this machine's {machine.gpus} GPUs are used ({ranks.origin.place})"
            all_of_them = f"GPUS_PER_NODE={machine.gpus} takes all, with a GBS to match"
            run = replace(run, notes=(*run.notes, f"{used}; {all_of_them}"))
    else:
        fewest = sizes.smallest_world
        count, why = _preset_ranks(run, fewest)
        ranks = _local("GPUS_PER_NODE", str(count), why, run, given)
        _refuse_too_many(run, ranks, sizes)
    return replace(run, knobs={**run.knobs, "NNODES": nodes, "GPUS_PER_NODE": ranks})


def _refuse_several_machines(run: ResolvedRun, nodes: Setting, machine: Machine) -> None:
    """Without a scheduler each machine is told which of them it is, and where the first one is."""
    several = "bash ./sbatch_benchmarking.sh starts a run on several machines"
    if machine.device == "cpu":
        raise ConfigError(
            f"{says('NNODES', nodes)}: CPU ranks are those of one machine; GPUS_PER_NODE says how many; {several}"
        )
    missing = [name for name in ("MASTER_ADDR", "NODE_RANK") if name not in run.knobs]
    if missing:
        raise ConfigError(
            f"{says('NNODES', nodes)}: not set: {', '.join(missing)}; on each machine set MASTER_ADDR to the host of the "
            f"first, and NODE_RANK to 0, 1, ...; {several}"
        )
    rank = run.knobs["NODE_RANK"]
    if int(rank.value) >= int(nodes.value):
        raise ConfigError(
            f"{says('NODE_RANK', rank)} is none of the machines of {says('NNODES', nodes)}: they are counted from 0 to "
            f"{int(nodes.value) - 1}"
        )


def _on_fewer_gpus(run: ResolvedRun, gpus: int) -> ResolvedRun:
    """A Tiny preset whose own EP needs more GPUs than there are, with the EP that they hold."""
    asked, knob = run.args.get(SIZE_FLAGS["ep"]), run.knobs.get("EP")
    fewest = Sizes.of(run).smallest_world
    is_own = knob is not None and knob.origin.layer not in EXPLICIT
    if asked is None or knob is None or not is_own or asked.value != knob.value:
        return run
    if not run.model.startswith("Tiny-") or fewest <= gpus:
        return run
    fitting = math.gcd(int(knob.value), gpus)
    held = "this machine has 1 GPU" if gpus == 1 else f"this machine has {gpus} GPUs"
    said = Substitution(asked=says("EP", knob), used=f"EP={fitting}", reason=held)
    origin = Origin(layer="derived", place=held)
    lost = (Overridden(value=knob.value, origin=knob.origin),)
    setting = Setting(value=str(fitting), origin=origin, overrode=lost)
    return replace(
        run,
        args={**run.args, SIZE_FLAGS["ep"]: setting},
        knobs={**run.knobs, "EP": setting},
        substitutions=(*run.substitutions, said),
    )


def _gpu_ranks(run: ResolvedRun, gpus: int, fewest: int) -> tuple[int, str]:
    if run.rehearsal and fewest > gpus:
        raise ConfigError(
            f"the rehearsal's layout needs {fewest} ranks, and this machine has {gpus} GPU{'s' * (gpus > 1)}; "
            f"set REHEARSE_RANKS={gpus}, or MOE_BENCH_DEVICE=cpu to rehearse on the CPU"
        )
    if run.rehearsal or run.model.startswith("Tiny-"):
        count, why = _preset_ranks(run, fewest)
        if count <= gpus:
            return count, why
    return gpus, "GPUs of this machine"


def _preset_ranks(run: ResolvedRun, fewest: int) -> tuple[int, str]:
    """A Tiny preset's own number where the layout fits it, else the fewest that hold the layout."""
    knob = run.knobs.get("GPUS_PER_NODE")
    is_own = knob is not None and knob.origin.layer not in ("derived", "default")
    own = int(knob.value) if knob is not None and is_own else 0
    if knob is not None and run.model.startswith("Tiny-") and own and own % fewest == 0:
        return own, knob.origin.place
    return fewest, "fewest ranks that hold the layout"


def _refuse_too_many(run: ResolvedRun, ranks: Setting, sizes: Sizes) -> None:
    if int(ranks.value) <= _MAX_LOCAL_RANKS:
        return
    if ranks.value != str(sizes.smallest_world):
        raise ConfigError(
            f"{says('GPUS_PER_NODE', ranks)} is more than the {_MAX_LOCAL_RANKS} ranks that one machine without GPUs "
            f"starts; this layout runs on any multiple of {sizes.smallest_world}"
        )
    spelled = ", ".join(one.said for one in (sizes.tp, sizes.pp, sizes.ep, sizes.cp))
    raise ConfigError(
        f"{run.model} with {spelled} needs {ranks.value} ranks, too many for one machine without GPUs; "
        "set REHEARSE=1 to train a shrunken stand-in here, or lower TP, PP, EP, CP"
    )


def _local(
    name: str, value: str, place: str, run: ResolvedRun, given: Mapping[str, str]
) -> Setting:
    before = run.knobs.get(name)
    if before is not None and given.get(name):
        return before
    lost: tuple[Overridden, ...] = ()
    if before is not None and before.value != value:
        lost = (Overridden(value=before.value, origin=before.origin),)
    layer = before.origin.layer if before is not None and not lost else "derived"
    return Setting(value=value, origin=Origin(layer=layer, place=place), overrode=lost)


def check(run: ResolvedRun, knows: Callable[[str], bool]) -> None:
    """Raises ConfigError for the first sizes that do not fit together, with the way out. `knows`: the release's flags."""
    for flag, name in BOUND.items():
        if flag in run.args and KNOBS[name].kind in ("count", "count_or_false"):
            _number(flag, run.args[flag])
    sizes = Sizes.of(run)
    _check_world(sizes)
    _check_heads(run, sizes)
    _check_experts(run, sizes)
    _check_sequence(run, sizes)
    _check_batch(run, sizes, knows)
    _check_patterns(run)
    _check_pipeline_knobs(run, pipeline_of(run))


def _number(flag: str, setting: Setting) -> int:
    number = whole(setting.value)
    if number is None or number < 1:
        raise ConfigError(
            f"{flag} {setting.value} ({setting.origin.place}) is not a whole number of at least 1"
        )
    return number


def _size(run: ResolvedRun, flag: str, default: int) -> Size:
    setting = run.args.get(flag)
    if setting is None:
        return Size(number=default, said=f"{BOUND.get(flag, flag)}={default} (Megatron's default)")
    name = BOUND.get(flag) or _DERIVED.get(flag)
    number = _number(flag, setting)
    knob = run.knobs.get(name) if name else None
    if name and knob is not None and knob.value == setting.value and setting.origin.layer != "flag":
        return Size(number=number, said=says(name, knob))
    return Size(number=number, said=f"{flag} {setting.value} ({setting.origin.place})")


_DERIVED = {
    "--decoder-first-pipeline-num-layers": "PP_FIRST",
    "--decoder-last-pipeline-num-layers": "PP_LAST",
    "--num-virtual-stages-per-pipeline-rank": "VPP",
    "--num-layers-per-virtual-pipeline-stage": "LAYERS_PER_VP",
}
"""Flags that a rule makes of a knob -> the knob, which the user wrote."""


def _optional(run: ResolvedRun, flag: str) -> Size | None:
    setting = run.args.get(flag)
    return _size(run, flag, 1) if setting is not None and whole(setting.value) is not None else None


def _mtp_layers(run: ResolvedRun) -> Size | None:
    setting = run.args.get("--mtp-num-layers")
    has_none = setting is None or whole(setting.value) == 0
    return None if has_none else _optional(run, "--mtp-num-layers")


def _world(run: ResolvedRun) -> Size:
    nodes, ranks = run.knobs.get("NNODES"), run.knobs.get("GPUS_PER_NODE")
    if nodes is None or ranks is None:
        missing = "NNODES" if nodes is None else "GPUS_PER_NODE"
        raise ConfigError(f"{missing} is not set; set it in the environment or the cluster's .conf")
    said = f"{says('NNODES', nodes)} x {says('GPUS_PER_NODE', ranks)}"
    return Size(number=int(nodes.value) * int(ranks.value), said=said)


def _check_world(sizes: Sizes) -> None:
    dense = sizes.tp.number * sizes.pp.number * sizes.cp.number
    expert = sizes.etp.number * sizes.ep.number * sizes.pp.number
    for product, spelled in (
        (dense, (sizes.tp, sizes.pp, sizes.cp)),
        (expert, (sizes.etp, sizes.ep, sizes.pp)),
    ):
        if sizes.world.number % product:
            named = " x ".join(one.said for one in spelled)
            raise ConfigError(
                f"{named} = {product} does not divide the {sizes.world.number} ranks of {sizes.world.said}; "
                f"this layout runs on a multiple of {sizes.smallest_world} ranks: change NNODES or GPUS_PER_NODE, "
                "or one of the sizes"
            )


def _must_divide(divisor: Size, number: Size) -> None:
    if number.number % divisor.number:
        listed = [str(one) for one in divisors(number.number)]
        shown = ", ".join(listed if len(listed) <= 12 else [*listed[:4], "...", listed[-1]])
        raise ConfigError(f"{divisor.said} does not divide {number.said}; use one of {shown}")


def _check_heads(run: ResolvedRun, sizes: Sizes) -> None:
    heads, groups = _optional(run, "--num-attention-heads"), None
    if "--group-query-attention" in run.args:
        groups = _optional(run, "--num-query-groups")
    if heads is not None:
        _must_divide(sizes.tp, heads)
    if heads is not None and groups is not None:
        _must_divide(groups, heads)
        if groups.number % sizes.tp.number and sizes.tp.number % groups.number:
            raise ConfigError(
                f"{sizes.tp.said} and {groups.said}: one must divide the other, so that every rank holds whole groups"
            )


def _check_experts(run: ResolvedRun, sizes: Sizes) -> None:
    experts, top_k = _optional(run, "--num-experts"), _optional(run, "--moe-router-topk")
    if experts is None:
        if sizes.ep.number > 1:
            raise ConfigError(
                f"{sizes.ep.said} needs a model with experts; --num-experts is not set"
            )
        return
    _must_divide(sizes.ep, experts)
    if top_k is not None and top_k.number > experts.number:
        raise ConfigError(
            f"{top_k.said} is more than {experts.said}; a token cannot go to more experts than there are"
        )


def _check_sequence(run: ResolvedRun, sizes: Sizes) -> None:
    length = _optional(run, "--seq-length")
    if length is None:
        return
    if sizes.cp.number > 1 and length.number % (2 * sizes.cp.number):
        raise ConfigError(
            f"{length.said} must be a multiple of 2 x {sizes.cp.said}: each rank takes one piece from either half"
        )
    if "--sequence-parallel" in run.args and length.number // sizes.cp.number % sizes.tp.number:
        raise ConfigError(
            f"{length.said} over {sizes.cp.said} must be a multiple of {sizes.tp.said} for sequence parallelism"
        )


_LOWERED = "--decrease-batch-size-if-needed"
_EVALUATED = "--eval-global-batch-size"
"""GBS where it is not given, and never lowered."""


def _check_batch(run: ResolvedRun, sizes: Sizes, knows: Callable[[str], bool]) -> None:
    micro, global_batch = (
        _optional(run, "--micro-batch-size"),
        _optional(run, "--global-batch-size"),
    )
    if micro is None or global_batch is None or "--rampup-batch-size" in run.args:
        return
    data_parallel = sizes.world.number // (sizes.tp.number * sizes.pp.number * sizes.cp.number)
    unit = micro.number * data_parallel
    is_lowered = _LOWERED in run.args and global_batch.number >= unit
    if is_lowered and (_EVALUATED in run.args or not knows(_EVALUATED)):
        return
    if global_batch.number % unit:
        above = -(-global_batch.number // unit) * unit
        micro_fits = [
            one
            for one in divisors(global_batch.number)
            if one <= micro.number and global_batch.number % (one * data_parallel) == 0
        ]
        or_micro = f", or MBS={micro_fits[-1]}" if micro_fits else ""
        if is_lowered:
            or_micro += f", or {_EVALUATED} {above - unit} beside {_LOWERED}"
        raise ConfigError(
            f"{global_batch.said} is not a multiple of {micro.said} x DP={data_parallel} "
            f"({sizes.world.number} ranks of {sizes.world.said}); use GBS={above} or another multiple of {unit}{or_micro}"
        )


def _check_patterns(run: ResolvedRun) -> None:
    """A list of one entry for each layer must have as many as there are layers."""
    layers = _optional(run, "--num-layers")
    for flag in ("--moe-layer-freq", "--linear-attention-freq"):
        setting = run.args.get(flag)
        if layers is None or setting is None or "[" not in setting.value:
            continue
        found = len(layer_pattern(setting.value, flag=flag))
        if found != layers.number:
            raise ConfigError(
                f"{flag} {setting.value} ({setting.origin.place}) is for {found} layers, but {layers.said}; "
                "make the numbers in it add up to the layers"
            )


def _check_pipeline_knobs(run: ResolvedRun, found: pipeline.Pipeline) -> None:
    """What the caller said of the pipeline is what it is: a flag, a YAML or a layout that says otherwise is named."""
    first, last = found.layers_of_rank(0), found.layers_of_rank(found.pp - 1)
    each = {len(stage.layers) for stage in found.stages}
    true_of = {"VPP": found.vpp, "PP_FIRST": len(first), "PP_LAST": len(last)}
    if len(each) == 1:
        true_of["LAYERS_PER_VP"] = each.pop()
    for name, number in true_of.items():
        knob = run.knobs.get(name)
        if knob is None or knob.origin.layer not in EXPLICIT:
            continue
        asked = whole(knob.value)
        if asked is None or asked == number:
            continue
        raise ConfigError(
            f"{says(name, knob)}, but by {_pipeline_said(run)} it is {number}; make them agree or leave {name} out"
        )


def _pipeline_said(run: ResolvedRun) -> str:
    flags = (
        "--pipeline-model-parallel-layout",
        "--num-virtual-stages-per-pipeline-rank",
        "--num-layers-per-virtual-pipeline-stage",
        "--decoder-first-pipeline-num-layers",
        "--decoder-last-pipeline-num-layers",
        "--pipeline-model-parallel-size",
        "--num-layers",
    )
    said = [
        f"{flag} {run.args[flag].value} ({run.args[flag].origin.place})"
        for flag in flags
        if flag in run.args
    ]
    return " and ".join(said[:3]) or "Megatron's defaults"


# Pipeline


def pipeline_of(run: ResolvedRun) -> pipeline.Pipeline:
    """Which layers each stage holds. Raises ConfigError, with the stages as a table where there are some."""
    layers = _optional(run, "--num-layers")
    pp = _size(run, SIZE_FLAGS["pp"], 1)
    if layers is None:
        raise ConfigError(
            "--num-layers is not set by the model's YAML; every preset must say how many layers it has"
        )
    layout = run.args.get("--pipeline-model-parallel-layout")
    if layout is not None:
        return _from_layout(run, layout, layers, pp)
    first, last = _stage_size(run, "first"), _stage_size(run, "last")
    vpp = _virtual_stages(run, layers, pp)
    mtp = _mtp_layers(run)
    mtp_layers = mtp.number if mtp else 0
    try:
        if (first or last) and pp.number > 1:
            return pipeline.uneven(
                layers.number,
                pp=pp.number,
                vpp=vpp,
                first=first.number if first else None,
                last=last.number if last else None,
                mtp_layers=mtp_layers,
            )
        return pipeline.even(
            layers.number,
            pp=pp.number,
            vpp=vpp,
            mtp_layers=mtp_layers,
            count_embedding="--account-for-embedding-in-pipeline-split" in run.args,
            count_loss="--account-for-loss-in-pipeline-split" in run.args,
        )
    except ValueError as error:
        said = [one.said for one in (layers, pp, first, last) if one is not None]
        if vpp > 1:
            said.insert(2, _virtual_said(run, vpp))
        ways = _ways_out(layers.number, pp.number, vpp, is_uneven=bool(first or last))
        table = _table(layers.number, pp.number, first, last)
        raise ConfigError(
            f"{', '.join(said)}: {error}\n{table}\nuse {'; or '.join(ways)}"
        ) from error


def _stage_size(run: ResolvedRun, which: str) -> Size | None:
    return _optional(run, f"--decoder-{which}-pipeline-num-layers")


def _virtual_stages(run: ResolvedRun, layers: Size, pp: Size) -> int:
    by_count = _optional(run, "--num-virtual-stages-per-pipeline-rank")
    by_layers = _optional(run, "--num-layers-per-virtual-pipeline-stage")
    if by_count is not None and by_layers is not None:
        raise ConfigError(
            f"{by_count.said} and {by_layers.said} are two spellings of one choice; give only one of them"
        )
    if by_count is not None:
        return by_count.number
    if by_layers is None:
        return 1
    counted = layers.number
    counted += "--account-for-embedding-in-pipeline-split" in run.args
    counted += "--account-for-loss-in-pipeline-split" in run.args
    if counted % (pp.number * by_layers.number):
        raise ConfigError(
            f"{by_layers.said} does not divide the layers of a stage ({layers.said} over {pp.said}); "
            "change LAYERS_PER_VP, or give VPP alone"
        )
    return counted // pp.number // by_layers.number


def _virtual_said(run: ResolvedRun, vpp: int) -> str:
    flags = ("--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage")
    said = next(one for one in (_optional(run, flag) for flag in flags) if one is not None)
    return said.said if said.number == vpp else f"{said.said}, so {vpp} virtual stages"


def _ways_out(layers: int, pp: int, vpp: int, *, is_uneven: bool) -> list[str]:
    layout = "--pipeline-model-parallel-layout for any division"
    if is_uneven:
        each = f", each a multiple of VPP={vpp}" if vpp > 1 else ""
        return [f"PP_FIRST and PP_LAST that leave each other stage as many layers{each}", layout]
    if layers % pp == 0 and vpp > 1:
        fitting = ", ".join(str(one) for one in divisors(layers // pp))
        return [f"VPP one of {fitting}", layout]
    fitting = ", ".join(str(one) for one in divisors(layers))
    return [f"PP one of {fitting}", "PP_FIRST and PP_LAST for uneven stages", layout]


def _table(layers: int, pp: int, first: Size | None, last: Size | None) -> str:
    """Stage by stage, what was asked for and what is left over."""
    middle = pp - (first is not None) - (last is not None)
    left = layers - (first.number if first else 0) - (last.number if last else 0)
    each = left // middle if middle > 0 else 0
    by_rank = [each] * pp
    if first is not None:
        by_rank[0] = first.number
    if last is not None:
        by_rank[-1] = last.number
    lines = [f"  stage {rank}: {count} layers" for rank, count in enumerate(by_rank)]
    if len(lines) > 8:
        lines = [*lines[:2], f"  ... {len(lines) - 4} stages of {each} layers", *lines[-2:]]
    total = sum(by_rank)
    return "\n".join([*lines, f"  sum: {total} of {layers} layers"])


def _from_layout(run: ResolvedRun, layout: Setting, layers: Size, pp: Size) -> pipeline.Pipeline:
    said = f"--pipeline-model-parallel-layout {layout.value!r} ({layout.origin.place})"
    try:
        found = pipeline.from_layout(layout.value, pp=pp.number)
    except ValueError as error:
        raise ConfigError(f"{said}: {error}") from error
    if found.num_layers != layers.number:
        raise ConfigError(
            f"{said} holds {found.num_layers} decoder layers (t), but {layers.said}\n{found.table()}\n"
            f"add or take away t until they are {layers.number}"
        )
    mtp = _mtp_layers(run)
    in_layout, wanted = sum(stage.mtp_layers for stage in found.stages), mtp.number if mtp else 0
    if in_layout != wanted:
        asked = mtp.said if mtp else "--mtp-num-layers is not set"
        raise ConfigError(f"{said} holds {in_layout} MTP layers (m), but {asked}\n{found.table()}")
    return found
