"""A model YAML: ENV_VARS and MODEL_ARGS, every value as written, with its line. Pure but for `read`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import msgspec
import yaml

from moe_bench.config.nearest import nearest
from moe_bench.errors import ConfigError

SECTIONS = ("DEFAULTS", "ENV_VARS", "MODEL_ARGS")
_Loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
"""Every scalar is its text: nothing is guessed of types."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One `key: value` line."""

    name: str
    words: tuple[str, ...]
    """The scalar as written, or the items of a list."""
    place: str
    """`model_configs/benchmarking/X.yaml:77`."""
    is_list: bool = False
    quoted: bool = False
    """True when the YAML scalar was in quotes, so that `"true"` is a word and not a switch."""


class ModelFile(msgspec.Struct, frozen=True, kw_only=True):
    """What one model YAML says."""

    env_vars: tuple[Entry, ...]
    defaults: tuple[Entry, ...]
    """Values of names used as `${NAME}`, for where no other source gives a non-empty one."""
    model_args: tuple[Entry, ...]


@lru_cache(maxsize=64)
def parse(text: str, *, name: str) -> ModelFile:
    """The YAML's entries in order. Raises ConfigError naming `name` and the line."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_yaml_complaint(error, name, text)) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name} must be a mapping with ENV_VARS and MODEL_ARGS")
    sections = dict(_sections(root, name))
    if "MODEL_ARGS" not in sections:
        raise ConfigError(f"{name} has no MODEL_ARGS; it must map Megatron flags to values there")
    env_vars, defaults = sections.get("ENV_VARS", ()), sections.get("DEFAULTS", ())
    for entry in (*env_vars, *defaults):
        _check_env_name(entry)
    for entry in sections["MODEL_ARGS"]:
        _check_flag_name(entry)
    return ModelFile(env_vars=env_vars, defaults=defaults, model_args=sections["MODEL_ARGS"])


def _yaml_complaint(error: yaml.MarkedYAMLError, name: str, text: str) -> str:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    shown = lines[line - 1] if 0 < line <= len(lines) else ""
    tab = "; indent with spaces, not tabs" if "\t" in shown else ""
    return f"{name}:{line}: not readable as YAML: {error.problem or error.context}{tab} (line reads {shown.strip()!r})"


def _sections(root: yaml.MappingNode, name: str) -> Iterator[tuple[str, tuple[Entry, ...]]]:
    for key, node in _pairs(root, name):
        place = f"{name}:{key.start_mark.line + 1}"
        if key.value not in SECTIONS:
            guess = nearest(key.value, SECTIONS)
            hint = (
                f"; did you mean {guess[0]}?"
                if guess
                else "; only DEFAULTS, ENV_VARS and MODEL_ARGS are read"
            )
            raise ConfigError(f"{place}: unknown section {key.value!r}{hint}")
        if isinstance(node, yaml.ScalarNode) and node.value in ("", "null", "~"):
            yield key.value, ()
        elif isinstance(node, yaml.MappingNode):
            yield key.value, tuple(_entries(node, name))
        else:
            raise ConfigError(f"{place}: {key.value} must be a mapping (one `name: value` a line)")


def _entries(section: yaml.MappingNode, name: str) -> Iterator[Entry]:
    for key, node in _pairs(section, name):
        place = f"{name}:{key.start_mark.line + 1}"
        if isinstance(node, yaml.ScalarNode):
            quoted = node.style in ("'", '"')
            if not quoted and node.value in ("", "~", "null"):
                raise ConfigError(
                    f"{place}: {key.value} has no value; write true for a switch, false to leave it out"
                )
            yield Entry(name=key.value, words=(node.value,), place=place, quoted=quoted)
        elif isinstance(node, yaml.SequenceNode):
            yield Entry(
                name=key.value, words=_items(node, key.value, place), place=place, is_list=True
            )
        else:
            raise ConfigError(
                f"{place}: {key.value} must be a value or a list of values, not a mapping"
            )


def _items(node: yaml.SequenceNode, key: str, place: str) -> tuple[str, ...]:
    items = [item.value for item in node.value if isinstance(item, yaml.ScalarNode)]
    if not items or len(items) != len(node.value):
        raise ConfigError(f"{place}: {key} must be a list of plain values with at least one item")
    return tuple(items)


def _pairs(mapping: yaml.MappingNode, name: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """Key and value nodes; refuses doubled and non-scalar keys, which PyYAML itself lets pass."""
    seen: dict[str, int] = {}
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or (
            key.value == "<<" and key.style not in ("'", '"')
        ):
            raise ConfigError(f"{name}:{line}: keys must be plain names (no merge keys, no lists)")
        if key.value in seen:
            raise ConfigError(
                f"{name}:{line}: {key.value} is already set in line {seen[key.value]}; remove one of the two"
            )
        seen[key.value] = line
        yield key, value


def _check_env_name(entry: Entry) -> None:
    if not (entry.name.isascii() and entry.name.isidentifier()):
        raise ConfigError(
            f"{entry.place}: {entry.name!r} is not the name of an environment variable"
        )
    if entry.is_list:
        raise ConfigError(
            f"{entry.place}: {entry.name} is an environment variable and takes one value"
        )


def _check_flag_name(entry: Entry) -> None:
    if not entry.name.startswith("--") or any(char.isspace() or char == "=" for char in entry.name):
        raise ConfigError(
            f"{entry.place}: {entry.name!r} is not a Megatron flag; flags are written --like-this: value"
        )
