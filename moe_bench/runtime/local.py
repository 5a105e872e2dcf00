"""All ranks of a run on this machine: `python -m moe_bench.runtime.local --nproc N -- <Megatron flags>`.

torch and Megatron are imported once and the ranks are forked, by torch's own elastic agent, because importing is most
of the time from the command to the first step. These ranks compute on the CPU, whatever the machine has: a CUDA context
does not survive a fork, so with GPUs each rank is a torchrun worker of its own (`runtime.pretrain`).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from moe_bench.errors import MoeBenchError
from moe_bench.results.records import Event
from moe_bench.results.triage import without_ignored
from moe_bench.results.writer import RunWriter
from moe_bench.runtime.pretrain import prepare, train
from moe_bench.runtime.rank import RankContext, fill_in, local_context, rank_context

log = logging.getLogger(__name__)

TAIL_LINES = 15


def main(argv: Sequence[str]) -> int:
    """Start the ranks and wait for them. Returns 0, 2 for a user's error, 1 when a rank failed, 128+N on signal N."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options, words = _options(argv)
    flags = fill_in(words)
    try:
        context = local_context(options.nproc)
        prepare(context, flags, on_cpu=True)
        _check(context, flags)
    except MoeBenchError as error:
        log.error("%s", error)
        return error.exit_code
    return _launch(context, flags)


def _options(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="moe_bench.runtime.local", description=__doc__)
    parser.add_argument("--nproc", type=int, required=True, help="ranks on this machine")
    position = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:position]), list(argv[position + 1 :])


def _check(context: RankContext, flags: Sequence[str]) -> None:
    """Let Megatron parse and validate the flags in a child of this process, so that its refusal is said once.

    Raises MoeBenchError with Megatron's own words.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        sys.argv = ["pretrain_gpt.py", *flags]
        _parse_and_exit()
    os.close(writing)
    with os.fdopen(reading, errors="replace") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        lines = said.strip().splitlines() or ["Megatron ended without a word"]
        where = context.megatron_path or "megatron-core"
        raise MoeBenchError(
            f"{lines[-1]}\n(said by {where}'s own check of these arguments for {context.world_size} ranks; "
            "no rank was started)"
        )


def _parse_and_exit() -> None:
    from moe_bench.mcore.validation import refusal, validate  # noqa: PLC0415

    code = 1
    try:
        validate()
        code = 0
    except SystemExit:
        pass  # argparse has said why
    except BaseException as error:  # noqa: BLE001 - a child's last words
        refused = refusal(error, "")
        where = f" ({refused.where})" if refused.where else ""
        sys.stderr.write(f"\n{refused.message}{where}\n")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _launch(context: RankContext, flags: Sequence[str]) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.api import SignalException  # noqa: PLC0415
    from torch.distributed.elastic.multiprocessing.errors import (  # noqa: PLC0415
        ChildFailedError,
    )
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="moe_bench-") as errors:  # torch would leave its own
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=context.local_world_size,
            run_id="moe_bench",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.1,
            start_method="fork",
            logs_specs=DefaultLogsSpecs(log_dir=errors),
        )
        try:
            elastic_launch(config, _rank_main)(list(flags))
        except ChildFailedError as failure:
            return _report(context, failure)
        except SignalException as stopped:
            return 128 + int(stopped.sigval)
    return 0


def _rank_main(flags: list[str]) -> None:
    """Body of a forked rank."""
    from moe_bench.mcore.cpu.embedding import install  # noqa: PLC0415

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    context = rank_context()
    if context.run_dir is not None:
        _log_to(_log_path(context.run_dir, context.rank))
    try:
        stopped = train(context, flags, install(local_world_size=context.local_world_size))
    finally:
        if sys.exc_info()[0] is not None:  # the elastic agent keeps it to itself
            traceback.print_exc()
        sys.stdout.flush()
    if stopped:
        # An agent that was told to stop no longer takes the results that a rank which returns waits to hand over
        # (torch/distributed/elastic/multiprocessing/api.py _wrap, 2.11); it would kill the rank after 30 s.
        sys.exit(128 + signal.SIGTERM)


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _log_path(run_dir: Path, rank: int) -> Path:
    return run_dir / "logs" / f"rank-{rank}.log"


def _report(context: RankContext, failure: object) -> int:
    """Say which rank failed first and how its log ends; keep it in the record."""
    failures = getattr(failure, "failures", {})
    rank, first = min(failures.items(), key=lambda each: each[1].timestamp)
    how = f"signal {-first.exitcode}" if first.exitcode < 0 else f"exit code {first.exitcode}"
    message = f"rank {rank} failed first ({how})"
    if context.run_dir is not None:
        path = _log_path(context.run_dir, rank)
        tail = _tail(path)
        log.error("%s; the end of %s:\n%s", message, path, tail)
        writer = RunWriter(context.run_dir, source="launcher")
        now = time.time()
        fields = {"message": message, "failed_rank": rank, "log": str(path), "tail": tail}
        writer.event(Event(event="error", time_unix_s=now, rank=rank, fields=fields))
        writer.event(Event(event="end", time_unix_s=now, fields={"outcome": "failed"}))
        writer.close()
    else:
        log.error("%s", message)
    return 1


def _tail(path: Path) -> str:
    if not path.is_file():
        return "(no log)"
    with path.open(errors="replace") as lines:
        return "".join(deque(without_ignored(lines), maxlen=TAIL_LINES)).rstrip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
