"""Pipelines agree with Megatron-Core's own (imported, no ranks started)."""

from __future__ import annotations

import pytest

from moe_bench.topology.pipeline import from_layout


@pytest.mark.parametrize(
    ("text", "pp"),
    [
        ("Et*2|(tt|)*22t|(tt|)*7mL", 8),
        ("Et|(tt|)*30mL", 8),
        ("Et*4|(tttt|)*14tmL", 4),
        ("Ettt|(tt|)*29,m|L", 16),
        ("E|t|t|t*3|tt|L", 3),
        ("E(|tt)*3|L", 1),
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
