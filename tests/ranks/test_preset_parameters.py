"""The counted parameters are the ones Megatron builds: one preset for each part of the formula, small, with all its parts, on one rank."""

import sys
from dataclasses import replace

import pytest

from moe_bench.arguments.emit import argv
from moe_bench.planner.params import count
from tests.support.ranks import run_ranks
from tests.unit.arguments.test_rehearse import resolve

EVERY_PART = (
    "DeepSeek-V2-Lite",
    "DeepSeek-V3",
    "GLM-4.5-Air",
    "Mixtral-8x7B",
    "Qwen2-57B-A14B",
    "Qwen3-Next-80B-A3B",
    "gpt-oss-20b",
    "Tiny-Qwen3",
)
FLAGS = {
    "sparse attention": (
        "DeepSeek-V3 --mtp-num-layers=false --experimental-attention-variant dsa --dsa-indexer-n-heads 4 "
        "--dsa-indexer-head-dim 32 --dsa-indexer-topk 64 --dsa-indexer-topk-freq 2"
    ),
    "latent experts": "Tiny-DeepSeek-V3 --moe-latent-size 64",
    "latent experts with biases": "Tiny-Qwen3 --moe-latent-size 64 --disable-bias-linear=false",
}
WRITERS = ("--wandb-", "--tensorboard-", "--save")


def parameters_of(words: tuple[str, ...]) -> int:
    """Build the model of these flags on this rank."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.argument_utils import gpt_config_from_args

    from moe_bench.mcore import entry
    from moe_bench.mcore.cpu.spec import reference_layers

    sys.argv = ["pretrain", *words]
    with reference_layers():
        config = gpt_config_from_args(entry.parse())
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = config.get_builder_cls()(config).build_model(
            groups, pre_process=True, post_process=True
        )
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "asked", [*EVERY_PART, *(pytest.param(FLAGS[name], id=name) for name in FLAGS)]
)
@pytest.mark.ranks(1)
def test_megatron_builds_as_many_parameters_as_are_counted(asked: str) -> None:
    model, *flags = asked.split()
    run = resolve(model, *flags, REHEARSE_RANKS="1")
    silent = {flag: said for flag, said in run.args.items() if not flag.startswith(WRITERS)}
    words = argv(replace(run, args=silent))
    (built,) = run_ranks(lambda: parameters_of(words), 1, layout={})
    counted = count(run.args)
    assert built == counted.total + counted.mtp
