"""What a check of the arguments found: one value, where it was written, what is wrong, and the way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_bench.errors import ArgumentsError

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing wrong with a run's flags, knobs or environment."""

    severity: Severity
    """error: the run would fail or mean something else; warning: it runs, worse; note: could not be decided here."""
    rule: str
    """`unknown-flag`, `renamed-flag`, ... of the schema, or a lint rule's name."""
    subject: str
    """The flag, knob or variable in the user's spelling, with its value: `--moe-router-topk 12`."""
    place: str
    """Where the value was written; "" when nothing wrote it (a default)."""
    reason: str
    fix: str
    link: str = ""
    """Upstream file and line, or documentation page, that the rule rests on."""

    def __str__(self) -> str:
        """One line: value (place): reason; way out."""
        place = f" ({self.place})" if self.place else ""
        return f"{self.subject}{place}: {self.reason}; {self.fix}"


def raise_errors(findings: list[Finding]) -> None:
    """Raise one ArgumentsError that lists every error among the findings; warnings and notes pass."""
    errors = [finding for finding in findings if finding.severity == "error"]
    if not errors:
        return
    if len(errors) == 1:
        raise ArgumentsError(str(errors[0]))
    lines = "\n".join(f"  {finding}" for finding in errors)
    raise ArgumentsError(f"{len(errors)} settings cannot be used:\n{lines}")
