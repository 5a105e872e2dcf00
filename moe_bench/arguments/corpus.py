"""Which data a run reads: its own, none (mock), or on this machine the demo corpus. Pure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from moe_bench.config.knobs import whole
from moe_bench.config.run import Origin, Overridden, ResolvedRun, Setting, Substitution

SOURCES = (
    "--data-path",
    "--train-data-path",
    "--valid-data-path",
    "--test-data-path",
    "--data-args-path",
    "--per-split-data-args-path",
)
"""Flags that name data."""

BYTE_VOCABULARY = 257
"""Every byte is a token, 256 ends a document."""
_DEMO = Origin(layer="derived", place="DATA_PATH is not set: the demo corpus")


def without_mocked(run: ResolvedRun) -> ResolvedRun:
    """With --mock-data no data is named: Megatron refuses both."""
    if "--mock-data" not in run.args:
        return run
    args = {flag: setting for flag, setting in run.args.items() if flag not in SOURCES}
    return replace(run, args=args)


def with_demo(run: ResolvedRun, prefix: Path) -> ResolvedRun:
    """The demo corpus at `prefix`, byte by byte, where the run names no data."""
    if "--mock-data" in run.args or any(flag in run.args for flag in SOURCES):
        return run
    args = dict(run.args)
    args["--data-path"] = Setting(value=str(prefix), origin=_DEMO, words=(str(prefix),))
    said: tuple[Substitution, ...] = ()
    before = args.get("--tokenizer-type")
    if before is not None and before.value != "NullTokenizer":
        said = (_said(before, args.pop("--tokenizer-model", None)),)
    _set(args, "--tokenizer-type", "NullTokenizer")
    vocabulary = args.get("--vocab-size")
    if vocabulary is None or (ids := whole(vocabulary.value)) is None or ids < BYTE_VOCABULARY:
        _set(args, "--vocab-size", str(BYTE_VOCABULARY))
    return replace(run, args=args, substitutions=(*run.substitutions, *said))


def reads_demo(run: ResolvedRun) -> bool:
    """True when the run reads the demo corpus."""
    data = run.args.get("--data-path")
    return data is not None and data.origin == _DEMO


def _said(before: Setting, model: Setting | None) -> Substitution:
    name = f" {model.value}" if model else ""
    return Substitution(
        asked=f"--tokenizer-type {before.value}{name}",
        used="bytes (NullTokenizer)",
        reason="DATA_PATH is not set, and the demo corpus is tokenized byte by byte",
    )


def _set(args: dict[str, Setting], flag: str, value: str) -> None:
    before = args.get(flag)
    if before is not None and before.value == value:
        return
    lost = (Overridden(value=before.value, origin=before.origin),) if before else ()
    args[flag] = Setting(value=value, origin=_DEMO, overrode=lost)
