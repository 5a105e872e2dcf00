"""Which decoder layers each (pipeline stage, virtual stage) holds, as Megatron divides them. Pure.

Follows megatron/core/transformer/transformer_block.py (get_num_layers_to_build) and pipeline_parallel_layer_layout.py
of Megatron-Core 0.19. Raises ValueError where Megatron would refuse; the caller names the user's setting.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

import msgspec

_LETTERS = {"E": "embedding", "t": "decoder", "m": "mtp", "L": "loss"}
_GROUP = re.compile(r"\(([^)]+)\)\*(\d+)")
_LETTER = re.compile(r"(.)\*(\d+)")


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One virtual stage of one pipeline rank."""

    pp_rank: int
    vpp_rank: int
    layers: tuple[int, ...] = ()
    """1-based decoder layers, as Megatron numbers them."""
    embedding: bool = False
    mtp_layers: int = 0
    loss: bool = False


class Pipeline(msgspec.Struct, frozen=True, kw_only=True):
    """Every stage, in the order in which a micro-batch visits them."""

    stages: tuple[Stage, ...]
    pp: int
    vpp: int

    @property
    def num_layers(self) -> int:
        """Decoder layers of the whole model."""
        return sum(len(stage.layers) for stage in self.stages)

    def layers_of_rank(self, pp_rank: int) -> tuple[int, ...]:
        """Decoder layers that a pipeline rank holds, over all its virtual stages."""
        held = (stage.layers for stage in self.stages if stage.pp_rank == pp_rank)
        return tuple(layer for layers in held for layer in layers)

    def table(self) -> str:
        """One line a pipeline rank: what it holds, virtual stages separated by `|`."""
        lines = []
        for pp_rank in range(self.pp):
            held = " | ".join(_words(stage) for stage in self.stages if stage.pp_rank == pp_rank)
            lines.append(f"  stage {pp_rank}: {held}")
        return "\n".join(lines)

    def layout(self) -> str:
        """The same division as a --pipeline-model-parallel-layout string."""
        return "|".join(_letters(stage) for stage in self.stages)


def even(
    num_layers: int,
    *,
    pp: int,
    vpp: int = 1,
    mtp_layers: int = 0,
    count_embedding: bool = False,
    count_loss: bool = False,
) -> Pipeline:
    """Equal stages. `count_embedding`, `count_loss`: each takes the place of one layer in its stage.

    Raises ValueError when the layers do not divide.
    """
    counted = num_layers + count_embedding + count_loss
    if counted % pp:
        raise ValueError(
            f"{_counted(num_layers, counted)} do not divide evenly over {pp} pipeline stages"
        )
    if counted // pp % vpp:
        raise ValueError(
            f"{counted // pp} layers of a pipeline stage do not divide over {vpp} virtual stages"
        )
    counts = [counted // pp // vpp] * (pp * vpp)
    counts[0] -= count_embedding
    counts[-1] -= count_loss
    if min(counts) < 0:
        raise ValueError(f"a stage is left with fewer than no layers: {counts}")
    return _pipeline(counts, pp=pp, vpp=vpp, mtp_layers=mtp_layers)


def _counted(num_layers: int, counted: int) -> str:
    if counted == num_layers:
        return f"{num_layers} layers"
    return f"{num_layers} layers and the embedding or loss counted as one ({counted})"


def uneven(
    num_layers: int,
    *,
    pp: int,
    vpp: int = 1,
    first: int | None = None,
    last: int | None = None,
    mtp_layers: int = 0,
) -> Pipeline:
    """`first` and `last` layers in the outer stages, the rest equal. None: that stage is like the middle ones.

    Raises ValueError when the layers do not add up or do not divide.
    """
    middle_stages = pp - (first is not None) - (last is not None)
    left = num_layers - (first or 0) - (last or 0)
    if middle_stages < 0:
        raise ValueError(
            "one pipeline stage cannot be both the first and the last with sizes of their own"
        )
    if left < 0 or (middle_stages == 0 and left):
        raise ValueError(
            f"the first and last stage hold {(first or 0) + (last or 0)} of {num_layers} layers"
        )
    if (
        middle_stages == 0 and vpp > 1
    ):  # core 0.11 to 0.19, transformer_layer.py: it divides by the stages between
        raise ValueError(
            "Megatron lays out virtual stages over the stages between the first and the last, and there are none; "
            "give only one of the two a size of its own"
        )
    if middle_stages and left % middle_stages:
        raise ValueError(
            f"the {left} layers left do not divide evenly over the {middle_stages} other stages"
        )
    middle = left // middle_stages if middle_stages else 0
    by_rank = [middle] * pp
    if first is not None:
        by_rank[0] = first
    if last is not None:
        by_rank[-1] = last
    for rank, count in enumerate(by_rank):
        if count % vpp:
            raise ValueError(
                f"the {count} layers of stage {rank} do not divide over {vpp} virtual stages"
            )
    counts = [by_rank[rank] // vpp for _ in range(vpp) for rank in range(pp)]
    return _pipeline(counts, pp=pp, vpp=vpp, mtp_layers=mtp_layers)


def _pipeline(counts: Sequence[int], *, pp: int, vpp: int, mtp_layers: int) -> Pipeline:
    stages = []
    layer = 1
    for index, count in enumerate(counts):
        is_last = index == len(counts) - 1
        stages.append(
            Stage(
                pp_rank=index % pp,
                vpp_rank=index // pp,
                layers=tuple(range(layer, layer + count)),
                embedding=index == 0,
                mtp_layers=mtp_layers if is_last else 0,
                loss=is_last,
            )
        )
        layer += count
    return Pipeline(stages=tuple(stages), pp=pp, vpp=vpp)


def from_layout(text: str, *, pp: int) -> Pipeline:
    """A --pipeline-model-parallel-layout string such as `Et*2|(tt|)*30m|L`.

    Raises ValueError for a letter Megatron does not know, or stages that do not divide by `pp`.
    """
    written = unrolled(text).split("|")
    for stage in written:
        unknown = set(stage) - _LETTERS.keys()
        if unknown:
            raise ValueError(
                f"{sorted(unknown)[0]!r} is none of E (embedding), t (decoder layer), m (MTP), L (loss), |, *, ()"
            )
    if len(written) % pp:
        raise ValueError(f"its {len(written)} stages are not a multiple of PP={pp}")
    stages = []
    layer = 1
    for index, letters in enumerate(written):
        count = letters.count("t")
        stages.append(
            Stage(
                pp_rank=index % pp,
                vpp_rank=index // pp,
                layers=tuple(range(layer, layer + count)),
                embedding="E" in letters,
                mtp_layers=letters.count("m"),
                loss="L" in letters,
            )
        )
        layer += count
    _check_ends("".join(written))
    return Pipeline(stages=tuple(stages), pp=pp, vpp=len(written) // pp)


def unrolled(text: str) -> str:
    """Without commas, `(ab|)*2` and `t*3` written out."""
    text = text.replace(",", "")
    for pattern in (_GROUP, _LETTER):
        written = sum(len(match[1]) * int(match[2][:_DIGITS]) for match in pattern.finditer(text))
        if written + len(text) > _LONGEST:
            raise ValueError(f"it is longer than {_LONGEST} letters when written out")
        text = pattern.sub(lambda match: match[1] * int(match[2]), text)
    return text


_LONGEST, _DIGITS = 100_000, 9


def _check_ends(letters: str) -> None:
    for letter, where, found in (("E", "first", letters[:1]), ("L", "last", letters[-1:])):
        name = f"{letter} ({_LETTERS[letter]})"
        if letters.count(letter) != 1:
            raise ValueError(
                f"{name} must stand in it exactly once, not {letters.count(letter)} times"
            )
        if found != letter:
            raise ValueError(f"{name} must come {where}")
    if "t" in letters[letters.find("m") :] and "m" in letters:
        raise ValueError("m (MTP) must come after every t (decoder layer)")


def _words(stage: Stage) -> str:
    parts = ["embedding"] if stage.embedding else []
    if stage.layers:
        first, last = stage.layers[0], stage.layers[-1]
        span = f"layer {first}" if first == last else f"layers {first}-{last}"
        parts.append(f"{span} ({len(stage.layers)})")
    if stage.mtp_layers:
        parts.append(f"MTP x{stage.mtp_layers}")
    if stage.loss:
        parts.append("loss")
    return ", ".join(parts) or "nothing"


def _letters(stage: Stage) -> str:
    letters = (
        "E" * stage.embedding + "t" * len(stage.layers) + "m" * stage.mtp_layers + "L" * stage.loss
    )
    runs = ((letter, len(list(group))) for letter, group in groupby(letters))
    return "".join(letter if count == 1 else f"{letter}*{count}" for letter, count in runs)
