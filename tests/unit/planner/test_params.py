"""Each preset has the parameters and the operations per token of the model it is named after."""

from pathlib import Path

import pytest

from moe_bench.arguments.resolve import Identity, resolve_run
from moe_bench.config.gather import Request
from moe_bench.config.machine import Machine
from moe_bench.config.run import Origin, ResolvedRun, Setting
from moe_bench.errors import ArgumentsError
from moe_bench.planner import flops, params
from moe_bench.planner.architecture import Architecture
from moe_bench.topology.layer_pattern import layer_pattern

PROJECT = Path(__file__).parents[3]


def resolve(model: str, **environment: str) -> ResolvedRun:
    cluster = {
        "CLUSTER": "local",
        "GPUS_PER_NODE": "8",
        "DATA_PATH": "/data/text_document",
        "TOKENIZER_MODEL": "/data/tokenizer",
        "MCORE_RELEASE_VERSION": "0.19.2",
    }
    request = Request(
        environment={"PATH": "/usr/bin:/bin", "MODEL": model, **cluster, **environment},
        words=(),
        project=PROJECT,
        local=False,
    )
    return resolve_run(request, Machine(device="cpu", gpus=0, cores=2), Identity(run_id="test"))


# total and active in 1e9; GFLOP per token at 4096 tokens, forward and backward, without multi-token prediction.
# Totals of published models as their cards and configurations give them; gpt-oss from its model card (116.83 B, 20.91 B,
# and 5.13 B, 3.61 B active without the input embedding, which we count).
PUBLISHED = {
    "Mixtral-8x2B": (6.85, 2.04, 13.0),
    "Mixtral-8x7B": (46.70, 12.88, 79.7),
    "Mixtral-8x22B": (140.62, 39.15, 242.2),
    "DeepSeek-V2-Lite": (15.71, 2.66, 16.4),
    "DeepSeek-V2": (235.74, 21.38, 155.3),
    "DeepSeek-V3": (671.03, 37.55, 250.4),
    "Qwen2-57B-A14B": (57.41, 14.25, 84.7),
    "Qwen3-30B-A3B": (30.53, 3.35, 23.1),
    "Qwen3-235B-A22B": (235.09, 22.19, 148.3),
    "Kimi-K2": (1026.41, 32.86, 205.5),
    "Moonlight-16B-A3B": (15.96, 2.91, 17.2),
    "gpt-oss-20b": (20.91, 4.19, 22.9),
    "gpt-oss-120b": (116.83, 5.71, 32.7),
    "GLM-4.5-Air": (106.85, 13.42, 90.7),
    "OLMoE-1B-7B": (6.92, 1.28, 7.9),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_preset_has_the_size_of_the_model_it_is_named_after(model: str) -> None:
    total, active, gflop = PUBLISHED[model]
    run = resolve(model)
    found = params.count(run.args)
    assert found.total / 1e9 == pytest.approx(total, abs=0.0051)
    assert found.active / 1e9 == pytest.approx(active, abs=0.0051)
    assert flops.per_token(run.args, with_mtp=False) / 1e9 == pytest.approx(gflop, abs=0.051)


def test_deepseek_v3_counts_its_prediction_module_apart() -> None:
    """The published checkpoint holds 685 B: 671 B, the module of 11.6 B, and its copies of both embeddings."""
    run = resolve("DeepSeek-V3")
    found = params.count(run.args)
    copied_embeddings = 2 * 129280 * 7168
    assert (found.total + found.mtp + copied_embeddings) / 1e9 == pytest.approx(684.5, abs=0.1)
    assert flops.per_token(run.args) / 1e9 == pytest.approx(260.6, abs=0.051)
    assert params.count(resolve("DeepSeek-V3", MTP="0").args).mtp == 0


def test_qwen3_next_has_the_81_billion_of_its_published_checkpoint() -> None:
    release = {"MCORE_RELEASE_VERSION": "0.18.0"}  # 0.19 refuses MTP beside the delta net
    found = params.count(resolve("Qwen3-Next-80B-A3B", MTP="1", **release).args)
    assert (found.total + found.mtp) / 1e9 == pytest.approx(81.3, abs=0.05)


def test_the_fault_tolerance_guides_shape_is_not_235_billion() -> None:
    assert params.count(resolve("FT-Guide-Qwen235B").args).total > 7e12


def test_fewer_layers_leave_a_model_with_its_dense_layers() -> None:
    run = resolve("DeepSeek-V3", NUM_LAYERS="32", PP_FIRST="", PP_LAST="")
    assert sum(Architecture.of(run.args).is_expert_layer) == 29


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("([0]*3+[1]*5)", [0, 0, 0, 1, 1, 1, 1, 1]),
        ("[0,1]*2", [0, 1, 0, 1]),
        ("([1]*2+[0]*1)*2", [1, 1, 0, 1, 1, 0]),
        ("3*[1]", [1, 1, 1]),
    ],
)
def test_a_layer_pattern_means_what_python_makes_of_it(text: str, meaning: list[int]) -> None:
    assert layer_pattern(text, flag="--moe-layer-freq") == meaning


@pytest.mark.parametrize("text", ["__import__('os')", "[0]*x", "[0]-[1]", "([0]"])
def test_a_layer_pattern_that_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ArgumentsError, match="--moe-layer-freq"):
        layer_pattern(text, flag="--moe-layer-freq")


def test_a_pattern_of_another_length_names_both_numbers() -> None:
    run = resolve("Qwen3-30B-A3B")
    origin = Origin(layer="flag", place="command line")
    args = {**run.args, "--moe-layer-freq": Setting(value="[1]*4", origin=origin)}
    with pytest.raises(ArgumentsError, match="speaks of 4 layers, --num-layers of 48"):
        params.count(args)
