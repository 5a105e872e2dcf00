"""`python -m moe_bench presets`."""

import json

from click.testing import CliRunner

from moe_bench.cli.presets import command


def test_every_model_is_listed_with_its_size_and_need() -> None:
    result = CliRunner().invoke(command, ["DeepSeek-V3", "Tiny-Qwen3"])
    deepseek, tiny = result.output.splitlines()[1:3]
    assert deepseek.split()[:3] == ["DeepSeek-V3", "671B", "37.6B"]
    assert deepseek.endswith("1024 GPUs")
    assert tiny.endswith("a CPU, 2 ranks")


def test_json_holds_exact_numbers() -> None:
    result = CliRunner().invoke(command, ["--json", "Mixtral-8x7B"])
    (preset,) = json.loads(result.output)
    assert preset["total_params"] == 46_702_792_704
    assert preset["layout"] == "PP4 VPP8 EP8"


def test_a_model_that_cannot_be_resolved_does_not_hide_the_others() -> None:
    result = CliRunner().invoke(command, ["Nope", "Tiny-Qwen3"])
    assert result.exit_code == 2
    assert "error: Nope: MODEL=Nope (command line): there is no" in result.stderr
    assert result.stdout.splitlines()[1].startswith("Tiny-Qwen3")
