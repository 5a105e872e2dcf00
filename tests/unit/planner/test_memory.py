"""Where a model's states lie: no parameter twice, none forgotten."""

import pytest

from moe_bench.planner import memory, params
from moe_bench.units import GIB
from tests.unit.planner.test_params import resolve


def weights_of_every_rank(model: str, **environment: str) -> float:
    """Bytes of all ranks' weights, each data-parallel copy counted once."""
    run = resolve(model, **environment)
    tp, ep = (int(run.knobs[name].value) for name in ("TP", "EP"))
    assert tp == ep, "then every rank of a stage holds the same share"
    return sum(stage.weights for stage in memory.states(run)) * tp


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("Mixtral-8x7B", {"TP": "4", "EP": "4", "PP": "2", "VPP": "1"}),
        ("Qwen3-30B-A3B", {"TP": "1", "EP": "1", "PP": "4"}),
    ],
)
def test_the_ranks_together_hold_the_model_once(model: str, layout: dict[str, str]) -> None:
    """bf16: two bytes for each parameter."""
    run = resolve(model, **layout)
    assert weights_of_every_rank(model, **layout) == 2 * params.count(run.args).total


def test_a_prediction_module_brings_its_copy_of_the_embedding_to_the_last_stage() -> None:
    layout = {"TP": "1", "EP": "1", "NNODES": "2", "DISPATCHER": "alltoall"}
    run = resolve("DeepSeek-V3", **layout)
    found = params.count(run.args)
    copy = 129280 * 7168
    assert weights_of_every_rank("DeepSeek-V3", **layout) == 2 * (found.total + found.mtp + copy)


def test_one_gpu_of_mixtral_8x7b_by_hand() -> None:
    """EP 8, PP 4, 64 GPUs: dense parts are kept by 16 data-parallel ranks, experts by 2."""
    hidden, width, vocab, layers = 4096, 14336, 32000, 8
    experts = layers * 3 * hidden * width  # one of eight
    attention = hidden * (32 * 128 * 2 + 2 * 8 * 128)
    dense = layers * (attention + 8 * hidden + 2 * hidden) + vocab * hidden
    by_hand = 6 * (dense + experts) + 12 * (dense / 16 + experts / 2)
    assert memory.states(resolve("Mixtral-8x7B"))[0].gib == pytest.approx(by_hand / GIB, rel=1e-12)


def test_fp8_weights_and_bf16_moments_take_less() -> None:
    bf16, fp8 = (memory.states(resolve("DeepSeek-V3", PR=pr))[3] for pr in ("bf16", "fp8"))
    assert fp8.weights == bf16.weights / 2
    assert fp8.optimizer == pytest.approx(bf16.optimizer * 8 / 12)
