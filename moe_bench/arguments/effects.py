"""What a setting does not do: knobs that nothing reads, weights and data other than one would think. Said at every start. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from moe_bench.arguments.corpus import SOURCES
from moe_bench.config.expand import names_in
from moe_bench.config.knobs import says
from moe_bench.config.run import ResolvedRun, Setting

if TYPE_CHECKING:
    from moe_bench.config.model_file import ModelFile

_BY_YAML_ALONE = {
    "DATA_PATH": "--data-path",
    "LOAD_PATH": "--load",
    "TOKENIZER_MODEL": "--tokenizer-type HuggingFaceTokenizer --tokenizer-model",
}
"""Knobs that reach Megatron only where the model's YAML names them -> the flag that does it without."""


def of_unread(knobs: Mapping[str, Setting], file: ModelFile) -> Iterator[str]:
    """One sentence for each knob of the caller that this model's YAML does not read."""
    read = {name for entry in file.model_args for word in entry.words for name in names_in(word)}
    for name, flag in _BY_YAML_ALONE.items():
        knob = knobs.get(name)
        if knob is not None and knob.origin.layer == "environment" and name not in read:
            yield (
                f"{says(name, knob)} changes nothing: {knobs['TRAINING_PARAMS_PATH'].value} does not read ${{{name}}}; "
                f"{flag} {knob.value} after the script's name does"
            )


def of_start(run: ResolvedRun) -> Iterator[str]:
    """Where PRETRAIN and the checkpoint disagree, and where there are no data."""
    pretrain, load = run.knobs["PRETRAIN"], run.args.get("--load")
    if pretrain.value == "0" and load is None and not run.rehearsal:
        yield (
            f"{says('PRETRAIN', pretrain)}, but there is no checkpoint (LOAD_PATH): training starts from scratch; "
            "PRETRAIN=1 says so"
        )
    if pretrain.value == "1" and pretrain.origin.layer == "environment" and load is not None:
        yield (
            f"{says('PRETRAIN', pretrain)}, but {load.spelled('--load')} ({load.origin.place}): training starts from that "
            "checkpoint; unset LOAD_PATH to start from scratch"
        )
    ranks = run.knobs.get("REHEARSE_RANKS")
    if ranks is not None and ranks.origin.layer == "environment" and not run.rehearsal:
        yield f"{says('REHEARSE_RANKS', ranks)} changes nothing without REHEARSE=1"
    if not any(flag in run.args for flag in ("--mock-data", *SOURCES)):
        yield "DATA_PATH is not set: Megatron trains on made-up tokens; --mock-data says so"
