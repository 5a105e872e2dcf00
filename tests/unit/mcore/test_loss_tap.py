"""What a step adds to Megatron's sums of losses."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from moe_bench.mcore.recording import LossTap  # noqa: E402


def add(sums: dict[str, Any], lm_loss: Any, balancing: Any) -> None:
    """The two ways in which Megatron-Core 0.19.2 adds."""
    sums["advanced iterations"] = sums.get("advanced iterations", 0) + 1
    sums["lm loss"] = sums.get("lm loss", torch.tensor([0.0])) + lm_loss
    if "load_balancing_loss" in sums:
        sums["load_balancing_loss"] += balancing
    else:
        sums["load_balancing_loss"] = balancing


def test_a_step_s_losses_are_its_own_to_the_last_bit_and_the_sums_are_megatron_s() -> None:
    tap, plain = LossTap(), {}
    for first, second in ((5.8, 1.0080114), (5.7, 1.0073099), (5.6, 1.0000001)):
        losses = torch.tensor([first]), torch.tensor(second)
        tap.begin_step()
        add(tap, *losses)
        add(plain, losses[0].clone(), losses[1].clone())
        assert tap.step == {"lm loss": losses[0], "load_balancing_loss": losses[1]}
    assert {key: tap[key] for key in tap} == plain


def test_a_reset_after_a_skipped_step_is_a_reset() -> None:
    tap = LossTap()
    tap.begin_step()
    add(tap, torch.tensor([5.0]), torch.tensor(1.0))
    tap.begin_step()  # a skipped step adds no loss, and is printed
    for key in tap:
        if key != "advanced iterations":
            tap[key] = torch.tensor([0.0])
    assert tap.step == {}
    tap.begin_step()
    assert tap.get("lm loss", "absent") == "absent"
    assert dict.get(tap, "lm loss") == torch.tensor([0.0])
