"""What the run's Megatron release knows of a flag: one door to the schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from moe_bench.arguments import schema
from moe_bench.arguments.findings import raise_errors
from moe_bench.config.run import ResolvedRun, Setting, Substitution

ARGUMENTS = Path("megatron/training/arguments.py")


@dataclass(frozen=True, kw_only=True, slots=True)
class Flags:
    """The flags of one release, or of the checkout that MEGATRON_PATH names."""

    release: str
    known: schema.FlagSchema

    @classmethod
    def of_release(cls, knobs: Mapping[str, Setting], cache_dir: Path | None = None) -> Flags:
        """Of MEGATRON_PATH's own source where it can be read here, else of MCORE_RELEASE_VERSION."""
        release = knobs["MCORE_RELEASE_VERSION"].value
        path = knobs.get("MEGATRON_PATH")
        if path is not None and path.value and (Path(path.value) / ARGUMENTS).is_file():
            known = schema.schema_for(Path(path.value), cache_dir=cache_dir)
        else:
            known = schema.load(release)
        return cls(release=release, known=known)

    def knows(self, flag: str) -> bool:
        """True when the release has the flag."""
        return self.known.knows(flag)

    def takes_list(self, flag: str) -> bool:
        """True when several words may follow the flag."""
        return self.known.takes_list(flag)

    def is_switch(self, flag: str) -> bool:
        """True when no word may follow the flag."""
        return self.known.is_switch(flag)

    def checked(self, run: ResolvedRun) -> ResolvedRun:
        """The run without flags that change nothing and its release lacks, each said aloud; warnings become notes.

        Raises ArgumentsError for whatever Megatron's parser would refuse or misread.
        """
        findings = self.known.check(run.args)
        raise_errors(findings)
        idle = {
            flag: reason
            for flag in run.args
            if (reason := self.known.harmless_without(flag)) is not None
        }
        left_out = tuple(
            Substitution(asked=flag, used="left out", reason=reason)
            for flag, reason in idle.items()
        )
        said = tuple(
            str(one) for one in findings if one.severity == "warning" and one.rule != "removed-flag"
        )
        return replace(
            run,
            args={flag: setting for flag, setting in run.args.items() if flag not in idle},
            substitutions=(*run.substitutions, *left_out),
            notes=(*run.notes, *said),
        )
