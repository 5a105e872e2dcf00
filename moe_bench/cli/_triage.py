"""The rules by which failures are named, shared by the verbs that name them."""

from __future__ import annotations

from pathlib import Path

from moe_bench.cli._launching import PROJECT
from moe_bench.config.sources import process_environment
from moe_bench.results.triage import Rule, all_rules


def rules_in_force() -> tuple[Rule, ...]:
    """The project's `triage_rules/*.yaml`, MOE_BENCH_TRIAGE's files, and the builtin ones. Raises RecordError."""
    environment = process_environment()
    project = Path(environment.get("WORKSPACE") or PROJECT)
    return all_rules(project, environment.get("MOE_BENCH_TRIAGE", ""))
