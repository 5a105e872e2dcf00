"""A family's table and one config.json -> every Megatron tensor, and the Hugging Face rows that make it. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from moe_bench.checkpoint.family import (
    Family,
    Part,
    Row,
    Sizes,
    View,
    holds,
    read_sizes,
    whole_number,
)
from moe_bench.errors import CheckpointError

MXFP4_BLOCK = 32
"""Values that share a scale."""
Dialect = Literal["te", "local", "both"]
LayerKeys = Literal["stacked", "per-layer"]


class Piece(NamedTuple):
    """Consecutive rows of a matrix, and where Hugging Face has them."""

    name: str
    """Hugging Face tensor."""
    first: int
    """First row within the Hugging Face matrix."""
    rows: int
    view: View | None
    """Set when the matrix is not simply the tensor's rows."""
    expert: int | None
    """Position on the tensor's first axis when one tensor holds all experts."""


class Matrix(NamedTuple):
    """One layer's (and one expert's) part of a Megatron tensor."""

    lead: tuple[int, ...]
    """Position on the leading axes (layer, expert)."""
    pieces: tuple[Piece, ...]
    """Rows from the top down."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MegatronTensor:
    """One tensor of a torch_dist checkpoint."""

    key: str
    aliases: tuple[str, ...]
    """Further keys that name the same bytes."""
    lead: tuple[int, ...]
    """Sizes of the leading axes: layers when keys are stacked, then experts."""
    shape: tuple[int, ...]
    """Shape of one matrix."""
    dtype: str | None
    """The type that Megatron demands; None follows the source."""
    matrices: tuple[Matrix, ...]

    @property
    def global_shape(self) -> tuple[int, ...]:
        """As torch_dist's metadata has it."""
        return self.lead + self.shape

    @property
    def num_elements(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.global_shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMap:
    """The whole model."""

    family: Family
    dialect: Dialect
    layer_keys: LayerKeys
    tensors: tuple[MegatronTensor, ...]
    hf_shapes: Mapping[str, tuple[int, ...]]
    """Shape that each Hugging Face tensor must have."""
    copies: Mapping[str, str]
    """Redundant Hugging Face tensor -> the tensor that it must equal."""


def map_model(
    family: Family,
    config: Mapping[str, Any],
    *,
    dialect: Dialect,
    layer_keys: LayerKeys,
    num_mtp: int,
) -> ModelMap:
    """`num_mtp`: multi-token-prediction layers that the weights have (`count_mtp`).

    Raises CheckpointError where config.json lacks a size, or asks for keys that the model cannot have.
    """
    if dialect != "te" and not family.local_spec:
        raise CheckpointError(
            f"--dialect {dialect}: Megatron's local layer spec cannot build family {family.name!r}; use --dialect te"
        )
    builder = _Builder(family, config, read_sizes(family, config), dialect, layer_keys, num_mtp)
    tensors = tuple(builder.build())
    return ModelMap(
        family=family,
        dialect=dialect,
        layer_keys=layer_keys,
        tensors=tensors,
        hf_shapes=builder.hf_shapes,
        copies=builder.copies(),
    )


def count_mtp(family: Family, config: Mapping[str, Any], names: Iterable[str]) -> int:
    """Multi-token-prediction layers that are really there.

    transformers drops them when it saves a model, and still writes their number into config.json.
    """
    if family.mtp_prefix:
        stem = f"{family.mtp_prefix}layers."
        return len(
            {name.removeprefix(stem).split(".")[0] for name in names if name.startswith(stem)}
        )
    stated = whole_number(config, family.mtp_layers) if family.mtp_layers else 0
    last = read_sizes(family, config).values["L"]
    first = family.layer_prefix.replace("{layer}", str(last))
    return stated if stated and any(name.startswith(first) for name in names) else 0


class _Builder:
    def __init__(
        self,
        family: Family,
        config: Mapping[str, Any],
        sizes: Sizes,
        dialect: Dialect,
        layer_keys: LayerKeys,
        num_mtp: int,
    ) -> None:
        self.family, self.config, self.sizes = family, config, sizes
        self.dialect, self.layer_keys = dialect, layer_keys
        self.num_layers = sizes.values["L"]
        self.num_mtp = num_mtp
        self.hf_shapes: dict[str, tuple[int, ...]] = {}

    def build(self) -> Iterator[MegatronTensor]:
        for row in self.family.model:
            if holds(row.when, self.config):
                yield self._tensor(row, (row.key,), [("", ())], ())
        yield from self._decoder()
        for index in range(self.num_mtp):
            yield from self._mtp(index)

    def _decoder(self) -> Iterator[MegatronTensor]:
        dense = [self.family.is_dense(self.config, layer) for layer in range(self.num_layers)]
        linear = [self.family.is_linear(self.config, layer) for layer in range(self.num_layers)]
        if self.layer_keys == "per-layer":
            for layer, is_dense in enumerate(dense):
                for row in self._layer_rows(is_dense=is_dense, is_linear=linear[layer]):
                    keys = self._keys(f"decoder.layers.{layer}.", row)
                    yield self._tensor(row, keys, [(self._prefix(layer), ())], ())
            return
        if len(set(dense)) > 1:
            raise CheckpointError(
                f"layers {[i for i, d in enumerate(dense) if d]} are dense and the others are MoE, so Megatron "
                "trains this model with a list as --moe-layer-freq and names each layer; use --layer-keys per-layer"
            )
        if any(linear):
            raise CheckpointError(
                f"layers {[i for i, d in enumerate(linear) if d]} have linear attention and the others have not, so "
                "Megatron names each layer; use --layer-keys per-layer"
            )
        for row in self._layer_rows(is_dense=dense[0]):
            places = [(self._prefix(layer), (layer,)) for layer in range(self.num_layers)]
            yield self._tensor(row, self._keys("decoder.layers.", row), places, (self.num_layers,))

    def _mtp(self, index: int) -> Iterator[MegatronTensor]:
        own = self.family.mtp_prefix
        place = (own or self._prefix(self.num_layers + index), ())
        for row in self.family.mtp:
            yield self._tensor(row, (f"mtp.layers.{index}.{row.key}",), [place], ())
        if own:
            place = (f"{own}layers.{index}.", ())
        for row in self._layer_rows(is_dense=False):
            keys = self._keys(f"mtp.layers.{index}.transformer_layer.", row)
            yield self._tensor(row, keys, [place], ())

    def _layer_rows(self, *, is_dense: bool, is_linear: bool = False) -> Iterator[Row]:
        attention = self.family.linear_attention if is_linear else self.family.attention
        rows = self.family.dense if is_dense else self.family.moe
        yield from (row for row in (*attention, *rows) if holds(row.when, self.config))

    def _prefix(self, layer: int) -> str:
        return self.family.layer_prefix.replace("{layer}", str(layer))

    def _keys(self, prefix: str, row: Row) -> tuple[str, ...]:
        names = {"te": (row.key,), "local": (row.local or row.key,), "both": (row.key, row.local)}
        return tuple(dict.fromkeys(prefix + name for name in names[self.dialect] if name))

    def _tensor(
        self,
        row: Row,
        keys: tuple[str, ...],
        places: Sequence[tuple[str, tuple[int, ...]]],
        lead: tuple[int, ...],
    ) -> MegatronTensor:
        shapes = [self.sizes.shape(part.shape) for part in row.parts]
        matrices: list[Matrix] = []
        for prefix, at in places:
            for expert in range(self.sizes.values["E"]) if row.experts else (None,):
                pieces = self._pieces(row, shapes, prefix, expert)
                matrices.append(Matrix(at if expert is None else (*at, expert), pieces))
        return MegatronTensor(
            key=keys[0],
            aliases=keys[1:],
            lead=(*lead, self.sizes.values["E"]) if row.experts else lead,
            shape=(sum(shape[0] for shape in shapes), *shapes[0][1:]),
            dtype=row.dtype,
            matrices=tuple(matrices),
        )

    def _pieces(
        self, row: Row, shapes: list[tuple[int, ...]], prefix: str, expert: int | None
    ) -> tuple[Piece, ...]:
        groups = self.sizes.number(row.groups) if row.groups else 1
        named = [
            (*self._hf(part, shape, prefix, expert), part, self._runs(part, shape))
            for part, shape in zip(row.parts, shapes, strict=True)
        ]
        pieces = []
        for group in range(groups):
            for name, index, part, runs in named:
                for first, rows in _portion(runs, group, groups):
                    pieces.append(Piece(name, first, rows, part.view, index))
        return tuple(pieces)

    def _runs(self, part: Part, shape: tuple[int, ...]) -> list[tuple[int, int]]:
        """(first row in the file's matrix, rows) of a part, in order."""
        if part.share is None:
            return [(0, shape[0])]
        groups, first, whole = map(
            self.sizes.number, (part.share.groups, part.share.first, part.share.whole)
        )
        return [(i * whole + first, shape[0] // groups) for i in range(groups)]

    def _hf(
        self, part: Part, shape: tuple[int, ...], prefix: str, expert: int | None
    ) -> tuple[str, int | None]:
        """The tensor's name and expert index; notes the shape that the file must have."""
        fused = expert is not None and "{e}" not in part.name
        name = prefix + part.name.replace("{e}", str(expert))
        if name not in self.hf_shapes:
            full = self._full_shape(part, shape)
            self.hf_shapes[name] = (self.sizes.values["E"], *full) if fused else full
        return name, expert if fused else None

    def _full_shape(self, part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
        view = part.view or View()
        rows = shape[0] * view.step
        if part.share is not None:
            rows = self.sizes.number(part.share.groups) * self.sizes.number(part.share.whole)
        full = (rows, *shape[1:])
        if view.packed:
            return (*full[:-1], full[-1] // MXFP4_BLOCK, MXFP4_BLOCK // 2)
        return tuple(reversed(full)) if view.transpose else full

    def copies(self) -> dict[str, str]:
        """Redundant tensors of the MTP layers, and a tied output layer's."""
        tied = bool(self.config.get("tie_word_embeddings"))
        found = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
        for index in range(self.num_mtp):
            prefix = self._prefix(self.num_layers + index)
            for name, original in self.family.copies.items():
                found[prefix + name] = found.get(original, original)
        return found


def _portion(runs: list[tuple[int, int]], group: int, groups: int) -> list[tuple[int, int]]:
    """The group's equal share of a part's rows."""
    if len(runs) == 1:
        first, rows = runs[0]
        return [(first + group * (rows // groups), rows // groups)]
    each = len(runs) // groups
    return runs[group * each : (group + 1) * each]
