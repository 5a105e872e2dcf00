"""What a user is shown of a failed run's log."""

from __future__ import annotations

from moe_bench.cli._watching import telling_lines

CHAINED = """loading
>> '--exit-on-missing-checkpoint' set ... exiting. <<

Traceback (most recent call last):
  File "checkpointing.py", line 1697
SystemExit

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "pretrain.py", line 171
MoeBenchError: what it said last, above, tells why
"""


def test_what_was_said_before_the_first_of_chained_tracebacks_is_shown_with_the_last_one() -> None:
    assert telling_lines(CHAINED.splitlines()) == [
        "loading",
        ">> '--exit-on-missing-checkpoint' set ... exiting. <<",
        "Traceback (most recent call last):",
        '  File "pretrain.py", line 171',
        "MoeBenchError: what it said last, above, tells why",
    ]


def test_without_a_traceback_the_last_lines_are_shown() -> None:
    assert telling_lines(f"line {i}" for i in range(40)) == [f"line {i}" for i in range(25, 40)]
