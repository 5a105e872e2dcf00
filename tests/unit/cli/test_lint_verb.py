import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe_bench.cli.lint import command
from moe_bench.errors import ArgumentsError

KNOBS = (
    "TP",
    "PP",
    "EP",
    "MODEL",
    "CLUSTER",
    "TE_VERSION",
    "GPU_ARCH",
    "MCORE_RELEASE_VERSION",
    "MEGATRON_PATH",
)


def said(*words: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of `python -m moe_bench lint` with these words and variables."""
    environment: dict[str, str | None] = {name: None for name in KNOBS if name in os.environ}
    result = CliRunner().invoke(
        command, list(words), env={**environment, **variables}, catch_exceptions=False
    )
    return result.exit_code, result.output


def test_a_preset_as_it_ships_has_no_errors() -> None:
    code, text = said("DeepSeek-V3", TE_VERSION="2.9", GPU_ARCH="h100")
    assert code == 0
    assert "0 errors, 0 warnings" in text


def test_the_model_may_come_from_the_environment() -> None:
    code, text = said(MODEL="Mixtral-8x7B")
    assert code == 0
    assert "Mixtral-8x7B.yaml" in text


def test_the_guides_command_passes_and_says_that_extended_ep_is_left_out() -> None:
    code, text = said("--moe-extended-ep", MODEL="DeepSeek-V2-Lite", MCORE_RELEASE_VERSION="0.11.0")
    assert code == 0
    assert "left-out: --moe-extended-ep" in text


def test_an_old_transformer_engine_is_an_error_before_anything_starts() -> None:
    with pytest.raises(ArgumentsError, match=r"--moe-permute-fusion .*Transformer Engine 2\.1\.0"):
        said("Qwen3-30B-A3B", TE_VERSION="2.0")


def test_rules_are_listed_with_the_users_own(tmp_path: Path) -> None:
    more = tmp_path / "ours.yaml"
    more.write_text(
        "- name: ours\n  when: [{env: X, is: set}]\n  reason: because\n  fix: unset X\n"
    )
    code, text = said("--rules", MOE_BENCH_RULES=str(more))
    assert code == 0
    assert f"ours ({more}): because. Way out: unset X" in text
    assert "permute-fusion-needs-te-2.1" in text
