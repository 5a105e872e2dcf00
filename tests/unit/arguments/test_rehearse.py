"""A rehearsal keeps what the run does and says everything it makes smaller."""

from functools import cache
from itertools import product
from pathlib import Path

import pytest

from moe_bench.arguments.resolve import Identity, resolve_run
from moe_bench.config.gather import Request
from moe_bench.config.machine import Machine
from moe_bench.config.run import ResolvedRun
from moe_bench.errors import ArgumentsError, ConfigError
from moe_bench.planner.architecture import Architecture
from moe_bench.planner.params import count
from moe_bench.topology.layout import smallest_world

PROJECT = Path(__file__).parents[3]
MODELS = sorted(path.stem for path in (PROJECT / "model_configs/benchmarking").glob("*.yaml"))
SIZES = {
    "tp": "--tensor-model-parallel-size",
    "cp": "--context-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "ep": "--expert-model-parallel-size",
    "etp": "--expert-tensor-parallel-size",
}
LAYOUTS: tuple[dict[str, str], ...] = (
    {"REHEARSE_RANKS": "1"},
    {"REHEARSE_RANKS": "8"},
    {"CP": "4", "TP": "2", "REHEARSE_RANKS": "8"},
    {"TP": "4", "ETP": "2", "REHEARSE_RANKS": "8"},
    {"PP": "4", "VPP": "2", "NUM_LAYERS": "48", "REHEARSE_RANKS": "8"},
)


@cache
def resolve(model: str, *words: str, rehearse: str = "1", **environment: str) -> ResolvedRun:
    given = {"PATH": "/usr/bin:/bin", "MODEL": model, "CLUSTER": "local", "REHEARSE": rehearse}
    request = Request(
        environment={**given, "MCORE_RELEASE_VERSION": "0.19.2", **environment},
        words=words,
        project=PROJECT,
        local=rehearse == "1",
        demo_prefix=PROJECT / ".cache/corpus/shakespeare-bytes",
    )
    return resolve_run(request, Machine(device="cpu", gpus=0, cores=2), Identity(run_id="test"))


def sizes_of(run: ResolvedRun) -> dict[str, int]:
    return {name: int(run.args[flag].value) for name, flag in SIZES.items()}


def number(run: ResolvedRun, flag: str) -> int:
    return int(run.args[flag].value)


REPRESENTATIVES = (
    "DeepSeek-V2",
    "DeepSeek-V3",
    "Mixtral-8x7B",
    "Qwen3-235B-A22B",
    "Qwen3-Next-80B-A3B",
    "Tiny-Qwen3",
)


@pytest.mark.parametrize(
    ("model", "layout"),
    [*product(MODELS, [{}]), *product(REPRESENTATIVES, LAYOUTS)],
)
def test_a_preset_rehearses_in_a_layout(model: str, layout: dict[str, str]) -> None:
    """`resolve` itself checks every divisibility; here what it does not know."""
    run = resolve(model, **layout)
    sizes = sizes_of(run)
    assert run.rehearsal
    assert run.world_size == smallest_world(**sizes) <= int(layout.get("REHEARSE_RANKS", "4"))
    assert count(run.args).total < 6e6
    data_parallel = run.world_size // (sizes["tp"] * sizes["cp"] * sizes["pp"])
    micro_batches = number(run, "--global-batch-size") / (
        number(run, "--micro-batch-size") * data_parallel
    )
    assert micro_batches % sizes["pp"] == 0
    assert number(run, "--seq-length") % (2 * sizes["cp"] * sizes["tp"]) == 0


@pytest.mark.parametrize("model", MODELS)
def test_a_rehearsal_keeps_the_models_parts(model: str) -> None:
    real, small = (Architecture.of(resolve(model, rehearse=on).args) for on in ("0", "1"))
    for part in (
        "gated_unit",
        "linear_bias",
        "qkv_bias",
        "qk_norm",
        "output_gate",
        "sinks",
        "tied",
        "mtp_layers",
    ):
        assert getattr(real, part) == getattr(small, part), part
    for kinds in ("is_expert_layer", "is_delta_layer", "is_windowed_layer"):
        assert set(getattr(real, kinds)) == set(getattr(small, kinds)), kinds
    assert (real.kv_groups < real.heads) == (small.kv_groups < small.heads)
    assert (real.latent is None) == (small.latent is None)
    assert (real.delta is None) == (small.delta is None)
    if real.latent and small.latent:
        assert (real.latent.q_rank is None) == (small.latent.q_rank is None)
    if real.experts and small.experts:
        assert bool(real.experts.shared_width) == bool(small.experts.shared_width)
        assert real.experts.shared_gate == small.experts.shared_gate
        assert 1 < small.experts.topk < small.experts.count


@pytest.mark.parametrize("model", MODELS)
def test_a_rehearsal_takes_no_switch_away_that_a_machine_without_gpus_keeps(model: str) -> None:
    real = resolve(model, rehearse="0")
    small = resolve(model)
    gone = {
        flag for flag, setting in real.args.items() if setting.value == "true"
    } - small.args.keys()
    said = " ".join(one.asked for one in small.substitutions)
    assert [flag for flag in gone if flag not in said] == []


def test_deepseek_v2_keeps_its_uneven_virtual_pipeline_in_the_form_that_two_stages_allow() -> None:
    args = resolve("DeepSeek-V2").args
    assert args["--decoder-first-pipeline-num-layers"].value == "6"
    assert args["--num-layers"].value == "10"
    assert args["--num-virtual-stages-per-pipeline-rank"].value == "2"
    assert "--decoder-last-pipeline-num-layers" not in args


def test_deepseek_v3_keeps_its_groups_its_uneven_pipeline_and_its_prediction_module() -> None:
    run = resolve("DeepSeek-V3")
    assert sizes_of(run) == {"tp": 1, "cp": 1, "pp": 2, "ep": 2, "etp": 1}
    assert number(run, "--decoder-first-pipeline-num-layers") != number(
        run, "--decoder-last-pipeline-num-layers"
    )
    groups, chosen = (number(run, f"--moe-router-{name}") for name in ("num-groups", "group-topk"))
    assert 1 < chosen < groups
    assert number(run, "--num-experts") % groups == 0
    assert number(run, "--moe-router-topk") % chosen == 0
    assert run.args["--moe-layer-freq"].value == "[0,1,1,1,1]"
    assert number(run, "--mtp-num-layers") == 1


def test_virtual_stages_stay_virtual() -> None:
    assert number(resolve("Qwen2-57B-A14B"), "--num-virtual-stages-per-pipeline-rank") == 2


def test_a_layout_string_stays_one_of_the_same_kind() -> None:
    run = resolve(
        "DeepSeek-V3", "--pipeline-model-parallel-layout", "Et*3|(tt|)*29m|L", PP="8", VPP="4"
    )
    layout = run.args["--pipeline-model-parallel-layout"].value
    assert layout.count("|") == 3
    assert layout.endswith("m|L")
    assert layout.count("t") == number(run, "--num-layers")


def test_it_says_aloud_that_it_is_not_the_model() -> None:
    said = resolve("DeepSeek-V3").substitutions
    assert "NOT DeepSeek-V3" in said[0].used
    assert ("--hidden-size 7168", "--hidden-size 128") in {(one.asked, one.used) for one in said}


def test_each_flag_that_changed_is_said_or_is_the_machines_own() -> None:
    real, small = resolve("DeepSeek-V3", rehearse="0"), resolve("DeepSeek-V3")
    said = " ".join(one.asked for one in small.substitutions)
    silent = {
        flag
        for flag, setting in real.args.items()
        if flag not in said and (flag not in small.args or small.args[flag].value != setting.value)
    }
    assert silent <= {"--save", "--tensorboard-dir", "--wandb-save-dir", "--tokenizer-model"}


def test_parallelism_that_finds_no_room_is_named() -> None:
    reasons = {one.asked: one.reason for one in resolve("Qwen3-235B-A22B", CP="2").substitutions}
    assert "leaves no room" in reasons["--tensor-model-parallel-size 2"]


def test_the_nodes_of_the_cluster_command_are_left_out_aloud() -> None:
    run = resolve("Qwen3-30B-A3B", NNODES="4", GPUS_PER_NODE="8")
    assert (run.knobs["NNODES"].value, run.world_size) == ("1", 2)
    assert {"NNODES=4", "GPUS_PER_NODE=8"} <= {one.asked for one in run.substitutions}


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        ({"EP": "7"}, "EP=7 (environment)"),
        ({"PP": "5"}, "PP=5 (environment)"),
        ({"GBS": "100"}, "GBS=100 (environment) is not a multiple"),
    ],
)
def test_sizes_that_do_not_fit_at_full_size_are_said_though_the_small_ones_do(
    given: dict[str, str], refusal: str
) -> None:
    run = resolve("Qwen3-30B-A3B", **given)
    (note,) = (note for note in run.notes if "at its full size" in note)
    assert refusal in note


@pytest.mark.parametrize("model", MODELS)
def test_a_preset_as_it_is_has_no_such_note(model: str) -> None:
    assert not [note for note in resolve(model).notes if "at its full size" in note]


def test_the_knobs_say_what_the_flags_say() -> None:
    run = resolve("DeepSeek-V3")
    assert (run.knobs["PP"].value, run.knobs["EP"].value, run.knobs["NUM_LAYERS"].value) == (
        "2",
        "2",
        "5",
    )
    assert run.knobs["PP"].overrode[0].value == "16"


def test_the_users_number_of_steps_and_rate_stay() -> None:
    run = resolve("DeepSeek-V3", "--lr", "5e-4", TRAIN_ITERS="7")
    assert (number(run, "--train-iters"), run.args["--lr"].value) == (7, "5e-4")


def test_the_users_own_data_keep_their_vocabulary() -> None:
    run = resolve("DeepSeek-V3", DATA_PATH="/data/text_document", TOKENIZER_MODEL="/data/tokenizer")
    assert number(run, "--vocab-size") == 129280


def test_what_megatron_refuses_of_the_real_run_it_refuses_of_the_rehearsal() -> None:
    with pytest.raises(ArgumentsError, match="biases in experts"):
        resolve("gpt-oss-20b", TP="4", ETP="2", REHEARSE_RANKS="8")


@pytest.mark.parametrize("ranks", ["9", "0", "many"])
def test_a_number_of_ranks_out_of_reach_is_refused(ranks: str) -> None:
    with pytest.raises(ConfigError, match=f"REHEARSE_RANKS={ranks}"):
        resolve("DeepSeek-V3", REHEARSE_RANKS=ranks)
