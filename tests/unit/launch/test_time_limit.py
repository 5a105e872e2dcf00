"""RUN_TIME in every spelling of Slurm's."""

from __future__ import annotations

import pytest

from moe_bench.errors import LaunchError
from moe_bench.launch import time_limit
from tests.support.runs import make_run


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20", 1200),
        ("2880", 172_800),
        ("10:30", 630),
        ("01:02:03", 3723),
        ("2-12", 216_000),
        ("1-00:30", 88_200),
        ("1-00:00:05", 86_405),
    ],
)
def test_every_spelling_of_slurms_time_limit_is_read(text: str, expected: int) -> None:
    assert time_limit.seconds(make_run(RUN_TIME=text)) == expected


@pytest.mark.parametrize("text", ["UNLIMITED", "INFINITE", "unlimited"])
def test_no_limit_is_one_word_in_every_spelling_and_no_number(text: str) -> None:
    run = make_run(RUN_TIME=text)
    assert time_limit.written(run) == "UNLIMITED"
    with pytest.raises(LaunchError, match=r"RUN_TIME=UNLIMITED \(environment\) sets no limit"):
        time_limit.seconds(run)


@pytest.mark.parametrize("text", ["soon", "1:2:3:4", "00:00:00", "-1"])
def test_what_is_no_time_limit_is_refused(text: str) -> None:
    with pytest.raises(LaunchError, match="RUN_TIME="):
        time_limit.seconds(make_run(RUN_TIME=text))
