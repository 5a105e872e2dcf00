"""Which data a run reads: its own, none (mock), or on this machine the demo corpus; and with which tokenizer. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from moe_bench.config.knobs import says, whole
from moe_bench.config.layers import EXPLICIT
from moe_bench.config.run import Origin, Overridden, ResolvedRun, Setting, Substitution
from moe_bench.errors import ConfigError

SOURCES = (
    "--data-path",
    "--train-data-path",
    "--valid-data-path",
    "--test-data-path",
    "--data-args-path",
    "--per-split-data-args-path",
)
"""Flags that name data."""

DEMO = "Shakespeare"
"""The demo corpus, as DATASET names it."""
BYTE_VOCABULARY = 257
"""Every byte is a token, 256 ends a document."""
_MODEL = "--tokenizer-model"
_DEMO = Origin(layer="derived", place="DATA_PATH is not set: the demo corpus")


def without_mocked(run: ResolvedRun) -> ResolvedRun:
    """With --mock-data no data is named: Megatron refuses both. What the user named is left out aloud."""
    if "--mock-data" not in run.args:
        return run
    args = {flag: setting for flag, setting in run.args.items() if flag not in SOURCES}
    knob = run.knobs.get("DATA_PATH")
    said = tuple(
        Substitution(asked=f"{flag} {setting.value}", used="mock data", reason="--mock-data")
        for flag, setting in run.args.items()
        if flag in SOURCES
        and (setting.origin.layer in EXPLICIT or (knob and knob.origin.layer in EXPLICIT))
    )
    return replace(run, args=args, substitutions=(*run.substitutions, *said))


def refuse_unknown_set(run: ResolvedRun, *, has_demo: bool) -> None:
    """Raises ConfigError for a DATASET that the user asks for and that leads to no data: the run would read others."""
    asked, path = run.knobs.get("DATASET"), run.knobs.get("DATA_PATH")
    if asked is None or asked.origin.layer != "environment" or (path and path.value):
        return
    if any(flag in run.args for flag in ("--mock-data", *SOURCES)):
        return
    if has_demo and asked.value == DEMO:
        return
    raise ConfigError(
        f"{says('DATASET', asked)}: CLUSTER={run.knob('CLUSTER')} has no data of that name for {run.model}; name them as "
        f"[{asked.value}:{run.model}] in the DATA_PATHS of its .conf, or set DATA_PATH; --mock-data trains without data"
    )


def with_demo(run: ResolvedRun, prefix: Path) -> ResolvedRun:
    """The demo corpus at `prefix`, byte by byte, where the run names no data."""
    if "--mock-data" in run.args or any(flag in run.args for flag in SOURCES):
        return run
    args = dict(run.args)
    args["--data-path"] = Setting(value=str(prefix), origin=_DEMO, words=(str(prefix),))
    said: tuple[Substitution, ...] = ()
    before = args.get("--tokenizer-type")
    if before is not None and before.value != "NullTokenizer":
        said = (_said(before, args.pop(_MODEL, None)),)
    _set(args, "--tokenizer-type", "NullTokenizer", _DEMO)
    vocabulary = args.get("--vocab-size")
    if vocabulary is None or (ids := whole(vocabulary.value)) is None or ids < BYTE_VOCABULARY:
        _set(args, "--vocab-size", str(BYTE_VOCABULARY), _DEMO)
    return replace(run, args=args, substitutions=(*run.substitutions, *said))


FROM_A_MODEL = (
    "GPTSentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "Llama2Tokenizer",
    "SFTTokenizer",
    "SentencePieceTokenizer",
    "TikTokenizer",
)
"""Tokenizers that --tokenizer-model names: a file, a folder, or a repository of the Hugging Face hub."""


def names_tokenizer(run: ResolvedRun) -> bool:
    """Whether the user says which tokenizer: a flag, a variable, a .conf, or a path in the model's YAML.

    What is left is a preset's: a repository of the hub, which a machine may not reach, or nothing (Mixtral).
    """
    flags = [run.args[flag] for flag in ("--tokenizer-type", _MODEL) if flag in run.args]
    if any(setting.origin.layer in EXPLICIT for setting in flags):
        return True
    knob = run.knobs.get("TOKENIZER_MODEL")
    if knob is not None and knob.value and knob.origin.layer != "model":
        return True
    return _MODEL in run.args and Path(run.args[_MODEL].value).is_absolute()


def with_ids_alone(run: ResolvedRun, knows: Callable[[str], bool]) -> ResolvedRun:
    """NullTokenizer for a preset's own tokenizer where the number of ids is all that counts.

    That is in mock data, and in a rehearsal, whose data hold ids already.
    """
    asked, ids = run.args.get("--tokenizer-type"), run.args.get("--vocab-size")
    is_mock = "--mock-data" in run.args
    if asked is None or asked.value not in FROM_A_MODEL or names_tokenizer(run):
        return run
    if not (is_mock or run.rehearsal) or ids is None or (number := whole(ids.value)) is None:
        return run
    args = dict(run.args)
    model = args.pop(_MODEL, None)
    place = "--mock-data" if is_mock else "REHEARSE=1"
    # 0.11 to 0.17 count the end-of-document token on top of --vocab-size, and have no flag to name it
    given = number if knows("--null-tokenizer-eod-id") else number - 1
    for flag, value in (("--tokenizer-type", "NullTokenizer"), ("--vocab-size", str(given))):
        _set(args, flag, value, Origin(layer="derived", place=place))
    what = "mock data are" if is_mock else "the data of a rehearsal are"
    said = Substitution(
        asked=_spelled(asked, model),
        used=f"{number} ids without text (NullTokenizer)",
        reason=f"{what} ids already, and the hub need not be asked; TOKENIZER_MODEL names one to be loaded",
    )
    return replace(run, args=args, substitutions=(*run.substitutions, said))


def reads_demo(run: ResolvedRun) -> bool:
    """True when the run reads the demo corpus."""
    data = run.args.get("--data-path")
    return data is not None and data.origin == _DEMO


def _said(before: Setting, model: Setting | None) -> Substitution:
    return Substitution(
        asked=_spelled(before, model),
        used="bytes (NullTokenizer)",
        reason="DATA_PATH is not set, and the demo corpus is tokenized byte by byte",
    )


def _spelled(tokenizer: Setting, model: Setting | None) -> str:
    named = f" {_MODEL} {model.value}" if model else ""
    return f"--tokenizer-type {tokenizer.value}{named}"


def _set(args: dict[str, Setting], flag: str, value: str, origin: Origin) -> None:
    before = args.get(flag)
    if before is not None and before.value == value:
        return
    lost = (Overridden(value=before.value, origin=before.origin),) if before else ()
    args[flag] = Setting(value=value, origin=origin, overrode=lost)
