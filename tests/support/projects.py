"""A small project of its own for tests of the configuration: files under a temporary folder, resolved as a user would."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_bench.arguments.resolve import Identity, resolve_run
from moe_bench.config.gather import CLUSTERS, COMMON, MODELS, RUNTIME, Request
from moe_bench.config.machine import Machine
from moe_bench.config.run import ResolvedRun

REPOSITORY = Path(__file__).parents[2]
CPU = Machine(device="cpu", gpus=0, cores=8)
GPUS = Machine(device="cuda", gpus=8, cores=64)

TABLE = """
export TP=${TP:-1}
export PP=${PP:-1}
export EP=${EP:-1}
export CP=${CP:-1}
export VPP=${VPP:-1}
export MBS=${MBS:-1}
export GBS=${GBS:-8}
export NUM_LAYERS=${NUM_LAYERS:-4}
export NNODES=${NNODES:-1}
export GPUS_PER_NODE=${GPUS_PER_NODE:-8}
export SEQ_LEN=${SEQ_LEN:-128}
export MOE_TOKEN_DISPATCHER=${MOE_TOKEN_DISPATCHER:-alltoall}
"""
MODEL = """
ENV_VARS:
  NCCL_DEBUG: VERSION
MODEL_ARGS:
  --tensor-model-parallel-size: ${TP}
  --pipeline-model-parallel-size: ${PP}
  --expert-model-parallel-size: ${EP}
  --context-parallel-size: ${CP}
  --micro-batch-size: ${MBS}
  --global-batch-size: ${GBS}
  --seq-length: ${SEQ_LEN}
  --max-position-embeddings: 4096
  --num-layers: ${NUM_LAYERS}
  --hidden-size: 64
  --num-attention-heads: 4
  --num-experts: 8
  --moe-router-topk: 2
  --moe-token-dispatcher-type: ${MOE_TOKEN_DISPATCHER}
  --data-path: /data/text
  --train-iters: 10
  --sequence-parallel: true
  --disable-bias-linear: true
  --save-interval: 100
  --bf16: true
"""


class Project:
    """Files and a resolver; nothing of the process's own environment but PATH reaches it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write(COMMON, "")
        self.write(RUNTIME, TABLE)
        self.write(f"{CLUSTERS}/local.conf", "")
        self.write(f"{MODELS}/Tiny-Test.yaml", MODEL)

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def add_flags(self, lines: str) -> None:
        """More lines for the model's MODEL_ARGS."""
        path = self.root / MODELS / "Tiny-Test.yaml"
        path.write_text(path.read_text() + "".join(f"  {line}\n" for line in lines.splitlines()))

    def resolve(
        self,
        environment: Mapping[str, str] | None = None,
        flags: Sequence[str] = (),
        *,
        machine: Machine = GPUS,
        local: bool = False,
        demo_prefix: Path | None = None,
        device: str | None = None,
        must_name: bool = False,
    ) -> ResolvedRun:
        request = Request(
            environment={
                "PATH": os.environ["PATH"],
                "MODEL": "Tiny-Test",
                "MCORE_RELEASE_VERSION": "0.19",
            }
            | dict(environment or {}),
            words=tuple(flags),
            project=self.root,
            local=local,
            demo_prefix=demo_prefix,
            device=device,
            must_name=must_name,
        )
        return resolve_run(request, machine, Identity(run_id="run"))


def repository() -> Project:
    """The repository's own presets and .conf files."""
    project = Project.__new__(Project)
    project.root = REPOSITORY
    return project
