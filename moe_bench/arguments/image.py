"""Whether a job's ranks run in a container image, or on the nodes as they are. Pure."""

from __future__ import annotations

from moe_bench.config.run import ResolvedRun


def in_image(run: ResolvedRun) -> bool:
    """With CONTAINER_IMAGE, unless CONTAINER_RUNTIME=none; otherwise the ranks run the interpreter that submits them."""
    return bool(run.knob("CONTAINER_IMAGE")) and run.knob("CONTAINER_RUNTIME") != "none"
