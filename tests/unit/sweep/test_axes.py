"""--vary: what it makes, and what it refuses with a way out."""

from __future__ import annotations

import pytest

from moe_bench.config.command_line import Flag
from moe_bench.errors import ConfigError
from moe_bench.results.sweep_record import Axis
from moe_bench.sweep.axes import parse, points


def axes(
    *texts: str, known: tuple[str, ...] = ("MTP",), flags: tuple[Flag, ...] = ()
) -> list[Axis]:
    return list(parse(texts, lambda: known, flags))


def test_points_are_the_product_and_the_last_axis_is_the_fastest() -> None:
    found = points(axes("TP=1,2", "--lr=1e-3,1e-4"))
    assert found == [
        {"TP": "1", "--lr": "1e-3"},
        {"TP": "1", "--lr": "1e-4"},
        {"TP": "2", "--lr": "1e-3"},
        {"TP": "2", "--lr": "1e-4"},
    ]


def test_names_joined_by_a_comma_vary_together() -> None:
    assert points(axes("TP,EP=1:8,2:4")) == [{"TP": "1", "EP": "8"}, {"TP": "2", "EP": "4"}]


def test_a_single_name_may_have_colons_and_escaped_commas_in_its_values() -> None:
    [times, layout] = axes(
        "RUN_TIME=00:10:00,00:20:00", r"--pipeline-model-parallel-layout=Et|t\,L,Ett|L"
    )
    assert times.values == (("00:10:00",), ("00:20:00",))
    assert layout.values == (("Et|t,L",), ("Ett|L",))


def test_a_name_that_the_runs_files_read_may_vary() -> None:
    assert axes("MTP=0,1")[0].names == ("MTP",)


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["TPP=1,2"], "TPP is no knob.*did you mean TP"),
        (["tp=1,2"], "tp is no knob.*did you mean TP"),
        (["TP"], "write --vary NAME=VALUE,VALUE"),
        (["TP="], "TP has no values; write --vary TP=1,2"),
        (["TP=1,,2"], "one of the values is empty"),
        (["TP=1,2,1"], "'1' is there twice"),
        (["TP=1,x"], r"TP=x \(--vary\) is not a whole number"),
        (["PR=bf16,fp9"], r"PR=fp9 \(--vary\) is not one of"),
        (["TP,EP=1:8,2"], "'2' holds 1 values for 2 names"),
        (["TP=1,2", "TP=4"], "TP varies twice"),
        (["MBS=1,2", "--micro-batch-size=1,2"], "and so does MBS, its knob"),
        (["CLUSTER=a,b"], "CLUSTER does not vary"),
        (["RUN_ID=a,b"], "each point is named after what varies"),
        (["WANDB_API_KEY=a,b"], "is a secret"),
        ([], "nothing varies"),
    ],
)
def test_what_cannot_vary_is_refused_with_a_way_out(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        axes(*texts)


@pytest.mark.parametrize(
    ("vary", "flag"), [("--lr=1,2", "--lr"), ("TP=1,2", "--tensor-model-parallel-size")]
)
def test_a_trailing_flag_that_would_win_in_every_point_is_refused(vary: str, flag: str) -> None:
    with pytest.raises(ConfigError, match="would win over --vary"):
        axes(vary, flags=(Flag(name=flag, words=("4",)),))
