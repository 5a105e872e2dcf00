"""What a model family is: which Hugging Face tensors make which Megatron tensor, as data.

A `Family` is a table that is read at a glance. Each `Row` says: this Megatron key holds these Hugging Face tensors, one
below the other. Sizes are words ("A*D H" is a matrix of heads x head size rows and hidden size columns), and each word
is defined once per family by the keys of config.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moe_bench.errors import CheckpointError

_LARGEST = 2**31
_MOST_EXPERTS = 2**20
"""Of all layers together; no model comes near either."""


@dataclass(frozen=True, slots=True)
class View:
    """How a matrix lies inside a Hugging Face tensor that is not simply its rows."""

    transpose: bool = False
    """The file holds the transposed matrix."""
    start: int = 0
    step: int = 1
    """Rows `start::step` of the (transposed) matrix."""
    packed: bool = False
    """The file holds MXFP4: 32 values of a row are 16 bytes of codes and, in the tensor `..._scales`, one exponent."""
    less_one: bool = False
    """Megatron stores the file's values less one, in float32 so that nothing is lost (a norm centred on zero)."""


@dataclass(frozen=True, slots=True)
class Share:
    """The rows of a tensor that belong to one part, when several parts alternate in it."""

    groups: str
    """Size word: how often the parts alternate."""
    first: str
    """Size word: rows of a group that come before this part's."""
    whole: str
    """Size word: rows of a whole group."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a Megatron matrix, and the Hugging Face tensor that holds them."""

    name: str
    """Name below the layer's prefix; `{e}` is the expert. Without `{e}` in an expert row, the tensor's first axis is the expert."""
    shape: str
    """Size words of the matrix (of one expert)."""
    view: View | None = None
    share: Share | None = None
    """Set when the tensor holds other parts' rows too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One Megatron tensor of a layer (or of the whole model)."""

    key: str
    """Key below the layer's prefix, as Transformer Engine's layer spec writes it."""
    parts: tuple[Part, ...]
    """Stacked along the first axis, in this order."""
    local: str | None = None
    """The key that the local layer spec uses, where it differs."""
    groups: str | None = None
    """Size word: the parts are interleaved in so many groups (grouped-query attention)."""
    experts: bool = False
    """One matrix for each of E experts; the expert is an axis of the Megatron tensor."""
    when: str | None = None
    """A key of config.json that must be truthy (`!key`: falsy) for the row to exist."""
    dtype: str | None = None
    """The type that Megatron stores, whatever the source's (F32 for the expert bias)."""


def one(key: str, name: str, shape: str, **more: Any) -> Row:
    """One tensor, copied as it is."""
    return Row(key=key, parts=(Part(name, shape),), **more)


def gate_up(key: str, gate: str, up: str, shape: str, **more: Any) -> Row:
    """A gated MLP's first linear: gate rows, then up rows. `shape` is that of each."""
    return Row(key=key, parts=(Part(gate, shape), Part(up, shape)), **more)


def qkv(key: str, names: str, columns: str, *, q: str = "A*D", **more: Any) -> Row:
    """Grouped-query attention: of each group its query heads, then k, then v. `names` contains `{q,k,v}`."""
    q_name, k_name, v_name = (names.replace("{q,k,v}", letter) for letter in "qkv")
    parts = (
        Part(q_name, f"{q} {columns}"),
        Part(k_name, f"G*D {columns}"),
        Part(v_name, f"G*D {columns}"),
    )
    return Row(key=key, parts=parts, groups="G", **more)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A model architecture's tables."""

    name: str
    architectures: tuple[str, ...]
    """As in config.json."""
    sizes: Mapping[str, str]
    """Size word -> where config.json has it: alternatives separated by ` | `, each a key or a formula of other words."""
    attention: tuple[Row, ...]
    """Rows of every layer (but the linear ones): norms and attention."""
    linear_attention: tuple[Row, ...] = ()
    """Rows that take their place in a layer whose attention is linear."""
    dense: tuple[Row, ...] = ()
    """Rows of a layer with a dense MLP."""
    moe: tuple[Row, ...] = ()
    """Rows of a layer with experts."""
    model: tuple[Row, ...] = ()
    """Rows outside the layers, with whole names."""
    mtp: tuple[Row, ...] = ()
    """Rows of a multi-token-prediction layer beside its transformer layer."""
    mtp_layers: str | None = None
    """Key of config.json: number of multi-token-prediction layers after the last one."""
    mtp_prefix: str | None = None
    """Set where those layers have a prefix of their own: `{prefix}layers.{i}.` for the transformer layer."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Name in an MTP layer -> whole name of the tensor that it must equal. Dropped on import, restored on export."""
    is_dense: Callable[[Mapping[str, Any], int], bool] = lambda _config, _layer: False
    """Whether a layer of this index has a dense MLP."""
    is_linear: Callable[[Mapping[str, Any], int], bool] = lambda _config, _layer: False
    """Whether a layer of this index has linear attention."""
    local_spec: bool = True
    """Whether Megatron's local layer spec can build the family."""
    per_layer_keys: bool = False
    """True when Megatron trains this family with a list as moe-layer-freq, and thus names each layer in the key."""
    layer_prefix: str = "model.layers.{layer}."
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    """Patterns of source tensors that hold no weight."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Megatron flag -> a size word, or a literal after `=`; see `megatron_flags`."""
    refuse: Mapping[str, str] = field(default_factory=dict)
    """Key of config.json that must be falsy -> why this family cannot be converted with it."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """Condition (as in `Row.when`; empty: always) -> what the user should know before training."""
    divergence: Callable[[Mapping[str, Any]], str | None] = lambda _config: None
    """Why Megatron and transformers compute different logits from the same weights, if with this config.json they do."""


def first_k_dense(config: Mapping[str, Any], layer: int) -> bool:
    """DeepSeek's and GLM's rule: the first `first_k_dense_replace` layers, then every `moe_layer_freq`-th is MoE."""
    frequency = whole_number(config, "moe_layer_freq") or 1
    return layer < whole_number(config, "first_k_dense_replace") or layer % frequency != 0


def sparse_step(config: Mapping[str, Any], layer: int) -> bool:
    """Qwen's rule: `mlp_only_layers`, and every layer that `decoder_sparse_step` skips."""
    step = whole_number(config, "decoder_sparse_step") or 1
    return layer in list_of(config, "mlp_only_layers") or (layer + 1) % step != 0


def linear_layer_types(config: Mapping[str, Any], layer: int) -> bool:
    """Qwen3-Next's rule: `layer_types`, or every layer but each `full_attention_interval`-th."""
    types = list_of(config, "layer_types")
    if types and layer >= len(types):
        raise CheckpointError(
            f"config.json: layer_types names {len(types)} layers, too few for layer {layer}"
        )
    if types:
        return bool(types[layer] == "linear_attention")
    return (layer + 1) % (whole_number(config, "full_attention_interval") or 4) != 0


def group_scores(experts: int, config: Mapping[str, Any]) -> str | None:
    """Of routers that choose groups of experts first: whether both sides score a group by as many experts."""
    groups, chosen, topk = (
        whole_number(config, key) for key in ("n_group", "topk_group", "num_experts_per_tok")
    )
    if not groups or not chosen or groups == chosen or topk // chosen == experts:
        return None
    return (
        f"a group of experts is scored by its best {experts} in transformers and by its best {topk // chosen} in Megatron "
        f"(num_experts_per_tok {topk} / topk_group {chosen}; megatron/core/transformer/moe/moe_utils.py "
        "group_limited_topk): logits differ although the weights are the same"
    )


@dataclass(frozen=True, slots=True)
class Sizes:
    """Values of a family's size words for one config.json."""

    values: Mapping[str, int]

    def shape(self, words: str) -> tuple[int, ...]:
        """`"A*D H"` -> (heads x head size, hidden size)."""
        return tuple(self.number(word) for word in words.split())

    def number(self, word: str) -> int:
        """Value of a word, a product, a quotient or a sum of them, without spaces."""
        return sum(self._product(term) for term in word.split("+"))

    def _product(self, term: str) -> int:
        dividend, *divisors = term.split("/")
        value = math.prod(self._atom(atom) for atom in dividend.split("*"))
        for divisor in divisors:
            value //= self._atom(divisor)
        return value

    def _atom(self, atom: str) -> int:
        return int(atom) if atom.isdecimal() else self.values[atom]


def read_sizes(family: Family, config: Mapping[str, Any]) -> Sizes:
    """Evaluate the size words in order. Raises CheckpointError naming the key that config.json lacks."""
    values: dict[str, int] = {}
    for word, alternatives in family.sizes.items():
        values[word] = _size(family, config, word, alternatives.split(" | "), Sizes(values))
    if values["L"] * values.get("E", 1) > _MOST_EXPERTS:
        raise CheckpointError(
            f"config.json describes {values['L']} layers of {values.get('E', 1)} experts: more than any model has"
        )
    return Sizes(values)


def _size(
    family: Family, config: Mapping[str, Any], word: str, alternatives: list[str], known: Sizes
) -> int:
    for choice in alternatives:
        if re.fullmatch(r"[a-z][a-z0-9_]*", choice):
            value = whole_number(config, choice)
            if value:
                return value
            if config.get(choice) is None:
                continue
            raise CheckpointError(f"config.json: {choice} = 0 is not a positive whole number")
        return known.number(choice)
    raise CheckpointError(
        f"config.json has none of {', '.join(alternatives)} (the {word} of family {family.name!r})"
    )


def whole_number(config: Mapping[str, Any], key: str) -> int:
    """A count in config.json, 0 where it is absent or null. Raises CheckpointError for anything else."""
    value = config.get(key)
    if value is None:
        return 0
    if type(value) is not int or not 0 <= value < _LARGEST:
        raise CheckpointError(
            f"config.json: {key} = {repr(value)[:60]} is not a positive whole number, or larger than any model's"
        )
    return value


def table_of(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A table in config.json, empty where it is absent or null. Raises CheckpointError for anything else."""
    value = config.get(key)
    if not isinstance(value, dict | None):
        raise CheckpointError(f"config.json: {key} = {repr(value)[:60]} is not a table")
    return value or {}


def list_of(config: Mapping[str, Any], key: str) -> Sequence[Any]:
    """A list in config.json, empty where it is absent or null. Raises CheckpointError for anything else."""
    value = config.get(key)
    if not isinstance(value, list | None):
        raise CheckpointError(f"config.json: {key} = {repr(value)[:60]} is not a list")
    return value or ()


def holds(when: str | None, config: Mapping[str, Any]) -> bool:
    """Whether a row's condition is met."""
    if not when:
        return True
    return not config.get(when[1:]) if when.startswith("!") else bool(config.get(when))
