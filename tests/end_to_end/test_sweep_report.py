"""A sweep's page in a real browser: the ranking and a plot for each varied knob are drawn, nothing is fetched or run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe_bench.cli.report import command
from moe_bench.results.sweep_report import render_sweeps
from tests.support.recorded import write_run
from tests.support.sweeps import write_measured_sweep

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=120_000)
        yield chromium
        chromium.close()


def visit(browser: object, path: Path) -> tuple[object, list[str]]:
    """The opened page, and all that it said or asked for beside itself."""
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(path.as_uri(), timeout=60_000)
    page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
    said.remove(path.as_uri())
    return page, said


def test_a_sweeps_page_draws_the_ranking_and_each_varied_knob(
    browser: object, tmp_path: Path
) -> None:
    folder = write_measured_sweep(tmp_path / "Tiny-Qwen3-abc")
    result = CliRunner().invoke(command, [str(folder)])
    assert result.exit_code == 0, result.output
    page, said = visit(browser, folder / "report.html")
    assert said == []
    assert page.locator("figure h3").all_inner_texts() == [
        "Points by speed", "Speed over TP", "Speed over MBS", "Speed over memory",
    ]  # fmt: skip
    assert page.locator(".plot:has(svg.main-svg)").count() == 4
    assert page.locator(".plot .barlayer .point").count() == 4
    assert page.locator(".plot .errorbars path, .plot .errorbar path").count() >= 4
    assert page.locator("#plot-2 .xtick text").all_text_contents() == ["1", "2", "4"]
    assert "winner: point 2 (TP=1 MBS=2)" in page.locator("main h3").first.inner_text()
    assert page.locator("table.ranking tbody tr").count() == 4
    text = page.content()
    assert "out of GPU memory" in text
    assert "GBS=6 is not a multiple of MBS=4" in text
    page.locator("input[type=search]").fill("2,462")  # the winner's speed
    assert page.locator("table.ranking tbody tr:visible").count() == 1


def test_hostile_names_and_reasons_are_text(browser: object, tmp_path: Path) -> None:
    folder = write_measured_sweep(
        tmp_path / "<b>a&amp;b", why=HOSTILE, reason=HOSTILE, model=HOSTILE[:40].replace("/", "")
    )
    (tmp_path / "page.html").write_text(render_sweeps([folder, folder]))
    page, said = visit(browser, tmp_path / "page.html")
    assert said == []
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    assert HOSTILE in page.locator("main").inner_text()
    assert page.locator(".plot:has(svg.main-svg)").count() == 8


def test_runs_and_sweeps_do_not_share_a_page(tmp_path: Path) -> None:
    folder = write_measured_sweep(tmp_path / "s")
    run = write_run(tmp_path / "r", num_steps=4)
    result = CliRunner().invoke(command, [str(folder), str(run)])
    assert "a page shows one kind; make two reports" in str(result.exception)
