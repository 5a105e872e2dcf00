"""Every parallel layout trains as one rank does: same losses, gradient norms and routing over 20 steps, in fp32.

All start from the same torch_dist checkpoint and read the same batches. What differs is the order of sums: a reduction
over ranks adds partial sums in another order than one rank does, which moves fp32 results by some 1e-7 a step; over 20
steps of Adam the largest differences seen are 1.2e-7 in the loss (one unit in the last place) and 4.5e-7 in the gradient
norm (under tensor parallelism, which splits the most sums). The bounds leave room for other processors' kernels.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.training import (
    CPU_FLAGS,
    DEEPSEEK_LIKE,
    QWEN3_LIKE,
    Training,
    initial_weights,
    train,
)

DSA = (
    "--experimental-attention-variant dsa --dsa-indexer-n-heads 4 --dsa-indexer-head-dim 16 "
    "--dsa-indexer-loss-coeff 0 --dsa-indexer-topk"
).split()
"""Without the indexer's loss: the divergence of two near equal distributions is mostly rounding."""
MODELS = {
    "qwen3": QWEN3_LIKE,
    "deepseek": DEEPSEEK_LIKE,
    "mtp": [*DEEPSEEK_LIKE, "--mtp-num-layers", "1", "--mtp-loss-scaling-factor", "0.1"],
    "dsa": [*DEEPSEEK_LIKE, *DSA, "8"],
    "dsa-all": [*DEEPSEEK_LIKE, *DSA, "64"],  # every key: no choice hangs on a rounding
}
STEPS = 20
LOSS_BOUND = 1e-6
GRAD_NORM_BOUND = 2e-6

TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
CP2 = "--context-parallel-size 2"
ETP1 = "--expert-tensor-parallel-size 1"
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"

LAYOUTS = {
    "tp2-sp": (2, TP2),
    "tp2-etp2": (2, f"{TP2} --expert-tensor-parallel-size 2"),
    "tp2-etp1-ep2": (2, f"{TP2} {ETP1} {EP2}"),
    "pp2": (2, PP2),
    "pp2-vpp2-layers-per-stage": (2, f"{PP2} --num-layers-per-virtual-pipeline-stage 1"),
    "pp2-vpp2-stages-per-rank": (2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2"),
    "pp2-layout": (2, f"{PP2} --pipeline-model-parallel-layout Et|tt|t|L"),
    "pp2-uneven": (
        2,
        f"{PP2} --decoder-first-pipeline-num-layers 3 --decoder-last-pipeline-num-layers 1",
    ),
    "ep2-alltoall": (2, EP2),
    "ep2-allgather": (2, f"{EP2} --moe-token-dispatcher-type allgather"),
    "cp2": (2, CP2),
    "cp2-allgather": (2, f"{CP2} --cp-comm-type allgather"),
    "dp2-distributed-optimizer": (2, DISTRIBUTED),
    "tp2-etp2-ep2": (4, f"{TP2} --expert-tensor-parallel-size 2 {EP2}"),
    "pp2-vpp2-layout-mtp": (2, f"{PP2} --pipeline-model-parallel-layout Et|tt|t|mL"),
    "tp2-pp2-ep2": (4, f"{TP2} {PP2} {ETP1} {EP2} {DISTRIBUTED}"),
    "cp2-ep4": (4, f"{CP2} --expert-model-parallel-size 4 {DISTRIBUTED}"),
}
"""World size and flags."""

IN_EVERY_RUN = [
    ("qwen3", "tp2-sp"),
    ("qwen3", "pp2-vpp2-layers-per-stage"),
    ("qwen3", "ep2-alltoall"),
    ("qwen3", "ep2-allgather"),
    ("qwen3", "cp2"),
    ("qwen3", "dp2-distributed-optimizer"),
    ("qwen3", "tp2-etp2-ep2"),
    ("qwen3", "cp2-ep4"),
    ("mtp", "pp2-uneven"),
    ("mtp", "pp2-vpp2-layout-mtp"),
    ("mtp", "tp2-pp2-ep2"),
    ("dsa-all", "tp2-etp1-ep2"),
]
"""Every parallelism, every kind of layer that is cut."""
# Not MTP with CP2: a rank takes the mean of that loss over its own chunks, of which one has no token after its last
# (process_mtp_loss in megatron/core/transformer/multi_token_prediction.py, 0.19.2), which moves the loss by 1e-4.
MORE = [
    ("qwen3", "tp2-etp2"),
    ("qwen3", "tp2-etp1-ep2"),
    ("qwen3", "pp2"),
    ("qwen3", "pp2-vpp2-stages-per-rank"),
    ("qwen3", "pp2-layout"),
    ("qwen3", "pp2-uneven"),
    ("qwen3", "tp2-pp2-ep2"),
    ("deepseek", "tp2-etp1-ep2"),
    ("deepseek", "pp2-uneven"),
    ("deepseek", "cp2"),
    ("deepseek", "tp2-pp2-ep2"),
    ("mtp", "pp2"),
    ("mtp", "tp2-etp1-ep2"),
    ("dsa-all", "pp2"),
    ("dsa-all", "cp2-allgather"),
    ("dsa", "pp2"),
    ("dsa", "cp2-allgather"),
]
"""Other spellings and combinations of the same."""
EIGHT_RANKS = {
    "tp2-pp2-ep2-dp2": (8, f"{TP2} {PP2} {ETP1} {EP2} {DISTRIBUTED}"),
    "tp2-cp2-pp2-ep4": (
        8,
        f"{TP2} {CP2} {PP2} {ETP1} --expert-model-parallel-size 4 {DISTRIBUTED}",
    ),
    "ep8": (8, f"--expert-model-parallel-size 8 {DISTRIBUTED}"),
    "pp4-vpp1-ep2": (8, f"--pipeline-model-parallel-size 4 {EP2} {DISTRIBUTED}"),
    "tp4-etp2-ep2": (  # 127 words are padded to 128 as in the others: 64 for each of 4 ranks would be 256
        8,
        "--tensor-model-parallel-size 4 --sequence-parallel --make-vocab-size-divisible-by 32 "
        f"--expert-tensor-parallel-size 2 {EP2} {DISTRIBUTED}",
    ),
}
ONE_AT_A_TIME = "--micro-batch-size 1"
"""Eight sequences are one for each rank of ep8."""


class References:
    """One-rank trainings, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._starts: dict[str, list[str]] = {}
        self._made: dict[tuple[str, str], tuple[list[str], Training]] = {}

    def of(self, model: str, more: str = "") -> tuple[list[str], Training]:
        """Flags that start from the model's weights, and its training on one rank."""
        if model not in self._starts:
            self._starts[model] = initial_weights(MODELS[model], self._folder / model)
        if (model, more) not in self._made:
            argv = [*CPU_FLAGS, *MODELS[model], "--train-iters", str(STEPS), *self._starts[model]]
            argv += more.split()
            one = train(argv, 1, self._folder / f"{model}{more}".replace(" ", "_"))
            self._made[model, more] = (argv, one)
        return self._made[model, more]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(tmp_path_factory.mktemp("references"))


@pytest.mark.parametrize(
    ("model", "layout"),
    [*IN_EVERY_RUN, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)],
)
def test_layout_trains_as_one_rank_does(
    model: str, layout: str, references: References, tmp_path: Path
) -> None:
    world_size, flags = LAYOUTS[layout]
    argv, one = references.of(model)
    assert_same(train([*argv, *flags.split()], world_size, tmp_path / "run"), one)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["qwen3", "deepseek"])
@pytest.mark.parametrize("layout", EIGHT_RANKS)
def test_layout_of_eight_ranks_trains_as_one_rank_does(
    model: str, layout: str, references: References, tmp_path: Path
) -> None:
    world_size, flags = EIGHT_RANKS[layout]
    argv, one = references.of(model, ONE_AT_A_TIME)
    assert_same(train([*argv, *flags.split()], world_size, tmp_path / "run"), one)


def test_other_weights_do_not_pass_for_the_same(references: References, tmp_path: Path) -> None:
    argv, one = references.of("qwen3")
    other = train([*argv, "--lr", "1.001e-3"], 1, tmp_path / "run")
    with pytest.raises(AssertionError):
        assert_same(other, one)


def assert_same(got: Training, one: Training) -> None:
    """Losses, gradient norms, routing and the number of parameters equal those of one rank."""
    assert len(got.losses) == STEPS
    assert got.parameters == one.parameters
    worst_loss = max(_relative(got.losses, one.losses))
    worst_norm = max(_relative(got.grad_norms, one.grad_norms))
    print(f"largest relative difference: loss {worst_loss:.1e}, gradient norm {worst_norm:.1e}")
    assert worst_loss <= LOSS_BOUND
    assert worst_norm <= GRAD_NORM_BOUND
    assert got.routing == one.routing
    assert got.other_losses.keys() == one.other_losses.keys()
    for name, values in one.other_losses.items():
        assert max(_relative(got.other_losses[name], values)) <= LOSS_BOUND, name


def _relative(got: list[float], expected: list[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True)]
