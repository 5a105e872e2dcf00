"""A pytest plugin: puts the CPU embedding in place before Megatron-LM's own unit tests import Megatron."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from moe_bench.mcore.cpu.embedding import install

install(local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

from moe_bench.mcore.imports import lend_compiled_helper  # noqa: E402

sys.path.insert(0, str(Path.cwd()))
lend_compiled_helper(Path.cwd())
