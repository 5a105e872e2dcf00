"""A pytest plugin: puts the CPU embedding in place before Megatron-LM's own unit tests import Megatron."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from moe_bench.mcore.cpu.embedding import install

install(local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

from moe_bench.mcore.imports import (  # noqa: E402
    lend_compiled_helper,
    quiet_about_gpu_libraries,
)

sys.path.insert(0, str(Path.cwd()))
lend_compiled_helper(Path.cwd())

with quiet_about_gpu_libraries():
    from moe_bench.mcore.cpu.spec import reference_layers

reference_layers().__enter__()  # for the whole session: pytest ends the process
