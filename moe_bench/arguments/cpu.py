"""What a machine without CUDA does instead of what was asked. Pure.

A Tiny preset, a rehearsal, or MOE_BENCH_DEVICE=cpu (the caller asks for the CPU) gets substitutions, each announced;
any other run that needs CUDA is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec

from moe_bench.config.knobs import says
from moe_bench.config.machine import Machine
from moe_bench.config.run import Origin, Overridden, ResolvedRun, Setting, Substitution
from moe_bench.errors import ConfigError

_RULE = Origin(layer="derived", place="what this machine lacks (moe_bench/arguments/cpu.py)")


class Feature(msgspec.Struct, frozen=True, kw_only=True):
    """Flags that ask for something only CUDA can do."""

    flags: tuple[str, ...]
    used: str
    reason: str
    of_te: bool = False
    """Whether a GPU without Transformer Engine lacks it as well."""


_NO_TE = "Transformer Engine computes on CUDA only"
FEATURES = (
    Feature(
        flags=(
            "--fp8-format",
            "--fp8-recipe",
            "--fp8-margin",
            "--fp8-amax-history-len",
            "--fp8-amax-compute-algo",
            "--fp8-param-gather",
            "--fp4-format",
            "--fp4-recipe",
            "--fp4-param-gather",
            "--reuse-grad-buf-for-mxfp8-param-ag",
            "--moe-router-padding-for-fp8",
            "--moe-router-padding-for-quantization",
            "--first-last-layers-bf16",
        ),
        used="bf16 (or fp32 with PR=fp32)",
        reason="a CPU has no FP8 or FP4 matrix units and " + _NO_TE,
        of_te=True,
    ),
    Feature(
        flags=(
            "--use-precision-aware-optimizer",
            "--main-grads-dtype",
            "--main-params-dtype",
            "--exp-avg-dtype",
            "--exp-avg-sq-dtype",
        ),
        used="optimizer states in fp32",
        reason="low-precision optimizer states need Transformer Engine's FusedAdam",
        of_te=True,
    ),
    Feature(
        flags=(
            "--moe-flex-dispatcher-backend",
            "--moe-enable-deepep",
            "--moe-deepep-num-sms",
            "--moe-hybridep-num-sms",
            "--moe-permute-fusion-into-hybridep",
        ),
        used="the all-to-all token dispatcher",
        reason="DeepEP and HybridEP are CUDA kernels over NVLink and RDMA",
    ),
    Feature(
        flags=(
            "--moe-permute-fusion",
            "--moe-router-fusion",
            "--apply-rope-fusion",
            "--cross-entropy-loss-fusion",
            "--cross-entropy-fusion-impl",
            "--use-te-activation-func",
            "--moe-use-legacy-grouped-gemm",
            "--mla-down-proj-fusion",
            "--use-grouped-gemm-for-shared-expert",
            "--use-transformer-engine-op-fuser",
        ),
        used="the same operations, unfused",
        reason=_NO_TE,
        of_te=True,
    ),
    Feature(
        flags=(
            "--enable-cuda-graph",
            "--external-cuda-graph",
            "--cuda-graph-impl",
            "--cuda-graph-scope",
            "--cuda-graph-modules",
            "--cuda-graph-warmup-steps",
            "--cuda-graph-num-warmup-steps",
            "--te-rng-tracker",
            "--optimizer-cuda-graph",
        ),
        used="no graphs",
        reason="CUDA graphs need CUDA",
        of_te=True,
    ),
    Feature(
        flags=(
            "--tp-comm-overlap",
            "--tp-comm-overlap-cfg",
            "--tp-comm-bootstrap-backend",
            "--delay-wgrad-compute",
            "--overlap-moe-expert-parallel-comm",
        ),
        used="communication that waits",
        reason="it runs on a CUDA stream beside the computation",
        of_te=True,
    ),
    Feature(
        flags=(
            "--optimizer-cpu-offload",
            "--overlap-cpu-optimizer-d2h-h2d",
            "--optimizer-offload-fraction",
            "--offload-optimizer-states",
            "--fine-grained-activation-offloading",
            "--offload-modules",
        ),
        used="no offloading",
        reason="there is no GPU memory to relieve",
        of_te=True,
    ),
    Feature(
        flags=(
            "--async-save",
            "--use-persistent-ckpt-worker",
            "--async-strategy",
            "--async-ckpt-cpu-priority",
            "--async-ckpt-io-priority",
            "--async-ckpt-use-cpu-shm",
        ),
        used="saving while training waits",
        reason="Megatron's writer is a process of its own, which takes tensors off a GPU",
    ),
    Feature(
        flags=("--use-flash-attn", "--attention-backend"),
        used="the reference attention",
        reason="flash attention is a CUDA kernel",
    ),
    Feature(
        flags=("--dsa-kernel-backend",),
        used="sparse attention in PyTorch",
        reason="its TileLang and cuDNN kernels need CUDA",
    ),
    Feature(
        flags=("--save-activations-interval", "--save-dgrads-interval"),
        used="no snapshots of them",
        reason="Megatron looks for Transformer Engine's layers to take them from",
        of_te=True,
    ),
    Feature(
        flags=("--log-energy",),
        used="no energy figures",
        reason="NVML tells what NVIDIA GPUs take",
    ),
    Feature(
        flags=("--record-memory-history", "--memory-snapshot-path"),
        used="the resident set of each rank, in the record",
        reason="the CUDA allocator's history needs CUDA",
    ),
    Feature(
        flags=(
            "--use-nccl-ub",
            "--nccl-ub",
            "--use-sharp",
            "--sharp-enabled-group",
            "--nccl-communicator-config-path",
            "--pipeline-model-parallel-comm-backend",
        ),
        used="gloo",
        reason="NCCL needs CUDA",
    ),
)
"""What is left out; a flag that an even stranger feature needs is Megatron's own to refuse."""

REFUSED = ("--use-megatron-fsdp", "--use-torch-fsdp2", "--use-custom-fsdp")
"""No stand-in would mean the same."""

_OFF = (
    "--no-masked-softmax-fusion",
    "--no-bias-gelu-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
    "--no-gradient-accumulation-fusion",
    "--no-persist-layer-norm",
)
"""Fused CUDA kernels that Megatron uses unless told not to."""


def for_machine(
    run: ResolvedRun, machine: Machine, *, asked: str | None, knows: Callable[[str], bool]
) -> ResolvedRun:
    """The run as this machine can do it; unchanged where there are CUDA and Transformer Engine.

    `asked`: MOE_BENCH_DEVICE of the caller. Raises ConfigError for a run that is neither Tiny nor a rehearsal, and for
    a PROFILE=nsys that cannot be.
    """
    _refuse_nsys(run, machine)
    if machine.device == "cuda":
        run = run if machine.nsys else _without_nsys(run)
        if not machine.transformer_engine:
            return _without_transformer_engine(run, knows)
        return run if machine.apex else _without_apex(run)
    for flag in REFUSED:
        if flag in run.args:
            raise ConfigError(
                f"{flag} ({run.args[flag].origin.place}) needs CUDA, and this machine has none; leave it out"
            )
    changed = _Changes(run)
    profile = changed.replace_profiler()
    for feature in FEATURES:
        changed.leave_out(feature)
    changed.replace_backends()
    for flag in _OFF:
        if knows(flag):
            changed.add(flag, "true")
    if changed.needed and not (run.rehearsal or run.model.startswith("Tiny-") or asked == "cpu"):
        raise ConfigError(_refusal(run, changed.needed))
    return replace(
        run,
        args=changed.args,
        env={**run.env, **profile},
        substitutions=(*run.substitutions, *changed.substitutions),
    )


def _refuse_nsys(run: ResolvedRun, machine: Machine) -> None:
    """PROFILE=nsys means Nsight Systems and nothing else; a rehearsal is told what stands in for it."""
    knob = run.knobs.get("PROFILE")
    if knob is None or knob.value != "nsys" or run.rehearsal:
        return
    lacks = "nsys is not on PATH here" if machine.device == "cuda" else "there is no CUDA to trace"
    if machine.device != "cuda" or not machine.nsys:
        raise ConfigError(
            f"{says('PROFILE', knob)}: {lacks}; use PROFILE=torch, or PROFILE=1 for the profiler that this machine has"
            + (", or install Nsight Systems" if machine.device == "cuda" else "")
        )


def _without_nsys(run: ResolvedRun) -> ResolvedRun:
    changed = _Changes(run)
    if "--profile" in run.args and "--use-pytorch-profiler" not in run.args:
        changed.add("--use-pytorch-profiler", "true")
        changed.announce("Nsight Systems", "PyTorch's profiler", "nsys is not on PATH here")
    return replace(
        run, args=changed.args, substitutions=(*run.substitutions, *changed.substitutions)
    )


_FUSION = "--no-gradient-accumulation-fusion"


def _without_apex(run: ResolvedRun) -> ResolvedRun:
    """Megatron's own linear layers, the output layer among them, would end the run at start."""
    changed = _Changes(run)
    changed.add(_FUSION, "true")
    if _FUSION not in run.args:
        changed.announce(
            "gradient accumulation in the GEMM (Megatron's default)",
            _FUSION,
            "Apex's fused_weight_gradient_mlp_cuda is not installed here",
        )
    return replace(
        run, args=changed.args, substitutions=(*run.substitutions, *changed.substitutions)
    )


def _without_transformer_engine(run: ResolvedRun, knows: Callable[[str], bool]) -> ResolvedRun:
    """A GPU without Transformer Engine: torch's own operations under NCCL, each thing left out announced."""
    changed = _Changes(run)
    absent = "Transformer Engine is not installed here"
    for feature in FEATURES:
        if feature.of_te:
            changed.leave_out(msgspec.structs.replace(feature, reason=absent))
    changed.use_plain_layers(absent)
    for flag in _OFF:
        if knows(flag):
            changed.add(flag, "true")
    return replace(
        run, args=changed.args, substitutions=(*run.substitutions, *changed.substitutions)
    )


def _refusal(run: ResolvedRun, needed: list[Substitution]) -> str:
    listed = "\n".join(f"  {one.asked}: {one.reason}" for one in needed)
    return (
        f"this machine has no CUDA, and {run.model} asks for what only CUDA can do:\n{listed}\n"
        f"use REHEARSE=1 to train a shrunken stand-in of {run.model} here, or MOE_BENCH_DEVICE=cpu to train it "
        "as it is with every one of these replaced"
    )


_PROFILES = {
    "1": ("torch", "Nsight Systems (PROFILE=1)", "PyTorch's profiler, a trace of each rank"),
    "nsys": ("torch", "Nsight Systems (PROFILE=nsys)", "PyTorch's profiler, a trace of each rank"),
    "torch": ("torch", "", ""),
    "memory": (
        "memory",
        "the CUDA allocator's history (PROFILE=memory)",
        "torch's allocations and the process's memory, for each rank",
    ),
}
"""PROFILE -> what the ranks profile, what was asked for, and what is used in its place."""
_PROFILER_FLAGS = (
    "--profile",
    "--profile-ranks",
    "--use-pytorch-profiler",
    "--record-memory-history",
    "--memory-snapshot-path",
)


class _Changes:
    """Flags as they are changed, and what has to be said of it."""

    def __init__(self, run: ResolvedRun) -> None:
        self.run = run
        self.args = dict(run.args)
        self.substitutions: list[Substitution] = []
        self.needed: list[Substitution] = []
        """Those that only a run which may be substituted can have."""

    def leave_out(self, feature: Feature) -> None:
        """Take the feature's flags out, where there are any."""
        asked = [flag for flag in feature.flags if flag in self.args]
        if asked:
            self.announce(_asked(self.args, asked), feature.used, feature.reason)
            for flag in asked:
                del self.args[flag]

    def replace_profiler(self) -> dict[str, Setting]:
        """PROFILE is this project's own profiler here, which needs no CUDA: the variable that starts it in the ranks.

        Megatron's flags for it are taken out, but for the steps they name.
        """
        knob = self.run.knobs.get("PROFILE")
        found = _PROFILES.get(knob.value) if knob is not None else None
        if found is None:
            if "--profile" in self.args and "--use-pytorch-profiler" not in self.args:
                self.add("--use-pytorch-profiler", "true")
                self.announce("Nsight Systems", "PyTorch's profiler", "nsys would find no CUDA")
            return {}
        kind, asked, used = found
        for flag in _PROFILER_FLAGS:
            self.args.pop(flag, None)
        if asked:
            said = Substitution(asked=asked, used=used, reason="there is no CUDA to trace")
            self.substitutions.append(said)
        return {"MOE_BENCH_PROFILE": Setting(value=kind, origin=_RULE)}

    def replace_backends(self) -> None:
        """gloo, Megatron's local layers, and weights made on the CPU."""
        self.use_plain_layers(_NO_TE)
        dispatcher = self.args.get("--moe-token-dispatcher-type")
        if dispatcher is not None and dispatcher.value == "flex":
            self.announce(
                "--moe-token-dispatcher-type flex",
                "alltoall",
                "flex moves tokens with CUDA kernels",
            )
            self.add("--moe-token-dispatcher-type", "alltoall")
        self.add("--distributed-backend", "gloo")
        self.add("--use-cpu-initialization", "true")

    def use_plain_layers(self, reason: str) -> None:
        """The local layers, which this project's reference layers stand in for."""
        impl = self.args.get("--transformer-impl")
        if impl is None or impl.value != "local":
            said = impl.value if impl else "transformer_engine (Megatron's default)"
            self.announce(f"--transformer-impl {said}", "local", reason)
        self.add("--transformer-impl", "local")

    def add(self, flag: str, value: str) -> None:
        """Set a flag, whatever it was."""
        before = self.args.get(flag)
        if before is not None and before.value == value:
            return
        lost: tuple[Overridden, ...] = ()
        if before is not None:
            lost = (Overridden(value=before.value, origin=before.origin), *before.overrode)
        self.args[flag] = Setting(value=value, origin=_RULE, overrode=lost)

    def announce(self, asked: str, used: str, reason: str) -> None:
        """Say what was asked for, what is used, and why."""
        self.substitutions.append(Substitution(asked=asked, used=used, reason=reason))
        self.needed.append(self.substitutions[-1])


def _asked(args: dict[str, Setting], flags: list[str]) -> str:
    return " ".join(args[flag].spelled(flag) for flag in flags)
