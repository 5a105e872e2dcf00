"""What a failure's own words mean, and what to do next. Pure: text in, diagnosis out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """A named kind of failure."""

    name: str
    what_to_do: str
    line: str
    """The line that told it."""


@dataclass(frozen=True, slots=True)
class _Kind:
    name: str
    pattern: re.Pattern[str]
    what_to_do: str


def _kind(name: str, pattern: str, what_to_do: str) -> _Kind:
    return _Kind(name, re.compile(pattern, re.IGNORECASE), what_to_do)


KINDS = (
    _kind(
        "out of GPU memory",
        r"CUDA out of memory|torch\.OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED",
        "lower MBS, raise PP, EP or CP, or add --recompute-granularity full; "
        "PROFILE=memory shows where it goes",
    ),
    _kind(
        "out of host memory",
        r"oom-kill|Out of memory: Killed|MemoryError|DefaultCPUAllocator: can't allocate|OUT_OF_MEMORY",
        "ask for more memory per node, or lower --num-workers and the number of ranks per node",
    ),
    _kind(
        "NCCL timeout",
        r"Watchdog caught collective operation timeout|NCCL.{0,40}time(d )?out|ncclRemoteError",
        "one rank did not reach a collective: look at the first rank that failed or went silent "
        "(`logs RUN --rank N`), then at the fabric; --distributed-timeout-minutes sets the patience",
    ),
    _kind(
        "NCCL system error",
        r"ncclSystemError|ncclInternalError|NCCL WARN",
        "run with NCCL_DEBUG=INFO and compare NCCL_SOCKET_IFNAME with the nodes' interfaces",
    ),
    _kind(
        "gloo lost a peer",
        r"Connection (closed by peer|reset by peer)|gloo.*(timed out|Timed out)",
        "another rank ended first: its log has the cause (`logs RUN`)",
    ),
    _kind(
        "a module is missing",
        r"ModuleNotFoundError: .*|ImportError: .*",
        "the interpreter of the ranks lacks a package: `python -m moe_bench doctor` within the "
        "container or environment lists what is there",
    ),
    _kind(
        "a path is wrong",
        r"FileNotFoundError: .*|No such file or directory|source path does not exist",
        "the path is not there on the compute node: check DATA_PATH, LOAD_PATH, TOKENIZER_MODEL "
        "and CONTAINER_MOUNTS",
    ),
    _kind(
        "the disk is full",
        r"No space left on device|Disk quota exceeded",
        "free space at OUTPUT_PATH, or point it elsewhere",
    ),
    _kind(
        "not a number",
        r"found NaN in|Unexpected result nan|grad(ient)? norm.*(nan|inf)",
        "the loss or gradient became NaN: lower --lr, check the data, try PR=bf16 when this was fp8",
    ),
    _kind(
        "time limit",
        r"DUE TO TIME LIMIT|\bTIMEOUT\b",
        "raise RUN_TIME; a run with --save-interval goes on from its checkpoint",
    ),
    _kind(
        "a node failed",
        r"DUE TO NODE FAILURE|NODE_FAIL|Node failure|NodeDown|does not answer",
        "the job is requeued and goes on from its newest checkpoint once other nodes are free; "
        "`sinfo -R` says what is known of the node, EXCLUDE=NODE avoids it",
    ),
    _kind(
        "preempted",
        r"DUE TO PREEMPTION|\bPREEMPTED\b",
        "the job was taken off its nodes and is requeued; it resumes from its checkpoint",
    ),
    _kind(
        "cancelled",
        r"\*\*\* (JOB|STEP) .* CANCELLED|\bCANCELLED\b",
        "somebody cancelled the job",
    ),
    _kind(
        "no pyxis",
        r"unrecognized option '--(no-)?container-",
        "this Slurm has no pyxis, which starts containers from srun; set CONTAINER_RUNTIME=apptainer, "
        "or none with a bare-metal Python",
    ),
    _kind(
        "container could not start",
        r"pyxis: |enroot-|failed to create container filesystem|FATAL: .*image",
        "check CONTAINER_IMAGE and CONTAINER_MOUNTS on a compute node: srun --container-image=... true",
    ),
    _kind(
        "Megatron refused the arguments",
        r"pretrain.* error: .*|unrecognized arguments: .*|AssertionError: .*",
        "`python -m moe_bench preflight` says this before anything is queued",
    ),
    _kind(
        "killed",
        r"Killed|signal 9|SIGKILL|exitcode\s*: -9",
        "the process was killed from outside; if nobody did it, it was out of memory: look at dmesg",
    ),
)
"""The first kind whose pattern is found wins: causes stand before what they lead to."""

_ERROR_WORDS = (
    *("error", "exception", "assert", "killed", "fatal", "cancelled", "time limit"),
    "unrecognized option",
)
"""In lower case; a line that holds one reads like an error."""


def diagnose(lines: Iterable[str]) -> Diagnosis | None:
    """The most telling kind found anywhere in `lines`; None when nothing is known."""
    text = "\n".join(lines)  # one search of the whole is many times quicker than one a line
    for kind in KINDS:
        if match := kind.pattern.search(text):
            line = _line_at(text, match.start())
            return Diagnosis(name=kind.name, what_to_do=kind.what_to_do, line=line)
    return None


def last_error_line(lines: Iterable[str]) -> str | None:
    """The last line that reads like an error; None when there is none."""
    text = "\n".join(lines)
    lowered = text.lower()
    if len(lowered) != len(text):  # a letter whose lower case is longer would shift what follows
        lowered = text
    last = max(lowered.rfind(word) for word in _ERROR_WORDS)
    return None if last < 0 else _line_at(text, last)


def _line_at(text: str, position: int) -> str:
    begin = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    return text[begin : end if end >= 0 else None].strip()[:400]
