"""From files, environment and trailing words to knobs, variables and what each source says of Megatron's flags."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from moe_bench.config import command_line, knobs as knob_table
from moe_bench.config.conf import ConfFile, ConfVariables
from moe_bench.config.knobs import BOUND, KNOBS
from moe_bench.config.layers import EXPLICIT, PRECEDENCE
from moe_bench.config.nearest import nearest
from moe_bench.config.release import find_release
from moe_bench.config.run import Origin, Overridden, Setting
from moe_bench.config.sources import is_file, names_in, read_text, run_confs_each
from moe_bench.errors import ConfigError
from moe_bench.secrets import is_secret

if TYPE_CHECKING:
    from moe_bench.config.model_file import ModelFile

MODELS = "model_configs/benchmarking"
CLUSTERS = "cluster_configs/benchmarking"
COMMON = "runtime_configs/benchmarking/common.conf"
RUNTIME = "runtime_configs/benchmarking/runtime.conf"

DEFAULT_MODEL = "Tiny-Qwen3"
"""What MODEL unset trains on this machine."""
DEFAULT_CLUSTER = "local"

PLACEHOLDER = re.compile(r"your_own_\w+|YOUR_[A-Z_]+|\{YOUR_\w+\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a user asked for, before anything is read."""

    environment: Mapping[str, str]
    words: Sequence[str]
    """Trailing words of the command."""
    project: Path
    """Folder that holds model_configs, runtime_configs and cluster_configs (WORKSPACE)."""
    code: Path | None = None
    """Folder of moe_bench, where ranks and relative paths start; None: `project`."""
    local: bool
    """True for this machine: one node, and what it cannot do is replaced or refused."""
    must_name: bool = False
    """True where MODEL and CLUSTER have no defaults: a submission to a scheduler."""
    device: str | None = None
    """cpu or cuda: what the run will compute on, for the .conf files (MOE_BENCH_DEVICE); None where nobody has looked."""
    demo_prefix: Path | None = None
    """Where the demo corpus is or will be; None where there is none (a cluster)."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Where knobs of `environment` and flags of `words` were written that were not written there: `--vary`, a verb's own word."""

    @property
    def base(self) -> Path:
        """Where relative paths start."""
        return self.code or self.project


class Gathered(msgspec.Struct, frozen=True, kw_only=True):
    """What the sources say, each with its origin."""

    model: str
    knobs: Mapping[str, Setting]
    variables: Mapping[str, str]
    """Every variable a model file may name."""
    exported: Mapping[str, Setting]
    """Variables that the .conf files export and that are no knobs: they go to the ranks."""
    file: ModelFile
    flags: tuple[tuple[command_line.Flag, Origin], ...]
    """Trailing flags and TRAINING_PARAMS'."""
    notes: tuple[str, ...] = ()
    """What may be misspelt."""


FLAG = Origin(layer="flag", place="command line")
ENVIRONMENT = Origin(layer="environment", place="environment")


def gather(request: Request, meanwhile: Callable[[], object] = lambda: None) -> Gathered:
    """Read every source. Raises ConfigError for the first that cannot be used. `meanwhile` is called while bash works."""
    [found] = gather_each([request], meanwhile)
    if isinstance(found, ConfigError):
        raise found
    return found


def gather_each(
    requests: Sequence[Request], meanwhile: Callable[[], object] = lambda: None
) -> Iterator[Gathered | ConfigError]:
    """`gather` for many requests, in order, while a few bash processes run the .conf files of those to come.

    An error stands in its request's place. An environment is run once, however many requests share it.
    """
    begun = [_begun(request) for request in requests]
    kinds: dict[_Kind, dict[frozenset[tuple[str, str]], Mapping[str, str]]] = {}
    for one in begun:
        if isinstance(one, _Begun):
            kinds.setdefault(one.kind, {})[one.key] = one.environment
    passes = {kind: _confs(kind, environments, meanwhile) for kind, environments in kinds.items()}
    for one in begun:
        if isinstance(one, _Begun):
            yield _ended(one, passes[one.kind](one.key))
        else:
            yield one


type _Kind = tuple[tuple[ConfFile, ...], Path]
"""The .conf files and the project: what one bash can run together."""


def _confs(
    kind: _Kind,
    environments: Mapping[frozenset[tuple[str, str]], Mapping[str, str]],
    meanwhile: Callable[[], object],
) -> Callable[[frozenset[tuple[str, str]]], ConfVariables | ConfigError]:
    """What became of an environment; waits for it if need be. Environments must first be asked for in their order."""
    files, project = kind
    shown = functools.cache(lambda path: _shown(Path(path), project))
    to_come = iter(environments)
    found: dict[frozenset[tuple[str, str]], ConfVariables | ConfigError] = {}
    ran = run_confs_each(files, list(environments.values()), shown, meanwhile)

    def outcome(key: frozenset[tuple[str, str]]) -> ConfVariables | ConfigError:
        while key not in found:
            try:
                found[next(to_come)] = next(ran)
            except ConfigError as error:  # of the files themselves: nothing ran, nothing will
                found.update(dict.fromkeys(environments, error))
        return found[key]

    return outcome


class _Begun(msgspec.Struct, frozen=True, kw_only=True):
    """A request before its .conf files have run."""

    request: Request
    flags: tuple[command_line.Flag, ...]
    given: Mapping[str, Setting]
    environment: Mapping[str, str]
    files: tuple[ConfFile, ...]

    @property
    def kind(self) -> _Kind:
        """Requests of one kind are run by the same bash."""
        return self.files, self.request.project

    @property
    def key(self) -> frozenset[tuple[str, str]]:
        """Equal for requests with the same environment."""
        return frozenset(self.environment.items())


def _begun(request: Request) -> _Begun | ConfigError:
    try:
        flags = command_line.parse(request.words)
        given = _given(request, flags)
        environment = _for_bash(request, given)
        files = _conf_files(request, given["CLUSTER"])
    except ConfigError as error:
        return error
    return _Begun(request=request, flags=flags, given=given, environment=environment, files=files)


def _ended(begun: _Begun, conf: ConfVariables | ConfigError) -> Gathered | ConfigError:
    try:
        if isinstance(conf, ConfigError):
            given, project = begun.given, begun.request.project
            if (
                "TRAINING_PARAMS_PATH" not in given
            ):  # a table that lacks MODEL says less than we can
                _check_model(_model_path(given, project), given, project)
            return conf
        return _gathered(begun, conf)
    except ConfigError as error:
        return error


def _gathered(begun: _Begun, conf: ConfVariables) -> Gathered:
    request = begun.request
    knobs = _knobs(begun.given, conf, request)
    _refuse_too_late(begun.given, knobs)
    model = knobs["MODEL"].value
    path = Path(knobs["TRAINING_PARAMS_PATH"].value)
    shown = _shown(path, request.project)
    _check_model(path, knobs, request.project)
    text = read_text(path, shown=shown, what="the model's YAML")
    from moe_bench.config import misspelt, model_file  # noqa: PLC0415 - loaded while bash works

    file = model_file.parse(text, name=shown)
    texts = {shown: text} | {
        one.shown: read_text(Path(one.path), shown=one.shown, what="a bash .conf file")
        for one in begun.files
    }
    notes = misspelt.check(request.environment, conf.settings, file, texts)
    knobs = _with_defaults(knobs, file)
    _refuse_too_late(begun.given, knobs)
    knobs = _with_params(_with_built_in(knobs), begun.given)
    return Gathered(
        model=model,
        knobs=knobs,
        variables=_variables(conf, knobs, file, request.project),
        exported=_exported(conf, request.environment),
        file=file,
        flags=_flags(begun.flags, knobs, request),
        notes=notes,
    )


def _given(request: Request, flags: tuple[command_line.Flag, ...]) -> dict[str, Setting]:
    """Knobs that the caller set, by a flag of the same meaning, by the environment, or by our defaults."""
    given: dict[str, Setting] = {}
    for name in KNOBS:
        value = request.environment.get(name)
        if value:
            setting = Setting(value=value, origin=_origin(name, ENVIRONMENT, request))
            given[name] = _absolute(name, setting, request)
            knob_table.check(name, given[name])
    for name, setting in _bound(_params(given.get("TRAINING_PARAMS"))):
        before = given.get(name)
        if before is None or before.origin == setting.origin:  # the last of several flags
            given[name] = setting
        elif not _agree(before.value, setting.value):
            raise _two_values(name, before, setting)
    for name, setting in _bound((flag, _origin(flag.name, FLAG, request)) for flag in flags):
        given[name] = _on_top(setting, given.get(name))
    _default_model_and_cluster(given, request)
    if "MEGATRON_PATH" in given:
        _refuse_placeholder("MEGATRON_PATH", given["MEGATRON_PATH"])
    _refuse_placeholder_secrets(request.environment)
    release = find_release(given.get("MCORE_RELEASE_VERSION"), given.get("MEGATRON_PATH"))
    given["MCORE_RELEASE_VERSION"] = release
    if request.device is not None:
        place = "this machine" if request.local else "built in"
        origin = Origin(layer="default", place=place)
        given.setdefault("MOE_BENCH_DEVICE", Setting(value=request.device, origin=origin))
    return given


_PATHS = ("MEGATRON_PATH", "OUTPUT_PATH", "TRAINING_PARAMS_PATH", "TRAINING_SCRIPT_PATH")
"""Knobs that name a file or folder of this machine, and are read here and by the ranks."""


def _absolute(name: str, setting: Setting, request: Request) -> Setting:
    if name not in _PATHS or Path(setting.value).is_absolute():
        return setting
    return replace(setting, value=str(request.base / setting.value))


def _bound(
    flags: Iterable[tuple[command_line.Flag, Origin]],
) -> Iterator[tuple[str, Setting]]:
    """The knobs that flags of the same meaning set, in order. Raises ConfigError for a value that one does not accept."""
    for flag, origin in flags:
        name = BOUND.get(flag.name)
        if name is not None:
            switch = "true" if "true" in KNOBS[name].choices else ""
            setting = Setting(value=" ".join(flag.words) or switch, origin=origin)
            knob_table.check(name, setting)
            yield name, setting


def _agree(one: str, other: str) -> bool:
    """Whether two values say the same: Megatron's own flag has one word for both flex transports."""
    return one == other or (one in ("deepep", "hybridep") and other == "flex")


def _two_values(name: str, one: Setting, other: Setting) -> ConfigError:
    said, flag = knob_table.says(name, one), knob_table.says(name, other)
    return ConfigError(f"{said} and {flag} are one setting and differ; take one of them out")


def _params(more: Setting | None) -> list[tuple[command_line.Flag, Origin]]:
    """The flags of TRAINING_PARAMS, which have its rank."""
    if more is None:
        return []
    try:
        words = shlex.split(more.value)
    except ValueError as error:
        raise ConfigError(
            f"TRAINING_PARAMS ({more.origin.place}): {error}: {more.value!r}"
        ) from error
    origin = replace(more.origin, place=knob_table.PARAMS)
    flags = command_line.parse(words, place=f"TRAINING_PARAMS, {more.origin.place}")
    return [(flag, origin) for flag in flags]


def _origin(name: str, otherwise: Origin, request: Request) -> Origin:
    return replace(otherwise, place=request.places.get(name, otherwise.place))


def _on_top(setting: Setting, before: Setting | None) -> Setting:
    if before is None or before.value == setting.value:
        return setting
    loser = Overridden(value=before.value, origin=before.origin)
    return replace(setting, overrode=(loser, *before.overrode))


def _default_model_and_cluster(given: dict[str, Setting], request: Request) -> None:
    default = Origin(layer="default", place="built in")
    if not request.must_name:
        given.setdefault("MODEL", Setting(value=DEFAULT_MODEL, origin=default))
        given.setdefault("CLUSTER", Setting(value=DEFAULT_CLUSTER, origin=default))
    for name, folder, suffix in (("MODEL", MODELS, ".yaml"), ("CLUSTER", CLUSTERS, ".conf")):
        if name not in given:
            known = ", ".join(names_in(request.project / folder, suffix))
            raise ConfigError(
                f"{name} is not set; name a file of {folder} (one of {known}), for example {name}="
                f"{'DeepSeek-V3' if name == 'MODEL' else 'my_cluster'} bash ./sbatch_benchmarking.sh"
            )
        _refuse_placeholder(name, given[name])


def _refuse_placeholder(name: str, setting: Setting) -> None:
    match = PLACEHOLDER.search(setting.value)
    if match:
        raise ConfigError(
            f"{knob_table.says(name, setting)} still holds the placeholder {match[0]!r}; put your own value there"
        )


def _refuse_placeholder_secrets(environment: Mapping[str, str]) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        value = environment.get(name, "")
        if PLACEHOLDER.fullmatch(value):  # so it is no secret, and may be shown
            raise ConfigError(
                f"{name} (environment) still holds the placeholder {value!r}; put your own there, or unset it"
            )


def _for_bash(request: Request, given: Mapping[str, Setting]) -> dict[str, str]:
    environment = dict(request.environment)
    environment["WORKSPACE"] = str(request.project)
    environment.setdefault("MEGATRON_PATH", "")
    environment |= {name: setting.value for name, setting in given.items()}
    return environment


def _conf_files(request: Request, named: Setting) -> tuple[ConfFile, ...]:
    cluster = f"{CLUSTERS}/{named.value}.conf"
    if not is_file(request.project / cluster):
        said = _absent("CLUSTER", named, CLUSTERS, ".conf", request.project)
        raise ConfigError(f"{said} (copy {CLUSTERS}/template.conf to make your own)")
    layers = (("common", COMMON), ("runtime", RUNTIME), ("cluster", cluster))
    return tuple(
        ConfFile(path=str(request.project / path), layer=layer, shown=path)
        for layer, path in layers
    )


def _knobs(
    given: Mapping[str, Setting], conf: ConfVariables, request: Request
) -> dict[str, Setting]:
    """The value of each knob that has one: a flag wins whatever a .conf did, else what bash ended with."""
    knobs: dict[str, Setting] = {}
    for name in KNOBS:
        setting = conf.settings.get(name)
        if name in given and setting is not None:
            setting = _with_given_origin(given[name], setting)
        if setting is not None and setting.value:
            knobs[name] = _absolute(name, setting, request)
            knob_table.check(name, knobs[name])
    if "TRAINING_PARAMS_PATH" not in knobs:
        path = f"{conf.settings['WORKSPACE'].value}/{MODELS}/{knobs['MODEL'].value}.yaml"
        origin = Origin(layer="default", place="built in")
        knobs["TRAINING_PARAMS_PATH"] = Setting(value=path, origin=origin)
    return knobs


def _with_given_origin(given: Setting, after: Setting) -> Setting:
    """In bash, flags and defaults were environment variables: put their own origin back, and flags back on top."""
    if after.value == given.value:
        return replace(given, overrode=(*given.overrode, *after.overrode))
    if given.origin.layer == "flag" or given.origin.place == knob_table.PARAMS:
        return _on_top(given, after)
    lost = tuple(
        replace(one, origin=given.origin) if one.origin == ENVIRONMENT else one
        for one in after.overrode
    )
    return replace(after, overrode=lost)


_ACTED_ON: Mapping[str, tuple[str, ...]] = {
    "CLUSTER": ("common", "runtime", "cluster"),
    "DRY_RUN": ("common", "runtime", "cluster"),
    "MODEL": ("runtime", "cluster"),
    "MOE_BENCH_DEVICE": ("common", "runtime", "cluster", "model"),
}
"""What files of these layers cannot change any more: they were chosen or are read by it, or it asks that nothing starts."""
_BEFORE_FILES = ("LAUNCHER", "RUN_ID")
"""What only the environment can say: it has been acted on when the first file is read."""


def _refuse_too_late(given: Mapping[str, Setting], knobs: Mapping[str, Setting]) -> None:
    for name, layers in _ACTED_ON.items():
        asked, found = given.get(name), knobs.get(name)
        if asked is None or found is None:
            continue
        said = [Overridden(value=found.value, origin=found.origin)]
        if asked.origin.layer == "default":  # what a file would have set but for that
            said += found.overrode
        for one in said:
            if one.origin.layer in layers and one.value != asked.value:
                wish = knob_table.says(name, Setting(value=one.value, origin=one.origin))
                raise ConfigError(
                    f"{wish} contradicts {knob_table.says(name, asked)}, by which this file was read; "
                    "take it out of the file, or say it in the environment"
                )
    for name in _BEFORE_FILES:
        late = knobs.get(name)
        if late is not None and late.origin.layer not in EXPLICIT:
            raise ConfigError(
                f"{knob_table.says(name, late)} comes too late: it has been acted on when this file is read; "
                f"take it out of the file, and say it in the environment: {name}={late.value} bash ./..."
            )


def _model_path(knobs: Mapping[str, Setting], project: Path) -> Path:
    return project / MODELS / f"{knobs['MODEL'].value}.yaml"


def _check_model(path: Path, knobs: Mapping[str, Setting], project: Path) -> None:
    model = knobs["MODEL"]
    if path != _model_path(knobs, project) or path.exists():
        return
    raise ConfigError(_absent("MODEL", model, MODELS, ".yaml", project))


def _absent(name: str, named: Setting, folder: str, suffix: str, project: Path) -> str:
    """That the folder has no file of that name, and what may have been meant."""
    known = names_in(project / folder, suffix)
    guess = nearest(Path(named.value).name.removesuffix(suffix), known)
    hint = f"did you mean {' or '.join(guess)}?" if guess else f"there are {', '.join(known)}"
    return f"{knob_table.says(name, named)}: there is no {folder}/{named.value}{suffix}; {hint}"


def _variables(
    conf: ConfVariables,
    knobs: Mapping[str, Setting],
    file: ModelFile,
    project: Path,
) -> dict[str, str]:
    found = {name: one.value for name, one in conf.settings.items() if name not in KNOBS}
    found |= {entry.name: entry.words[0] for entry in file.defaults if not found.get(entry.name)}
    found |= {name: setting.value for name, setting in knobs.items()}
    return found | {"WORKSPACE": str(project)}


def _with_defaults(knobs: Mapping[str, Setting], file: ModelFile) -> dict[str, Setting]:
    """The knobs, and what the model's DEFAULTS say of those that nothing above gives a value."""
    filled = dict(knobs)
    for entry in file.defaults:
        if entry.name in KNOBS and entry.name not in knobs and entry.words[0]:
            origin = Origin(layer="model", place=entry.place)
            filled[entry.name] = Setting(value=entry.words[0], origin=origin)
            knob_table.check(entry.name, filled[entry.name])
    return filled


def _with_built_in(knobs: Mapping[str, Setting]) -> dict[str, Setting]:
    """The knobs, in the table's order, with what is built in for those that nobody sets."""
    default = Origin(layer="default", place="built in")
    built_in = {
        name: Setting(value=knob.default, origin=default)
        for name, knob in KNOBS.items()
        if knob.default is not None
    }
    filled = built_in | dict(knobs)
    if "GPUS_PER_NODE" not in filled:
        is_gb200 = filled["GB200_CLUSTER"].value == "1"
        origin = replace(default, place="GB200_CLUSTER=1") if is_gb200 else default
        filled["GPUS_PER_NODE"] = Setting(value="4" if is_gb200 else "8", origin=origin)
    return {name: filled[name] for name in KNOBS if name in filled}


def _with_params(knobs: dict[str, Setting], given: Mapping[str, Setting]) -> dict[str, Setting]:
    """The knobs, and what flags of a file's TRAINING_PARAMS say of them; the caller's own are in `given`."""
    more = knobs.get("TRAINING_PARAMS")
    if more is not None and more.origin.layer in EXPLICIT:
        return knobs
    filled, said = dict(knobs), list(_bound(_params(more)))
    for name, setting in said:
        before = filled.get(name)
        rank = _rank(before) if before is not None else len(PRECEDENCE)
        if before is None or before.origin == setting.origin or _rank(setting) < rank:
            filled[name] = _on_top(setting, before)
        elif before.origin.layer not in EXPLICIT and not _agree(before.value, setting.value):
            raise _two_values(name, before, setting)
    kept = {(name, setting.value) for name, setting in said}
    for name, setting in given.items():
        if setting.origin.place == knob_table.PARAMS and (name, setting.value) not in kept:
            by = knob_table.says("TRAINING_PARAMS", more) if more is not None else "a .conf file"
            raise ConfigError(
                f"{by} takes {knob_table.says(name, setting)} out again, by which the files were read; "
                'write TRAINING_PARAMS="${TRAINING_PARAMS:-} ..." there'
            )
    return filled


def _rank(setting: Setting) -> int:
    return PRECEDENCE.index(setting.origin.layer)


def _exported(conf: ConfVariables, environment: Mapping[str, str]) -> dict[str, Setting]:
    ours = KNOBS.keys() | {"WORKSPACE", "SHLVL", "PWD", "OLDPWD"}
    found = {
        name: setting
        for name, setting in conf.settings.items()
        if name in conf.exported
        and name not in ours
        and setting.origin.layer != "environment"
        and environment.get(name, "") != setting.value
    }
    for name, setting in found.items():
        if is_secret(name):
            raise ConfigError(
                f"{setting.origin.place} sets {name}: a secret does not belong in a file whose values are recorded; "
                f"export {name} in your shell instead (~/.bashrc), and jobs inherit it"
            )
    return found


def _flags(
    trailing: tuple[command_line.Flag, ...], knobs: Mapping[str, Setting], request: Request
) -> tuple[tuple[command_line.Flag, Origin], ...]:
    own = [(flag, _origin(flag.name, FLAG, request)) for flag in trailing]
    return (*_params(knobs.get("TRAINING_PARAMS")), *own)


def _shown(path: Path, project: Path) -> str:
    return str(path.relative_to(project)) if path.is_relative_to(project) else str(path)
