"""What an event says to someone who watches."""

from moe_bench.results.live import describe
from moe_bench.results.records import Event


def test_an_evaluation_names_its_set_and_shows_four_digits() -> None:
    event = Event(
        event="evaluation",
        time_unix_s=0.0,
        rank=0,
        fields={"step": 12, "split": "test", "losses": {"lm loss": 3.418731212615967}},
    )
    assert describe(event) == "evaluation (test) at step 12: lm loss 3.4187"


def test_an_event_that_concerns_no_watcher_says_nothing() -> None:
    assert describe(Event(event="start", time_unix_s=0.0, rank=0, fields={})) is None
