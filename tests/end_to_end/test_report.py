"""The report in a real browser: everything is drawn, nothing is fetched, nothing hostile runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe_bench.cli.report import command
from moe_bench.config.run import Substitution
from moe_bench.results.report import render_report
from moe_bench.results.writer import RunWriter
from tests.support.recorded import say, write_manifest, write_run

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    api = pytest.importorskip("playwright.sync_api")
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if path is None:
        pytest.skip("no chromium on PATH (Debian: apt-get install chromium)")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=120_000)
        yield chromium
        chromium.close()


class Visit:
    """A page that was opened, and all it did."""

    def __init__(self, browser: object, path: Path, *, scheme: str = "light") -> None:
        self.page = browser.new_page(color_scheme=scheme)
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri(), timeout=60_000)
        self.page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)

    def titles(self) -> list[str]:
        return self.page.locator("figure h3").all_inner_texts()

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()


def write_page(tmp_path: Path, *runs: Path) -> Path:
    output = tmp_path / "report.html"
    result = CliRunner().invoke(command, [*map(str, runs), "--output", str(output)])
    assert result.exit_code == 0, result.output
    return output


def test_every_plot_of_a_run_is_drawn_offline(browser: object, tmp_path: Path) -> None:
    visit = Visit(browser, write_page(tmp_path, write_run(tmp_path / "a", num_steps=60)))
    assert visit.said == []
    assert visit.requests == [visit.page.url]
    assert visit.titles() == [
        "Loss", "Speed", "Step time", "Gradient norm", "Expert load", "Imbalance by layer over time",
        "Busiest expert", "Routing entropy", "Auxiliary losses", "Learning rate", "Where a step's time goes", "Memory by rank",
    ]  # fmt: skip
    drawn = visit.page.locator(".plot:has(svg.main-svg)")
    assert drawn.count() == visit.count(".plot") == 12
    assert visit.count(".plot .heatmaplayer image") == 2
    assert (
        visit.count(".plot .scatterlayer path.js-line") == 10
    )  # speed and step time have a faded line too
    assert visit.count(".plot .barlayer .point") == 5
    assert all(visit.page.locator(".plot").nth(i).get_attribute("aria-label") for i in range(12))


def test_hostile_names_are_text_and_never_run(browser: object, tmp_path: Path) -> None:
    swap = Substitution(asked=HOSTILE, used=HOSTILE, reason=HOSTILE)
    a = write_run(
        tmp_path / "<b>a&amp;b",
        model="Tiny-Qwen3",
        knobs={"COMMENT": HOSTILE, HOSTILE: "1"},
        args={"--wandb-exp-name": HOSTILE},
        substitutions=(swap,),
        start={"versions": {HOSTILE: HOSTILE}, "device": HOSTILE, "flop_formula": HOSTILE},
    )
    say(RunWriter(a), "warning", 20, message=HOSTILE)
    b = write_run(tmp_path / "b", start={"routing_mode": HOSTILE})
    visit = Visit(browser, write_page(tmp_path, a, b))
    assert visit.page.evaluate("window.hacked") is None
    assert visit.said == []
    assert visit.requests == [visit.page.url]
    assert visit.count("img[src=x]") == 0
    assert HOSTILE in visit.page.locator("#events ~ section").first.text_content()
    assert "Expert load: <b>a&amp;b" in visit.titles()


def test_runs_of_other_batch_sizes_are_laid_over_one_another_by_tokens(
    browser: object, tmp_path: Path
) -> None:
    a, b = write_run(tmp_path / "a", num_steps=60), write_run(tmp_path / "b", num_steps=20)
    say(RunWriter(a), "evaluation", 40, step=30, split="validation", losses={"lm loss": 2.5})
    visit = Visit(browser, write_page(tmp_path, a, b))
    furthest = "document.getElementById('plot-0').data.map((line) => Math.max(...line.x))"
    assert visit.page.evaluate(furthest) == [60, 20, 30]
    visit.page.locator("#along").select_option("tokens")
    assert visit.page.evaluate(furthest) == [60 * 2048, 20 * 2048, 30 * 2048]
    assert visit.page.locator("#plot-0 .xtitle").text_content() == "tokens consumed"
    visit.page.locator("#along").select_option("hours")
    assert visit.page.locator("#plot-0 .xtitle").text_content() == "minutes since the start"
    seconds = [59 * 0.54, 19 * 0.54, 30 * 0.5]  # of the steps that end last by their time stamps
    assert visit.page.evaluate(furthest) == pytest.approx([one / 60 for one in seconds], rel=1e-3)
    assert visit.page.locator("#plot-0 .legendtext").all_text_contents() == [
        "A",
        "B",
        "A: validation",
    ]
    assert visit.said == []


def test_a_page_is_printed_dark_on_light(browser: object, tmp_path: Path) -> None:
    page = write_page(tmp_path, write_run(tmp_path / "a", num_steps=5))
    visit = Visit(browser, page, scheme="dark")
    shade = (
        "getComputedStyle(document.querySelector('.xtick text')).fill.match(/\\d+/g).map(Number)"
    )
    assert min(visit.page.evaluate(shade)) > 200
    visit.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    visit.page.wait_for_function(f"Math.max(...{shade}) < 60", timeout=20_000)


def test_the_filter_of_the_configuration_hides_what_does_not_match(
    browser: object, tmp_path: Path
) -> None:
    visit = Visit(browser, write_page(tmp_path, write_run(tmp_path / "a", num_steps=2)))
    rows = visit.page.locator("table.filtered tbody tr:visible")
    assert rows.count() == 0
    visit.page.locator("summary", has_text="resolved values").click()
    assert rows.count() == 8
    visit.page.locator("input[type=search]").fill("num-exp")
    assert rows.all_inner_texts() == [
        "flag\t--num-experts\t8\tmodel_configs/benchmarking/Tiny-Qwen3.yaml:12"
    ]


def test_a_dark_page_is_dark(browser: object, tmp_path: Path) -> None:
    page = write_page(tmp_path, write_run(tmp_path / "a", num_steps=5))
    shade = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert max(Visit(browser, page, scheme="dark").page.evaluate(shade)) < 60
    assert min(Visit(browser, page, scheme="light").page.evaluate(shade)) > 200


def test_a_run_without_steps_still_has_a_page(browser: object, tmp_path: Path) -> None:
    write_manifest(tmp_path / "a", rehearsal=True)
    visit = Visit(browser, write_page(tmp_path, tmp_path / "a"))
    assert visit.said == []
    assert visit.titles() == []
    assert "recorded no step" in visit.page.content()
    assert "NOT THE REAL MODEL" in visit.page.content()


def page_of(html: str) -> dict[str, object]:
    """What the page's script draws."""
    text = html.split('<script id="page" type="application/json">')[1].split("</script>")[0]
    return json.loads(text)


def test_a_long_run_makes_a_page_of_bounded_size_in_which_one_spike_is_seen(tmp_path: Path) -> None:
    short = render_report([write_run(tmp_path / "a", num_steps=1500)])
    long = render_report([write_run(tmp_path / "b", num_steps=4500, spike=1234)])
    assert len(long) < len(short) + 100_000
    [loss, *_] = page_of(long)["figures"]
    [line] = loss["traces"]
    assert max(line["y"]) == 99.0
    assert len(line["y"]) <= 1500
    assert page_of(long)["axes"][0]["step"][-1] == 4500
