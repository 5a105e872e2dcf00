"""What Megatron does with sys.argv before it builds a model: parse, validate, configure. Nothing is started."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import linecache
import sys
import traceback
from dataclasses import dataclass
from typing import Any

REFUSALS = (
    AssertionError,
    AttributeError,
    ImportError,
    KeyError,
    RuntimeError,
    SystemExit,
    TypeError,
    ValueError,
)
"""What Megatron's checks raise: it has no error class of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """Megatron would stop here."""

    message: str
    """Its own words; the failing source line where it has none."""
    where: str
    """`megatron/training/arguments.py:1645`."""
    source: str
    """The statement that refused."""


def validate() -> None:
    """Let Megatron check sys.argv, and this project's entry what it serves. Raises what Megatron raises, and ArgumentsError."""
    args, _ = configured()
    entry = sys.modules.get(
        "moe_bench.mcore.entry"
    )  # there unless a checkout's own script will run
    if entry is not None:
        entry.refuse_unserved(args)


def configured() -> tuple[Any, Any]:
    """Parse and validate sys.argv as rank RANK of WORLD_SIZE, and configure the model and the training of it.

    Raises what Megatron raises, SystemExit included.
    """
    arguments = importlib.import_module("megatron.training.arguments")
    args = arguments.parse_args()
    if hasattr(args, "vocab_size") and args.vocab_size is None:
        args.vocab_size = _SOME_VOCABULARY  # the tokenizer would say; it is not read here
    arguments.validate_args(args, {"tokenizer_type": "NullTokenizer"})
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator  # noqa: PLC0415 - the embedding comes first

    parameters = inspect.signature(init_num_microbatches_calculator).parameters
    given: dict[str, Any] = {
        "rank": args.rank,
        "rampup_batch_size": getattr(args, "rampup_batch_size", None),
        "global_batch_size": args.global_batch_size,
        "micro_batch_size": args.micro_batch_size,
        "data_parallel_size": args.data_parallel_size,
        "decrease_batch_size_if_needed": getattr(args, "decrease_batch_size_if_needed", False),
        "step_batch_size_schedule": getattr(args, "step_batch_size_schedule", None),
        "seq_length": args.seq_length,
    }
    init_num_microbatches_calculator(**{name: given[name] for name in parameters})
    config = arguments.core_transformer_config_from_args(args)
    _whole_configuration(args, config)
    return args, config


_SOME_VOCABULARY = 32000


def _whole_configuration(args: Any, config: Any) -> None:
    """The model's and the training loop's own configuration classes, in releases that have them (0.17)."""
    utils = (
        importlib.import_module("megatron.training.argument_utils") if _has_containers() else None
    )
    if utils is not None and hasattr(utils, "pretrain_cfg_container_from_args"):
        as_model = getattr(utils, "gpt_config_from_args", None)
        utils.pretrain_cfg_container_from_args(args, as_model(args, config) if as_model else None)


def _has_containers() -> bool:
    return importlib.util.find_spec("megatron.training.argument_utils") is not None


def refusal(error: BaseException, said: str) -> Refusal:
    """What Megatron means by an error of its own; `said`: what it printed before (argparse prints, then exits)."""
    frame = own_frame(error)
    source = "" if frame is None else _statement(frame)
    where = "" if frame is None else f"{short(frame.filename)}:{frame.lineno}"
    if isinstance(error, SystemExit):
        lines = [line for line in said.splitlines() if line.strip()]
        return Refusal(message=lines[-1] if lines else "Megatron stops", where=where, source=source)
    text = " ".join(str(error).split())
    kind = (
        ""
        if isinstance(error, (AssertionError, ValueError, RuntimeError))
        else f"{type(error).__name__}: "
    )
    return Refusal(
        message=f"{kind}{text}" if text else f"asserts: {source}", where=where, source=source
    )


def own_frame(error: BaseException) -> traceback.FrameSummary | None:
    """The innermost frame of Megatron's: deeper ones are argparse's or the interpreter's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/megatron/" in frame.filename]
    return own[-1] if own else None


def _statement(frame: traceback.FrameSummary) -> str:
    first = frame.lineno or 1
    last = frame.end_lineno or first
    lines = (linecache.getline(frame.filename, number).strip() for number in range(first, last + 1))
    return " ".join(" ".join(lines).split())


def short(filename: str) -> str:
    """`megatron/training/arguments.py` of a file's path."""
    return "megatron/" + filename.rpartition("/megatron/")[2]
