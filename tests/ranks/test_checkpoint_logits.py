"""Converted models under Megatron give transformers' own logits, in every layout and both key dialects.

One process makes the models with transformers. Weights are NaN before loading, loading is strict about missing keys, and
the bound is 5e-6 in float32 on logits of about 1.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_bench.checkpoint.families import family_of
from moe_bench.checkpoint.flags import megatron_flags
from moe_bench.checkpoint.importing import ImportOptions, run_import
from moe_bench.checkpoint.plan import plan_import
from moe_bench.runtime.logits import CPU_FLAGS
from tests.ranks.checkpoint_ranks import run_listed

HERE = Path(__file__).parent
BOUND = 5e-6

LAYOUTS: dict[str, tuple[int, str]] = {
    "one rank": (1, ""),
    "TP2": (
        2,
        "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 --sequence-parallel",
    ),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "PP2 uneven": (2, "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 2"),
    "VPP2": (
        2,
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|t|tt|ttL",
    ),
    "EP2": (2, "--expert-model-parallel-size 2"),
    "EP4, one expert a rank": (4, "--expert-model-parallel-size 4"),
    "ETP2": (
        2,
        "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 2 --sequence-parallel",
    ),
    "CP2": (2, "--context-parallel-size 2"),
}
FAMILIES = (
    "mixtral",
    "qwen3",
    "qwen2",
    "qwen3_next",
    "dsv2lite",
    "dsv2",
    "dsv3",
    "moonlight",
    "glm",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "olmoe",
)
IMPOSSIBLE = {
    ("gpt_oss", "ETP2"): "Bias in Moe is only supported when ETP==1",
    ("gpt_oss_mxfp4", "ETP2"): "Bias in Moe is only supported when ETP==1",
}
"""What Megatron itself refuses, and its words."""
DIALECTS = ("te", "local")


TE_ONLY = ("qwen3_next",)
"""Families without a local layer spec."""


def possible(family: str, layout: str, dialect: str) -> bool:
    return (family, layout) not in IMPOSSIBLE and (dialect == "te" or family not in TE_ONLY)


MATRIX = [
    (family, layout, dialect)
    for family in FAMILIES
    for layout in LAYOUTS
    for dialect in DIALECTS
    if possible(family, layout, dialect)
]
QUICK = [
    (family, layout, DIALECTS[i // 8 % 2] if possible(family, layout, "local") else "te")
    for i, (family, layout) in enumerate((f, y) for f in FAMILIES for y in LAYOUTS)
    if i % 8 == 0 and possible(family, layout, "te")
]
QUICK.append(("gpt_oss", "PP2", "te"))
"""Every family, every layout and both dialects, thinly."""


@dataclass
class Case:
    family: str
    layout: str = "one rank"
    dialect: str = "te"
    layer_keys: str = "auto"
    spec: str = "te"
    """`te`: the reference layers; `local`: Megatron's local spec of such layers; `megatron`: Megatron's own."""
    strictness: str = "assume_ok_unexpected"
    how: str = ""
    """`load`: only load, into the layers that Megatron's flags describe."""
    more: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "-".join(map(str, vars(self).values())).replace(" ", "_").replace("/", "_")


def case_of(family: str, layout: str, dialect: str) -> Case:
    return Case(family, layout, dialect=dialect, spec=dialect)


TRAPS = {
    "local keys, local spec": Case(
        "qwen3", dialect="local", spec="megatron", strictness="raise_all"
    ),
    "both keys, local spec": Case("qwen3", dialect="both", spec="megatron"),
    "TE keys, local spec": Case("qwen3", dialect="te", spec="megatron"),
    "per-layer keys, list": Case(
        "mixtral", layer_keys="per-layer", more=["--moe-layer-freq", "[1]*6"]
    ),
    "stacked keys, list": Case("mixtral", layer_keys="stacked", more=["--moe-layer-freq", "[1]*6"]),
    "MTP of DeepSeek-V3": Case("dsv3_mtp", how="load", more=["--mtp-num-layers", "1"]),
    "MTP of GLM": Case("glm_mtp", dialect="both", how="load", more=["--mtp-num-layers", "1"]),
    "groups scored otherwise": Case("dsv3_top1"),
    "phantom norm": Case("dsv2lite", how="load"),
}


def spelled(case: Case, models: Path, folder: Path) -> dict[str, Any]:
    """A case as `run_listed` takes it; imports the model on the way."""
    config = json.loads((models / case.family / "config.json").read_text())
    checkpoint = folder / f"{case.family}-{case.dialect}-{case.layer_keys}"
    plan = plan_import(models / case.family, dialect=case.dialect, layer_keys=case.layer_keys)
    run_import(plan, checkpoint, ImportOptions())
    world_size, layout = LAYOUTS[case.layout]
    argv = [*megatron_flags(family_of(config), config), *CPU_FLAGS, *layout.split(), *case.more]
    argv += ["--vocab-size", str(config["vocab_size"]), "--seq-length", "16"]
    argv += ["--load", str(checkpoint)]
    return {
        "world_size": world_size,
        "argv": [*argv, "--dist-ckpt-strictness", case.strictness],
        "tokens": str(models / f"{case.family}.tokens.pt"),
        "out": str(folder / f"{case.name}.pt"),
        "spec": case.spec,
        "how": case.how,
    }


def run_cases(cases: list[Case], models: Path, folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Logits by case name (absent where Megatron refused), and what the ranks said."""
    listed = [spelled(case, models, folder) for case in cases]
    log = run_listed(listed, folder)
    found = {
        case.name: torch.load(entry["out"], weights_only=True) if not case.how else torch.empty(0)
        for case, entry in zip(cases, listed, strict=True)
        if Path(entry["out"]).exists()
    }
    return found, log


def distance(found: torch.Tensor, models: Path, family: str) -> float:
    reference = torch.load(models / f"{family}.logits.pt", weights_only=True)
    assert found.shape == reference.shape
    return float((found - reference).abs().max())


@pytest.fixture(scope="session")
def quick(
    models: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, torch.Tensor], str]:
    cases = [case_of(*chosen) for chosen in QUICK] + list(TRAPS.values())
    return run_cases(cases, models, tmp_path_factory.mktemp("ranks"))


@pytest.mark.ranks(4)
@pytest.mark.parametrize(("family", "layout", "dialect"), QUICK)
def test_logits_are_those_of_transformers(
    family: str, layout: str, dialect: str, quick, models: Path
) -> None:
    found, log = quick
    name = case_of(family, layout, dialect).name
    assert name in found, log[-3000:]
    assert distance(found[name], models, family) <= BOUND


@pytest.mark.ranks(1)
@pytest.mark.parametrize(
    "trap", ["local keys, local spec", "both keys, local spec", "per-layer keys, list"]
)
def test_keys_that_fit_the_training_configuration_load(trap: str, quick, models: Path) -> None:
    found, log = quick
    assert TRAPS[trap].name in found, log[-3000:]
    assert distance(found[TRAPS[trap].name], models, TRAPS[trap].family) <= BOUND


@pytest.mark.ranks(1)
@pytest.mark.parametrize("trap", ["TE keys, local spec", "stacked keys, list", "phantom norm"])
def test_keys_that_do_not_fit_are_refused_by_megatron(trap: str, quick) -> None:
    found, _ = quick
    assert TRAPS[trap].name not in found


@pytest.mark.ranks(1)
@pytest.mark.parametrize("trap", ["MTP of DeepSeek-V3", "MTP of GLM"])
def test_multi_token_prediction_loads_and_leaves_no_parameter_unset(trap: str, quick) -> None:
    found, log = quick
    assert TRAPS[trap].name in found, log[-3000:]


@pytest.mark.ranks(1)
def test_a_router_that_megatron_scores_otherwise_differs_and_the_import_says_so(
    quick, models: Path
) -> None:
    found, log = quick
    case = TRAPS["groups scored otherwise"]
    assert case.name in found, log[-3000:]
    assert distance(found[case.name], models, case.family) > 1e-2
    notes = plan_import(models / case.family).notes
    assert any("scored by its best 2 in transformers and by its best 1" in note for note in notes)
    assert not any("scored by" in note for note in plan_import(models / "dsv3").notes)


@pytest.mark.slow
@pytest.mark.ranks(4)
@pytest.mark.timeout(3600)
def test_the_whole_matrix(models: Path, tmp_path: Path) -> None:
    cases = [case_of(*chosen) for chosen in MATRIX]
    refused = [case_of(family, layout, "te") for family, layout in IMPOSSIBLE]
    found, log = run_cases([*cases, *refused], models, tmp_path)
    distances = {
        case.name: distance(found[case.name], models, case.family)
        for case in cases
        if case.name in found
    }
    print(table(distances))
    missing = [case.name for case in cases if case.name not in found]
    assert not missing, log[-3000:]
    assert max(distances.values()) <= BOUND
    for case, words in zip(refused, IMPOSSIBLE.values(), strict=True):
        assert case.name not in found
        assert words in log


def table(distances: dict[str, float]) -> str:
    """Largest difference of any logit, in millionths: both dialects of each family and layout (Markdown)."""
    lines = ["| family | " + " | ".join(LAYOUTS) + " |", "|---" * (len(LAYOUTS) + 1) + "|"]
    for family in FAMILIES:
        cells = []
        for layout in LAYOUTS:
            both = (distances.get(case_of(family, layout, d).name) for d in DIALECTS)
            cells.append(" ".join("-" if d is None else f"{d * 1e6:.1f}" for d in both))
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
