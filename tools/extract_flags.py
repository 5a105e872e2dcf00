"""Make moe_bench/arguments/schema/flags.json from Megatron-LM source trees.

    python tools/extract_flags.py CHECKOUT [CHECKOUT ...]            write the data
    python tools/extract_flags.py --verify CHECKOUT [CHECKOUT ...]   compare it with Megatron's real parser

A CHECKOUT is a Megatron-LM tree (`git worktree add ../mlm-0.16 core_v0.16.1`) or a site-packages folder that holds
megatron-core. Give the newest patch of each release line; the file is rewritten from exactly the trees given (two trees of one
line, such as a checkout and a wheel, are joined). Reading is static
(moe_bench/arguments/schema/extract.py). --verify imports each tree's own parser in a process of its own, which needs torch and,
for old trees, `six` and `einops`; it prints each difference and exits with 1 when there is any.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import msgspec

PROJECT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(PROJECT))  # a script in tools/ does not see the package beside it

from moe_bench.arguments.schema.extract import Extraction, extract  # noqa: E402
from moe_bench.arguments.schema.spec import FlagSpec  # noqa: E402

DATA = PROJECT / "moe_bench" / "arguments" / "schema" / "flags.json"

REAL_PARSER = """
import argparse, enum, json, sys
import torch.utils.cpp_extension  # 0.15 and older ask for CUDA's architectures at import
torch.utils.cpp_extension._get_cuda_arch_flags = lambda *a, **k: []
class Caught(BaseException):
    pass
def catch(parser, *args, **kwargs):
    raise Caught(parser)
argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_known_args = catch
from megatron.training.arguments import parse_args
try:
    parse_args()
except Caught as caught:
    parser = caught.args[0]
def plain(value):
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
def kind(action):
    names = {"_StoreAction": "value", "_StoreTrueAction": "true", "_StoreFalseAction": "false",
             "_StoreConstAction": "const", "_AppendAction": "append", "BooleanOptionalAction": "boolean"}
    return names[type(action).__name__]
def type_name(action):
    if action.nargs == 0:
        return ""
    name = getattr(action.type, "__name__", None) or "str"
    return "lambda" if name == "<lambda>" else name
print("FLAGS" + json.dumps([
    dict(options=action.option_strings, dest=action.dest, kind=kind(action), type=type_name(action),
         nargs="" if action.nargs in (None, 0) else str(action.nargs),
         choices=[str(plain(c)) for c in action.choices or [] if c is not None],
         default=plain(action.default))
    for action in parser._actions if action.dest != "help"], default=str))
"""


def main() -> int:
    """Write the data, or compare it with the real parsers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("checkouts", nargs="+", type=Path, metavar="CHECKOUT")
    parser.add_argument("--verify", action="store_true", help="compare with the real parsers")
    options = parser.parse_args()
    extractions = [(path, extract(path)) for path in options.checkouts]
    for path, found in extractions:
        if found.unread or not found.release:
            raise SystemExit(f"{path}: release {found.release!r}, unread: {found.unread}")
    if options.verify:
        return 1 if sum(verify(path, found) for path, found in extractions) else 0
    DATA.write_text(rendered([found for _, found in extractions]))
    print(f"{DATA}: {DATA.stat().st_size} bytes, {len(extractions)} releases")
    return 0


def rendered(extractions: list[Extraction]) -> str:
    """One flag variant a line: the release lines that have it, as indices, then its spec."""
    sources: dict[str, list[str]] = {}
    for found in extractions:
        sources.setdefault(_line(found.release), []).append(found.release)
    lines = sorted(sources, key=_numbers)
    variants: dict[str, set[int]] = {}
    for found in extractions:
        for spec in found.flags:
            key = json.dumps(_compact(spec), separators=(",", ":"))
            variants.setdefault(key, set()).add(lines.index(_line(found.release)))
    rows = sorted(
        variants.items(), key=lambda row: (json.loads(row[0])["options"][0], min(row[1]), row[0])
    )
    body = ",\n".join(
        f'{{"in":{json.dumps(sorted(where), separators=(",", ":"))},"spec":{key}}}'
        for key, where in rows
    )
    return f'{{"lines":{json.dumps(lines)},\n"sources":{json.dumps(sources)},\n"flags":[\n{body}\n]}}\n'


def _line(release: str) -> str:
    return ".".join(release.split(".")[:2])


def verify(path: Path, found: Extraction) -> int:
    """Print how the static reading differs from the parser Megatron builds; return how often it does."""
    real = _real_flags(path)
    read = {spec.options: msgspec.structs.asdict(spec) for spec in found.flags if not spec.needs}
    differences = [
        f"only read: {options}"
        for options in read
        if list(options) not in [flag["options"] for flag in real]
    ]
    for flag in real:
        mine = read.get(tuple(flag["options"]))
        if mine is None:
            differences.append(f"only real: {flag['options']}")
            continue
        for key, value in flag.items():
            ours = list(mine[key]) if isinstance(mine[key], tuple) else mine[key]
            if ours != value and not _computed(ours) and mine["type"] != "signal.Signals":
                differences.append(f"{flag['options'][0]} {key}: read {ours!r}, real {value!r}")
    computed = sum(_computed(spec["default"]) for spec in read.values())
    print(
        f"{path} ({found.release}): {len(real)} flags, {len(differences)} differences, "
        f"{computed} defaults that only running tells, {len(found.unread)} unread"
    )
    for line in differences:
        print(f"  {line}")
    return len(differences)


def _real_flags(path: Path) -> list[dict[str, object]]:
    answer = subprocess.run(
        [sys.executable, "-c", REAL_PARSER],
        env={"PYTHONPATH": f"{path}:{PROJECT}:{':'.join(sys.path)}", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in answer.stdout.splitlines() if line.startswith("FLAGS")]
    if not lines:
        raise SystemExit(f"{path}: its parser cannot be imported here:\n{answer.stderr[-2000:]}")
    flags: list[dict[str, object]] = json.loads(lines[0].removeprefix("FLAGS"))
    return flags


def _compact(spec: FlagSpec) -> dict[str, object]:
    """The spec without empty fields; what the reader fills in again."""
    return {
        key: value
        for key, value in msgspec.structs.asdict(spec).items()
        if key == "default" or value not in ("", ())
    }


def _computed(value: object) -> bool:
    return isinstance(value, dict) and "expr" in value


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


if __name__ == "__main__":
    sys.exit(main())
