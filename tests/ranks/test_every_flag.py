"""Flags of Megatron-Core 0.19, each alone beside a small preset, train or are refused before a rank starts.

A switch is set, a flag with choices takes each, a number its own default. Not here: texts, lists and numbers without a default.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from moe_bench.arguments import schema
from moe_bench.arguments.emit import argv
from moe_bench.arguments.resolve import Identity, resolve_run
from moe_bench.cli._inputs import refuse_unnamed_tokenizer
from moe_bench.config.gather import Request
from moe_bench.config.machine import Machine
from moe_bench.config.run import ResolvedRun
from moe_bench.errors import MoeBenchError
from tests.support.projects import REPOSITORY
from tests.support.ranks import run_ranks
from tests.support.training import train

pytestmark = [pytest.mark.slow, pytest.mark.ranks(1)]
KNOWN = schema.load("0.19.2")
SMALL = {"NNODES": "1", "GPUS_PER_NODE": "1", "EP": "1", "MBS": "1", "GBS": "2", "SEQ_LEN": "64"}
TRAINS_NOTHING = ("--skip-train",)


def spellings() -> Iterator[str]:
    """Each flag once, under its first name, with what it takes."""
    for spec in {id(spec): spec for spec in KNOWN.flags.values()}.values():
        flag, default = spec.options[0], spec.default
        if spec.is_switch:
            yield flag
        elif spec.choices:
            yield from (f"{flag} {choice}" for choice in spec.choices if choice != default)
        elif isinstance(default, (int, float)):
            yield f"{flag} {default}"


def cases() -> list[tuple[str, str]]:
    """With latent attention each; with grouped queries the switches."""
    every = list(spellings())
    latent = [("Tiny-DeepSeek-V3", said) for said in every]
    return latent + [("Tiny-Qwen3", said) for said in every if " " not in said]


@pytest.mark.parametrize(("model", "said"), cases())
def test_a_flag_trains_or_is_refused_before_a_rank_starts(
    model: str, said: str, tmp_path: Path
) -> None:
    run = resolved(model, said.split(), tmp_path)
    if run is None or refused_by_megatron(argv(run)):
        return
    with variables(run):
        if said in TRAINS_NOTHING:
            with pytest.raises(IndexError):
                train([*argv(run)], 1, tmp_path / "run")
        else:
            assert len(train([*argv(run)], 1, tmp_path / "run").losses) == 2


def resolved(model: str, words: list[str], folder: Path) -> ResolvedRun | None:
    """What the local launcher would run; None where it refuses."""
    given = {"PATH": os.environ["PATH"], "MODEL": model, "TRAIN_ITERS": "2", **SMALL}
    request = Request(
        environment=given, words=(*words, "--mock-data"), project=REPOSITORY, local=True
    )
    identity = Identity(run_id="run", folder=folder)
    try:
        run = resolve_run(request, Machine(device="cpu", gpus=0, cores=2), identity)
        refuse_unnamed_tokenizer(run)
    except MoeBenchError:
        return None
    return run


def refused_by_megatron(words: tuple[str, ...]) -> str:
    """What Megatron says of the flags in the launcher's check; empty where it takes them."""

    def body() -> str:
        from moe_bench.mcore.validation import refusal, validate

        sys.argv = ["pretrain_gpt.py", *words]
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                validate()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the launcher takes any for a refusal
            return refusal(error, printed.getvalue()).message
        return ""

    return str(run_ranks(body, 1)[0])


@contextlib.contextmanager
def variables(run: ResolvedRun) -> Iterator[Mapping[str, str]]:
    """The run's environment, which its ranks inherit."""
    before = dict(os.environ)
    os.environ.update({name: one.value for name, one in run.env.items() if "MOE_BENCH" not in name})
    try:
        yield os.environ
    finally:
        os.environ.clear()
        os.environ.update(before)
