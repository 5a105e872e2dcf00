"""Errors a user can act on. The CLI prints them without a traceback and exits with 2."""

from __future__ import annotations


class MoeBenchError(Exception):
    """Base of every error that is the user's to mend.

    The message says value, place, reason and way out, in the user's own spelling.
    """

    exit_code = 2


class ConfigError(MoeBenchError):
    """A configuration file, environment variable or flag cannot be used."""


class ArgumentsError(MoeBenchError):
    """Megatron would refuse, or silently misread, these arguments."""


class LaunchError(MoeBenchError):
    """A launch could not be rendered or started."""


class DataError(MoeBenchError):
    """An input text, tokenizer or indexed dataset cannot be used."""


class RecordError(MoeBenchError):
    """A run's record is missing or damaged."""


class CheckpointError(MoeBenchError):
    """A checkpoint cannot be read, written or trusted."""


class Interrupted(MoeBenchError):  # noqa: N818 - it is no error
    """The user stopped it; what is done so far is kept."""

    exit_code = 130


class MissingExtraError(MoeBenchError):
    """An optional package is needed for what was asked."""

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package!r}, which is not installed; "
            f"install it with: uv pip install 'moe-bench[{extra}]'"
        )
