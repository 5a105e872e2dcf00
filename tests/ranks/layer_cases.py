"""Runs the layer tests on CPU ranks: imports Megatron once, forks one rank and then two, writes each case's outcome.

usage: layer_cases.py OUTCOMES.json     {case: "" or the traceback}
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

warnings.simplefilter("ignore")

from moe_bench.mcore.cpu import embedding  # noqa: E402

embedding.install(local_world_size=2)

import layer_features as features  # noqa: E402
import layer_layouts as layouts  # noqa: E402
import torch  # noqa: E402
from layer_architectures import CHECKPOINTS, FEATURES, cases  # noqa: E402

from moe_bench.mcore.cpu.spec import reference_layers  # noqa: E402

type Cases = dict[str, Callable[[], None]]


def main(outcomes_file: Path) -> None:
    torch.set_num_threads(1)
    alone: Cases = {name: getattr(features, name) for name in FEATURES}
    together: Cases = {name: getattr(layouts, name) for name in CHECKPOINTS}
    for architecture, layout in cases():
        together[f"{architecture} on {layout}"] = lambda a=architecture, x=layout: (
            layouts.agrees_with_one_rank(a, x)
        )
    outcomes: dict[str, str] = {}
    for world_size, chosen in ((1, alone), (2, together)):
        fork_ranks(world_size, chosen, outcomes_file)
        outcomes |= json.loads(outcomes_file.read_text())
    outcomes_file.write_text(json.dumps(outcomes))


def fork_ranks(world_size: int, chosen: Cases, outcomes_file: Path) -> None:
    """Run the cases on that many ranks; rank 0 writes the outcomes of all of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            try:
                run_rank(rank, world_size, port, chosen, outcomes_file)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if any(codes):
        sys.exit(f"ranks ended with {codes}")


def run_rank(rank: int, world_size: int, port: int, chosen: Cases, outcomes_file: Path) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", port, world_size, is_master=rank == 0)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    outcomes = {}
    with reference_layers():
        for name, case in chosen.items():
            outcomes[name] = outcome(case)
    gathered: list[dict[str, str]] = [{} for _ in range(world_size)]
    torch.distributed.all_gather_object(gathered, outcomes)
    if rank == 0:
        merged = {name: "".join(each[name] for each in gathered) for name in chosen}
        outcomes_file.write_text(json.dumps(merged))
    torch.distributed.destroy_process_group()


def outcome(case: Callable[[], None]) -> str:
    """Empty when the case passes, else its traceback: the other cases still run."""
    try:
        case()
    except Exception:
        return traceback.format_exc()
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]))
