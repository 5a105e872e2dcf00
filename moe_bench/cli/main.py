"""`python -m moe_bench`: finds the verb's module and runs it; prints user errors without a traceback."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import NoReturn

import click

from moe_bench import cli
from moe_bench.errors import MoeBenchError


class VerbGroup(click.Group):
    """Imports a verb's module (`moe_bench/cli/<verb>.py`, attribute `command`) when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Each module beside this one is a verb."""
        names = (path.stem for path in Path(cli.__path__[0]).glob("*.py"))
        return sorted(name for name in names if name != "main" and not name.startswith("_"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's click command, or None (click then names the nearest verb)."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"moe_bench.cli.{cmd_name}")
        command: click.Command = module.command
        return command


@click.command(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"]})
def moe_bench() -> None:
    """Train and benchmark Mixture-of-Experts models with Megatron-Core."""


def main() -> NoReturn:
    """Run the verb in sys.argv and exit: 0 done, 2 the user's to mend, 130 interrupted."""
    try:
        moe_bench(prog_name="python -m moe_bench")
    except MoeBenchError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0)
