"""From files, environment and flags to argv: who wins, what is derived, what is refused and how it is said."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

from moe_bench.arguments.emit import argv
from moe_bench.config.gather import CLUSTERS, COMMON, MODELS, RUNTIME
from moe_bench.config.machine import Machine
from moe_bench.errors import ConfigError, MoeBenchError
from tests.support.projects import CPU, Project, repository


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def refusal(
    project: Project, environment: dict[str, str] | None = None, *flags: str, **options: object
) -> str:
    with pytest.raises(MoeBenchError) as caught:
        project.resolve(environment, flags, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    return str(caught.value)


# Who wins


def test_a_flag_beats_the_environment_beats_the_table(project: Project) -> None:
    flag = "--tensor-model-parallel-size"
    assert project.resolve().args[flag].value == "1"
    assert project.resolve({"TP": "2"}).args[flag].value == "2"
    setting = project.resolve({"TP": "2"}, [flag, "4"]).args[flag]
    assert (setting.value, setting.origin.place) == ("4", "command line")
    assert setting.overrode[0].value == "2"


def test_a_flag_also_sets_the_knob_that_other_values_are_made_of(project: Project) -> None:
    project.add_flags("--wandb-exp-name: TP${TP}")
    run = project.resolve({"TP": "2"}, ["--tensor-model-parallel-size=4"])
    assert run.knobs["TP"].value == "4"
    assert run.args["--wandb-exp-name"].value == "TP4"


def test_the_environment_beats_a_number_in_the_yaml(project: Project) -> None:
    project.add_flags("--expert-tensor-parallel-size: 1")
    setting = project.resolve({"ETP": "2", "TP": "2"}).args["--expert-tensor-parallel-size"]
    assert (setting.value, setting.overrode[0].value) == ("2", "1")


def test_a_conf_and_the_yaml_may_not_say_two_numbers_for_one_thing(project: Project) -> None:
    project.write(RUNTIME, "export ETP=2\n" + (project.root / RUNTIME).read_text())
    project.add_flags("--expert-tensor-parallel-size: 1")
    said = refusal(project)
    assert "ETP=2 (runtime_configs/benchmarking/runtime.conf:1)" in said
    assert "--expert-tensor-parallel-size is 1" in said


def test_a_conf_that_ignores_the_environment_is_said_aloud(project: Project) -> None:
    project.write(f"{CLUSTERS}/local.conf", "export GBS=16\n")
    run = project.resolve({"GBS": "32"})
    assert run.args["--global-batch-size"].value == "16"
    assert any(
        "GBS=32 (environment) is overridden by cluster_configs" in note for note in run.notes
    )


def test_but_a_flag_beats_even_that(project: Project) -> None:
    project.write(f"{CLUSTERS}/local.conf", "export GBS=16\n")
    assert (
        project.resolve({}, ["--global-batch-size", "64"]).args["--global-batch-size"].value == "64"
    )


def test_training_params_of_the_environment_rank_between_flags_and_yaml(project: Project) -> None:
    given = {"TRAINING_PARAMS": "--lr 0.1 --min-lr '0.01' --train-iters 7"}
    project.add_flags("--lr: 0.5")
    run = project.resolve(given, ["--train-iters", "9"])
    assert [run.args[name].value for name in ("--lr", "--min-lr", "--train-iters")] == [
        "0.1",
        "0.01",
        "9",
    ]


def test_training_params_set_the_knobs_of_their_flags(project: Project) -> None:
    project.add_flags("--moe-layer-freq: '[1]*${NUM_LAYERS}'")
    params = "--pipeline-model-parallel-size 2 --num-layers 6 --num-layers 8"
    run = project.resolve({"TRAINING_PARAMS": params, "VPP": "2"})
    assert (run.knobs["PP"].value, run.knobs["NUM_LAYERS"].value) == ("2", "8")
    assert run.args["--num-virtual-stages-per-pipeline-rank"].value == "2"
    assert run.args["--moe-layer-freq"].value == "[1]*8"
    assert run.args["--num-layers"].origin.place == "TRAINING_PARAMS"
    run = project.resolve({"TRAINING_PARAMS": params}, ["--num-layers", "4"])
    assert (run.knobs["NUM_LAYERS"].value, run.args["--num-layers"].value) == ("4", "4")


def test_a_knob_and_a_flag_of_training_params_may_not_differ(project: Project) -> None:
    flag = "--tensor-model-parallel-size"
    said = refusal(project, {"TP": "4", "TRAINING_PARAMS": f"{flag} 2"})
    assert said.startswith(f"TP=4 (environment) and {flag} 2 (TRAINING_PARAMS) are one setting")
    assert project.resolve({"TP": "2", "TRAINING_PARAMS": f"{flag} 2"}).knobs["TP"].value == "2"


def test_training_params_of_a_conf_set_knobs_below_the_callers(project: Project) -> None:
    flag = "--tensor-model-parallel-size"
    conf = f'export TRAINING_PARAMS="${{TRAINING_PARAMS:-}} {flag} 2"\n'
    project.write(f"{CLUSTERS}/local.conf", conf)
    for given, value in (({}, "2"), ({"TP": "4"}, "4"), ({"TRAINING_PARAMS": "--lr 0.1"}, "2")):
        run = project.resolve(given)
        assert (run.knobs["TP"].value, run.args[flag].value) == (value, value)
    project.write(f"{CLUSTERS}/local.conf", f"{conf}export TP=4\n")
    assert "TP=4 (cluster_configs/benchmarking/local.conf:2) and" in refusal(project)


def test_a_conf_may_not_take_a_flag_out_that_the_files_were_read_by(project: Project) -> None:
    project.write(f"{CLUSTERS}/local.conf", 'export TRAINING_PARAMS="--lr 0.1"\n')
    said = refusal(project, {"TRAINING_PARAMS": "--num-layers 8"})
    assert "takes --num-layers 8 (TRAINING_PARAMS) out again" in said


def test_env_vars_of_the_yaml_yield_to_the_caller(project: Project) -> None:
    assert project.resolve().env["NCCL_DEBUG"].value == "VERSION"
    setting = project.resolve({"NCCL_DEBUG": "INFO"}).env["NCCL_DEBUG"]
    assert (setting.value, setting.overrode[0].value) == ("INFO", "VERSION")


def test_what_a_conf_exports_is_what_the_ranks_get(project: Project) -> None:
    conf = "export LD_LIBRARY_PATH=/opt/nccl:${LD_LIBRARY_PATH:-}\nexport PATH=/opt/bin:$PATH\nexport NCCL_DEBUG=INFO\n"
    project.write(f"{CLUSTERS}/local.conf", conf)
    run = project.resolve({"LD_LIBRARY_PATH": "/usr/x", "NCCL_DEBUG": "WARN"})
    assert run.env["LD_LIBRARY_PATH"].value == "/opt/nccl:/usr/x"
    assert run.env["PATH"].value.startswith("/opt/bin:/")
    assert run.env["NCCL_DEBUG"].value == "INFO"
    lost = [(one.value, one.origin.layer) for one in run.env["NCCL_DEBUG"].overrode]
    assert lost == [("WARN", "environment"), ("VERSION", "model")]
    [note] = [note for note in run.notes if "is overridden by" in note]
    assert note.startswith("NCCL_DEBUG=WARN (environment) is overridden by cluster_configs")


def test_a_conf_that_looks_first_yields_to_the_caller(project: Project) -> None:
    project.write(f"{CLUSTERS}/local.conf", "export NCCL_DEBUG=${NCCL_DEBUG:-INFO}\n")
    assert project.resolve().env["NCCL_DEBUG"].value == "INFO"
    assert project.resolve({"NCCL_DEBUG": "WARN"}).env["NCCL_DEBUG"].value == "WARN"


def test_threads_of_a_file_or_the_caller_are_those_of_a_local_rank(project: Project) -> None:
    def threads(given: dict[str, str] | None = None) -> tuple[str, str]:
        setting = project.resolve(given, local=True).env["OMP_NUM_THREADS"]
        return setting.value, setting.origin.layer

    assert threads() == ("8", "derived")
    assert threads({"OMP_NUM_THREADS": "3"}) == ("3", "environment")
    path = project.root / MODELS / "Tiny-Test.yaml"
    path.write_text(path.read_text().replace("ENV_VARS:", "ENV_VARS:\n  OMP_NUM_THREADS: 2"))
    assert threads() == ("2", "model")
    assert threads({"OMP_NUM_THREADS": "3"}) == ("3", "environment")
    project.write(f"{CLUSTERS}/local.conf", "export OMP_NUM_THREADS=4\n")
    assert threads({"OMP_NUM_THREADS": "3"}) == ("4", "cluster")


def test_defaults_of_the_yaml_yield_to_every_other_source(project: Project) -> None:
    path = project.root / MODELS / "Tiny-Test.yaml"
    path.write_text("DEFAULTS:\n  ETP: 2\n  EXTRA: 5\n" + path.read_text())
    project.add_flags("--expert-tensor-parallel-size: ${ETP}\n--seed: ${EXTRA}")
    assert project.resolve({"TP": "2"}).args["--expert-tensor-parallel-size"].value == "2"
    run = project.resolve({"ETP": "1", "EXTRA": "6"})
    assert (run.args["--expert-tensor-parallel-size"].value, run.args["--seed"].value) == ("1", "6")


def defaults(project: Project, lines: str) -> None:
    path = project.root / MODELS / "Tiny-Test.yaml"
    path.write_text(f"DEFAULTS:\n{lines}" + path.read_text())


def test_defaults_of_the_yaml_beat_what_is_built_in(project: Project) -> None:
    table = (project.root / RUNTIME).read_text()
    project.write(RUNTIME, table.replace("export GPUS_PER_NODE=${GPUS_PER_NODE:-8}\n", ""))
    assert project.resolve().knobs["GPUS_PER_NODE"].value == "8"
    defaults(project, "  GB200_CLUSTER: 1\n  PROFILE: torch\n")
    run = project.resolve()
    assert (run.knobs["PROFILE"].value, run.knobs["PROFILE"].origin.layer) == ("torch", "model")
    assert run.knobs["GPUS_PER_NODE"].value == "4"
    assert run.env["NVLINK_DOMAIN_SIZE"].value == "72"
    assert project.resolve({"GPUS_PER_NODE": "2"}).knobs["GPUS_PER_NODE"].value == "2"


def test_defaults_of_the_yaml_are_checked_like_any_knob(project: Project) -> None:
    defaults(project, "  PP_FIRST: x\n")
    said = refusal(project)
    assert f"PP_FIRST=x ({MODELS}/Tiny-Test.yaml:2) is not a whole number" in said


# Exact words


@pytest.mark.parametrize(
    "value", ["a b", "it's", 'x"y', "a|b", "$HOME", "`id`", "$(id)", "two\nlines", "", "-1", "*"]
)
def test_values_reach_argv_exactly_from_every_source(project: Project, value: str) -> None:
    project.add_flags("--wandb-project: ${WANDB_PROJECT}\n--wandb-exp-name: x-${COMMENT}")
    given = {"COMMENT": value} | ({"WANDB_PROJECT": value} if value else {})
    words = list(
        argv(project.resolve(given, ["--wandb-save-dir", value, f"--wandb-entity={value}"]))
    )
    assert words[words.index("--wandb-exp-name") + 1] == f"x-{value}"
    assert words[words.index("--wandb-save-dir") + 1] == value
    assert words[words.index("--wandb-entity") + 1] == value
    if value:
        assert words[words.index("--wandb-project") + 1] == value


@pytest.mark.parametrize("value", ["--foo", "-foo", "-1e-3", "-", "-1", "-.5", "-2.5", "-a b", "a"])
def test_megatrons_parser_reads_a_value_that_looks_like_a_flag(
    project: Project, value: str
) -> None:
    name = "--wandb-exp-name"
    words = argv(project.resolve({}, [f"{name}={value}"]))
    at = next(index for index, word in enumerate(words) if word.startswith(name))
    parser = argparse.ArgumentParser()
    parser.add_argument(name)
    count = 1 if "=" in words[at] else 2
    assert parser.parse_args(words[at : at + count]).wandb_exp_name == value


def test_lists_become_several_words(project: Project) -> None:
    project.add_flags("--recompute-granularity: selective\n--recompute-modules: mlp moe")
    words = argv(project.resolve())
    at = words.index("--recompute-modules")
    assert words[at : at + 3] == ("--recompute-modules", "mlp", "moe")


def test_a_blend_of_data_is_split_and_a_quoted_path_with_a_space_is_not(project: Project) -> None:
    path = project.root / MODELS / "Tiny-Test.yaml"
    path.write_text(path.read_text().replace("/data/text", "${DATA_PATH}"))
    words = argv(project.resolve({"DATA_PATH": "0.3 /a 0.7 '/b c/d'"}))
    at = words.index("--data-path")
    assert words[at + 1 : at + 5] == ("0.3", "/a", "0.7", "/b c/d")


@pytest.mark.parametrize("path", ["my data/o1", "it's/my data/o1"])
def test_a_path_with_a_blank_is_whole_where_its_index_is_there(project: Project, path: str) -> None:
    model = project.root / MODELS / "Tiny-Test.yaml"
    model.write_text(model.read_text().replace("/data/text", "${DATA_PATH}"))
    project.write(f"{path}.idx", "")
    for prefix in (path, str(project.root / path)):
        assert project.resolve({"DATA_PATH": prefix}).args["--data-path"].words == (prefix,)


def test_a_path_that_cannot_be_split_is_shown_as_it_must_be_written(project: Project) -> None:
    project.add_flags("--valid-data-path: ${VALID}")
    said = refusal(project, {"VALID": "/it's a/path"})
    assert f"No closing quotation; one path is written {shlex.quote("/it's a/path")}" in said


def test_a_relative_path_starts_in_the_project_wherever_the_caller_stands(
    project: Project, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    project.write("mlm/megatron/training/arguments.py", "")
    given = {
        "MEGATRON_PATH": "mlm",
        "OUTPUT_PATH": "out",
        "TRAINING_SCRIPT_PATH": "mlm/pretrain_gpt.py",
    }
    with pytest.raises(MoeBenchError) as empty:  # the flags of that checkout: none
        project.resolve(given)
    assert "has no such flag" in str(empty.value)
    run = project.resolve({"OUTPUT_PATH": "out"})
    assert run.run_dir == project.root / "out" / "run"
    project.write(f"{CLUSTERS}/local.conf", "export OUTPUT_PATH=there MEGATRON_PATH=nowhere\n")
    run = project.resolve()
    assert run.run_dir == project.root / "there" / "run"
    assert run.env["MEGATRON_PATH"].value == str(project.root / "nowhere")


def test_true_is_a_switch_false_takes_it_out(project: Project) -> None:
    project.add_flags("--swiglu: true\n--qk-layernorm: ${QK}\n--finetune: false")
    words = argv(project.resolve({"QK": "false"}))
    assert "--swiglu" in words
    assert "true" not in words
    assert "--qk-layernorm" not in words
    assert "--finetune" not in words


@pytest.mark.parametrize("spelling", [["--swiglu=false"], ["--swiglu", "false"]])
def test_a_trailing_false_takes_a_switch_of_the_yaml_out(
    project: Project, spelling: list[str]
) -> None:
    project.add_flags("--swiglu: true")
    assert "--swiglu" not in argv(project.resolve({}, spelling))


def test_an_unset_optional_name_leaves_its_flag_out(project: Project) -> None:
    project.add_flags("--load: ${LOAD_PATH}")
    assert "--load" not in argv(project.resolve())
    assert "--load" in argv(project.resolve({"LOAD_PATH": "/ckpt"}))


def test_mock_data_takes_the_datas_path_out(project: Project) -> None:
    words = argv(project.resolve({}, ["--mock-data"]))
    assert "--mock-data" in words
    assert "--data-path" not in words


def test_output_path_within_the_yaml_is_the_runs_own_directory(project: Project) -> None:
    project.add_flags("--save: ${OUTPUT_PATH}/checkpoints")
    run = project.resolve({"OUTPUT_PATH": "/base dir"})
    assert run.run_dir == Path("/base dir/run")
    assert run.args["--save"].value == "/base dir/run/checkpoints"


# Refusals


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("two", "TP=two (environment) is not a whole number"),
        ("0", "TP=0 (environment) must be at least 1"),
        ("-1", "TP=-1 (environment) is not a whole number"),
        ("1.5", "TP=1.5 (environment) is not a whole number"),
        ("²", "is not a whole number"),
        ("2 ", "is not a whole number"),
        ("$(id)", "is not a whole number"),
    ],
)
def test_bad_numbers(project: Project, value: str, said: str) -> None:
    assert said in refusal(project, {"TP": value})


@pytest.mark.parametrize("name", ["TP", "NUM_LAYERS", "GPUS_PER_NODE", "PP_FIRST", "PR", "CLUSTER"])
def test_an_empty_knob_is_an_unset_one(project: Project, name: str) -> None:
    assert project.resolve({name: ""}).knobs.get(name) == project.resolve().knobs.get(name)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"MODEL": "Tiny-Tset"}, "did you mean Tiny-Test"),
        (
            {"MODEL": "../../etc/passwd"},
            "MODEL=../../etc/passwd (environment) is a path; MODEL is the name of a model",
        ),
        ({"CLUSTER": "locl"}, "did you mean local"),
        (
            {"PR": "fp18"},
            "PR=fp18 (environment) is not one of bf16, fp8, mxfp8, fp32; did you mean fp8",
        ),
        ({"MOE_TOKEN_DISPATCHER": "all2all"}, "did you mean alltoall"),
        ({"A2A_OVERLAP": "yes"}, "A2A_OVERLAP=yes (environment) must be 0 or 1"),
        ({"RUN_TIME": "soon"}, "write HH:MM:SS"),
        ({"MCORE_RELEASE_VERSION": "newest"}, "is not a Megatron-Core release"),
        ({"MCORE_RELEASE_VERSION": "your_own_megatron_version"}, "is not a Megatron-Core release"),
        ({"MEGATRON_PATH": "your_own_megatron_path"}, "placeholder 'your_own_megatron_path'"),
        ({"MODEL": "your_own_model"}, "placeholder 'your_own_model'"),
        ({"DATA_PATH": "YOUR_DATA_PATH", "TRAINING_PARAMS": "--load YOUR_LOAD"}, "placeholder"),
        ({"TRAINING_PARAMS": "--lr '0.1"}, "No closing quotation"),
        ({"TRAINING_PARAMS_PATH": "/nowhere.yaml"}, "/nowhere.yaml: there is no such file"),
        ({"TRAINING_PARAMS_PATH": "/"}, "is a directory"),
    ],
)
def test_bad_values_of_the_environment(project: Project, given: dict[str, str], said: str) -> None:
    assert said in refusal(project, given)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--num-layerz", "4"], "did you mean --num-layers"),
        (["--num_layers", "4"], "--num-layers"),
        (["--moe-enable-deepeep"], "did you mean --moe-enable-deepep"),
        (["--swiglu", "7"], "it is a switch and takes no value"),
        (["--lr", "fast"], "'fast' is not a number"),
        (["--num-layers"], "--num-layers  (command line) is not a whole number"),
        (["4"], "belongs to no flag"),
    ],
)
def test_bad_flags(project: Project, flags: list[str], said: str) -> None:
    assert said in refusal(project, {}, *flags)


@pytest.mark.parametrize("release", ["0.11.0", "0.19"])
def test_the_guides_extended_ep_is_left_out_aloud_where_no_flag_is_needed_for_it(
    project: Project, release: str
) -> None:
    run = project.resolve({"MCORE_RELEASE_VERSION": release, "EP": "8"}, ["--moe-extended-ep"])
    assert "--moe-extended-ep" not in argv(run)
    assert [one.asked for one in run.substitutions] == ["--moe-extended-ep"]


def test_placeholders_of_a_cluster_file_are_refused_with_their_line(project: Project) -> None:
    project.write(f"{CLUSTERS}/local.conf", "\nexport ACCOUNT=${ACCOUNT:-YOUR_ACCOUNT}\n")
    assert "ACCOUNT=YOUR_ACCOUNT (cluster_configs/benchmarking/local.conf:2)" in refusal(project)
    assert project.resolve({"ACCOUNT": "me"}).knobs["ACCOUNT"].value == "me"


@pytest.mark.parametrize("name", ["RUN_ID", "LAUNCHER"])
def test_what_a_file_says_too_late_is_refused(project: Project, name: str) -> None:
    project.write(f"{CLUSTERS}/local.conf", f"export {name}=${{{name}:-x}}\n")
    said = f"{name}=x (cluster_configs/benchmarking/local.conf:1) comes too late"
    assert said in refusal(project)
    assert project.resolve({name: "mine"}).knobs[name].value == "mine"
    project.write(f"{CLUSTERS}/local.conf", "")
    defaults(project, f"  {name}: x\n")
    assert f"{name}=x ({MODELS}/Tiny-Test.yaml:2) comes too late" in refusal(project)


@pytest.mark.parametrize("line", ["cpu", "${MOE_BENCH_DEVICE:-cpu}"])
def test_a_conf_may_not_name_another_device_than_the_one_it_was_read_for(
    project: Project, line: str
) -> None:
    project.write(f"{CLUSTERS}/local.conf", f"export MOE_BENCH_DEVICE={line}\n")
    said = refusal(project, device="cuda")
    assert "MOE_BENCH_DEVICE=cpu (cluster_configs/benchmarking/local.conf:1) contradicts" in said
    assert "MOE_BENCH_DEVICE=cuda (built in)" in said
    run = project.resolve({"MOE_BENCH_DEVICE": "cpu"}, device="cpu")
    assert run.knobs["MOE_BENCH_DEVICE"].origin.layer == "environment"


def test_the_device_that_was_found_is_not_said_to_be_the_callers(project: Project) -> None:
    setting = project.resolve(device="cuda", local=True).knobs["MOE_BENCH_DEVICE"]
    assert (setting.value, setting.origin.place) == ("cuda", "this machine")


def test_a_secret_in_a_file_is_refused(project: Project) -> None:
    path = project.root / MODELS / "Tiny-Test.yaml"
    path.write_text(path.read_text().replace("NCCL_DEBUG: VERSION", "WANDB_API_KEY: abc"))
    said = refusal(project)
    assert "WANDB_API_KEY is a secret" in said
    assert "abc" not in said


def test_an_undefined_name_in_the_yaml_is_named_with_its_line(project: Project) -> None:
    project.add_flags("--seed: ${SEED}")
    assert f"{MODELS}/Tiny-Test.yaml:25: ${{SEED}} is not defined" in refusal(project)


def test_a_broken_conf_is_an_error_of_the_user(project: Project) -> None:
    project.write(COMMON, 'export A="\n')
    assert "common.conf failed" in refusal(project)


# This machine


def test_without_cuda_a_tiny_model_is_told_what_is_replaced(project: Project) -> None:
    project.add_flags("--transformer-impl: transformer_engine\n--moe-permute-fusion: true")
    run = project.resolve({"MOE_TOKEN_DISPATCHER": "flex", "PR": "fp8"}, local=True, machine=CPU)
    words = argv(run)
    assert words[words.index("--moe-token-dispatcher-type") + 1] == "alltoall"
    assert words[words.index("--transformer-impl") + 1] == "local"
    assert words[words.index("--distributed-backend") + 1] == "gloo"
    assert not any("fp8" in word or "deepep" in word for word in words)
    asked = " ".join(one.asked for one in run.substitutions)
    for name in ("--fp8-format", "--moe-permute-fusion", "flex", "transformer_engine"):
        assert name in asked


def test_without_cuda_another_model_is_refused_with_the_ways_out(project: Project) -> None:
    project.write(f"{MODELS}/Big.yaml", (project.root / MODELS / "Tiny-Test.yaml").read_text())
    said = refusal(project, {"MODEL": "Big"}, local=True, machine=CPU)
    assert "REHEARSE=1" in said
    assert "MOE_BENCH_DEVICE=cpu" in said
    run = project.resolve({"MODEL": "Big", "MOE_BENCH_DEVICE": "cpu"}, local=True, machine=CPU)
    assert run.substitutions


def test_with_cuda_nothing_is_replaced(project: Project) -> None:
    run = project.resolve({"GPUS_PER_NODE": "8"}, local=True)
    assert run.substitutions == ()
    assert "--distributed-backend" not in run.args


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ({}, 1),
        ({"EP": "2"}, 2),
        ({"TP": "2", "PP": "2"}, 4),
        ({"TP": "2", "EP": "2"}, 4),  # ETP is TP unless said
        ({"TP": "2", "EP": "4", "ETP": "1"}, 4),
        ({"GPUS_PER_NODE": "4", "EP": "2"}, 4),
    ],
)
def test_a_local_world_is_as_large_as_the_layout_needs(
    project: Project, given: dict[str, str], ranks: int
) -> None:
    project.write(
        RUNTIME, (project.root / RUNTIME).read_text().replace("GPUS_PER_NODE:-8", "GPUS_PER_NODE:-")
    )
    run = project.resolve(given | {"MBS": "1"}, local=True, machine=CPU)
    assert run.world_size == ranks
    assert run.env["OMP_NUM_THREADS"].value == str(8 // ranks)


def test_the_demo_corpus_is_read_only_where_no_data_is_named(project: Project) -> None:
    prefix = Path("/corpus/shakespeare bytes")
    assert (
        project.resolve(local=True, machine=CPU, demo_prefix=prefix).args["--data-path"].value
        == "/data/text"
    )
    path = project.root / MODELS / "Tiny-Test.yaml"
    path.write_text(
        path.read_text().replace("/data/text", "${DATA_PATH}")
        + "  --tokenizer-type: HuggingFaceTokenizer\n"
    )
    run = project.resolve(local=True, machine=CPU, demo_prefix=prefix)
    words = argv(run)
    assert words[words.index("--data-path") + 1] == str(prefix)
    assert words[words.index("--tokenizer-type") + 1] == "NullTokenizer"
    assert any("HuggingFaceTokenizer" in one.asked for one in run.substitutions)


def test_a_data_set_that_leads_to_no_data_is_refused_before_others_are_read(
    project: Project,
) -> None:
    path = project.root / MODELS / "Tiny-Test.yaml"
    path.write_text(path.read_text().replace("/data/text", "${DATA_PATH}"))
    demo = Path("/corpus/demo")
    for local, prefix in ((True, demo), (False, None)):
        with pytest.raises(
            ConfigError, match=r"DATASET=wiki \(environment\): CLUSTER=local has no"
        ):
            project.resolve({"DATASET": "wiki"}, local=local, machine=CPU, demo_prefix=prefix)
    with pytest.raises(ConfigError, match="DATASET=Shakespeare"):
        project.resolve({"DATASET": "Shakespeare"})
    run = project.resolve({"DATASET": "Shakespeare"}, local=True, machine=CPU, demo_prefix=demo)
    assert run.args["--data-path"].value == str(demo)
    assert "--mock-data" in project.resolve({"DATASET": "wiki"}, ["--mock-data"]).args
    project.write(f"{CLUSTERS}/local.conf", "export DATA_PATH=${DATA_PATH:-/sets/${DATASET:-}}\n")
    assert project.resolve({"DATASET": "wiki"}).args["--data-path"].value == "/sets/wiki"


# The repository's own files


@pytest.mark.parametrize(
    "model", sorted(path.stem for path in (repository().root / MODELS).glob("*.yaml"))
)
def test_every_preset_resolves_as_a_cluster_would_run_it(model: str, tmp_path: Path) -> None:
    run = repository().resolve({"MODEL": model, "OUTPUT_PATH": str(tmp_path), "DATA_PATH": "/d"})
    assert run.args["--num-layers"].value.isdigit()


def test_the_guides_own_command_resolves(tmp_path: Path) -> None:
    given = dict(
        pair.split("=")
        for pair in "MODEL=DeepSeek-V2-Lite MCORE_RELEASE_VERSION=0.11.0 PR=bf16 PROFILE=1 TP=1 PP=1 EP=8 VPP=1 MBS=1 GBS=512 "
        "SEQ_LEN=4096 MOE_TOKEN_DISPATCHER=alltoall MOE_GROUPED_GEMM=true".split()
    )
    run = repository().resolve(
        given | {"OUTPUT_PATH": str(tmp_path), "DATA_PATH": "/d"}, ["--moe-extended-ep"]
    )
    assert {"--moe-grouped-gemm", "--profile"} <= run.args.keys()
    assert "--moe-extended-ep" in {one.asked for one in run.substitutions}


def test_the_callers_variables_for_the_ranks_are_recorded_and_seen_by_the_rules(
    project: Project,
) -> None:
    given = {"NCCL_GRAPH_REGISTER": "0", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    graphs = ["--cuda-graph-impl", "transformer_engine", "--te-rng-tracker"]
    run = project.resolve({**given, "NCCL_VERSION": "2.27"}, graphs)
    assert {name: run.env[name].value for name in given} == given
    assert run.env["NCCL_GRAPH_REGISTER"].origin.layer == "environment"
    assert "NCCL_VERSION" not in run.env
    with pytest.raises(MoeBenchError, match="set NCCL_GRAPH_REGISTER=0"):
        project.resolve({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, graphs)


def test_another_training_script_is_refused_and_the_guides_own_is_not(project: Project) -> None:
    megatron = {"MEGATRON_PATH": "/mlm"}
    project.resolve({**megatron, "TRAINING_SCRIPT_PATH": "/mlm/pretrain_gpt.py"})
    project.resolve(
        {"TRAINING_SCRIPT_PATH": "/pretrain_gpt.py"}
    )  # an old common.conf without MEGATRON_PATH
    with pytest.raises(
        ConfigError, match=r"TRAINING_SCRIPT_PATH=/mlm/pretrain_vlm.py .* is not run"
    ):
        project.resolve({**megatron, "TRAINING_SCRIPT_PATH": "/mlm/pretrain_vlm.py"})


def test_flags_of_a_checkout_that_cannot_be_read_are_passed_on_unless_nearly_known(
    project: Project,
) -> None:
    given = {"MEGATRON_PATH": "/only/in/the/container"}
    run = project.resolve(given, ["--offload-everything-nicely", "--optimizer", "brand_new"])
    assert "--offload-everything-nicely" in run.args
    assert any("cannot be read here: flags are checked against" in note for note in run.notes)
    assert any("--offload-everything-nicely" in note for note in run.notes)
    assert any("--optimizer brand_new" in note for note in run.notes)
    with pytest.raises(MoeBenchError, match="did you mean --moe-router-topk"):
        project.resolve(given, ["--moe-router-topkk", "2"])
    with pytest.raises(MoeBenchError, match="no such flag"):
        project.resolve({}, ["--offload-everything-nicely"])


@pytest.mark.parametrize(
    ("given", "has_torch", "layers"),
    [
        ({}, True, "local"),
        ({"CONTAINER_IMAGE": "nvcr.io/nvidia/pytorch:25.12-py3"}, True, "transformer_engine"),
        ({}, False, "transformer_engine"),
    ],
)
def test_a_job_without_an_image_has_the_layers_of_this_interpreter(
    project: Project, given: dict[str, str], has_torch: bool, layers: str
) -> None:
    project.add_flags("--transformer-impl: transformer_engine")
    login = Machine(device="cpu", gpus=0, cores=4, torch=has_torch, transformer_engine=False)
    given = {"CLUSTER": "local"} | given
    run = project.resolve(given, machine=login, must_name=True, device="cuda")
    assert run.args["--transformer-impl"].value == layers
    assert bool(run.substitutions) == (layers == "local")
    assert "--distributed-backend" not in run.args
