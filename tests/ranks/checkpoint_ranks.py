"""Checkpoints under Megatron on CPU ranks: one process is forked from the tests' own, and the ranks of each case from it.

A case is {"world_size", "argv", "tokens": file, "out": file, ...}; its exit codes go to "out" + ".codes".
"how": "train" trains and saves through the product's entry, as its argv says; "load" only loads, into the
layers that Megatron's flags describe; "poison" makes a legacy checkpoint name a command.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from moe_bench.runtime.logits import fork_ranks, prepare, run_model
from tests.support.ranks import megatron


def run_listed(listed: list[dict[str, Any]], folder: Path) -> str:
    """Run the cases in order; return what their ranks said."""
    log = folder / "ranks.log"
    with megatron(1):
        process = os.fork()
        if not process:
            _serve(listed, log)
    try:
        os.waitpid(process, 0)
    finally:  # Megatron's checkpoint writers outlive the ranks that saved
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
    return log.read_text()


def _serve(listed: list[dict[str, Any]], log: Path) -> None:
    """Never returns: this process must not go on with the tests of the one it was forked from."""
    try:
        os.setsid()
        os.environ["OMP_NUM_THREADS"] = "1"
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = sys.stderr = os.fdopen(said, "w", buffering=1)
        warnings.simplefilter("ignore")
        prepare()
        for case in listed:
            body = {"train": train, "load": load, "poison": poison}.get(case.get("how", ""), run)
            codes = fork_ranks(case["world_size"], lambda c=case, b=body: b(c))
            Path(case["out"] + ".codes").write_text(json.dumps(codes))
    except BaseException:  # noqa: BLE001 - the tests find no output, and this in the log
        traceback.print_exc()
    finally:
        os._exit(0)


def run(case: dict[str, Any]) -> None:
    run_model(case["argv"], Path(case["tokens"]), Path(case["out"]), case.get("spec", "te"))


def load(case: dict[str, Any]) -> None:
    from moe_bench.mcore.checkpoint import load_model
    from moe_bench.mcore.cpu.spec import reference_layers

    sys.argv = ["pretrain_gpt.py", *case["argv"]]
    with reference_layers():
        load_model()
    Path(case["out"]).touch()


def train(case: dict[str, Any]) -> None:
    from moe_bench.mcore.cpu.embedding import installed
    from moe_bench.runtime import pretrain
    from moe_bench.runtime.rank import rank_context

    pretrain.train(rank_context(), case["argv"], installed())


class Evil:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.victim}",)


def poison(case: dict[str, Any]) -> None:
    import torch

    folder = Path(case["folder"])
    for path in folder.rglob("model_optim_rng.pt"):
        state = torch.load(path, weights_only=False)
        torch.save({**state, "args": Evil(folder.parent / "owned")}, path)
