"""Runs checkpoints under Megatron on CPU ranks: imports once, then forks the ranks of each case.

usage: checkpoint_ranks.py CASES.json   [{"world_size", "argv", "tokens": file, "out": file, ...}]
"how": "train" trains and saves through the product's entry, as its argv says; "load" only loads, into the
layers that Megatron's flags describe;
"poison" makes a legacy checkpoint name a command.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from moe_bench.runtime.logits import fork_ranks, prepare, run_model


def main(cases_file: Path) -> None:
    prepare()
    for case in json.loads(cases_file.read_text()):
        body = {"train": train, "load": load, "poison": poison}.get(case.get("how", ""), run)
        codes = fork_ranks(case["world_size"], lambda c=case, b=body: b(c))
        Path(case["out"] + ".codes").write_text(json.dumps(codes))


def run(case: dict) -> None:
    run_model(case["argv"], Path(case["tokens"]), Path(case["out"]), case.get("spec", "te"))


def load(case: dict) -> None:
    from moe_bench.mcore.checkpoint import load_model
    from moe_bench.mcore.cpu.spec import reference_layers

    sys.argv = ["pretrain_gpt.py", *case["argv"]]
    with reference_layers():
        load_model()
    Path(case["out"]).touch()


def train(case: dict) -> None:
    from moe_bench.mcore.cpu.embedding import installed
    from moe_bench.runtime import pretrain
    from moe_bench.runtime.rank import rank_context

    pretrain.train(rank_context(), case["argv"], installed())


class Evil:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.victim}",)


def poison(case: dict) -> None:
    import torch

    folder = Path(case["folder"])
    for path in folder.rglob("model_optim_rng.pt"):
        state = torch.load(path, weights_only=False)
        torch.save({**state, "args": Evil(folder.parent / "owned")}, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
