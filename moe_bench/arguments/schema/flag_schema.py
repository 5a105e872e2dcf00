"""The flags of one Megatron release, and what is wrong with a run's flags against them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from moe_bench.arguments.findings import Finding
from moe_bench.arguments.schema.renames import renames
from moe_bench.arguments.schema.spec import FlagSpec, refusal
from moe_bench.arguments.schema.store import release_lines, releases_with
from moe_bench.config.knobs import KNOBS
from moe_bench.config.misspelt import within
from moe_bench.config.nearest import nearest
from moe_bench.config.run import Setting
from moe_bench.secrets import is_secret

OLD = frozenset(
    {
        "--use-mcore-models", "--use-dist-ckpt", "--dist-ckpt-format", "--ckpt-fully-parallel-save",
        "--fp8-interval", "--batch-size", "--warmup", "--model-parallel-size", "--checkpoint-activations",
        "--no-position-embedding", "--moe-enable-deepep", "--moe-router-padding-for-fp8", "--cuda-graph-scope",
        "--enable-cuda-graph", "--external-cuda-graph", "--moe-extended-tp", "--moe-layer-recompute",
        "--no-weight-decay-cond-type", "--moe-deepep-num-sms", "--moe-hybridep-num-sms", "--disable-msc",
        "--hybrid-override-pattern",
    }
)  # fmt: skip
"""The flags of renames.yaml's `deprecated`, so that the file is read only when one is used."""


class FlagSchema(msgspec.Struct, frozen=True, kw_only=True):
    """What one Megatron release's parser accepts."""

    release: str
    """As asked for, or as the checkout says: `0.19.2`."""
    flags: Mapping[str, FlagSpec]
    """Every spelling -> its spec."""
    unread: tuple[str, ...] = ()
    """Declarations of a checkout that only running Megatron would tell. While there are any, an unknown flag is a warning."""
    stands_in: bool = False
    """True for a release's flags in place of a checkout's that cannot be read: what they lack is a warning, unless it is
    nearly one of them."""

    def knows(self, flag: str) -> bool:
        """Whether the release's parser has this very spelling. Megatron takes no abbreviations."""
        return flag in self.flags

    def is_switch(self, flag: str) -> bool:
        """Whether the flag stands alone. False for an unknown one."""
        spec = self.flags.get(flag)
        return spec is not None and spec.is_switch

    def takes_list(self, flag: str) -> bool:
        """Whether several words may follow the flag. False for an unknown one."""
        spec = self.flags.get(flag)
        return spec is not None and (spec.nargs in ("+", "*") or spec.nargs.isdigit())

    def harmless_without(self, flag: str) -> str | None:
        """Why a run is the same without this flag, which the release does not have; None when it is not."""
        if flag in self.flags:
            return None
        entry = renames().departed(flag)
        return entry.reason if entry is not None and entry.effect == "none" else None

    def check(self, args: Mapping[str, Setting]) -> list[Finding]:
        """Everything Megatron's parser would refuse or ignore: unknown and renamed flags, counts, types, choices."""
        found: list[Finding] = []
        for flag, setting in args.items():
            spec = self.flags.get(flag)
            if spec is None:
                found.append(self._unknown(flag, setting))
                continue
            reason = refusal(spec, setting.argv)
            if reason is not None:
                found.append(self._bad_value(spec, flag, setting, reason))
            if flag in OLD:
                found.extend(self._deprecated(flag, setting))
        found.extend(self._twice(args))
        return found

    def _bad_value(self, spec: FlagSpec, flag: str, setting: Setting, reason: str) -> Finding:
        is_near = any(within(setting.value, choice, 2) for choice in spec.choices)
        may_exist = self.stands_in and bool(spec.choices) and not is_near
        return Finding(
            severity="warning" if may_exist else "error",
            rule="bad-value",
            subject=setting.spelled(flag),
            place=setting.origin.place,
            reason=reason,
            fix=_way_out(spec, setting),
        )

    def _unknown(self, flag: str, setting: Setting) -> Finding:
        rule, reason, fix = self._what_became(flag) or self._nearest(flag)
        dropped = self.harmless_without(flag) is not None
        may_exist = (bool(self.unread) or self.stands_in) and rule == "unknown-flag"
        is_typo = any(within(flag, known, 2) for known in self.flags)
        return Finding(
            severity="warning" if dropped or (may_exist and not is_typo) else "error",
            rule=rule,
            subject=flag if is_secret(flag) else setting.spelled(flag),
            place=setting.origin.place,
            reason=reason,
            fix=fix,
        )

    def _what_became(self, flag: str) -> tuple[str, str, str] | None:
        for other, entry in renames().siblings(flag):
            if other in self.flags:
                note = f" ({entry.note})" if entry.note else ""
                return (
                    "renamed-flag",
                    f"Megatron-Core {self.release} does not have this flag{_which_have(flag)}",
                    f"there it is {other}{note}",
                )
        gone = renames().departed(flag)
        if gone is None:
            return None
        reason = f"Megatron-Core {self.release} does not have this flag: {gone.reason}{_which_have(flag)}"
        fix = "leave it out" if gone.effect == "lost" else "it changes nothing and is left out"
        return "removed-flag", reason, fix

    def _nearest(self, flag: str) -> tuple[str, str, str]:
        reason = f"Megatron-Core {self.release} has no such flag"
        if has := _which_have(flag):
            newer = _numbers(releases_with(flag)[0]) > _numbers(self.release)[:2]
            way = (
                "use one of those releases or leave the flag out" if newer else "leave the flag out"
            )
            return "unknown-flag", reason + has, way
        if (dashed := flag.lower().replace("_", "-")) in self.flags:
            return "unknown-flag", reason, f"write {dashed}"
        if (knob := _as_knob(flag)) in KNOBS:
            return "unknown-flag", reason, f"{knob} is a knob: write {knob}=... before the command"
        full = sorted(known for known in self.flags if known.startswith(flag))
        if full and len(full) <= 3:
            return (
                "unknown-flag",
                f"{reason}, and Megatron takes no abbreviations",
                f"write {' or '.join(full)}",
            )
        close = nearest(flag, self.flags)
        if not close:
            return "unknown-flag", reason, "leave it out"
        return "unknown-flag", reason, f"did you mean {' or '.join(close)}?"

    def _deprecated(self, flag: str, setting: Setting) -> Iterator[Finding]:
        for entry in renames().deprecated:
            if entry.flag == flag and _numbers(entry.since) <= _numbers(self.release)[:2]:
                says = "is deprecated" if entry.effect in ("works", "refused") else "has no effect"
                yield Finding(
                    severity={"refused": "error", "lost": "error", "none": "note"}.get(
                        entry.effect, "warning"
                    ),  # type: ignore[arg-type]
                    rule="deprecated-flag",
                    subject=setting.spelled(flag),
                    place=setting.origin.place,
                    reason=f"it {says} in Megatron-Core {self.release}",
                    fix=entry.reason,
                )

    def _twice(self, args: Mapping[str, Setting]) -> Iterator[Finding]:
        """Two spellings that set one thing differently: argparse would let the last one win."""
        by_dest: dict[str, str] = {}
        for flag, setting in args.items():
            spec = self.flags.get(flag)
            if spec is None:
                continue
            first = by_dest.setdefault(spec.dest, flag)
            if first != flag and _differ((first, args[first]), (flag, setting), self.flags):
                yield Finding(
                    severity="error",
                    rule="said-twice",
                    subject=setting.spelled(flag),
                    place=setting.origin.place,
                    reason=f"{args[first].spelled(first)} ({args[first].origin.place}) sets the same thing, differently",
                    fix="keep only one of them",
                )


def _as_knob(flag: str) -> str:
    """`--tp` -> `TP`."""
    return flag.lstrip("-").replace("-", "_").upper()


def _differ(
    first: tuple[str, Setting], second: tuple[str, Setting], flags: Mapping[str, FlagSpec]
) -> bool:
    specs = flags[first[0]], flags[second[0]]
    if all(spec.is_switch for spec in specs):
        return _turns_on(first[0], specs[0]) != _turns_on(second[0], specs[1])
    return first[1].value != second[1].value


def _turns_on(flag: str, spec: FlagSpec) -> bool:
    """Of `--x` and `--no-x`, which argparse makes of one declaration, the first; else what the switch sets."""
    return not flag.startswith("--no-") if spec.kind == "boolean" else spec.kind != "false"


def _way_out(spec: FlagSpec, setting: Setting) -> str:
    if spec.is_switch:
        return f"give {spec.name} true or nothing to turn it on, false to leave it out"
    if spec.choices:
        close = nearest(setting.value, spec.choices, count=1)
        return f"did you mean {close[0]}?" if close else f"choose one of {', '.join(spec.choices)}"
    if spec.type == "bool":
        return "leave the flag out to get false"
    return f"give {spec.name} such a value"


def _which_have(flag: str) -> str:
    lines = releases_with(flag)
    if not lines:
        return ""
    known = release_lines()
    whole = lines == known[known.index(lines[0]) : known.index(lines[-1]) + 1]
    said = f"{lines[0]} to {lines[-1]}" if whole and len(lines) > 1 else ", ".join(lines)
    return f" ({said} {'have' if len(lines) > 1 else 'has'} it)"


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".") if part.isdigit())
