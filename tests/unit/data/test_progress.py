"""What a preparation says while it runs."""

from __future__ import annotations

import io

import pytest

from moe_bench.data.progress import Meter
from moe_bench.data.store import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_bench.data.progress.LINE_INTERVAL_S", 0.0)
    monkeypatch.setattr("moe_bench.data.progress.BAR_INTERVAL_S", 0.0)


def run(stream: io.StringIO) -> tuple[str, Meter]:
    with Meter(total_raw_bytes=4_000, stream=stream) as meter:
        meter.begin(Progress(documents=5, text_bytes=1_000))
        meter.advance(Progress(documents=6, tokens=900, text_bytes=2_000), raw_bytes=2_000)
        meter.advance(Progress(documents=7, tokens=1_200, text_bytes=3_000), raw_bytes=3_000)
    return stream.getvalue(), meter


@pytest.mark.usefixtures("eager")
def test_elsewhere_than_on_a_terminal_it_writes_whole_lines():
    said, meter = run(io.StringIO())
    first, second, third = said.splitlines()
    assert first == "prepare: going on after 5 stored documents"
    assert " 50% of" in second
    assert " 75% of" in third
    assert "7 documents, 1.2K tokens" in third
    assert "MB/s" in third
    assert third.endswith(" left")
    assert "\x1b" not in said
    assert meter.text_bytes == 2_000


@pytest.mark.usefixtures("eager")
def test_on_a_terminal_it_redraws_one_line():
    said, _ = run(Terminal())
    assert said.count("\r") == 2
    assert said.count("\n") == 2
