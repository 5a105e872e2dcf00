"""Every share of --split that Megatron builds must hold a token: on an empty one its ranks count for ever."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.arguments.flags import Flags
from moe_bench.config.knobs import says
from moe_bench.config.run import ResolvedRun, Setting
from moe_bench.data.index_header import read_header
from moe_bench.data.split import (
    MEGATRONS_OWN,
    PURPOSES,
    Shares,
    has_tokens,
    sequences_of,
    shares_of,
)
from moe_bench.errors import ConfigError

_OF_EACH = ("--train-data-path", "--valid-data-path", "--test-data-path")
_ALL: Shares = ((0.0, 1.0), (0.0, 1.0), (0.0, 1.0))
_OTHER_FORMATS = ("--mock-data", "--sft", "--perform-rl-step", "--dataloader-fast-cache-load")
"""With these no index is divided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Named:
    """One flag's data, for one purpose or, cut by --split, for all three."""

    flag: str
    words: tuple[str, ...]
    """As Megatron reads them: prefixes, or weights and prefixes in turn."""
    shares: Shares


def refuse_empty_shares(run: ResolvedRun, project: Path, *, mounts: str = "") -> None:
    """Raises ConfigError for data of too few documents; what is not to be seen from this machine is let be.

    Relative paths start in `project`. `mounts`: CONTAINER_MOUNTS, where the ranks run in an image.
    """
    if any(flag in run.args for flag in _OTHER_FORMATS):
        return
    named = tuple(_named(run, project))
    if not named:
        return
    for one in named:
        for prefix in prefixes_of(one.words):
            index = Path(f"{_outside(project / prefix, mounts)}.idx")
            if "://" not in prefix and index.is_file():
                _refuse_empty(run, one, index)
    _refuse_unfed(run, named)


def prefixes_of(words: Sequence[str]) -> tuple[str, ...]:
    """The data among the words of --data-path: megatron/core/datasets/utils.py get_blend_from_list, 0.11 to 0.19."""
    if len(words) % 2 == 0 and all(_is_number(word) for word in words[::2]):
        return tuple(words[1::2])
    return tuple(words)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _named(run: ResolvedRun, project: Path) -> Iterator[_Named]:
    args = run.args
    shares = shares_of(_split(run))
    for flag in ("--data-path", "--data-args-path"):
        if flag in args and shares is not None:
            words = _words(args[flag])
            if flag == "--data-args-path":
                words = tuple(_read(project / words[0]).split())
            yield _Named(flag=flag, words=words, shares=shares)
            return
    listed = "--per-split-data-args-path"
    if listed in args:
        try:
            found = json.loads(_read(project / args[listed].value) or "{}")
        except ValueError:
            return
        for number, name in enumerate(("train", "valid", "test")):
            blend = found.get(name) or ()
            words = tuple(blend.split() if isinstance(blend, str) else map(str, blend))
            if words:
                yield _Named(flag=listed, words=words, shares=_only(number))
        return
    for number, flag in enumerate(_OF_EACH):
        if flag in args:
            yield _Named(flag=flag, words=_words(args[flag]), shares=_only(number))


def _only(number: int) -> Shares:
    train, validation, test = (share if at == number else None for at, share in enumerate(_ALL))
    return train, validation, test


def _words(setting: Setting) -> tuple[str, ...]:
    return setting.words or (setting.value,)


def _read(path: Path) -> str:
    """Nothing where it is not on this machine: the ranks' may have it."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _split(run: ResolvedRun) -> str:
    setting = run.args.get("--split")
    return setting.value if setting is not None else MEGATRONS_OWN


def _outside(path: Path, mounts: str) -> Path:
    """Where this machine has a path of the container."""
    for mount in mounts.split(","):
        host, _, inside = mount.partition(":")
        inside = inside.split(":")[0]
        if inside and path.is_relative_to(inside):
            return Path(host) / path.relative_to(inside)
    return path


def _refuse_empty(run: ResolvedRun, named: _Named, index: Path) -> None:
    count = read_header(index).num_sequences
    for purpose, share in zip(PURPOSES, named.shares, strict=True):
        if share is None or has_tokens(index, sequences_of(share, count)):
            continue
        if share == (0.0, 1.0):
            raise ConfigError(
                f"{_said(run, named.flag)}: {index} holds no token, and Megatron would wait for one for ever; "
                "prepare it from text"
            )
        raise ConfigError(
            f"{_said(run, named.flag)}: {index} has {count} document(s), of which {_of_split(run)} leaves none with text for "
            f"{purpose}, and Megatron would wait for one for ever; cut the text into more (python -m moe_bench data "
            "prepare --text paragraph or line), or train on all of it with --split 100,0,0 --eval-iters 0"
        )


def _refuse_unfed(run: ResolvedRun, named: Sequence[_Named]) -> None:
    """Nothing to train on ends after 0 steps; nothing to validate on (from 0.14) after the last one, in a traceback."""
    fed = [any(one.shares[number] is not None for one in named) for number in range(3)]
    what = _of_split(run) if named[0].flag in ("--data-path", "--data-args-path") else named[0].flag
    if not fed[0] and "--skip-train" not in run.args:
        raise ConfigError(f"{what}: leaves nothing to train on; --skip-train only evaluates")
    iters = run.args.get("--eval-iters")
    asked = iters is None or iters.value != "0" or "--full-validation" in run.args
    if not fed[1] and asked and Flags.of_release(run.knobs).knows("--full-validation"):
        said = (
            f"{iters.spelled('--eval-iters')} ({iters.origin.place})"
            if iters
            else "--eval-iters (100 unless given)"
        )
        raise ConfigError(
            f"{what}: leaves nothing to validate on, and {said} asks for it; add --eval-iters 0"
        )


def _of_split(run: ResolvedRun) -> str:
    setting = run.args.get("--split")
    if setting is None:
        return f"--split {MEGATRONS_OWN} (Megatron's own)"
    return f"{setting.spelled('--split')} ({setting.origin.place})"


def _said(run: ResolvedRun, flag: str) -> str:
    setting, knob = run.args[flag], run.knobs.get("DATA_PATH")
    if knob is not None and knob.value == setting.value:
        return says("DATA_PATH", knob)
    return f"{setting.spelled(flag)} ({setting.origin.place})"
