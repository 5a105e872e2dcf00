"""Megatron's own validation over runs of many sizes, in one process that imports it once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
NOT_AT_VALIDATION = {
    "fp8-tensorwise-needs-te-2.2": "Transformer Engine's recipe is made at the first step",
    "fp8-blockwise-needs-te-2.3": "Transformer Engine's recipe is made at the first step",
    "mxfp8-needs-te-2.1": "Transformer Engine's recipe is made at the first step",
    "mxfp8-needs-blackwell": "Transformer Engine refuses at the first step",
    "fp8-needs-ada-or-hopper": "Transformer Engine refuses at the first step",
    "fp8-needs-transformer-engine": "the local layers ignore fp8",
    "delay-wgrad-needs-te-2.3": "the layer refuses when it is built",
    "softmax-sink-needs-te-2.8": "the attention refuses when it is built",
    "a2a-overlap-needs-torch-2.6": "the installed torch is newer",
    "flex-needs-ep-or-tp": "the dispatcher refuses when it is built",
    "sequence-parallel-for-moe-with-tp": "the MoE layer refuses in its first forward pass",
    "needs-megatron-lms-own-entry": "Megatron-LM's own script reads it; ours refuses it",
    "optimizer-needs-emerging-optimizers": "the optimizer is made after the model",
    "tiktokenizer-needs-tiktoken": "the tokenizer is made by the ranks",
    "mtp-and-attention-variant": "the model's specification refuses it",
    "sparse-attention-needs-bf16": "its first forward pass refuses it",
    "sparse-attention-needs-fast-hadamard-transform": "its first forward pass refuses it",
    "adlr-autoresume-needs-userlib": "the ranks ask for it",
    "fault-tolerance-package-needs-nvidia-resiliency-ext": "the ranks ask for it",
    "fault-injection-needs-nvidia-resiliency-ext": "the ranks ask for it",
    "external-data-is-for-other-programs": "the first batch is missed",
    **dict.fromkeys(
        (
            "warmup-ends-before-decay",
            "warmup-ends-before-training",
            "warmup-samples-end-before-decay",
            "warmup-samples-end-before-training",
            "warmup-is-a-part-of-decay",
            "wsd-decay-has-a-length",
        ),
        "the scheduler refuses when it is made",
    ),
    **dict.fromkeys(
        (
            "eval-interval-is-at-least-1",
            "log-interval-is-at-least-1",
            "tensorboard-log-interval-is-at-least-1",
            "lr-decay-iters-is-at-least-1",
            "make-vocab-size-divisible-by-is-at-least-1",
            "seed-is-at-least-1",
            "weight-hash-interval-is-at-least-1",
            "warmup-starts-below-the-learning-rate",
            "rerun-mode-report-stats",
            "test-mode-compares-biases-of-norms",
            "snapshots-need-a-place",
            "vocabularies-are-fetched-with-wget",
            "num-workers-is-not-negative",
            "weight-decay-is-not-negative",
            "init-method-std-is-not-negative",
            "hidden-dropout-is-a-probability",
            "attention-dropout-is-a-probability",
            "rotated-channels-are-pairs",
            "sinkhorn-takes-no-auxiliary-loss",
            "quantile-balancing-takes-no-groups",
        ),
        "the ranks stop where they use it",
    ),
    "hierarchical-context-parallelism-needs-einops": "the ranks ask for it",
    "distributed-optimizer-is-adams": "the optimizer refuses when it is made",
    "lazy-mpu-init-is-for-other-programs": "the ranks miss the groups",
    "probabilities-on-input-need-top-1": "the experts refuse when they are built",
    "l2-norm-of-queries-and-mla": "the model's specification refuses it",
    "full-validation-counts-sets": "the first evaluation fails",
    "multiple-validation-sets-need-full-validation": "the datasets refuse when they are built",
    "unpadded-vocabulary-needs-a-checkpoint": "the model's sizes are wanted at the first step",
    "checkpoint-arguments-need-a-checkpoint": "the ranks ask for it",
    "uninitialized-weights": "the first loss is not a number",
    "hybrid-models-have-their-own-script": "pretrain_gpt.py takes it and does nothing with it",
    "reinforcement-learning-has-its-own-script": "pretrain_gpt.py takes it and does nothing with it",
    "other-models-have-their-own-script": "pretrain_gpt.py takes it and does nothing with it",
    "inference-has-its-own-script": "pretrain_gpt.py takes it and does nothing with it",
}
"""Error rules whose upstream check comes after validation, or never."""
BODY = """
import json, sys
from moe_bench.arguments import schema
from moe_bench.arguments.lint import builtin_rules
from moe_bench.runtime.preflight import Target, ask, prepare
from tests.support.lint_cases import BASE, CASES, laid_over, run_of
prepare(None)
known = schema.load("0.19.2")
def verdict(*texts):
    settings = laid_over(BASE, *texts)
    compute = tuple(map(int, settings["compute"].split(".")))
    asked = ask(run_of(settings), known, Target(compute=compute, transformer_engine=settings["te"]), 8, ranks=(0,))
    return [asked.accepted, getattr(asked.answer, "message", ""), [flag for flag, _ in asked.blamed]]
from moe_bench.arguments.conditions import matches
answers = {"": verdict()}
for rule in builtin_rules():
    if rule.severity == "error" and matches("0.19.2", rule.megatron):
        fires, mended = CASES[rule.name]
        answers[rule.name] = [verdict(fires), verdict(fires, mended)]
from click.testing import CliRunner
from moe_bench.cli.preflight import command
def said(*words, **variables):
    result = CliRunner().invoke(command, list(words), env=variables, catch_exceptions=False)
    return [result.exit_code, result.stdout]
outputs = {
    "bf16": said("--all", PR="bf16"),
    "fp8": said("--all", PR="fp8"),
    "large": said("--world-size", "16384", "DeepSeek-V3"),
    "odd": said("--world-size", "1000", "DeepSeek-V3"),
    "decay": said("Mixtral-8x7B", "--lr-decay-samples", "5"),
}
print("ANSWERS" + json.dumps({"cases": answers, "outputs": outputs}))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, dict[str, list[object]]]:
    """What Megatron-Core says of each lint case, before and after it is mended, and of the presets."""
    pytest.importorskip("megatron.core")
    done = subprocess.run(
        [sys.executable, "-c", BODY], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, done.stderr[-3000:]
    found: dict[str, dict[str, list[object]]] = json.loads(lines[0].removeprefix("ANSWERS"))
    return found


@pytest.fixture(scope="module")
def answers(told: dict[str, dict[str, list[object]]]) -> dict[str, list[object]]:
    """The lint cases' part."""
    return told["cases"]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_megatron_accepts_every_preset_at_its_tables_world_size(
    told: dict[str, dict[str, list[object]]], precision: str
) -> None:
    presets = {path.stem for path in (ROOT / "model_configs/benchmarking").glob("*.yaml")}
    code, text = told["outputs"][precision]
    lines = str(text).splitlines()
    assert {line.partition(":")[0] for line in lines if ": OK " in line} == presets, text
    assert code == 0
    deepseek = next(line for line in lines if line.startswith("DeepSeek-V3:"))
    assert "1024 ranks TP1 PP16 EP64" in deepseek
    assert "61 layers = 15x4 + 1" in deepseek


def test_sixteen_thousand_ranks_need_no_job(told: dict[str, dict[str, list[object]]]) -> None:
    code, text = told["outputs"]["large"]
    assert code == 0, text
    assert "16384 ranks" in str(text)
    assert "DP1024" in str(text)


def test_a_refusal_names_rank_line_flags_and_places(
    told: dict[str, dict[str, list[object]]],
) -> None:
    code, text = told["outputs"]["decay"]
    assert code == 2
    assert (
        "REFUSED by Megatron at rank 0 of 64: expected iteration-based learning rate decay"
        in str(text)
    )
    assert "megatron/training/arguments.py:" in str(text)
    assert "--lr-decay-samples 5  (command line)" in str(text)


def test_a_world_size_that_does_not_divide_is_megatrons_own_refusal(
    told: dict[str, dict[str, list[object]]],
) -> None:
    code, text = told["outputs"]["odd"]
    assert code == 2
    assert "world size (1000) is not divisible" in str(text)
    assert "--pipeline-model-parallel-size 16" in str(text)


def test_megatron_accepts_the_base_run(answers: dict[str, list[object]]) -> None:
    assert answers[""][0] is True, answers[""]


def test_megatron_refuses_what_an_error_rule_speaks_of(answers: dict[str, list[object]]) -> None:
    accepted = {name for name, found in answers.items() if name and found[0][0] is True}  # type: ignore[index]
    assert accepted == set(NOT_AT_VALIDATION) & set(answers)


def test_megatron_accepts_the_mended_run(answers: dict[str, list[object]]) -> None:
    refused = {name: found[1] for name, found in answers.items() if name and not found[1][0]}  # type: ignore[index]
    assert refused == {}
