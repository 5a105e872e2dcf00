"""The layouts in which a converted model is tried on this machine: ranks, Megatron flags, memory. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moe_bench.checkpoint.torch_dist import TorchDist, model_keys
from moe_bench.errors import CheckpointError
from moe_bench.topology.layout import smallest_world
from moe_bench.units import format_bytes, format_count

_FLAGS = {
    "TP": "--tensor-model-parallel-size",
    "PP": "--pipeline-model-parallel-size",
    "CP": "--context-parallel-size",
    "EP": "--expert-model-parallel-size",
    "ETP": "--expert-tensor-parallel-size",
}
_SPELLED = re.compile(r"(ETP|VPP|TP|PP|CP|EP)(\d+)")
_BYTES = 4
"""Of a parameter: both sides compute in float32."""
_RANK_BYTES = 400 << 20
"""A rank that holds no tensor (measured), less what forked ranks share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One way to divide the model."""

    name: str
    sizes: Mapping[str, int]

    def size(self, dimension: str) -> int:
        """1 where it was not named."""
        return self.sizes.get(dimension, 1)

    @property
    def world_size(self) -> int:
        """Fewest ranks."""
        tp, cp, pp, ep, etp = (self.size(name) for name in ("TP", "CP", "PP", "EP", "ETP"))
        return smallest_world(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp)

    def flags(self, num_layers: int) -> list[str]:
        """Megatron's. Raises CheckpointError when there are fewer layers than stages."""
        argv = [word for name, flag in _FLAGS.items() for word in (flag, str(self.size(name)))]
        if self.size("TP") > 1:
            argv.append("--sequence-parallel")
        stages = self.size("PP") * self.size("VPP")
        if stages == 1:
            return argv
        if num_layers < stages:
            raise CheckpointError(
                f"--layout {self.name}: {num_layers} layers do not fill {stages} pipeline stages"
            )
        return [*argv, "--pipeline-model-parallel-layout", _pipeline(num_layers, stages)]


def _pipeline(num_layers: int, stages: int) -> str:
    """Layers as evenly as they go, the embedding first and the loss last: `Ett|tt|tL`."""
    counts = [num_layers // stages + (i < num_layers % stages) for i in range(stages)]
    return "E" + "|".join("t" * count for count in counts) + "L"


def parse_layout(text: str) -> Layout:
    """`1`, `EP2`, `TP2EP2`, `PP2VPP2`. Raises CheckpointError for anything else."""
    named = _SPELLED.findall(text)
    sizes = {name: int(size) for name, size in named}
    whole = "".join(name + size for name, size in named) == text and len(named) == len(sizes)
    if text != "1" and not (named and whole and min(sizes.values()) > 0):
        raise CheckpointError(
            f"--layout {text!r}: expected 1, or sizes such as EP2, PP2 or TP2EP2, of TP, PP, VPP, CP, EP and ETP"
        )
    if sizes.get("VPP", 1) > 1 and sizes.get("PP", 1) == 1:
        raise CheckpointError(f"--layout {text}: VPP needs PP, as in PP2VPP2")
    return Layout(name=text, sizes=sizes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """Parameters of a checkpoint."""

    routed: int
    """In routed experts, which EP divides."""
    others: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.routed + self.others

    def megatron_bytes(self, layout: Layout) -> int:
        """Of all ranks of a layout together."""
        pp, world = layout.size("PP"), layout.world_size
        others = self.others / (layout.size("TP") * pp)
        routed = self.routed / (layout.size("ETP") * layout.size("EP") * pp)
        return int(world * (_BYTES * (others + routed) + _RANK_BYTES))


def weight_of(checkpoint: TorchDist) -> Weight:
    """Counts each tensor once, whichever keys name it."""
    sizes = {}
    for key in model_keys(checkpoint):
        entry = checkpoint.tensors[key]
        if entry.boxes:
            number = 1
            for size in entry.shape:
                number *= size
            sizes[entry.boxes[0].file, entry.boxes[0].offset] = (".experts.experts." in key, number)
    routed = sum(number for is_routed, number in sizes.values() if is_routed)
    return Weight(routed=routed, others=sum(n for _, n in sizes.values()) - routed)


def check_fits(weight: Weight, layouts: Sequence[Layout], available: int) -> None:
    """Raises CheckpointError with the numbers when comparing logits needs more than `available` bytes of memory."""
    needed = {"transformers": weight.total * _BYTES + _RANK_BYTES}
    needed |= {f"Megatron in {layout.name}": weight.megatron_bytes(layout) for layout in layouts}
    worst = max(needed, key=lambda name: needed[name])
    if needed[worst] > available:
        raise CheckpointError(
            f"--logits: {format_count(weight.total)} parameters in float32 need {format_bytes(needed[worst])} of memory "
            f"({worst}), and {format_bytes(available)} are free; run it on a larger machine, or without --logits: "
            "the weights themselves are compared whatever their size"
        )
