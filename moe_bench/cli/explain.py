"""`python -m moe_bench explain [KEY]...`: every resolved value, who said it, and what it overrode."""

from __future__ import annotations

import click

from moe_bench.cli._destination import destination_option, request_described
from moe_bench.cli._launching import resolve

_SETTINGS = {"ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}


class _Command(click.Command):
    """Leaves the first `--`, which click would take out, among the words: what follows is the run's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Doubles it."""
        at = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [*args[:at], *args[at : at + 1], *args[at:]])


@click.command(
    cls=_Command, context_settings=_SETTINGS, short_help="Show every value with its origin."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@destination_option
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...], *, as_json: bool, here: bool | None) -> None:
    """Show what the run that the environment describes would be: `MODEL=Tiny-Qwen3 TP=2 python -m moe_bench explain TP`.

    Leading names choose what is shown: knobs (TP), Megatron flags in full (--seq-length alone) or variables. Flags that
    have values or follow `--` are the run's own, as after the benchmarking scripts.
    """
    from moe_bench.cli._explaining import as_text, refuse_unknown, to_json

    keys, flags = _split(words)
    request = request_described(flags, here=here)
    run, _ = resolve(request)
    refuse_unknown(run, keys, request)
    if as_json:
        print(to_json(run, keys))
        return
    for line in as_text(run, keys, request):
        print(line)


def _split(words: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names to show, and the run's flags: a lone flag with no value before any `--` is a name."""
    if "--" in words:
        at = words.index("--")
        return words[:at], words[at + 1 :]
    leading = 0
    while leading < len(words) and not words[leading].startswith("--"):
        leading += 1
    if leading == 0 and len(words) == 1 and "=" not in words[0]:
        return words, ()
    return words[:leading], words[leading:]
