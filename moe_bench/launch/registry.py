"""Launchers by name: the project's own, those that packages bring, and a user's own file.

A package brings one by an entry point of the group `moe_bench.launchers`; a user names a class of a file,
`LAUNCHER=./my_launcher.py:MyLauncher`. Either is called as `factory(project=Path, python=str)` and must return a
`moe_bench.launch.launcher.Launcher`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_bench.config.nearest import nearest
from moe_bench.errors import LaunchError
from moe_bench.launch.launcher import METHODS, Launcher

GROUP = "moe_bench.launchers"


def _local(*, project: Path, python: str) -> Launcher:
    from moe_bench.launch.local import LocalLauncher  # noqa: PLC0415 - only the one that is asked for

    return LocalLauncher(project=project, python=python, device="cpu")


def _slurm(*, project: Path, python: str) -> Launcher:
    from moe_bench.launch.slurm import SlurmLauncher  # noqa: PLC0415

    return SlurmLauncher(workspace=project, python=python)


def _kubernetes(*, project: Path, python: str) -> Launcher:
    from moe_bench.launch.kubernetes import KubernetesLauncher  # noqa: PLC0415

    return KubernetesLauncher(project=project, python=python)


BUILT_IN: Mapping[str, Callable[..., Launcher]] = {
    "local": _local,
    "slurm": _slurm,
    "kubernetes": _kubernetes,
}


def names() -> tuple[str, ...]:
    """All that are known by a name of their own."""
    from importlib.metadata import entry_points  # noqa: PLC0415 - 12 ms that a built-in one does not need

    brought = (point.name for point in entry_points(group=GROUP))
    return tuple(dict.fromkeys((*BUILT_IN, *sorted(brought))))


def canonical(name: str) -> str:
    """The name to record: a file's path made absolute, so that it is found again from anywhere."""
    path, colon, attribute = name.rpartition(":")
    return f"{Path(path).expanduser().resolve()}:{attribute}" if colon else name


def load(name: str, *, project: Path, python: str) -> Launcher:
    """The launcher of that name. Raises LaunchError when there is none, or it cannot be imported, made or used."""
    launcher = _made(name, _factory(name), project=project, python=python)
    lacking = [method for method in METHODS if not callable(getattr(launcher, method, None))]
    if lacking:
        raise LaunchError(
            f"LAUNCHER={name}: {type(launcher).__name__} has no {', no '.join(lacking)}; "
            f"a launcher has {', '.join(METHODS)} (moe_bench/launch/launcher.py says what each does)"
        )
    made: Launcher = launcher
    return made


def _factory(name: str) -> Callable[..., Any]:
    if name in BUILT_IN:
        return BUILT_IN[name]
    path, colon, attribute = name.rpartition(":")
    if colon and path:
        return _from_file(name, Path(path).expanduser(), attribute)
    return _from_package(name)


def _from_file(name: str, path: Path, attribute: str) -> Callable[..., Any]:
    if not path.is_file():
        raise LaunchError(f"LAUNCHER={name}: there is no file {path}; write PATH/TO/FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location(f"_moe_bench_launcher_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise LaunchError(
            f"LAUNCHER={name}: {path} is not a Python file; name one that ends in .py"
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with _Importing(name):
        spec.loader.exec_module(module)
    return _attribute(name, module, attribute)


def _from_package(name: str) -> Callable[..., Any]:
    from importlib.metadata import entry_points  # noqa: PLC0415

    points = entry_points(group=GROUP, name=name)
    if not points:
        known = names()
        guess = nearest(name, known)
        hint = f"did you mean {guess[0]}?" if guess else f"there are {', '.join(known)}"
        raise LaunchError(
            f"LAUNCHER={name} is not known; {hint} (your own: PATH/TO/FILE.py:CLASS, "
            f"or an entry point of the group {GROUP!r})"
        )
    [point, *_] = points
    with _Importing(name):
        factory: Callable[..., Any] = point.load()
    return factory


def _attribute(name: str, module: object, attribute: str) -> Callable[..., Any]:
    found = getattr(module, attribute, None)
    if not callable(found):
        raise LaunchError(
            f"LAUNCHER={name}: the file has no class {attribute!r}; write FILE.py:CLASS with a class it defines"
        )
    factory: Callable[..., Any] = found
    return factory


def _made(name: str, factory: Callable[..., Any], *, project: Path, python: str) -> Any:
    try:
        return factory(project=project, python=python)
    except TypeError as error:
        raise LaunchError(
            f"LAUNCHER={name} cannot be made: {error}; it is called with project=Path and python=str"
        ) from error


class _Importing:
    """Turns whatever a user's module raises while it is imported into a LaunchError that names it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, Exception):
            raise LaunchError(
                f"LAUNCHER={self._name} cannot be imported: {type(error).__name__}: {error}"
            ) from error
