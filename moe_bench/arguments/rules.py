"""One function per derived choice. Each maps what is set to further flags or variables; none reads or changes anything.

A rule speaks with the rank of the knob that decided: PR=fp8 in the environment beats the model's YAML, as a user who
wrote it expects; the same PR from a .conf or a default is of the layer "derived", below the YAML. A flag that the caller
wrote at that rank stands: what then contradicts the knob is for the interaction rules to refuse.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from moe_bench.arguments.flags import Flags
from moe_bench.config.knobs import as_count, says, whole
from moe_bench.config.layers import EXPLICIT, Candidate
from moe_bench.config.run import Origin, Setting
from moe_bench.errors import ConfigError


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a rule may look at."""

    knobs: Mapping[str, Setting]
    args: Mapping[str, Setting]
    """Flags as set by flags, environment and YAML, before the rules."""
    flags: Flags
    """What the run's Megatron release knows."""
    run_dir: str

    def knows(self, flag: str) -> bool:
        """True when the release has the flag."""
        return self.flags.knows(flag)

    def accepts(self, flag: str, value: str) -> bool:
        """True when the release has the flag and takes this value."""
        spec = self.flags.known.flags.get(flag)
        return spec is not None and (not spec.choices or value in spec.choices)

    def number(self, name: str, default: int = 1) -> int:
        """The knob's whole number, or `default` where it is not set."""
        return as_count(name, self.knobs[name]) if self.is_set(name) else default

    def is_set(self, name: str) -> bool:
        """True when the knob holds a value other than `false`."""
        return name in self.knobs and self.knobs[name].value not in ("", "false")

    def is_on(self, name: str) -> bool:
        """True for a switch that is 1."""
        return name in self.knobs and self.knobs[name].value == "1"


def derived_args(facts: Facts) -> list[Candidate]:
    """What every rule of `ARG_RULES` adds, in order."""
    return [candidate for rule in ARG_RULES for candidate in rule(facts)]


def derived_env(facts: Facts) -> list[Candidate]:
    """Environment variables that every rule of `ENV_RULES` adds, in order."""
    return [candidate for rule in ENV_RULES for candidate in rule(facts)]


def dispatcher_knobs(knobs: Mapping[str, Setting]) -> dict[str, Setting]:
    """Knobs with the two spellings of the dispatcher folded into one.

    MOE_TOKEN_DISPATCHER ends as Megatron's word (alltoall, allgather, flex), DISPATCHER as the transport behind flex.
    Raises ConfigError when both were set, differently, at the same rank.
    """
    old, new = knobs.get("MOE_TOKEN_DISPATCHER"), knobs.get("DISPATCHER")
    if old is not None and new is not None and _differ(old.value, new.value):
        if new.origin.layer in EXPLICIT and old.origin.layer in EXPLICIT:
            raise ConfigError(
                f"{says('DISPATCHER', new)} and {says('MOE_TOKEN_DISPATCHER', old)} are two spellings of one "
                "choice and differ; set only one of them"
            )
        old, new = (old, None) if old.origin.layer in EXPLICIT else (new, new)
    decides = new or old
    if decides is None:
        return dict(knobs)
    word = "flex" if decides.value in _FLEX_BACKENDS else decides.value
    folded = dict(knobs)
    spoken = old or decides
    folded["MOE_TOKEN_DISPATCHER"] = Setting(
        value=word,
        origin=(spoken if spoken.value == word else decides).origin,
        overrode=decides.overrode,
    )
    if decides.value in _FLEX_BACKENDS:
        folded["DISPATCHER"] = decides
    else:
        folded.pop("DISPATCHER", None)
    return folded


_FLEX_BACKENDS = ("deepep", "hybridep")


def _differ(old: str, new: str) -> bool:
    return old != new and not (old == "flex" and new in _FLEX_BACKENDS)


def dispatcher(facts: Facts) -> Iterator[Candidate]:
    """Name the transport that flex needs: DeepEP unless DISPATCHER says HybridEP; older releases know only a DeepEP switch."""
    if not facts.is_set("MOE_TOKEN_DISPATCHER"):
        return
    kind = facts.knobs["MOE_TOKEN_DISPATCHER"]
    yield from _flags(kind, "MOE_TOKEN_DISPATCHER", [("--moe-token-dispatcher-type", kind.value)])
    final = facts.args.get("--moe-token-dispatcher-type", kind)
    if kind.origin.layer == "environment" and final.origin.layer != "flag":
        final = kind
    if final.value != "flex":
        yield from _without_deepep(facts, kind, "MOE_TOKEN_DISPATCHER")
        return
    backend = facts.knobs.get("DISPATCHER", kind)
    if facts.knows("--moe-flex-dispatcher-backend"):
        name = backend.value if backend.value in _FLEX_BACKENDS else "deepep"
        yield from _flags(backend, "DISPATCHER", [("--moe-flex-dispatcher-backend", name)])
        if name == "hybridep":
            yield from _without_deepep(facts, backend, "DISPATCHER")
            yield from _flags(backend, "DISPATCHER", [("--moe-hybridep-num-sms", "32")])
    elif backend.value == "hybridep":
        raise ConfigError(
            f"{says('DISPATCHER', backend)} needs --moe-flex-dispatcher-backend, which Megatron-Core "
            f"{facts.knobs['MCORE_RELEASE_VERSION'].value} does not have; use DISPATCHER=deepep or a newer release"
        )
    elif facts.knows("--moe-enable-deepep"):
        yield from _flags(backend, "DISPATCHER", [("--moe-enable-deepep", "true")])


def _without_deepep(facts: Facts, knob: Setting, name: str) -> Iterator[Candidate]:
    """The older spelling of the DeepEP backend, where the YAML has it."""
    if "--moe-enable-deepep" in facts.args:
        yield from _flags(knob, name, [("--moe-enable-deepep", "false")])


_LAYOUT_FLAG = "--pipeline-model-parallel-layout"
_VIRTUAL_STAGES = "--num-virtual-stages-per-pipeline-rank"
_LAYERS_PER_VIRTUAL = "--num-layers-per-virtual-pipeline-stage"


def virtual_pipeline(facts: Facts) -> Iterator[Candidate]:
    """VPP > 1: the number of virtual stages, or LAYERS_PER_VP where that is asked for or the release knows no other."""
    if facts.number("VPP") == 1 or facts.number("PP") == 1 or _LAYOUT_FLAG in facts.args:
        return
    if _VIRTUAL_STAGES in facts.args:
        return
    if _LAYERS_PER_VIRTUAL in facts.args:
        yield from _counted_for_uneven(facts)
        return
    vpp, layers = facts.knobs["VPP"], facts.knobs.get("LAYERS_PER_VP")
    by_layers = (
        layers is not None and layers.origin.layer in EXPLICIT and facts.is_set("LAYERS_PER_VP")
    )
    if not by_layers and facts.knows(_VIRTUAL_STAGES):
        yield from _flags(vpp, "VPP", [(_VIRTUAL_STAGES, vpp.value)])
    elif layers is not None and facts.is_set("LAYERS_PER_VP"):
        yield from _flags(layers, "LAYERS_PER_VP", [(_LAYERS_PER_VIRTUAL, layers.value)])
    else:
        raise ConfigError(
            f"{says('VPP', vpp)} needs LAYERS_PER_VP with Megatron-Core "
            f"{facts.knobs['MCORE_RELEASE_VERSION'].value}, which cannot count virtual stages itself; set LAYERS_PER_VP"
        )


def _counted_for_uneven(facts: Facts) -> Iterator[Candidate]:
    """Megatron counts layers per virtual stage only over equal stages: with PP_FIRST or PP_LAST, VPP says it."""
    said = facts.args[_LAYERS_PER_VIRTUAL]
    is_uneven = facts.is_set("PP_FIRST") or facts.is_set("PP_LAST")
    if not is_uneven or said.origin.layer in EXPLICIT or not facts.knows(_VIRTUAL_STAGES):
        return
    origin = Origin(layer="environment", place="rule virtual_pipeline: VPP, for uneven stages")
    yield Candidate(name=_LAYERS_PER_VIRTUAL, value="false", origin=origin)
    yield Candidate(name=_VIRTUAL_STAGES, value=facts.knobs["VPP"].value, origin=origin)


def uneven_pipeline(facts: Facts) -> Iterator[Candidate]:
    """PP_FIRST and PP_LAST, where no layout string says it all."""
    if _LAYOUT_FLAG in facts.args or facts.number("PP") == 1:
        return
    for name, flag in (
        ("PP_FIRST", "--decoder-first-pipeline-num-layers"),
        ("PP_LAST", "--decoder-last-pipeline-num-layers"),
    ):
        if facts.is_set(name):
            yield from _flags(facts.knobs[name], name, [(flag, facts.knobs[name].value)])


def optimizer_offload(facts: Facts) -> Iterator[Candidate]:
    """OPTIMIZER_OFFLOAD=1 keeps the optimizer's states and step on the host."""
    if facts.is_on("OPTIMIZER_OFFLOAD"):
        switches = (
            "--optimizer-cpu-offload",
            "--overlap-cpu-optimizer-d2h-h2d",
            "--use-precision-aware-optimizer",  # Megatron's offloaded optimizer is built on it
        )
        yield from _switches(facts, "OPTIMIZER_OFFLOAD", switches)


_LOW_PRECISION_OPTIMIZER = (
    ("--use-precision-aware-optimizer", "true"),
    ("--main-grads-dtype", "fp32"),
    ("--main-params-dtype", "fp32"),
    ("--exp-avg-dtype", "bf16"),
    ("--exp-avg-sq-dtype", "bf16"),
)


def precision(facts: Facts) -> Iterator[Candidate]:
    """PR=fp8 (block-wise where the release has it) and PR=mxfp8, with the optimizer's low-precision states; bf16 and fp32 need no more flags.

    --tp-comm-overlap is not derived from PR=bf16: it needs a Transformer Engine built with user buffers.
    """
    if not facts.is_set("PR") or facts.knobs["PR"].value not in ("fp8", "mxfp8"):
        return
    pr = facts.knobs["PR"]
    recipe = "blockwise" if pr.value == "fp8" else "mxfp8"
    if facts.accepts("--fp8-recipe", recipe):
        yield from _flags(pr, "PR", [("--fp8-recipe", recipe), ("--fp8-format", "e4m3")])
    else:  # a release before block-wise scaling: delayed scaling, whose gradients need e5m2's range
        yield from _flags(pr, "PR", [("--fp8-format", "hybrid")])
    if not facts.is_on(
        "OPTIMIZER_OFFLOAD"
    ):  # Megatron's offloaded optimizer cannot gather fp8 parameters
        gather = ["--fp8-param-gather"]
        if pr.value == "mxfp8":
            gather += [
                "--reuse-grad-buf-for-mxfp8-param-ag",
                "--overlap-grad-reduce",
                "--overlap-param-gather",
            ]
        yield from _switches(facts, "PR", gather)
    states = [
        pair for pair in _LOW_PRECISION_OPTIMIZER if facts.accepts(*pair) or pair[1] == "true"
    ]
    yield from _flags(pr, "PR", [pair for pair in states if facts.knows(pair[0])])
    newer, older = "--moe-router-padding-for-quantization", "--moe-router-padding-for-fp8"
    yield from _switches(facts, "PR", [newer if facts.knows(newer) else older])


def full_precision(facts: Facts) -> Iterator[Candidate]:
    """PR=fp32 takes --bf16 and --fp16 out again."""
    if facts.is_set("PR") and facts.knobs["PR"].value == "fp32":
        named = [flag for flag in ("--bf16", "--fp16") if flag in facts.args]
        yield from _flags(facts.knobs["PR"], "PR", [(flag, "false") for flag in named])


def expert_overlap(facts: Facts) -> Iterator[Candidate]:
    """A2A_OVERLAP=1 hides the expert all-to-all behind another micro-batch's computation (1F1B)."""
    if facts.is_on("A2A_OVERLAP"):
        switches = ("--delay-wgrad-compute", "--overlap-moe-expert-parallel-comm")
        yield from _switches(facts, "A2A_OVERLAP", switches)


def long_context(facts: Facts) -> Iterator[Candidate]:
    """Positions must reach SEQ_LEN; a YAML that says fewer is raised to it."""
    positions, length = facts.args.get("--max-position-embeddings"), facts.args.get("--seq-length")
    if length is None or whole(length.value) is None:
        return
    if positions is None or (
        (reached := whole(positions.value)) is not None and reached < int(length.value)
    ):
        origin = Origin(
            layer="flag" if length.origin.layer == "flag" else "environment",
            place=f"rule long_context, --seq-length {length.value}",
        )
        if positions is not None and positions.origin.layer in EXPLICIT:
            raise ConfigError(
                f"--max-position-embeddings {positions.value} ({positions.origin.place}) is smaller than "
                f"--seq-length {length.value} ({length.origin.place}); raise it or shorten SEQ_LEN"
            )
        yield Candidate(name="--max-position-embeddings", value=length.value, origin=origin)


def short_run(facts: Facts) -> Iterator[Candidate]:
    """A run of fewer steps than the YAML's warm-up warms up for a tenth of them: Megatron refuses a warm-up that never ends."""
    steps, warmup = facts.args.get("--train-iters"), facts.args.get("--lr-warmup-iters")
    if steps is None or warmup is None or None in (whole(steps.value), whole(warmup.value)):
        return
    if int(warmup.value) >= int(steps.value) and warmup.origin.layer not in EXPLICIT:
        origin = Origin(layer="environment", place=f"rule short_run, --train-iters {steps.value}")
        yield Candidate(name="--lr-warmup-iters", value=str(int(steps.value) // 10), origin=origin)


def profile(facts: Facts) -> Iterator[Candidate]:
    """PROFILE=1 or nsys: steps 23 to 25 of rank 0; torch: the same with PyTorch's profiler; memory: allocation history."""
    if not facts.is_set("PROFILE") or facts.knobs["PROFILE"].value == "0":
        return
    knob = facts.knobs["PROFILE"]
    if knob.value == "memory":
        pairs = [
            ("--record-memory-history", "true"),
            ("--memory-snapshot-path", f"{facts.run_dir}/profiles/memory.pickle"),
        ]
    else:
        start, end = _profiled_steps(facts)
        pairs = [
            ("--profile", "true"),
            ("--profile-step-start", start),
            ("--profile-step-end", end),
        ]
        pairs += [("--profile-ranks", "0")]
    if knob.value == "torch":
        pairs += [("--use-pytorch-profiler", "true")]
    yield from _flags(knob, "PROFILE", pairs)


def _profiled_steps(facts: Facts) -> tuple[str, str]:
    """23 to 25, or earlier in a run that is shorter than that."""
    steps = facts.args.get("--train-iters")
    last = (whole(steps.value) if steps is not None else None) or 25
    start = min(23, max(last - 2, 1))
    return str(start), str(min(start + 2, last))


def overlap_environment(facts: Facts) -> Iterator[Candidate]:
    """Stream and SM settings of NVIDIA's recipes, with and without the expert overlap."""
    values = ("32", "24", "24") if facts.is_on("A2A_OVERLAP") else ("1", "0", "0")
    names = (
        "CUDA_DEVICE_MAX_CONNECTIONS",
        "NVTE_FWD_LAYERNORM_SM_MARGIN",
        "NVTE_BWD_LAYERNORM_SM_MARGIN",
    )
    knob = facts.knobs["A2A_OVERLAP"]
    origin = _origin(knob, "A2A_OVERLAP") if facts.is_on("A2A_OVERLAP") else _RULE
    for name, value in zip(names, values, strict=True):
        yield Candidate(name=name, value=value, origin=origin)


def nvlink_domain(facts: Facts) -> Iterator[Candidate]:
    """GB200_CLUSTER=1 tells HybridEP how many GPUs one NVLink domain joins."""
    if facts.is_on("GB200_CLUSTER"):
        origin = _origin(facts.knobs["GB200_CLUSTER"], "GB200_CLUSTER")
        yield Candidate(name="NVLINK_DOMAIN_SIZE", value="72", origin=origin)


_RULE = Origin(layer="derived", place="moe_bench/arguments/rules.py")


def _origin(knob: Setting, name: str) -> Origin:
    layer = knob.origin.layer if knob.origin.layer in EXPLICIT else "derived"
    return Origin(layer=layer, place=f"rule of {says(name, knob)}")


def _flags(knob: Setting, name: str, pairs: Iterable[tuple[str, str]]) -> Iterator[Candidate]:
    for flag, value in pairs:
        yield Candidate(name=flag, value=value, origin=_origin(knob, name))


def _switches(facts: Facts, name: str, flags: Iterable[str]) -> Iterator[Candidate]:
    known = [(flag, "true") for flag in flags if facts.knows(flag)]
    yield from _flags(facts.knobs[name], name, known)


ARG_RULES = (
    dispatcher,
    virtual_pipeline,
    uneven_pipeline,
    optimizer_offload,
    precision,
    full_precision,
    expert_overlap,
    long_context,
    short_run,
    profile,
)
ENV_RULES = (overlap_environment, nvlink_domain)
