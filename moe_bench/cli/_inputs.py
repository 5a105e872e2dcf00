"""What a run on this machine reads must be here before its ranks start."""

from __future__ import annotations

from pathlib import Path

from moe_bench.arguments.checkpoints import starts_from
from moe_bench.arguments.corpus import FROM_A_MODEL
from moe_bench.checkpoint.layout import TRACKER
from moe_bench.config.knobs import says, whole
from moe_bench.config.run import ResolvedRun
from moe_bench.errors import ConfigError


def refuse_missing(run: ResolvedRun, project: Path) -> None:
    """Raises ConfigError for data, a checkpoint or a tokenizer that the caller names and that is not there.

    Relative paths are the ranks' own: they start in `project`. Addresses and names of the Hugging Face hub are let be.
    """
    for flag in ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path"):
        setting = run.args.get(flag)
        for word in (setting.words or (setting.value,)) if setting is not None else ():
            if _is_weight(word) or "://" in word or Path(f"{project / word}.idx").is_file():
                continue
            if "--sft" in run.args:  # conversations, read as they are
                if (project / word).exists():
                    continue
                raise ConfigError(
                    f"{_said(run, 'DATA_PATH', flag)}: there is no {project / word}; --sft reads a JSONL file"
                )
            raise ConfigError(
                f"{_said(run, 'DATA_PATH', flag)}: there is no {project / word}.idx; it is the prefix of a .bin/.idx pair "
                "(python -m moe_bench data prepare makes one); --mock-data trains without data"
            )
    for name, flag in (("LOAD_PATH", "--load"), ("TOKENIZER_MODEL", "--tokenizer-model")):
        setting, knob = run.args.get(flag), run.knobs.get(name)
        if setting is None or knob is None or knob.value != setting.value:
            continue
        if Path(setting.value).is_absolute() and not Path(setting.value).exists():
            raise ConfigError(f"{says(name, knob)}: there is no such file or folder")
    _refuse_missing_checkpoint(run, project)


def _refuse_missing_checkpoint(run: ResolvedRun, project: Path) -> None:
    load = starts_from(run)
    if load is None or "--ckpt-step" in run.args or "://" in load.value:
        return
    folder = project / load.value
    if (folder / TRACKER).is_file():
        return
    beside = [
        near for near in (folder.parent, folder / "checkpoints") if (near / TRACKER).is_file()
    ]
    hint = f"; there is one in {beside[0]}" if beside else ""
    raise ConfigError(
        f"{_said(run, 'LOAD_PATH', '--load')}: there is no checkpoint in {folder} ({TRACKER} is missing){hint}; "
        f"Megatron would train from scratch. Leave it out to do so, or add --save {load.value} to go on there from now on"
    )


def refuse_unnamed_tokenizer(run: ResolvedRun) -> None:
    """Raises ConfigError for a tokenizer that is read from a file or a hub, of which nothing says which one."""
    kind = run.args.get("--tokenizer-type")
    if kind is not None and kind.value in FROM_A_MODEL and "--tokenizer-model" not in run.args:
        raise ConfigError(
            f"{kind.spelled('--tokenizer-type')} ({kind.origin.place}): nothing says which one; set TOKENIZER_MODEL, or "
            "--tokenizer-model, to a file, a folder or a name of the Hugging Face hub"
        )


def _is_weight(word: str) -> bool:
    """Of a blend: `0.3 first/prefix 0.7 second/prefix`."""
    return whole(word) is not None or word.replace(".", "", 1).isdigit()


def _said(run: ResolvedRun, name: str, flag: str) -> str:
    knob, setting = run.knobs.get(name), run.args[flag]
    if knob is not None and knob.value == setting.value:
        return says(name, knob)
    return f"{flag} {setting.value} ({setting.origin.place})"
