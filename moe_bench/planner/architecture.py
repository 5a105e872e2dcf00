"""The sizes of a GPT model, read from Megatron's flags with Megatron's defaults. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moe_bench.config.run import Setting
from moe_bench.errors import ArgumentsError
from moe_bench.topology.layer_pattern import layer_pattern

_Rule = Callable[[int, int], bool]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentAttention:
    """Multi-latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1)."""

    q_rank: int | None
    """Width of the compressed queries; None where they are not compressed."""
    kv_rank: int
    qk_head_dim: int
    """Channels of a head that are not rotated."""
    rotary_head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Indexer:
    """What chooses the keys of sparse latent attention (core/transformer/experimental_attention_variant/dsa.py, 0.19.2)."""

    rank: int
    """Width of what its queries are made of: the compressed queries, or the layer's input."""
    heads: int
    head_dim: int
    topk: int
    """Keys that a query attends to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeltaAttention:
    """Gated delta net (arXiv:2412.06464)."""

    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Experts:
    """What an expert layer holds."""

    count: int
    topk: int
    width: int
    """Hidden width of one routed expert."""
    shared_width: int
    """Hidden width of all shared experts together; 0 for none."""
    shared_gate: bool
    latent_width: int
    """Channels of a token that routed experts take and give; 0 for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """Everything that decides how many parameters and operations a model has."""

    layers: int
    hidden: int
    dense_width: int
    """Hidden width of a dense feed-forward layer."""
    heads: int
    kv_groups: int
    head_dim: int
    vocab: int
    """Rows of the embedding, padded."""
    seq_length: int
    is_expert_layer: tuple[bool, ...]
    """For each layer: experts, or a dense feed-forward layer."""
    is_delta_layer: tuple[bool, ...]
    """For each layer: gated delta net, or softmax attention."""
    window: int | None
    """Tokens a windowed layer attends to; None without windows."""
    is_windowed_layer: tuple[bool, ...]
    experts: Experts | None
    latent: LatentAttention | None
    is_indexed_layer: tuple[bool, ...]
    """For each layer: it chooses keys itself. Other layers of sparse attention take those of a layer before."""
    indexer: Indexer | None
    delta: DeltaAttention | None
    gated_unit: bool
    linear_bias: bool
    """Every linear layer and the router have a bias."""
    qkv_bias: bool
    qk_norm: bool
    output_gate: bool
    sinks: bool
    """A learned attention sink for each head."""
    tied: bool
    mtp_layers: int

    def indexer_of(self, index: int) -> Indexer | None:
        """The layer's own; None where it has none, or takes the keys that a layer before chose."""
        return self.indexer if self.is_indexed_layer[index] else None

    @classmethod
    def of(cls, args: Mapping[str, Setting]) -> Architecture:
        """Raises ArgumentsError where a needed flag is missing or unreadable."""
        flags = _Flags({name: setting.value for name, setting in args.items()})
        layers, hidden = flags.number("--num-layers"), flags.number("--hidden-size")
        heads = flags.number("--num-attention-heads")
        gated = flags.on("--swiglu") or flags.on("--quick-geglu")
        dense = flags.number("--ffn-hidden-size", _default_width(hidden, flags))
        bias = not flags.on("--disable-bias-linear")
        window = flags.text("--window-size")
        return cls(
            layers=layers,
            hidden=hidden,
            dense_width=dense,
            heads=heads,
            kv_groups=flags.number("--num-query-groups", 1)
            if flags.on("--group-query-attention")
            else heads,
            head_dim=flags.number("--kv-channels", hidden // heads),
            vocab=_padded_vocab(flags),
            seq_length=flags.number("--seq-length", 0),
            is_expert_layer=_expert_layers(flags, layers),
            is_delta_layer=_delta_layers(flags, layers),
            window=1 + int(window.strip("() ").split(",")[0]) if window else None,
            is_windowed_layer=_windowed_layers(flags, layers),
            experts=_experts(flags, dense),
            latent=_latent(flags),
            is_indexed_layer=_indexed_layers(flags, layers),
            indexer=_indexer(flags, hidden),
            delta=_delta(flags),
            gated_unit=gated,
            linear_bias=bias,
            qkv_bias=bias or flags.on("--add-qkv-bias"),
            qk_norm=flags.on("--qk-layernorm"),
            output_gate=flags.on("--attention-output-gate"),
            sinks=flags.text("--softmax-type") == "learnable",
            tied=not flags.on("--untie-embeddings-and-output-weights"),
            mtp_layers=flags.number("--mtp-num-layers", 0),
        )


class _Flags:
    """Values by flag, as numbers, switches and texts."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def number(self, flag: str, default: int | None = None) -> int:
        text = self._values.get(flag)
        if text is None and default is not None:
            return default
        if text is None:
            raise ArgumentsError(
                f"{flag} is not set, so the model's size is not known; set it in its YAML"
            )
        try:
            return int(text)
        except ValueError as error:
            raise ArgumentsError(f"{flag} {text} is not a whole number") from error

    def on(self, flag: str) -> bool:
        return self._values.get(flag, "false") == "true"

    def text(self, flag: str) -> str:
        return self._values.get(flag, "")


def _default_width(hidden: int, flags: _Flags) -> int:
    """Megatron's, where --ffn-hidden-size is missing (training/arguments.py, validate_args)."""
    if flags.on("--swiglu"):
        return int((4 * hidden * 2 / 3) / 64) * 64
    return 4 * hidden


def _padded_vocab(flags: _Flags) -> int:
    multiple = flags.number("--make-vocab-size-divisible-by", 128) * flags.number(
        "--tensor-model-parallel-size", 1
    )
    return math.ceil(flags.number("--vocab-size") / multiple) * multiple


def _experts(flags: _Flags, dense_width: int) -> Experts | None:
    if not flags.number("--num-experts", 0):
        return None
    return Experts(
        count=flags.number("--num-experts"),
        topk=flags.number("--moe-router-topk", 2),
        width=flags.number("--moe-ffn-hidden-size", dense_width),
        shared_width=flags.number("--moe-shared-expert-intermediate-size", 0),
        shared_gate=flags.on("--moe-shared-expert-gate"),
        latent_width=flags.number("--moe-latent-size", 0),
    )


def _latent(flags: _Flags) -> LatentAttention | None:
    if not flags.on("--multi-latent-attention"):
        return None
    return LatentAttention(
        q_rank=flags.number("--q-lora-rank", 0) or None,
        kv_rank=flags.number("--kv-lora-rank", 32),
        qk_head_dim=flags.number("--qk-head-dim", 128),
        rotary_head_dim=flags.number("--qk-pos-emb-head-dim", 64),
        v_head_dim=flags.number("--v-head-dim", 128),
    )


def _indexer(flags: _Flags, hidden: int) -> Indexer | None:
    if flags.text("--experimental-attention-variant") != "dsa":
        return None
    return Indexer(
        rank=flags.number("--q-lora-rank", 0) or hidden,
        heads=flags.number("--dsa-indexer-n-heads"),
        head_dim=flags.number("--dsa-indexer-head-dim"),
        topk=flags.number("--dsa-indexer-topk"),
    )


def _indexed_layers(flags: _Flags, layers: int) -> tuple[bool, ...]:
    """As `is_dsa_skip_topk_layer` (core/transformer/experimental_attention_variant/dsa.py, 0.19.2)."""
    if flags.text("--experimental-attention-variant") != "dsa":
        return (False,) * layers
    every = max(flags.number("--dsa-indexer-topk-freq", 1), 1)
    first = max(flags.number("--dsa-indexer-skip-topk-offset", 0), 1)
    return tuple(max(layer - first, 0) % every == 0 for layer in range(1, layers + 1))


def _delta(flags: _Flags) -> DeltaAttention | None:
    if flags.text("--experimental-attention-variant") != "gated_delta_net":
        return None
    return DeltaAttention(
        key_heads=flags.number("--linear-num-key-heads", 16),
        value_heads=flags.number("--linear-num-value-heads", 32),
        key_head_dim=flags.number("--linear-key-head-dim", 128),
        value_head_dim=flags.number("--linear-value-head-dim", 128),
        conv_kernel=flags.number("--linear-conv-kernel-dim", 4),
    )


def _expert_layers(flags: _Flags, layers: int) -> tuple[bool, ...]:
    """--moe-layer-freq: N puts experts into every N-th layer, counted from the first."""
    if not flags.number("--num-experts", 0):
        return (False,) * layers
    return _pattern("--moe-layer-freq", flags, layers, lambda index, every: index % every == 0)


def _delta_layers(flags: _Flags, layers: int) -> tuple[bool, ...]:
    """--linear-attention-freq: N keeps softmax attention in every N-th layer, counted from the N-th."""
    if _delta(flags) is None:
        return (False,) * layers
    return _pattern(
        "--linear-attention-freq", flags, layers, lambda index, every: (index + 1) % every != 0
    )


def _windowed_layers(flags: _Flags, layers: int) -> tuple[bool, ...]:
    """--window-attn-skip-freq: N attends in full in every N-th layer; without it every layer is windowed."""
    if not flags.text("--window-size"):
        return (False,) * layers
    if not flags.text("--window-attn-skip-freq"):
        return (True,) * layers
    return _pattern(
        "--window-attn-skip-freq", flags, layers, lambda index, every: (index + 1) % every != 0
    )


def _pattern(flag: str, flags: _Flags, layers: int, rule: _Rule) -> tuple[bool, ...]:
    text = flags.text(flag) or "1"
    if "[" not in text:
        every = flags.number(flag, 1)
        return tuple(rule(index, every) for index in range(layers))
    found = tuple(bool(one) for one in layer_pattern(text, flag=flag))
    if len(found) != layers:
        raise ArgumentsError(
            f"{flag} {text} speaks of {len(found)} layers, --num-layers of {layers}; make them equal"
        )
    return found
