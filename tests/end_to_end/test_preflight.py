"""Megatron's own validation over runs of many sizes, in one process that imports it once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
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
    "topk-above-experts": "torch refuses in the first forward pass",
    "length-splits-over-sequence-parallel": "the split refuses in the first forward pass",
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
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, list[object]]:
    """What Megatron-Core says of each lint case, before and after it is mended."""
    pytest.importorskip("megatron.core")
    done = subprocess.run(
        [sys.executable, "-c", BODY], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, done.stderr[-3000:]
    found: dict[str, list[object]] = json.loads(lines[0].removeprefix("ANSWERS"))
    return found


def test_megatron_accepts_the_base_run(answers: dict[str, list[object]]) -> None:
    assert answers[""][0] is True, answers[""]


def test_megatron_refuses_what_an_error_rule_speaks_of(answers: dict[str, list[object]]) -> None:
    wrong = {
        name: found
        for name, found in answers.items()
        if name and (found[0][0] is True) is not (name in NOT_AT_VALIDATION)  # type: ignore[index]
    }
    assert wrong == {}


def test_megatron_accepts_the_mended_run(answers: dict[str, list[object]]) -> None:
    refused = {name: found[1] for name, found in answers.items() if name and not found[1][0]}  # type: ignore[index]
    assert refused == {}
