"""Bodies of test_features.py: each feature on one rank against an independent plain reference."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state as mpu
from megatron.core.activations import quick_gelu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random as tensor_parallel_random
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from moe_bench.mcore.cpu.attention import CoreAttention
from moe_bench.mcore.cpu.chunks import leaving_sorted_chunks
from moe_bench.mcore.cpu.delta_net import causal_conv1d, l2norm
from moe_bench.mcore.cpu.experts import grouped_linear, weighted_swiglu
from moe_bench.mcore.cpu.norm import Norm
from moe_bench.mcore.cpu.optimizer import FusedAdam, l2_norm
from moe_bench.mcore.cpu.rope import rotating_in_place
from moe_bench.mcore.cpu.sparse_attention import rotate_activation
from moe_bench.mcore.cpu.spec import CpuSpecProvider
from tests.ranks import layer_models as models
from tests.ranks.layer_architectures import GQA, MLA, SPARSE_MLA


def compare(actual: Any, expected: Any, *inputs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Outputs of the two functions and the gradients of their inputs agree."""
    outcomes = []
    for function in (actual, expected):
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
        output = function(*leaves)
        weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
        (output.float() * weights).sum().backward()
        outcomes.append([output, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    for found, wanted in zip(*outcomes, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(
            found, wanted, rtol=tolerance, atol=tolerance * max(scale, 1e-12)
        )


def rms_norm_equals_its_formula() -> None:
    """With and without gamma around zero."""
    models.start_groups()
    for zero_centered in (False, True):
        norm = Norm(models.config(**GQA, layernorm_zero_centered_gamma=zero_centered), 32, eps=1e-3)
        torch.nn.init.uniform_(norm.weight)

        def formula(x: torch.Tensor, norm: Norm = norm, add: int = int(zero_centered)) -> Any:
            return x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (norm.weight + add)

        x = torch.randn(5, 3, 32)
        compare(norm, formula, x)
        own = norm.weight.grad.clone()
        norm.weight.grad = None
        compare(formula, formula, x)
        torch.testing.assert_close(own, norm.weight.grad / 2 + own / 2, rtol=1e-3, atol=1e-3)


def layer_norm_equals_torchs() -> None:
    """The other normalization Megatron offers."""
    models.start_groups()
    norm = Norm(models.config(**GQA, normalization="LayerNorm"), 32, eps=1e-5)
    reference = torch.nn.LayerNorm(32, eps=1e-5)
    compare(norm, reference, torch.randn(5, 3, 32))


def attention(heads: int = 4, groups: int = 2, **changes: Any) -> CoreAttention:
    """Core attention of one rank, with 8 channels a head."""
    models.start_groups()
    settings = models.config(
        num_attention_heads=heads, num_query_groups=groups, kv_channels=8, **changes
    )
    return CoreAttention(settings, 1, AttnMaskType.causal)


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, allowed: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention with loops over batch and heads; q: [s, b, n, d], allowed: [s, S] -> [s, b, n * v]."""
    s, batch, heads, _ = q.shape
    rows = []
    for b in range(batch):
        for n in range(heads):
            group = n // (heads // k.shape[2])
            scores = q[:, b, n] @ k[:, b, group].T * scale
            weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
            rows.append(weights @ v[:, b, group])
    return torch.stack(rows).view(batch, heads, s, -1).permute(2, 0, 1, 3).flatten(2)


def qkv(heads: int = 4, groups: int = 2, key: int = 8, value: int = 8) -> tuple[torch.Tensor, ...]:
    """Random queries, keys and values of 16 positions and 2 sequences."""
    return tuple(
        torch.randn(16, 2, n, d) for n, d in ((heads, key), (groups, key), (groups, value))
    )


CAUSAL = torch.ones(16, 16, dtype=torch.bool).tril()


def grouped_query_attention_equals_loops() -> None:
    """Queries share keys by group."""
    core = attention()
    compare(
        lambda q, k, v: core(q, k, v, None),
        lambda q, k, v: written_out(q, k, v, CAUSAL, 1 / math.sqrt(8)),
        *qkv(),
    )


def attention_with_fewer_value_channels_equals_loops() -> None:
    """MLA's shape, with its own scale."""
    models.start_groups()
    core = CoreAttention(
        models.config(**MLA), 1, AttnMaskType.causal, softmax_scale=0.3, k_channels=12, v_channels=6
    )
    compare(
        lambda q, k, v: core(q, k, v, None),
        lambda q, k, v: written_out(q, k, v, CAUSAL, 0.3),
        *qkv(4, 4, 12, 6),
    )


def sliding_window_sees_itself_and_five_before() -> None:
    """Megatron's window (5, 0)."""
    core = attention(window_size=(5, 0))
    distance = torch.arange(16)[:, None] - torch.arange(16)
    compare(
        lambda q, k, v: core(q, k, v, None),
        lambda q, k, v: written_out(q, k, v, CAUSAL & (distance <= 5), 1 / math.sqrt(8)),
        *qkv(),
    )


def a_mask_from_the_data_is_obeyed() -> None:
    """As --reset-attention-mask makes them: documents do not see one another."""
    core = attention()
    document = (torch.arange(16) >= 6).int()
    allowed = CAUSAL & (document[:, None] == document)
    compare(
        lambda q, k, v: core(q, k, v, ~allowed[None, None]),
        lambda q, k, v: written_out(q, k, v, allowed, 1 / math.sqrt(8)),
        *qkv(),
    )
    plain = core(*(inputs := qkv()), ~CAUSAL[None, None])
    torch.testing.assert_close(plain, core(*inputs, None), rtol=0, atol=0)


def packed_sequences_do_not_see_one_another() -> None:
    """The same answer from cumulative lengths as from a mask."""
    core = attention()
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 6, 16]))
    document = (torch.arange(16) >= 6).int()
    allowed = CAUSAL & (document[:, None] == document)
    compare(
        lambda q, k, v: core(q[:, 0], k[:, 0], v[:, 0], None, packed_seq_params=packed),
        lambda q, k, v: written_out(*(t[:, :1] for t in (q, k, v)), allowed, 8**-0.5)[:, 0],
        *qkv(),
    )


def learned_sinks_equal_transformers_gpt_oss() -> None:
    """A head may attend to nothing, at a learned price."""
    core = attention(softmax_type="learnable")
    torch.nn.init.uniform_(core.softmax_offset, -1, 1)

    class Module:
        sinks = core.softmax_offset
        num_key_value_groups = 2
        training = False

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads_first = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        mask = torch.zeros(1, 1, 16, 16).masked_fill(~CAUSAL, float("-inf"))
        context, _ = eager_attention_forward(Module(), *heads_first, mask, scaling=8**-0.5)
        return context.permute(1, 0, 2, 3).flatten(2)

    compare(lambda q, k, v: core(q, k, v, None), reference, *qkv())


def off_by_one_softmax_adds_one_to_the_sum() -> None:
    """Equals a sink whose logit is zero."""
    core = attention(softmax_type="off-by-one")

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = k.repeat_interleave(2, dim=2), v.repeat_interleave(2, dim=2)
        scores = torch.einsum("sbnd,tbnd->bnst", q, k) * 8**-0.5
        grown = scores.exp() * CAUSAL
        weights = grown / (1 + grown.sum(-1, keepdim=True))
        return torch.einsum("bnst,tbnd->sbnd", weights, v).flatten(2)

    compare(lambda q, k, v: core(q, k, v, None), reference, *qkv())


def attention_dropout_drops_and_rescales() -> None:
    """Nothing is dropped in evaluation; in training the mean stays."""
    core = attention(attention_dropout=0.5)
    inputs = qkv()
    core.train()
    many = torch.stack([core(*inputs, None) for _ in range(400)])
    core.eval()
    exact = core(*inputs, None)
    assert many.std(dim=0)[1:].min() > 0, "nothing was dropped"
    torch.testing.assert_close(many.mean(dim=0), exact, rtol=0, atol=0.5)
    torch.testing.assert_close(exact, attention()(*inputs, None))


def bf16_attention_is_as_near_as_bf16_allows() -> None:
    """Within two units in the last place of bf16, of values up to one."""
    core, inputs = attention(), qkv()
    exact = core(*inputs, None)
    narrow = core(*(t.bfloat16() for t in inputs), None)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), exact, rtol=2**-6, atol=2**-5)


def experts(settings: Any, *, grouped: bool) -> torch.nn.Module:
    """The four experts of one rank."""
    torch.manual_seed(5)
    builder = CpuSpecProvider().grouped_mlp_modules(grouped)
    return builder(4, settings, pg_collection=ProcessGroupCollection.use_mpu_process_groups())


def grouped_equals_sequential(**changes: Any) -> None:
    """Output, input gradient and weight gradients, with one expert idle; returns nothing, raises."""
    models.start_groups()
    settings = models.config(**{**GQA, **changes})
    grouped, sequential = experts(settings, grouped=True), experts(settings, grouped=False)
    assert isinstance(sequential, SequentialMLP)
    for name in ("linear_fc1", "linear_fc2"):
        layer = getattr(grouped, name)
        for expert_id, expert in enumerate(sequential.local_experts):
            getattr(expert, name).weight.data.copy_(layer.weight[expert_id])
    counts = torch.tensor([3, 0, 4, 2])
    x, probabilities = torch.randn(9, 32), torch.rand(9)
    outcomes = []
    for module in (grouped, sequential):
        leaves = x.clone().requires_grad_(), probabilities.clone().requires_grad_()
        output, bias = module(leaves[0], counts, leaves[1])
        assert bias is None
        (output * torch.linspace(-1, 1, 32)).sum().backward()
        outcomes.append((output, leaves[0].grad, leaves[1].grad))
    for found, wanted in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for name in ("linear_fc1", "linear_fc2"):
        wanted = [getattr(expert, name).weight.grad for expert in sequential.local_experts]
        torch.testing.assert_close(
            getattr(grouped, name).weight.grad, torch.stack(wanted), rtol=0, atol=0
        )


def grouped_swiglu_experts_equal_sequential_ones_bitwise() -> None:
    """The plain case, which has its own short path."""
    grouped_equals_sequential()


def grouped_experts_with_biases_and_clamped_quick_gelu_equal_a_loop() -> None:
    """gpt-oss. Megatron's sequential experts cannot: they add their bias in place to a view (mlp.py, 0.19.2)."""
    models.start_groups()
    options = {"glu_linear_offset": 1.0, "activation_func_clamp_value": 1.5}
    settings = models.config(**GQA, add_bias_linear=True, activation_func=quick_gelu, **options)
    grouped = experts(settings, grouped=True)
    for layer in (grouped.linear_fc1, grouped.linear_fc2):
        torch.nn.init.uniform_(layer.bias, -1, 1)
    counts = [3, 0, 4, 2]

    def loop(x: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        rows, start = [], 0
        for expert_id, count in enumerate(counts):
            for row in range(start, start + count):
                first = grouped.linear_fc1.weight[expert_id] @ x[row]
                gate, up = (first + grouped.linear_fc1.bias[expert_id]).chunk(2)
                gate, up = gate.clamp(max=1.5), up.clamp(-1.5, 1.5)
                middle = gate * torch.sigmoid(1.702 * gate) * (up + 1)
                second = grouped.linear_fc2.weight[expert_id] @ middle
                rows.append((second + grouped.linear_fc2.bias[expert_id]) * probabilities[row])
            start += count
        return torch.stack(rows)

    def run(x: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        return grouped(x, torch.tensor(counts), probabilities)[0]

    compare(run, loop, torch.randn(9, 32), torch.rand(9))


def grouped_experts_with_recomputed_activation_equal_sequential_ones_bitwise() -> None:
    """--recompute-modules moe_act."""
    grouped_equals_sequential(recompute_granularity="selective", recompute_modules=["moe_act"])


def grouped_linear_equals_torchs_grouped_mm_bitwise() -> None:
    """The kernel Hugging Face transformers uses."""
    counts = [5, 0, 11]
    ends = torch.tensor(counts).cumsum(0).int()
    compare(
        lambda x, w: grouped_linear(x, w, counts),
        lambda x, w: F.grouped_mm(x, w.transpose(1, 2), offs=ends),
        torch.randn(16, 8),
        torch.randn(3, 4, 8),
        tolerance=0.0,
    )


def grouped_linear_adds_to_main_grad() -> None:
    """As Megatron's DDP wants it: main_grad accumulates, and the parameter's own gradient is not looked at."""
    weight = torch.nn.Parameter(torch.randn(2, 4, 8))
    x = torch.randn(6, 8)
    grouped_linear(x, weight, [2, 4]).square().sum().backward()
    once = weight.grad.clone()
    for dtype in (torch.float32, torch.float64):
        weight.main_grad = once.to(dtype, copy=True)
        weight.grad_added_to_main_grad = False
        grouped_linear(x, weight, [2, 4]).square().sum().backward()
        assert weight.grad_added_to_main_grad
        torch.testing.assert_close(weight.main_grad, 2 * once.to(dtype))


def weighted_swiglu_equals_megatrons_composite_bitwise() -> None:
    """megatron/core/transformer/mlp.py's glu, times the router's probability."""

    def composite(x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        gate, up = torch.chunk(x, 2, dim=-1)
        return F.silu(gate) * (up + 0.0) * p

    compare(weighted_swiglu, composite, torch.randn(9, 12), torch.rand(9, 1), tolerance=0.0)


def rotation_equals_megatrons() -> None:
    """Against `_apply_rotary_pos_emb_bshd` as released, half and whole batch of positions."""
    upstream = released(rope_utils._apply_rotary_pos_emb_bshd)
    frequencies = torch.randn(16, 1, 1, 8)
    for options in ({}, {"mscale": 1.3}, {"rotary_interleaved": True}):
        compare(
            lambda t, o=options: rotating_in_place(upstream)(t, frequencies, **o),
            lambda t, o=options: upstream(t, frequencies, **o),
            torch.randn(16, 2, 4, 8),
            tolerance=1e-6,
        )
    partial = torch.randn(16, 2, 4, 12)  # only 8 of 12 channels rotate
    compare(
        lambda t: rotating_in_place(upstream)(t, frequencies),
        lambda t: upstream(t, frequencies),
        partial,
    )


def released(function: Any) -> Any:
    """The original below our stand-in."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells["upstream"].cell_contents if "upstream" in cells else function


def fused_adam_equals_torchs_adamw() -> None:
    """Ten steps, two groups."""
    start = [torch.randn(7, 3), torch.randn(5)]
    results = []
    for kind in (FusedAdam, torch.optim.AdamW):
        parameters = [torch.nn.Parameter(t.clone()) for t in start]
        groups = [{"params": [p], "weight_decay": 0.1 * i} for i, p in enumerate(parameters)]
        given_later = None if kind is FusedAdam else 1e-2
        optimizer = kind(groups, lr=given_later, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        generator = torch.Generator().manual_seed(0)
        for _ in range(10):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        results.append(parameters)
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def the_norm_of_many_gradients_is_exact_to_their_precision() -> None:
    """Nine million, for which torch's own norm is off by 1e-4, and odd little ones."""
    gradients = [torch.randn(9_000_001), torch.randn(4097), torch.randn(3), torch.empty(0)]
    exact = torch.cat(gradients).double().norm()
    found, _ = l2_norm(0, torch.zeros(1), [gradients], False)  # noqa: FBT003 - Apex's signature
    torch.testing.assert_close(found, exact.float().view(1), rtol=2e-7, atol=0)


def chunks_in_their_places_are_left_alone_and_others_sorted_as_megatron_does() -> None:
    """The order of the local experts, with and without probabilities."""
    tokens, probabilities, sizes = torch.randn(6, 2), torch.randn(6), torch.tensor([1, 2, 3])
    upstream = released(moe_utils.sort_chunks_by_idxs)
    ours = leaving_sorted_chunks(upstream)
    in_order, out_of_order = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])
    kept, kept_probabilities = ours(tokens, sizes, in_order, probs=probabilities)
    assert kept is tokens
    assert kept_probabilities is probabilities
    for order in (in_order, out_of_order):
        for probs in (None, probabilities):
            wanted = upstream(tokens, sizes, order, probs=probs)
            for one, other in zip(ours(tokens, sizes, order, probs=probs), wanted, strict=True):
                assert (one is None and other is None) or torch.equal(one, other)


def what_gpu_libraries_fuse_equals_the_same_unfused() -> None:
    """Rotary embedding, and the weight gradient that its GEMM adds to the sum of gradients."""
    found = []
    for fused in (False, True):
        models.start_groups()
        flags = dict.fromkeys(("apply_rope_fusion", "gradient_accumulation_fusion"), fused)
        gpt = models.model(models.config(**GQA, **flags))
        for parameter in gpt.parameters():
            parameter.main_grad = torch.zeros_like(parameter)
        loss, gradients = models.loss_and_gradients(gpt)
        sums = {name: p.main_grad for name, p in gpt.named_parameters()}
        assert any(total.any() for total in sums.values()) == fused
        found.append({"loss": loss} | {name: sums[name] + gradients[name] for name in sums})
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def causal_convolution_equals_a_loop() -> None:
    """Each channel with its own past, then silu."""

    def loop(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        steps = []
        for t in range(x.shape[1]):
            past = [x[:, t - i] * w[:, -1 - i] for i in range(w.shape[1]) if t - i >= 0]
            steps.append(torch.stack(past).sum(0))
        return F.silu(torch.stack(steps, dim=1))

    compare(
        lambda x, w: causal_conv1d(x, w, activation="silu")[0],
        loop,
        torch.randn(2, 9, 6),
        torch.randn(6, 4),
    )


def l2norm_makes_unit_vectors() -> None:
    """But for its small epsilon."""
    compare(l2norm, lambda x: F.normalize(x, dim=-1), torch.randn(4, 8), tolerance=1e-4)


def rotation_is_the_hadamard_matrix() -> None:
    """Entry (i, j) is 1 where i and j share an even number of bits, else -1; heads of 12 are those of 16, cut."""
    for head in (16, 12):
        signs = [[(-1.0) ** (i & j).bit_count() for j in range(head)] for i in range(head)]
        matrix = torch.tensor(signs) / head**0.5
        compare(rotate_activation, lambda x, m=matrix: x @ m.T, torch.randn(3, 2, head))
    rotated = rotate_activation(torch.randn(3, 16, dtype=torch.bfloat16))
    assert rotated.dtype == torch.bfloat16


def sparse_attention_over_every_key_is_dense() -> None:
    """From the same weights; sparse attention keeps the norms of queries and latents as layers of their own."""
    models.start_groups()
    dense = models.model(models.config(**MLA))
    sparse = models.model(models.config(**SPARSE_MLA))
    norms = {
        "q_layernorm.weight": "linear_q_up_proj.layer_norm_weight",
        "kv_layernorm.weight": "linear_kv_up_proj.layer_norm_weight",
    }
    given = dict(dense.named_parameters())
    with torch.no_grad():
        for name, parameter in sparse.named_parameters():
            if ".indexer." in name:
                continue
            norm = next((own for own in norms if name.endswith(own)), "")
            parameter.copy_(given.pop(name.removesuffix(norm) + norms.get(norm, "")))
    assert given == {}
    loss, wanted = models.loss_and_gradients(sparse)[0], models.loss_and_gradients(dense)[0]
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    for layer in sparse.decoder.layers:
        layer.self_attention.core_attention.index_topk = 2
    assert abs(models.loss_and_gradients(sparse)[0] - wanted) > 1e-3


def gradients(**changes: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a small model of that configuration on one rank."""
    models.start_groups()
    return models.loss_and_gradients(models.model(models.config(**{**GQA, **changes})))


def recomputing_compiles_nothing() -> None:
    """A laptop may have no C++ compiler, and the lock of a killed compilation would stop every later run."""
    settings = {"recompute_granularity": "selective", "recompute_modules": ["moe_act", "layernorm"]}
    gradients(**settings)
    assert tensor_parallel_random._share_storage_ext is None


def recomputing_changes_nothing() -> None:
    """Full, and each selective module, to the last bit."""
    shared = {"moe_shared_expert_intermediate_size": 24, "moe_layer_freq": [0, 1]}
    choices: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (GQA, {"recompute_granularity": "full", "recompute_method": method})
        for method in ("uniform", "block")
    ]
    choices = [(base, {**choice, "recompute_num_layers": 1}) for base, choice in choices]
    choices += [
        (base, {"recompute_granularity": "selective", "recompute_modules": [module]})
        for base, modules in (
            (GQA, ("core_attn", "moe_act", "layernorm", "moe")),
            ({**MLA, **shared}, ("mla_up_proj", "mlp", "shared_experts", "layernorm", "moe_act")),
        )
        for module in modules
    ]
    for base, choice in choices:
        expected, (loss, found) = gradients(**base), counted_gradients(**base, **choice)
        assert loss == expected[0], choice
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[1][name], rtol=0, atol=0)


def counted_gradients(**changes: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """`gradients`, having made sure that something is computed a second time."""
    again = []

    def count(original: Any) -> Any:
        def backward(ctx: Any, *arguments: Any) -> Any:
            again.append(original)
            return original(ctx, *arguments)

        return backward

    kinds = (
        tensor_parallel_random.CheckpointFunction,
        tensor_parallel_random.CheckpointWithoutOutput,
    )
    originals = [vars(kinds[0])["backward"], vars(kinds[1])["_recompute"]]
    kinds[0].backward = staticmethod(count(originals[0].__func__))
    kinds[1]._recompute = count(originals[1])
    try:
        return gradients(**changes)
    finally:
        kinds[0].backward, kinds[1]._recompute = originals
        assert again, f"{changes}: nothing was recomputed"


def dispatchers_agree() -> None:
    """All-gather and all-to-all are two ways to one result."""
    loss, found = gradients(moe_token_dispatcher_type="allgather")
    expected_loss, expected = gradients(moe_token_dispatcher_type="alltoall")
    torch.testing.assert_close(loss, expected_loss)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def router_options_train() -> None:
    """Each gives finite gradients and, where it changes the result, another one than the plain router."""
    plain = gradients()[1]["decoder.layers.0.mlp.router.weight"]
    choices: dict[str, dict[str, Any]] = {
        kind: {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.1}
        for kind in ("aux_loss", "seq_aux_loss", "global_aux_loss")
    }
    choices |= {
        "z loss": {"moe_z_loss_coeff": 0.1},
        "before the softmax": {"moe_router_pre_softmax": True},
        "forced balance": {"moe_router_force_load_balancing": True},
        "capacity": {"moe_expert_capacity_factor": 0.5},
        "capacity, padded": {
            "moe_expert_capacity_factor": 0.5,
            "moe_pad_expert_input_to_capacity": True,
        },
        "sigmoid": {"moe_router_score_function": "sigmoid"},
    }
    for name, choice in choices.items():
        gradient = gradients(**choice)[1]["decoder.layers.0.mlp.router.weight"]
        assert gradient.isfinite().all(), name
        assert not torch.equal(gradient, plain), f"{name} changed nothing"


def dense_layers_stand_among_the_moe_layers() -> None:
    """moe-layer-freq [0, 1] has one dense layer and one with experts."""
    models.start_groups()
    gpt = models.model(models.config(**GQA, moe_layer_freq=[0, 1]))
    names = [name for name, _ in gpt.named_parameters()]
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names
    assert "decoder.layers.1.mlp.router.weight" in names
    assert models.loss_and_gradients(gpt)[0].isfinite()


def multi_token_prediction_trains_its_own_layer() -> None:
    """The extra layer gets gradients, also over MLA."""
    for architecture in (GQA, MLA):
        models.start_groups()
        changes = {**architecture, "mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1}
        _, found = models.loss_and_gradients(models.model(models.config(**changes)))
        own = {name: gradient for name, gradient in found.items() if name.startswith("mtp.")}
        assert len(own) > 8
        assert all(gradient.isfinite().all() for gradient in own.values())
        assert any(gradient.abs().max() > 0 for gradient in own.values())


def yarn_equals_transformers() -> None:
    """Frequencies and the attention factor of https://arxiv.org/abs/2309.00071, for GQA and for MLA."""
    models.start_groups()
    channels, factor, seen = 64, 8.0, 4096
    for mscale in (0.707, 1.0):
        shared = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": mscale, "mscale_all_dim": 1.0}
        scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": factor, **shared}
        theirs = LlamaConfig(
            rope_parameters={**scaling, "original_max_position_embeddings": seen},
            head_dim=channels,
            hidden_size=4 * channels,
            num_attention_heads=4,
            max_position_embeddings=int(seen * factor),
        )
        frequencies, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
        ours = YarnRotaryEmbedding(
            channels,
            rotary_base=1e4,
            scaling_factor=factor,
            original_max_position_embeddings=seen,
            use_cpu_initialization=True,
            **shared,
        )
        angles, own_factor = ours(20)
        expected = torch.outer(torch.arange(20.0), frequencies).repeat(1, 2)
        torch.testing.assert_close(angles[:, 0, 0], expected, rtol=1e-5, atol=1e-6)
        assert abs(float(own_factor) - attention_factor) < 1e-6


def yarn_reaches_the_attention() -> None:
    """It changes the loss of MLA and of GQA, and keeps it finite."""
    yarn = {"rotary_scaling_factor": 4.0, "original_max_position_embeddings": 8}
    plain, scaled = gradients(**MLA)[0], gradients(**{**MLA, "rope_type": "yarn", **yarn})[0]
    assert scaled.isfinite()
    assert scaled != plain
    extra = {f"yarn_{name}": value for name, value in yarn.items()}
    extra |= {"yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0, "yarn_mscale": 1.0}
    extra |= {"yarn_mscale_all_dim": 1.0, "yarn_correction_range_round_to_int": True}
    losses = []
    for kind in ("rope", "yarn"):
        models.start_groups()
        settings = models.config(**GQA)
        for name, value in extra.items():  # arguments give them to the config so, not as fields
            setattr(settings, name, value)
        gpt = models.model(settings, position_embedding_type=kind)
        losses.append(models.loss_and_gradients(gpt)[0])
    assert losses[1].isfinite()
    assert losses[0] != losses[1]


def gradients_of_bf16_weights_add_up_in_fp32() -> None:
    """300 micro-batches whose gradients would each vanish in a sum kept in bf16."""
    weight = torch.nn.Parameter(torch.zeros(2, 1, 1, dtype=torch.bfloat16))
    weight.main_grad = torch.ones(2, 1, 1)
    for _ in range(300):
        weight.grad_added_to_main_grad = False
        x = torch.full((4, 1), 2.0**-10, dtype=torch.bfloat16)
        grouped_linear(x, weight, [2, 2]).sum().backward()
    expected = 1 + 300 * 2 * 2.0**-10
    assert weight.main_grad.flatten().tolist() == [expected, expected]
    assert torch.ones((), dtype=torch.bfloat16) + 2.0**-9 == 1, "bf16 would have kept it"


def a_model_in_bf16_is_near_the_one_in_fp32() -> None:
    """The mean loss a token to two digits."""
    exact, _ = gradients()
    models.start_groups()
    settings = models.config(**GQA, bf16=True, params_dtype=torch.bfloat16)
    gpt = models.model(settings).bfloat16()
    narrow, found = models.loss_and_gradients(gpt)
    per_token = (narrow.float() - exact).abs() / (2 * models.SEQUENCE)
    assert per_token < 0.05, per_token
    assert all(gradient.isfinite().all() for gradient in found.values())


def world_has_one_rank() -> None:
    """So that the comparisons above are with one rank indeed."""
    models.start_groups()
    assert mpu.get_data_parallel_world_size() == 1
