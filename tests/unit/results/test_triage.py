"""Failures are named by their own words: `failures/*.log` are excerpts, each with where it comes from."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_bench.errors import RecordError
from moe_bench.results.triage import all_rules, diagnose, last_error_line, read_rules

FAILURES = sorted((Path(__file__).parent / "failures").glob("*.log"))


def expected(path: Path) -> tuple[str, list[str]]:
    """The kind that an excerpt shows, and its lines."""
    first, source, *lines = path.read_text().splitlines()
    assert source.startswith("# from: "), path
    return first.removeprefix("# expect: "), lines


@pytest.mark.parametrize("path", FAILURES, ids=lambda path: path.stem)
def test_a_failure_is_named_by_its_own_words(path: Path) -> None:
    name, lines = expected(path)
    found = diagnose(["iteration 1/10 | lm loss: 5.1", *lines, "other ranks end"], read_rules())
    assert found is not None
    assert found.name == name, found
    assert found.line in [line.strip()[:400] for line in lines]
    assert found.what_to_do


def test_every_kind_of_the_guide_has_an_excerpt() -> None:
    shown = {expected(path)[0] for path in FAILURES}
    assert shown >= {
        *("out of GPU memory", "out of host memory", "the disk is full", "a module is missing"),
        *("a path is wrong", "the address is in use", "the tokenizer is missing", "time limit"),
        *("the checkpoint does not fit", "a node failed", "preempted", "NCCL timeout", "killed"),
        *(
            "NCCL network error",
            "not a number",
            "an unknown flag",
            "an assertion failed",
        ),
    }


def test_the_cause_wins_over_what_it_led_to() -> None:
    found = diagnose(
        ["srun: error: n1: task 3: Killed", "torch.OutOfMemoryError: CUDA out of memory"],
        read_rules(),
    )
    assert found is not None
    assert found.name == "out of GPU memory"


@pytest.mark.parametrize(
    "line",
    [
        "iteration 1/10 | lm loss: 5.1",
        "WARNING: could not find the metadata file /runs/x/checkpoints/latest_checkpointed_iteration.txt",
        "Transformer Engine is not installed: 4 reference layers in plain torch take its place",
        "  distributed_timeout_minutes ..................... 10",
        "  exit_on_missing_checkpoint ...................... False",
        "  tokenizer_model ................................. None",
        "moe_bench: the time limit or a preemption is near: asking for a checkpoint",
    ],
)
def test_what_a_healthy_run_says_is_no_failure(line: str) -> None:
    assert diagnose([line], read_rules()) is None


def test_every_rule_says_what_to_do_and_where_its_words_come_from() -> None:
    for rule in read_rules():
        assert rule.what_to_do, rule.name
        assert rule.source, rule.name
        assert not re.search(rule.compiled, ""), f"{rule.name} matches everything"
    names = [rule.name for rule in read_rules()]
    assert len(names) == len(set(names))


def test_a_users_rule_comes_first_and_takes_the_place_of_its_namesake(tmp_path: Path) -> None:
    folder = tmp_path / "triage_rules"
    folder.mkdir()
    (folder / "site.yaml").write_text(
        "- {name: our proxy, pattern: proxy.corp, what_to_do: ask IT}\n"
    )
    more = tmp_path / "more.yaml"
    more.write_text("- {name: killed, pattern: reaped, what_to_do: look at the reaper}\n")
    rules = all_rules(tmp_path, str(more))
    found = diagnose(["ConnectionError: proxy.corp: No such file or directory"], rules)
    assert found is not None
    assert (found.name, found.what_to_do) == ("our proxy", "ask IT")
    assert diagnose(["srun: error: n1: task 3: Killed"], rules) is None
    assert [rule.name for rule in rules].count("killed") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\n", "rules are a list"),
        ("- {name: x, pattern: y}\n", "what_to_do"),
        ("- {name: x, pattern: y, what_to_do: z, colour: red}\n", "colour"),
        ("- {name: x, pattern: '(', what_to_do: z}\n", "is no regular expression"),
    ],
)
def test_a_file_without_rules_is_refused_with_its_name(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecordError, match=said) as caught:
        read_rules(path)
    assert str(path) in str(caught.value)


def test_last_error_line_is_the_last_one() -> None:
    assert (
        last_error_line(["RuntimeError: a", "ok", "ValueError: exception b", "bye"])
        == "ValueError: exception b"
    )
