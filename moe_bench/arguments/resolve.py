"""The one resolver: files, environment and flags in, a complete ResolvedRun out."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from moe_bench.arguments import chain, checkpoints, corpus, cpu, effects, environment, rules, sizes
from moe_bench.arguments.findings import Finding, raise_errors
from moe_bench.arguments.flags import ARGUMENTS, Flags
from moe_bench.arguments.image import in_image
from moe_bench.config.command_line import Flag
from moe_bench.config.expand import expand
from moe_bench.config.gather import PLACEHOLDER, Gathered, Request, gather
from moe_bench.config.knobs import BOUND, KNOBS, says
from moe_bench.config.layers import EXPLICIT, Candidate, fold
from moe_bench.config.machine import Machine
from moe_bench.config.release import installed_here
from moe_bench.config.run import Origin, ResolvedRun, Setting
from moe_bench.config.sources import is_file
from moe_bench.errors import ConfigError
from moe_bench.secrets import is_secret

if TYPE_CHECKING:
    from moe_bench.config.model_file import Entry

_CONFS = ("cluster", "runtime", "common")


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """What makes two runs of the same configuration differ."""

    run_id: str
    folder: Path | None = None
    """Where the run's directory lies; None: under OUTPUT_PATH."""


def resolve_run(request: Request, machine: Machine, identity: Identity) -> ResolvedRun:
    """Everything decided and checked. Raises MoeBenchError for the first thing that cannot be."""
    return resolve_gathered(gather(request, _load_checks), request, machine, identity)


def _load_checks() -> None:
    """What is needed once the sources are read."""
    from moe_bench.arguments import lint, schema  # noqa: PLC0415
    from moe_bench.arguments.schema.renames import renames  # noqa: PLC0415
    from moe_bench.config import misspelt, model_file  # noqa: F401, PLC0415

    lint.builtin_rules()
    schema.release_lines()
    renames()


def resolve_gathered(
    gathered: Gathered,
    request: Request,
    machine: Machine,
    identity: Identity,
    flags: Flags | None = None,
) -> ResolvedRun:
    """The same from sources, and perhaps the release's flags, already read."""
    knobs = rules.dispatcher_knobs(gathered.knobs)
    _check_script(knobs)
    is_dry = knobs["DRY_RUN"].value == "1"
    kept = None if is_dry else request.base / ".cache" / "flags"
    flags = flags or Flags.of_release(knobs, kept)
    _check_place(knobs, flags, request)
    run_dir = (identity.folder or output_folder(knobs, request.project)) / identity.run_id
    variables = _variables(gathered, knobs, run_dir)
    said = [
        *_from_yaml(gathered, variables, knobs, flags, request.base),
        *_from_knobs(knobs),
        *_from_flags(gathered, flags),
    ]
    facts = rules.Facts(knobs=knobs, args=_emitted(fold(said)), flags=flags, run_dir=str(run_dir))
    env = _env(gathered, variables, facts, request, identity)
    run = ResolvedRun(
        run_id=identity.run_id,
        model=gathered.model,
        run_dir=run_dir,
        knobs=knobs,
        env=env,
        args=_emitted(fold([*said, *_unsaid(rules.derived_args(facts), said)])),
        notes=(
            *gathered.notes,
            *_overridden_notes({**env, **knobs}),
            *_release_notes(knobs, flags, local=request.local),
            *effects.of_unread(knobs, gathered.file),
        ),
    )
    _check_agreement(run)
    corpus.refuse_unknown_set(run, has_demo=request.demo_prefix is not None)
    run = chain.chained(corpus.without_mocked(run))
    if request.local:
        run = _for_this_machine(run, machine, request, flags)
    elif machine.device == "cpu" and request.environment.get("MOE_BENCH_DEVICE") == "cpu":
        run = cpu.for_machine(run, machine, asked="cpu", knows=flags.knows)  # nodes without GPUs
    elif request.must_name and machine.torch and not in_image(run):
        # A job without an image: its ranks run this very interpreter, with the libraries that it has, on nodes with GPUs.
        nodes = msgspec.structs.replace(machine, device="cuda", nsys=True)
        run = cpu.for_machine(run, nodes, asked=None, knows=flags.knows)
    run = checkpoints.demanded(corpus.with_ids_alone(run, flags.knows), flags.knows)
    return _checked(run, flags, request)


def _for_this_machine(
    run: ResolvedRun, machine: Machine, request: Request, flags: Flags
) -> ResolvedRun:
    if run.knobs["REHEARSE"].value == "1":
        from moe_bench.arguments.rehearse import rehearse  # noqa: PLC0415 - seldom asked for

        run = rehearse(run, flags.knows)
    if request.demo_prefix is not None:
        run = corpus.with_demo(run, request.demo_prefix)
    run = cpu.for_machine(
        run, machine, asked=request.environment.get("MOE_BENCH_DEVICE"), knows=flags.knows
    )
    run = sizes.with_local_world(run, machine, request.environment)
    threads = fold(
        [
            *environment.of_local(machine, run.world_size),
            *_threads_said(run, request.environment),
        ]
    )
    return replace(run, env={**run.env, **threads})


def _threads_said(run: ResolvedRun, given: Mapping[str, str]) -> Iterable[Candidate]:
    """OMP_NUM_THREADS of the run's files, which have been weighed against the caller's, else the caller's."""
    said = run.env.get("OMP_NUM_THREADS")
    if said is None:
        return _from_environment(("OMP_NUM_THREADS",), given)
    return [Candidate(name="OMP_NUM_THREADS", value=said.value, origin=said.origin)]


def _checked(run: ResolvedRun, flags: Flags, request: Request) -> ResolvedRun:
    """The run with what the checks note. Raises for what would fail or mean something else."""
    refuse_placeholders(run)
    run = flags.checked(run)
    sizes.check(run, flags.knows)
    findings = _lint(run, flags, request)
    raise_errors(findings)
    warned = tuple(str(one) for one in findings if one.severity == "warning")
    return replace(run, notes=(*run.notes, *effects.of_start(run), *warned))


def _lint(run: ResolvedRun, flags: Flags, request: Request) -> list[Finding]:
    """What the interaction rules find: the project's, and the user's in lint_rules/ and MOE_BENCH_RULES."""
    from moe_bench.arguments.lint import (  # noqa: PLC0415
        all_rules,
        lint,
        packages_here,
        versions_here,
    )

    rules_in_force = all_rules(request.project, request.environment.get("MOE_BENCH_RULES", ""))
    versions = versions_here(run, request.environment, local=request.local)
    has = packages_here(run, local=request.local)
    return lint(run, flags.known, versions, rules_in_force, has)


def _check_script(knobs: Mapping[str, Setting]) -> None:
    """TRAINING_SCRIPT_PATH is the guide's name for what follows from MEGATRON_PATH; another script would not be run."""
    script, megatron = knobs.get("TRAINING_SCRIPT_PATH"), knobs.get("MEGATRON_PATH")
    if script is None:
        return
    own = Path(megatron.value if megatron is not None else "/") / "pretrain_gpt.py"
    if Path(script.value) != own:
        raise ConfigError(
            f"{says('TRAINING_SCRIPT_PATH', script)} is not run: it is always the pretrain_gpt.py of MEGATRON_PATH, or "
            "without one the installed megatron-core's training; set MEGATRON_PATH to the checkout that holds your script "
            "as pretrain_gpt.py, and leave TRAINING_SCRIPT_PATH out"
        )


def _check_place(knobs: Mapping[str, Setting], flags: Flags, request: Request) -> None:
    """What belongs to this machine is not submitted, and what a run here needs is here."""
    if knobs["REHEARSE"].value == "1" and not request.local:
        raise ConfigError(
            f"{says('REHEARSE', knobs['REHEARSE'])} trains a small stand-in on this machine, and this is about the whole job; "
            "use bash ./interactive_benchmarking.sh (lint --here, explain), or leave REHEARSE out"
        )
    if flags.known.stands_in and request.local:
        raise ConfigError(
            f"{says('MEGATRON_PATH', knobs['MEGATRON_PATH'])} holds no {ARGUMENTS}: it is no Megatron-LM checkout; "
            "set it to the folder that holds pretrain_gpt.py, or unset it to run the installed megatron-core"
        )


def _release_notes(knobs: Mapping[str, Setting], flags: Flags, *, local: bool) -> Iterator[str]:
    said = knobs["MCORE_RELEASE_VERSION"]
    here = installed_here() if local and "MEGATRON_PATH" not in knobs else None
    if here is not None and here.split(".")[:2] != said.value.split(".")[:2]:
        yield (
            f"{says('MCORE_RELEASE_VERSION', said)}, but megatron-core {here} is installed and is what runs here: the flags "
            f"are those of {said.value}; MEGATRON_PATH=a checkout of it runs it"
        )
    if flags.known.stands_in:
        yield (
            f"{says('MEGATRON_PATH', knobs['MEGATRON_PATH'])} cannot be read here: flags are checked against "
            f"{says('MCORE_RELEASE_VERSION', said)}, and those it lacks are passed on"
        )
        return
    if (
        said.origin.layer == "default"
        or flags.known.release.split(".")[:2] == said.value.split(".")[:2]
    ):
        return
    yield (
        f"{says('MCORE_RELEASE_VERSION', said)}, but {says('MEGATRON_PATH', knobs['MEGATRON_PATH'])} holds "
        f"{flags.known.release}: the flags are checked against what it holds"
    )


def _check_agreement(run: ResolvedRun) -> None:
    """A knob of a .conf and the YAML's own number for its flag may not differ: one of them would do nothing."""
    for flag, name in BOUND.items():
        knob, setting = run.knobs.get(name), run.args.get(flag)
        counts = KNOBS[name].kind in ("count", "count_or_false")
        if not counts or name == "NUM_LAYERS" or knob is None or setting is None:
            continue
        from_conf = knob.origin.layer in _CONFS
        if from_conf and setting.origin.layer == "model" and knob.value != setting.value:
            raise ConfigError(
                f"{says(name, knob)}, but {flag} is {setting.value} ({setting.origin.place}); "
                f"write ${{{name}}} there, or make the two agree"
            )


def output_folder(knobs: Mapping[str, Setting], project: Path) -> Path:
    """Where runs are written: OUTPUT_PATH, else the project's runs/."""
    base = Path(knobs["OUTPUT_PATH"].value) if "OUTPUT_PATH" in knobs else project / "runs"
    return base if base.is_absolute() else project / base


def _variables(gathered: Gathered, knobs: Mapping[str, Setting], run_dir: Path) -> dict[str, str]:
    known = dict(gathered.variables)
    known |= {name: setting.value for name, setting in knobs.items()}
    known["OUTPUT_PATH"] = str(run_dir)
    return known


def _from_yaml(
    gathered: Gathered,
    variables: Mapping[str, str],
    knobs: Mapping[str, Setting],
    flags: Flags,
    base: Path,
) -> Iterator[Candidate]:
    for entry in gathered.file.model_args:
        words = _expanded(entry, variables)
        if words is None:
            continue
        origin = _yaml_origin(entry, knobs)
        literal = entry.is_list or entry.quoted or _is_one_path(entry.name, words, base)
        yield _candidate(entry.name, words, origin, flags, literal=literal)


def _is_one_path(name: str, words: tuple[str, ...], base: Path) -> bool:
    """Whether a scalar with a blank is the prefix of one data set, and no blend of several."""
    is_data = name.endswith("data-path") and len(words) == 1 and " " in words[0]
    return is_data and is_file(Path(f"{base / words[0]}.idx"))


def _expanded(entry: Entry, variables: Mapping[str, str]) -> tuple[str, ...] | None:
    if not any("$" in word for word in entry.words):  # most entries
        return entry.words or None
    words = [expand(word, variables, place=entry.place) for word in entry.words]
    kept = tuple(word for word in words if word is not None)
    return kept or None


def _yaml_origin(entry: Entry, knobs: Mapping[str, Setting]) -> Origin:
    """A value that is nothing but `${TP}` comes from where TP does, through the YAML."""
    name = entry.words[0].removeprefix("${").removesuffix("}")
    is_reference = len(entry.words) == 1 and entry.words[0] == f"${{{name}}}"
    if is_reference and (knob := knobs.get(name)) is not None:
        return Origin(
            layer=knob.origin.layer, place=f"{name} of {knob.origin.place}, through {entry.place}"
        )
    return Origin(layer="model", place=entry.place)


def _candidate(
    name: str, words: tuple[str, ...], origin: Origin, flags: Flags, *, literal: bool
) -> Candidate:
    """`literal`: the words stand as they are; else `true`, `false` and a list in one scalar mean what yq made of them."""
    words = _without_shell_quotes(name, words)
    if not literal and flags.takes_list(name) and len(words) == 1 and " " in words[0]:
        words = _split(name, words[0], origin)
        literal = True
    exact = words if literal or len(words) != 1 else None
    return Candidate(name=name, value=_text(name, words, flags), origin=origin, words=exact)


_EXPRESSIONS = (
    "--pipeline-model-parallel-layout",
    "--moe-layer-freq",
    "--linear-attention-freq",
    "--window-attn-skip-freq",
)
"""Flags whose value may hold ( | *, which scripts of this interface's ancestors quote for a second shell."""


def _without_shell_quotes(name: str, words: tuple[str, ...]) -> tuple[str, ...]:
    if name not in _EXPRESSIONS or len(words) != 1:
        return words
    return (words[0].strip("'\""),)


def _text(name: str, words: tuple[str, ...], flags: Flags) -> str:
    """The words as one text; a list flag's as a shell would write them."""
    return shlex.join(words) if len(words) != 1 or flags.takes_list(name) else words[0]


def _split(name: str, text: str, origin: Origin) -> tuple[str, ...]:
    """The items of a list flag written in one scalar; quotes hold a space together."""
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        one = f"one path is written {shlex.quote(text)}, with these quotes in the value"
        raise ConfigError(f"{name} {text} ({origin.place}): {error}; {one}") from error


def _from_knobs(knobs: Mapping[str, Setting]) -> Iterator[Candidate]:
    """Knobs speak for their flag: with their own rank when the caller set them, else below the YAML."""
    for flag, name in BOUND.items():
        knob = knobs.get(name)
        if knob is None or name == "MOE_TOKEN_DISPATCHER":
            continue
        explicit = knob.origin.layer in EXPLICIT
        layer = knob.origin.layer if explicit else "derived"
        place = knob.origin.place if knob.origin.layer == "flag" else says(name, knob)
        yield Candidate(name=flag, value=knob.value, origin=Origin(layer=layer, place=place))
        if explicit:
            for lost in knob.overrode:
                yield Candidate(name=flag, value=lost.value, origin=lost.origin)


def _from_flags(gathered: Gathered, flags: Flags) -> Iterator[Candidate]:
    for flag, origin in gathered.flags:
        yield _from_flag(flag, origin, flags)


def _from_flag(flag: Flag, origin: Origin, flags: Flags) -> Candidate:
    flag = Flag(name=flag.name, words=_without_shell_quotes(flag.name, flag.words))
    if not flag.words:
        return Candidate(name=flag.name, value="true", origin=origin)
    is_off = flag.words == ("false",) and flags.knows(flag.name)
    if is_off or (flag.words == ("true",) and flags.is_switch(flag.name)):
        return Candidate(name=flag.name, value=flag.words[0], origin=origin)
    value = _text(flag.name, flag.words, flags)
    return Candidate(name=flag.name, value=value, origin=origin, words=flag.words)


def _emitted(args: Mapping[str, Setting]) -> dict[str, Setting]:
    """Without the flags that a `false` takes out."""
    return {
        name: setting
        for name, setting in args.items()
        if not (setting.value == "false" and setting.words is None)
    }


def _unsaid(derived: Iterable[Candidate], said: Iterable[Candidate]) -> Iterator[Candidate]:
    """What rules add, but for flags that the caller wrote at the same rank: of a tie the later one would win."""
    own = {(one.name, one.origin.layer) for one in said}
    return (
        one
        for one in derived
        if one.origin.layer not in EXPLICIT or (one.name, one.origin.layer) not in own
    )


def _env(
    gathered: Gathered,
    variables: Mapping[str, str],
    facts: rules.Facts,
    request: Request,
    identity: Identity,
) -> dict[str, Setting]:
    said = list(_env_from_yaml(gathered, variables))
    said += rules.derived_env(facts)
    said += [
        Candidate(name=name, value=setting.value, origin=setting.origin)
        for name, setting in gathered.exported.items()
    ]
    said += environment.of_run(identity.run_id, facts.run_dir, gathered.model, facts.knobs)
    names = dict.fromkeys(one.name for one in said)
    names |= dict.fromkeys(
        name for name in environment.carried(request.environment) if not is_secret(name)
    )
    decided = {"WANDB_MODE", "WANDB_PROJECT", "MEGATRON_PATH", "PROFILE", *gathered.exported}
    said += _from_environment([name for name in names if name not in decided], request.environment)
    return {name: _with_lost(one, gathered.exported.get(name)) for name, one in fold(said).items()}


def _with_lost(setting: Setting, exported: Setting | None) -> Setting:
    """What a .conf's variable overrode belongs to it where it won."""
    if exported is None or exported.origin != setting.origin:
        return setting
    return replace(setting, overrode=(*exported.overrode, *setting.overrode))


def _env_from_yaml(gathered: Gathered, variables: Mapping[str, str]) -> Iterator[Candidate]:
    for entry in gathered.file.env_vars:
        if is_secret(entry.name):
            raise ConfigError(
                f"{entry.place}: {entry.name} is a secret and does not belong in a file; "
                f"export {entry.name} in the shell instead"
            )
        value = expand(entry.words[0], variables, place=entry.place)
        origin = Origin(layer="model", place=entry.place)
        yield Candidate(name=entry.name, value=value or "", origin=origin)


def _from_environment(names: Iterable[str], given: Mapping[str, str]) -> Iterator[Candidate]:
    """What the caller exported under these names: it beats the files."""
    for name in names:
        if name in given and not name.startswith("MOE_BENCH_"):
            origin = Origin(layer="environment", place="environment")
            yield Candidate(name=name, value=given[name], origin=origin)


def _overridden_notes(settings: Mapping[str, Setting]) -> Iterator[str]:
    """A .conf that assigns without looking beats the caller: never in silence."""
    for name, setting in settings.items():
        for lost in setting.overrode:
            if (
                lost.origin.layer == "environment"
                and setting.origin.layer in _CONFS
                and not _holds(setting.value, lost.value)
            ):
                yield (
                    f"{name}={lost.value} (environment) is overridden by {setting.origin.place}, which sets "
                    f"{name}={setting.value} whatever the environment says"
                )


def _holds(value: str, lost: str) -> bool:
    """Whether nothing is lost: `/opt/lib:$LD_LIBRARY_PATH`."""
    return set(_ITEM.split(lost)) <= set(_ITEM.split(value))


_ITEM = re.compile(r"[:,\s]+")


def refuse_placeholders(run: ResolvedRun) -> None:
    """Raises ConfigError when a value of the run still is a template's YOUR_... or your_own_..."""
    for group in (run.knobs, run.env, run.args):
        for name, setting in group.items():
            match = PLACEHOLDER.search(setting.value)
            if match and name != "TRAINING_PARAMS":
                joint = "=" if name in KNOBS or group is run.env else " "
                raise ConfigError(
                    f"{name}{joint}{setting.value} ({setting.origin.place}) still holds the placeholder "
                    f"{match[0]!r}; put your own value there"
                )
