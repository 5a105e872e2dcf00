"""`python -m moe_bench lint`: everything that flags, versions and interaction rules say about a run, nothing started."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from moe_bench.cli._destination import destination_option, request_described
from moe_bench.config.sources import process_environment

if TYPE_CHECKING:
    from moe_bench.arguments.findings import Finding
    from moe_bench.arguments.lint import Rule
    from moe_bench.config.gather import Request
    from moe_bench.config.run import ResolvedRun


@click.command(
    context_settings={"ignore_unknown_options": True},
    short_help="Check flags, versions and what does not work together.",
)
@click.option("--rules", "only_rules", is_flag=True, help="List the interaction rules in force.")
@destination_option
@click.argument(
    "words", nargs=-1, type=click.UNPROCESSED, metavar="[MODEL] [--MEGATRON-FLAG VALUE]..."
)
def command(words: tuple[str, ...], *, only_rules: bool, here: bool | None) -> None:
    """Print every finding for the run that MODEL and the environment describe; exit with 2 when it could not start.

    TE_VERSION, TORCH_VERSION and GPU_ARCH (h100, b200, ...) tell what the cluster has; without them a rule that needs to know
    gives a note. More rules: lint_rules/*.yaml, or files named in MOE_BENCH_RULES=a.yaml:b.yaml.
    """
    model, flags = (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)
    request = request_described(flags, here=here, model=model)
    if only_rules:
        _list_rules(request)
        return
    run, findings = _found(request)
    notes = [f"left-out: {one.asked} -> {one.used}: {one.reason}" for one in run.substitutions]
    notes += [note for note in run.notes if note not in {str(finding) for finding in findings}]
    for note in notes:
        print(f"note    {note}")
    for finding in findings:
        print(_shown(finding))
    counts = {
        kind: sum(one.severity == kind for one in findings) for kind in ("error", "warning", "note")
    }
    counts["note"] += len(notes)
    print(", ".join(f"{count} {kind}{'' if count == 1 else 's'}" for kind, count in counts.items()))
    sys.exit(2 if counts["error"] else 0)


def _found(request: Request) -> tuple[ResolvedRun, list[Finding]]:
    """The run and what is found. Raises MoeBenchError, which lists every error of its stage, where the run cannot even be resolved."""
    from moe_bench.arguments.flags import Flags
    from moe_bench.arguments.lint import all_rules, lint, packages_here, versions_here
    from moe_bench.arguments.resolve import Identity, resolve_run
    from moe_bench.config.gather import DEFAULT_MODEL
    from moe_bench.config.machine import probe

    environment = request.environment
    name = environment.get("MODEL") or DEFAULT_MODEL
    run = resolve_run(request, probe(environment), Identity(run_id=f"{name}-lint"))
    known = Flags.of_release(run.knobs).known
    rules = all_rules(request.project, environment.get("MOE_BENCH_RULES", ""))
    versions = versions_here(run, environment, local=request.local)
    has = packages_here(run, local=request.local)
    return run, [*known.check(run.args), *lint(run, known, versions, rules, has)]


def _list_rules(request: Request) -> None:
    from moe_bench.arguments.lint import all_rules

    rules = all_rules(request.project, process_environment().get("MOE_BENCH_RULES", ""))
    for rule in rules:
        print(_rule_line(rule))
    print(f"{len(rules)} rules")


def _rule_line(rule: Rule) -> str:
    versions = "" if rule.megatron == ">=0" else f" [Megatron {rule.megatron}]"
    own = "" if rule.origin == "builtin" else f" ({rule.origin})"
    return f"{rule.severity:7} {rule.name}{versions}{own}: {rule.reason}. Way out: {rule.fix}. {rule.source}"


def _shown(finding: Finding) -> str:
    link = f"  [{finding.link}]" if finding.link else ""
    return f"{finding.severity:7} {finding.rule}: {finding}{link}"
