"""Runs checkpoints under Megatron on CPU ranks: imports once, then forks the ranks of each case.

usage: checkpoint_ranks.py CASES.json   [{"world_size", "argv", "tokens": file, "out": file, ...}]
A case with "train" trains and saves as its argv says instead.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from moe_bench.mcore.cpu import embedding

embedding.install(local_world_size=1)

import torch  # noqa: E402

from moe_bench.mcore.cpu.spec import reference_layers  # noqa: E402
from moe_bench.mcore.patches import COMPILED_HELPERS, NO_PHANTOM_QUERY_NORM  # noqa: E402


def main(cases_file: Path) -> None:
    torch.set_num_threads(1)
    import moe_bench.mcore.checkpoint  # noqa: F401 - imported before the ranks fork

    for case in json.loads(cases_file.read_text()):
        run_case(case)


def run_case(case: dict) -> None:
    """Fork the ranks of one layout; each writes its complaint, the last stage the logits, into the out file."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(case["world_size"]):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run_rank(case, rank, port)
                code = 0
            except (Exception, SystemExit):  # noqa: BLE001 - a forked rank must not return into the parent's loop
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(pid)
    codes = dict.fromkeys(children, 0)
    waiting = set(children)
    while waiting:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        waiting.discard(pid)
        if codes[pid]:  # the others would wait for it for ever
            for other in waiting:
                os.kill(other, signal.SIGKILL)
    Path(case["out"] + ".codes").write_text(json.dumps(list(codes.values())))


def run_rank(case: dict, rank: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(case["world_size"]),
        LOCAL_WORLD_SIZE=str(case["world_size"]),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_DEVICE_MAX_CONNECTIONS="1",
    )
    sys.argv = ["checkpoint_ranks.py", *case["argv"]]
    embedding.install(local_world_size=case["world_size"])
    from moe_bench.mcore import checkpoint, entry

    with contextlib.ExitStack() as stack:
        if case.get("spec", "te") != "megatron":
            stack.enter_context(reference_layers(arrangement=case.get("spec", "te")))
        if case.get("without_phantom_norm"):
            stack.enter_context(NO_PHANTOM_QUERY_NORM.applied())
        if case.get("train"):
            with COMPILED_HELPERS.applied():
                entry.train(entry.parse())
            return
        stages = checkpoint.load_model()
        found = checkpoint.logits(stages, torch.load(case["tokens"], weights_only=True))
        first = torch.distributed.get_rank(checkpoint.mpu.get_data_parallel_group()) == 0
        if found is not None and checkpoint.mpu.get_tensor_model_parallel_rank() == 0 and first:
            torch.save(found, case["out"])
        torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
