"""Reads a checkpoint with whichever megatron-core is importable, and says what it found.

usage: load_release.py FOLDER   prints {"version", "common", "sha256": {key: ...}}
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch


def main(folder: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        store = torch.distributed.FileStore(f"{scratch}/store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        from megatron.core import dist_checkpointing

        wanted = dist_checkpointing.load_tensors_metadata(folder)
        tensors = dist_checkpointing.load(wanted, folder)
        common = dist_checkpointing.load_common_state_dict(folder)
    digests = {key: digest(value) for key, value in tensors.items() if torch.is_tensor(value)}
    found = {"version": version("megatron-core"), "common": common, "sha256": digests}
    print(json.dumps(found, default=str))


def digest(tensor: torch.Tensor) -> str:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()


if __name__ == "__main__":
    main(str(Path(sys.argv[1])))
