"""Layouts and pipelines agree with Megatron-Core's own (imported, no ranks started)."""

from __future__ import annotations

import itertools

import pytest

from moe_bench.topology.layout import EXPERT_ORDER, Layout
from moe_bench.topology.pipeline import from_layout

SIZES = [
    dict(zip(("tp", "cp", "pp", "ep", "etp"), sizes, strict=True))
    for sizes in itertools.product((1, 2), (1, 2), (1, 2), (1, 2, 4), (1, 2))
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_groups_are_megatrons(sizes: dict[str, int]) -> None:
    from megatron.core.parallel_state import RankGenerator

    layout = Layout(world_size=16, **sizes)
    dense = RankGenerator(
        tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order="tp-cp-ep-dp-pp"
    )
    expert = RankGenerator(
        tp=layout.etp, ep=layout.ep, dp=layout.edp, pp=layout.pp, cp=1, order="tp-cp-ep-dp-pp"
    )
    for token in ("tp", "cp", "dp", "pp", "dp-cp", "tp-cp", "tp-dp-cp", "tp-pp"):
        assert layout.groups(*token.split("-")) == sorted(map(sorted, dense.get_ranks(token))), (
            token
        )
    names = {"tp": "etp", "ep": "ep", "dp": "edp", "pp": "pp"}
    for token in ("ep", "tp", "dp", "tp-ep", "tp-ep-pp"):
        ours = layout.groups(*(names[one] for one in token.split("-")), order=EXPERT_ORDER)
        assert ours == sorted(map(sorted, expert.get_ranks(token))), token


@pytest.mark.parametrize(
    ("text", "pp"),
    [
        ("Et*2|(tt|)*22t|(tt|)*7mL", 8),
        ("Et|(tt|)*30mL", 8),
        ("Et*4|(tttt|)*14tmL", 4),
        ("Ettt|(tt|)*29,m|L", 16),
        ("E|t|t|t*3|tt|L", 3),
        ("(|t)*2".replace("(|t)*2", "E(|tt)*3|L"), 1),
    ],
)
def test_layout_strings_mean_what_megatron_reads(text: str, pp: int) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    ours, theirs = from_layout(text, pp=pp), PipelineParallelLayerLayout(text, pp)
    assert ours.vpp == theirs.virtual_pipeline_model_parallel_size
    for stage in ours.stages:
        row = theirs.layout[stage.pp_rank][stage.vpp_rank]
        assert len(stage.layers) == row.count(LayerType.decoder)
        assert stage.mtp_layers == row.count(LayerType.mtp)
        assert (stage.embedding, stage.loss) == (LayerType.embedding in row, LayerType.loss in row)
