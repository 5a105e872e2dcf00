"""Python source of a Megatron-LM tree, read without running it: names, classes, enums and constants."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

BASIC_CALLS = {"int": int, "float": float, "str": str}


class Unresolved(Exception):  # noqa: N818 - a signal within this package, not a user's error
    """An expression whose value only running the program would tell."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A definition and the module that holds it."""

    module: Module
    node: ast.stmt


@dataclass(kw_only=True)
class Module:
    """One parsed source file."""

    name: str
    tree: ast.Module
    defined: dict[str, ast.stmt]
    """Functions, classes and assignments, by name; those inside try and if included."""
    imported: dict[str, tuple[str, str]]
    """Name here -> (module, name there), wherever in the file the import stands."""
    starred: tuple[str, ...]
    """Modules of `from x import *`."""


@dataclass(kw_only=True)
class SourceTree:
    """A folder that holds the `megatron` package."""

    root: Path
    modules: dict[str, Module | None] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    """Path relative to root -> sha256, of every file read so far."""

    def module(self, name: str) -> Module | None:
        """The parsed module, or None when this tree has no such file."""
        if name not in self.modules:
            self.modules[name] = self._read(name)
        return self.modules[name]

    def find(self, module: Module, name: str, depth: int = 0) -> Found | None:
        """The definition a name refers to, through imports and re-exports."""
        if name in module.defined:
            return Found(module=module, node=module.defined[name])
        if depth > 8:  # a cycle of re-exports
            return None
        sources = [module.imported[name]] if name in module.imported else []
        sources += [(starred, name) for starred in module.starred]
        for source, there in sources:
            other = self.module(source)
            if other is not None and (found := self.find(other, there, depth + 1)) is not None:
                return found
        return None

    def enum_members(self, module: Module, name: str) -> dict[str, object] | None:
        """Member name -> value of an enum class, or None when the name is none."""
        found = self.find(module, name)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return None
        bases = {ast.unparse(base).rpartition(".")[2] for base in found.node.bases}
        if not bases & {"Enum", "IntEnum", "StrEnum", "Flag", "IntFlag"}:
            return None
        return dict(_members(found.node))

    def value(self, module: Module, node: ast.expr) -> object:  # noqa: PLR0911 - one return a case
        """What a literal, a named constant, an enum member or `list(Enum)` is. Raises Unresolved."""
        match node:
            case ast.Constant():
                return node.value
            case ast.List() | ast.Tuple() | ast.Set():
                return [self.value(module, item) for item in node.elts]
            case ast.Dict(keys=keys, values=values):
                return {
                    self.value(module, k): self.value(module, v)
                    for k, v in zip(keys, values, strict=True)
                    if k is not None
                }
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return _negated(self.value(module, operand))
            case ast.Name(id=name):
                return self._named(module, name)
            case ast.Attribute(value=ast.Name(id=owner), attr=member):
                return self._member(module, owner, member)
            case ast.Call() | ast.ListComp():
                return self._computed(module, node)
        raise Unresolved(ast.unparse(node))

    def _read(self, name: str) -> Module | None:
        base = self.root.joinpath(*name.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                text = path.read_bytes()
                relative = path.relative_to(self.root).as_posix()
                self.hashes[relative] = hashlib.sha256(text).hexdigest()
                return _parsed(name, ast.parse(text), is_package=path.name == "__init__.py")
        return None

    def _named(self, module: Module, name: str) -> object:
        found = self.find(module, name)
        if found is not None and isinstance(found.node, ast.Assign | ast.AnnAssign):
            assigned = found.node.value
            if assigned is not None:
                return self.value(found.module, assigned)
        raise Unresolved(name)

    def _member(self, module: Module, owner: str, member: str) -> object:
        members = self.enum_members(module, owner)
        if members is not None and member in members:
            return member
        raise Unresolved(f"{owner}.{member}")

    def _computed(self, module: Module, node: ast.Call | ast.ListComp) -> object:
        match node:
            case ast.Call(func=ast.Name(id="list"), args=[ast.Name(id=name)]):
                if (members := self.enum_members(module, name)) is not None:
                    return list(members)
            case ast.Call(func=ast.Name(id="list"), args=[], keywords=[]):
                return []
            case ast.Call(func=ast.Name(id="range"), args=args):
                return list(range(*(_whole(self.value(module, arg)) for arg in args)))
            case ast.Call(func=ast.Name(id=name), args=[arg]) if name in BASIC_CALLS:
                return BASIC_CALLS[name](str(self.value(module, arg)))
            case ast.ListComp(
                elt=ast.Attribute(attr=("value" | "name") as what),
                generators=[ast.comprehension(iter=ast.Name(id=name), ifs=[])],
            ):
                if (members := self.enum_members(module, name)) is not None:
                    return list(members.values() if what == "value" else members)
        raise Unresolved(ast.unparse(node))


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a block, those inside its if, try and with included."""
    for node in body:
        yield node
        match node:
            case ast.If():
                yield from statements(node.body + node.orelse)
            case ast.Try():
                yield from statements(node.body + node.orelse + node.finalbody)
                for handler in node.handlers:
                    yield from statements(handler.body)
            case ast.With():
                yield from statements(node.body)


def _parsed(name: str, tree: ast.Module, *, is_package: bool) -> Module:
    defined: dict[str, ast.stmt] = {}
    for node in statements(tree.body):
        match node:
            case ast.FunctionDef(name=own) | ast.ClassDef(name=own):
                defined.setdefault(own, node)
            case ast.Assign(targets=[ast.Name(id=own)]) | ast.AnnAssign(target=ast.Name(id=own)):
                defined.setdefault(own, node)
    imported: dict[str, tuple[str, str]] = {}
    starred: list[str] = []
    for inner in ast.walk(tree):
        if not isinstance(inner, ast.ImportFrom):
            continue
        source = _absolute(name, inner, is_package=is_package)
        for alias in inner.names:
            if alias.name == "*":
                starred.append(source)
            else:
                imported[alias.asname or alias.name] = (source, alias.name)
    return Module(name=name, tree=tree, defined=defined, imported=imported, starred=tuple(starred))


def _absolute(module: str, node: ast.ImportFrom, *, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    drop = node.level - 1 if is_package else node.level
    parts = module.split(".")
    base = parts[: len(parts) - drop]
    return ".".join([*base, node.module] if node.module else base)


def _members(node: ast.ClassDef) -> Iterator[tuple[str, object]]:
    for position, item in enumerate(node.body, start=1):
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            constant = item.value.value if isinstance(item.value, ast.Constant) else position
            yield item.targets[0].id, constant


def _negated(value: object) -> object:
    if isinstance(value, int | float):
        return -value
    raise Unresolved(f"-{value!r}")


def _whole(value: object) -> int:
    if isinstance(value, int):
        return value
    raise Unresolved(repr(value))
