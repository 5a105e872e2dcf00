"""Bodies of test_layers.py: what a router does, against the rule written out with loops. One rank.

Import under the CPU embedding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

from tests.ranks import layer_models as models
from tests.ranks.layer_architectures import GQA

TOKENS, SEQUENCES, EXPERTS, TOP_K, COEFFICIENT = 12, 2, 8, 4, 0.1


def router(**changes: Any) -> TopKRouter:
    """The first layer's router of a model with eight experts, and uneven weights."""
    models.start_groups()
    options = {"num_moe_experts": EXPERTS, "moe_router_topk": TOP_K, "moe_router_dtype": "fp32"}
    layer = models.model(models.config(**{**GQA, **options, **changes})).decoder.layers[0]
    found = layer.mlp.router
    with torch.no_grad():
        found.weight.mul_(torch.linspace(1, 3, EXPERTS)[:, None])
    get_moe_metrics_tracker().clear()
    return found.train()


def hidden() -> torch.Tensor:
    """Of TOKENS positions in each of SEQUENCES sequences: [s, b, h]."""
    drawn = torch.randn(TOKENS, SEQUENCES, 32, generator=torch.Generator().manual_seed(9))
    return drawn.requires_grad_()


def logits_of(found: TopKRouter, x: torch.Tensor) -> torch.Tensor:
    """[s * b, experts]."""
    return x.flatten(0, 1) @ found.weight.T


def sigmoid_routing_in_groups_with_a_bias_equals_loops() -> None:
    """DeepSeek-V3: groups by their best two, experts by score plus bias, weights by score alone."""
    found = router(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_topk_scaling_factor=2.5,
    )
    found.expert_bias.copy_(torch.linspace(-0.8, 0.8, EXPERTS).flip(0))
    x = hidden()
    probabilities, chosen = found(x)
    expected = torch.zeros_like(probabilities)
    unlimited = 0
    for token, scores in enumerate(logits_of(found, x).sigmoid()):
        biased = (scores + found.expert_bias).tolist()
        size = EXPERTS // 4
        groups = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(4)]
        kept = sorted(range(4), key=lambda g: -groups[g])[:2]
        allowed = [expert for expert in range(EXPERTS) if expert // size in kept]
        best = sorted(allowed, key=lambda expert: -biased[expert])[:TOP_K]
        unlimited += set(best) == set(sorted(range(EXPERTS), key=lambda e: -biased[e])[:TOP_K])
        for expert in best:
            expected[token, expert] = 2.5 * scores[expert] / sum(scores[e] for e in best)
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(chosen, expected > 0)
    assert unlimited < TOKENS * SEQUENCES, "the groups limited nothing"


def routed(scores: torch.Tensor) -> torch.Tensor:
    """Which experts each row of scores goes to: [tokens, experts] of 0 and 1."""
    chosen = torch.zeros_like(scores)
    return chosen.scatter(1, scores.topk(TOP_K, dim=1).indices, 1.0)


def switch_loss(scores: torch.Tensor, counts: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Fedus et al., https://arxiv.org/abs/2101.03961, equation 4, for top-k: E * sum(f_i * P_i)."""
    share = counts / (num_tokens * TOP_K)
    return EXPERTS * (share * scores.sum(0) / num_tokens).sum()


def gradient_and_figure(found: TopKRouter, x: torch.Tensor, name: str) -> tuple[Any, float]:
    """The router weight's gradient from the auxiliary loss alone, and the loss Megatron would log."""
    found.weight.grad = None
    probabilities, _ = found(x)
    (probabilities * 0).sum().backward()
    logged = get_moe_metrics_tracker().metrics[name].values[0]
    return found.weight.grad.clone(), float(logged)


def auxiliary_losses_equal_their_formulas() -> None:
    """Over the micro-batch, and over each sequence: the figure in the log and the gradient of the router."""
    x = hidden()
    for kind, name in (
        ("aux_loss", "load_balancing_loss"),
        ("seq_aux_loss", "seq_load_balancing_loss"),
    ):
        found = router(moe_router_load_balancing_type=kind, moe_aux_loss_coeff=COEFFICIENT)
        gradient, logged = gradient_and_figure(found, x, name)
        scores = logits_of(found, x).softmax(-1).view(TOKENS, SEQUENCES, EXPERTS)
        parts = [scores.flatten(0, 1)] if kind == "aux_loss" else list(scores.unbind(1))
        losses = [switch_loss(part, routed(part).sum(0), len(part)) for part in parts]
        expected = torch.stack(losses).mean()
        wanted = torch.autograd.grad(COEFFICIENT * expected, found.weight)[0]
        torch.testing.assert_close(torch.tensor(logged), expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-8)


def global_auxiliary_loss_counts_all_micro_batches_so_far() -> None:
    """The second micro-batch is weighed by the mean counts of both; after a reset by its own."""
    found = router(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=COEFFICIENT)
    first, second = hidden(), hidden().detach().flip(2).requires_grad_()
    name = "global_load_balancing_loss"
    counts = []
    for x in (first, second):
        get_moe_metrics_tracker().clear()
        gradient, logged = gradient_and_figure(found, x, name)
        scores = logits_of(found, x).softmax(-1)
        counts.append(routed(scores).sum(0))
        mean = torch.stack(counts).mean(0)
        expected = switch_loss(scores, mean, TOKENS * SEQUENCES)
        wanted = torch.autograd.grad(COEFFICIENT * expected, found.weight)[0]
        torch.testing.assert_close(torch.tensor(logged), expected.detach(), rtol=1e-5, atol=0)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-8)
    assert not torch.equal(*counts), "the micro-batches are alike"
    found.reset_global_aux_loss_tracker()
    get_moe_metrics_tracker().clear()
    _, logged = gradient_and_figure(found, second, name)
    alone = switch_loss(scores, counts[1], TOKENS * SEQUENCES)
    torch.testing.assert_close(torch.tensor(logged), alone.detach(), rtol=1e-5, atol=0)


def z_loss_equals_its_formula() -> None:
    """Zoph et al., https://arxiv.org/abs/2202.08906, equation 5."""
    found = router(moe_z_loss_coeff=COEFFICIENT)
    x = hidden()
    gradient, logged = gradient_and_figure(found, x, "z_loss")
    expected = logits_of(found, x).logsumexp(-1).square().mean()
    wanted = torch.autograd.grad(COEFFICIENT * expected, found.weight)[0]
    torch.testing.assert_close(torch.tensor(logged), expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-8)


def capacity_drops_what_the_policy_says() -> None:
    """Least probable or latest tokens first, ceil(tokens * top-k / experts * factor) an expert."""
    x = hidden()
    free_probabilities, free = router()(x)
    capacity = math.ceil(TOKENS * SEQUENCES * TOP_K / EXPERTS * 0.5)
    outcomes = []
    for policy in ("probs", "position"):
        found = router(moe_expert_capacity_factor=0.5, moe_token_drop_policy=policy)
        probabilities, kept = found(x)
        expected = torch.zeros_like(free)
        for expert in range(EXPERTS):
            tokens = free[:, expert].nonzero().flatten().tolist()
            if policy == "probs":
                tokens.sort(key=lambda token: -free_probabilities[token, expert].item())
            expected[tokens[:capacity], expert] = True
        assert torch.equal(kept, expected), policy
        torch.testing.assert_close(probabilities, free_probabilities * expected)
        outcomes.append(kept)
    assert not torch.equal(*outcomes), "the policies agree by chance"
    assert outcomes[0].sum() < free.sum(), "nothing was dropped"


def padding_to_capacity_gives_every_expert_as_many_tokens() -> None:
    """And changes no result: what is added has weight 0."""
    outcomes = []
    for pad in (False, True):
        models.start_groups()
        changes = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": pad}
        layer = models.model(models.config(**{**GQA, **changes})).decoder.layers[0].mlp
        layer.router.weight.data[0] = 0  # an expert that few choose
        seen: list[list[int]] = []
        layer.experts.register_forward_pre_hook(
            lambda _module, inputs, seen=seen: seen.append(inputs[1].tolist())
        )
        x = hidden()
        output, _ = layer(x)
        output.square().sum().backward()
        outcomes.append((output, x.grad))
        counts = seen[0]
        assert (len(set(counts)) == 1) == pad, counts
    assert counts == [TOKENS * SEQUENCES * 2 // 4] * 4
    for found, wanted in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def forced_balance_ignores_the_logits() -> None:
    """The same tokens go elsewhere each time, and to all experts alike."""
    x = hidden()
    natural = router()
    assert torch.equal(natural(x)[1], natural(x)[1])
    found = router(moe_router_force_load_balancing=True)
    maps = [found(x)[1] for _ in range(60)]
    assert not torch.equal(maps[0], maps[1])
    counts = torch.stack([each.sum(0) for each in maps]).float().mean(0)
    mean = TOKENS * SEQUENCES * TOP_K / EXPERTS
    torch.testing.assert_close(counts, torch.full((EXPERTS,), mean), rtol=0.15, atol=0)


def a_gated_shared_expert_is_weighed_by_its_gate() -> None:
    """Qwen2-MoE: the shared expert's output times sigmoid(x . gate), added to the routed ones'."""
    models.start_groups()
    shared = {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True}
    layer = models.model(models.config(**{**GQA, **shared})).decoder.layers[0].mlp
    x = hidden()
    with torch.no_grad():
        layer.shared_experts.gate_weight.normal_()
        whole, _ = layer(x)
        first = x @ layer.shared_experts.linear_fc1.weight.T
        gate, up = first.chunk(2, -1)
        own = (torch.nn.functional.silu(gate) * up) @ layer.shared_experts.linear_fc2.weight.T
        own = own * torch.sigmoid(x @ layer.shared_experts.gate_weight.T)
        layer.use_shared_expert = False
        routed_only, _ = layer(x)
    torch.testing.assert_close(whole, routed_only + own, rtol=1e-5, atol=1e-6)


def the_moe_layer_equals_a_loop_over_tokens() -> None:
    """Each token's experts, weighed by the router: what dispatch, experts and combine come to."""
    models.start_groups()
    layer = models.model(models.config(**GQA)).decoder.layers[0].mlp
    x = hidden()
    with torch.no_grad():
        output, _ = layer(x)
        probabilities, chosen = layer.router(x)
        expected = torch.zeros(TOKENS * SEQUENCES, 32)
        for token, expert in chosen.nonzero().tolist():
            row = x.flatten(0, 1)[token]
            gate, up = (layer.experts.linear_fc1.weight[expert] @ row).chunk(2)
            middle = torch.nn.functional.silu(gate) * up
            own = layer.experts.linear_fc2.weight[expert] @ middle
            expected[token] += probabilities[token, expert] * own
    torch.testing.assert_close(output.flatten(0, 1), expected, rtol=1e-5, atol=1e-6)
