"""What the run's Megatron release knows of a flag: one door to the schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from moe_bench.arguments import schema
from moe_bench.arguments.findings import raise_errors
from moe_bench.config.run import ResolvedRun, Setting, Substitution

ARGUMENTS = Path("megatron/training/arguments.py")


def _readable(path: str, mounts: str) -> Path | None:
    """The checkout as this machine sees it: at its own path, or at the host's side of one of the container's mounts."""
    candidates = [Path(path)]
    for mount in mounts.split(","):
        host, colon, inside = mount.partition(":")
        inside = inside.split(":")[0]
        if colon and inside and Path(path).is_relative_to(inside):
            candidates.append(Path(host) / Path(path).relative_to(inside))
    return next((one for one in candidates if (one / ARGUMENTS).is_file()), None)


class Flags(msgspec.Struct, frozen=True, kw_only=True):
    """The flags of one release, or of the checkout that MEGATRON_PATH names."""

    release: str
    known: schema.FlagSchema

    @classmethod
    def of_release(cls, knobs: Mapping[str, Setting], cache_dir: Path | None = None) -> Flags:
        """Of MEGATRON_PATH's own source where it can be read here, else of MCORE_RELEASE_VERSION."""
        release = knobs["MCORE_RELEASE_VERSION"].value
        path, mounts = knobs.get("MEGATRON_PATH"), knobs.get("CONTAINER_MOUNTS")
        if path is None or not path.value:
            return cls(release=release, known=schema.load(release))
        here = _readable(path.value, mounts.value if mounts is not None else "")
        if here is not None:
            return cls(release=release, known=schema.schema_for(here, cache_dir=cache_dir))
        return cls(
            release=release, known=msgspec.structs.replace(schema.load(release), stands_in=True)
        )

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
