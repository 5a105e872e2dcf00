"""`${NAME}` in the values of a model YAML, as envsubst reads it: nothing is ever run or split. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping

from moe_bench.errors import ConfigError

_REFERENCE = re.compile(r"\$(?:\{(?P<braced>[^}]*)\}|(?P<bare>[A-Za-z_][A-Za-z0-9_]*))")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")

OPTIONAL = frozenset(
    {
        "COMMENT",
        "DATA_PATH",
        "LAYERS_PER_VP",
        "LOAD_PATH",
        "PP_FIRST",
        "PP_LAST",
        "TOKENIZER_MODEL",
        "TRAIN_ITERS",
        "WANDB_PROJECT",
    }
)
"""Names that may be unset: a flag whose whole value is one of them is then left out."""

DEFERRED = re.compile(r"SLURM_[A-Z0-9_]+\Z")
"""Names only a running job knows: left as `${NAME}` for the launch script to expand."""


def expand(value: str, variables: Mapping[str, str], *, place: str) -> str | None:
    """`value` with each `$NAME` and `${NAME}` replaced; None when it is nothing but an unset optional name.

    Raises ConfigError naming `place` for an undefined name or a shell form envsubst does not know (`${X:-y}`).
    """
    whole = _REFERENCE.fullmatch(value)
    if whole and _name_of(whole, place) in OPTIONAL and not variables.get(_name_of(whole, place)):
        return None
    return _REFERENCE.sub(lambda match: _replacement(match, variables, place), value)


def names_in(value: str) -> list[str]:
    """The plain names that `value` refers to."""
    found = (match["braced"] or match["bare"] or "" for match in _REFERENCE.finditer(value))
    return [name for name in found if _NAME.match(name)]


def _name_of(match: re.Match[str], place: str) -> str:
    name = match["braced"] if match["braced"] is not None else match["bare"]
    if not _NAME.match(name):
        raise ConfigError(
            f"{place}: ${{{name}}} is not a plain ${{NAME}}; a model file knows only plain names, "
            "so give the default in a .conf file: export NAME=${NAME:-default}"
        )
    return name


def _replacement(match: re.Match[str], variables: Mapping[str, str], place: str) -> str:
    name = _name_of(match, place)
    if name in variables:
        return variables[name]
    if DEFERRED.match(name):
        return f"${{{name}}}"
    if name in OPTIONAL:
        return ""
    raise ConfigError(
        f"{place}: ${{{name}}} is not defined; set {name} in the environment or in one of the .conf files"
    )
