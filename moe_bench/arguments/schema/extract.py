"""The flags of a Megatron-LM tree, read from its source: no torch, no import of Megatron.

Follows `parse_args` in `megatron/training/arguments.py` through the functions that add arguments, and the dataclasses
whose fields become flags (`ArgumentGroupFactory`, from 0.16 on). What cannot be told without running is listed, never guessed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moe_bench.arguments.schema.source import Module, SourceTree, Unresolved, statements
from moe_bench.arguments.schema.spec import FlagSpec, Kind
from moe_bench.errors import ArgumentsError

ARGUMENTS = "megatron.training.arguments"
OPTIONAL_GROUPS = (("megatron.post_training.arguments", "add_modelopt_args", "nvidia-modelopt"),)
"""Functions pretrain_gpt.py adds itself, with the package it asks for first."""
CONDITION_PACKAGES = {"HAVE_KITCHEN": "nvidia-kitchen"}
KINDS: dict[str, Kind] = {
    "store": "value",
    "store_true": "true",
    "store_false": "false",
    "store_const": "const",
    "append": "append",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Extraction:
    """What a source tree says about its flags."""

    release: str
    """`0.19.2`, from megatron/core/package_info.py; "" when it does not say."""
    flags: tuple[FlagSpec, ...]
    unread: tuple[str, ...]
    """`file:line: what` for each declaration that only running Megatron would tell."""
    hashes: dict[str, str]
    """Path relative to the tree -> sha256 of each file this rests on."""


def extract(root: Path) -> Extraction:
    """Read the flags of the Megatron-LM tree (or site-packages folder) at `root`. Raises ArgumentsError."""
    tree = SourceTree(root=root)
    start = tree.module(ARGUMENTS)
    if start is None:
        raise ArgumentsError(
            f"{root} holds no megatron/training/arguments.py: it is not a Megatron-LM checkout; "
            "set MEGATRON_PATH to the folder that contains pretrain_gpt.py"
        )
    reader = _Reader(tree=tree)
    reader.function(start, "parse_args")
    for module_name, function, package in OPTIONAL_GROUPS:
        module = tree.module(module_name)
        if module is not None:
            reader.function(module, function, needs=package)
    return Extraction(
        release=_release(tree),
        flags=tuple(reader.flags),
        unread=tuple(reader.unread),
        hashes=dict(tree.hashes),
    )


def _release(tree: SourceTree) -> str:
    module = tree.module("megatron.core.package_info")
    if module is None:
        return ""
    try:
        return ".".join(
            str(tree.value(module, ast.Name(id=part))) for part in ("MAJOR", "MINOR", "PATCH")
        )
    except Unresolved:
        return ""


@dataclass(kw_only=True)
class _Reader:
    """Walks the functions that add arguments, in the order Megatron calls them."""

    tree: SourceTree
    flags: list[FlagSpec] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    visited: set[tuple[str, str]] = field(default_factory=set)

    def function(self, module: Module, name: str, needs: str = "") -> None:
        """Read one function of `module` and those it hands the parser to."""
        found = self.tree.find(module, name)
        if found is None or not isinstance(found.node, ast.FunctionDef):
            return
        if (found.module.name, name) in self.visited:
            return
        self.visited.add((found.module.name, name))
        groups: dict[str, str] = {}
        factories: dict[str, ast.Call] = {}
        for statement, condition in _conditional(found.node.body, needs):
            for call in _own_calls(statement):
                self._call(found.module, statement, call, (groups, factories), condition)

    def _call(
        self,
        module: Module,
        statement: ast.stmt,
        call: ast.Call,
        scope: tuple[dict[str, str], dict[str, ast.Call]],
        needs: str,
    ) -> None:
        groups, factories = scope
        target = _target(statement)
        match call.func:
            case ast.Attribute(attr="add_argument_group"):
                groups[target] = self._title(module, call)
            case ast.Attribute(value=ast.Name(id=parent), attr="add_mutually_exclusive_group"):
                groups[target] = groups.get(parent, "")
            case ast.Attribute(value=owner, attr="add_argument"):
                group = groups.get(owner.id, "") if isinstance(owner, ast.Name) else ""
                self._declared(module, call, group=group, needs=needs)
            case ast.Name(id="ArgumentGroupFactory"):
                factories[target] = call
            case ast.Attribute(value=owner, attr="build_group"):
                factory = factories.get(owner.id) if isinstance(owner, ast.Name) else owner
                groups[target] = self._title(module, call)
                if isinstance(factory, ast.Call):
                    scope_values = self._scope(module, statement)
                    self._fields(module, factory, groups[target], scope_values)
            case ast.Name(id=name) if any(_is_parser(arg) for arg in call.args):
                self.function(module, name, needs)

    def _scope(self, module: Module, statement: ast.stmt) -> dict[str, ast.expr]:
        """Local assignments of the function that holds the statement, by name."""
        for node in module.defined.values():
            if isinstance(node, ast.FunctionDef) and node.lineno <= statement.lineno <= (
                node.end_lineno or node.lineno
            ):
                return {
                    inner.targets[0].id: inner.value
                    for inner in statements(node.body)
                    if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name)
                }
        return {}

    def _title(self, module: Module, call: ast.Call) -> str:
        keyword = {word.arg: word.value for word in call.keywords}.get("title")
        positional = call.args[1:2] if call.args and _is_parser(call.args[0]) else call.args[:1]
        node = keyword if keyword is not None else (positional[0] if positional else None)
        try:
            return str(self.tree.value(module, node)) if node is not None else ""
        except Unresolved:
            return ""

    def _declared(self, module: Module, call: ast.Call, *, group: str, needs: str) -> None:
        try:
            options = [str(self.tree.value(module, arg)) for arg in call.args]
        except Unresolved:
            self._missed(module, call)
            return
        if any(keyword.arg is None for keyword in call.keywords):
            self._missed(module, call)
        keywords = {word.arg: word.value for word in call.keywords if word.arg is not None}
        self._add(module, options, keywords, group=group, needs=needs)

    def _add(
        self,
        module: Module,
        options: list[str],
        keywords: dict[str, ast.expr],
        *,
        group: str,
        needs: str,
    ) -> None:
        kind, options = self._kind(module, keywords.get("action"), options)
        if kind is None:
            return
        self.flags.append(
            FlagSpec(
                options=tuple(options),
                dest=self._text(module, keywords.get("dest")) or _dest(options),
                kind=kind,
                type="" if kind in ("true", "false", "boolean", "const") else _type_name(keywords),
                nargs=self._text(module, keywords.get("nargs")),
                choices=self._choices(module, keywords.get("choices")),
                default=self._default(module, keywords.get("default"), kind),
                group=group,
                needs=needs,
            )
        )

    def _kind(
        self, module: Module, action: ast.expr | None, options: list[str]
    ) -> tuple[Kind | None, list[str]]:
        if action is None:
            return "value", options
        if "BooleanOptionalAction" in ast.unparse(action):
            negative = [f"--no-{option[2:]}" for option in options]
            pairs = zip(options, negative, strict=True)
            return "boolean", [spelling for pair in pairs for spelling in pair]
        try:
            return KINDS.get(str(self.tree.value(module, action))), options
        except Unresolved:
            self._missed(module, action)
            return "value", options

    def _text(self, module: Module, node: ast.expr | None) -> str:
        if node is None:
            return ""
        try:
            value = self.tree.value(module, node)
        except Unresolved:
            return ""
        return "" if value is None else str(value)

    def _choices(self, module: Module, node: ast.expr | None) -> tuple[str, ...]:
        if node is None:
            return ()
        try:
            values = self.tree.value(module, node)
        except Unresolved:
            self._missed(module, node)
            return ()
        assert_list = values if isinstance(values, list) else []
        return tuple(str(value) for value in assert_list if value is not None)

    def _default(self, module: Module, node: ast.expr | None, kind: Kind) -> object:
        if node is None:
            return {"true": False, "false": True}.get(kind)
        try:
            return self.tree.value(module, node)
        except Unresolved:
            return {"expr": ast.unparse(node)}

    def _missed(self, module: Module, node: ast.AST) -> None:
        line = getattr(node, "lineno", 0)
        self.unread.append(f"{module.name.replace('.', '/')}.py:{line}: {ast.unparse(node)[:80]}")

    def _fields(
        self, module: Module, factory: ast.Call, group: str, scope: dict[str, ast.expr]
    ) -> None:
        """Add a flag for each field of the dataclass that a factory turns into arguments."""
        if not factory.args or not isinstance(factory.args[0], ast.Name):
            self._missed(module, factory)
            return
        excluded = self._excluded(module, factory, scope)
        for owner, annotated in self._dataclass_fields(module, factory.args[0].id):
            name = annotated.target.id if isinstance(annotated.target, ast.Name) else ""
            if name not in excluded:
                self._field(owner, name, annotated, group)

    def _excluded(self, module: Module, factory: ast.Call, scope: dict[str, ast.expr]) -> set[str]:
        node = {word.arg: word.value for word in factory.keywords}.get("exclude")
        if isinstance(node, ast.Name):
            node = scope.get(node.id)
        if node is None:
            return set()
        try:
            value = self.tree.value(module, node)
        except Unresolved:
            self._missed(module, node)
            return set()
        return {str(item) for item in value} if isinstance(value, list) else set()

    def _dataclass_fields(self, module: Module, name: str) -> list[tuple[Module, ast.AnnAssign]]:
        """Fields in dataclass order: bases first, an override keeps its place."""
        found = self.tree.find(module, name)
        if found is None or not isinstance(found.node, ast.ClassDef):
            return []
        fields: dict[str, tuple[Module, ast.AnnAssign]] = {}
        for base in reversed(found.node.bases):
            if isinstance(base, ast.Name):
                for owner, item in self._dataclass_fields(found.module, base.id):
                    fields[ast.unparse(item.target)] = (owner, item)
        for statement in found.node.body:
            if isinstance(statement, ast.AnnAssign) and "ClassVar" not in ast.unparse(
                statement.annotation
            ):
                fields[ast.unparse(statement.target)] = (found.module, statement)
        return list(fields.values())

    def _field(self, module: Module, name: str, item: ast.AnnAssign, group: str) -> None:
        default, metadata, hidden = _field_parts(item.value)
        if hidden:
            return
        keywords = _annotation_keywords(self.tree, module, item.annotation)
        options = [_option(name)]
        is_bool = (
            keywords is not None and ast.unparse(keywords.get("type", ast.Constant(0))) == "bool"
        )
        if keywords is not None and is_bool:
            del keywords["type"]
            off = not (isinstance(default, ast.Constant) and not default.value)
            keywords["action"] = ast.Constant("store_false" if off else "store_true")
            options = [_option(f"no_{name}"), _option(f"disable_{name}")] if off else options
        if keywords is None:
            keywords = {}
            if "type" not in metadata:
                self._missed(module, item)
        keywords.setdefault("dest", ast.Constant(name))
        if default is not None:
            keywords.setdefault("default", default)
        names = metadata.pop("arg_names", None)
        if names is not None:
            options = [str(part) for part in _items(self.tree.value(module, names))]
        keywords.update(metadata)
        self._add(module, options, keywords, group=group, needs="")


def _items(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _conditional(body: list[ast.stmt], needs: str) -> Iterator[tuple[ast.stmt, str]]:
    """Statements of a function with the optional package each one's branch asks for."""
    for node in body:
        yield node, needs
        match node:
            case ast.If(test=ast.Name(id=flag)) if flag in CONDITION_PACKAGES:
                yield from _conditional(node.body, CONDITION_PACKAGES[flag])
            case ast.If() | ast.With():
                yield from _conditional(node.body + getattr(node, "orelse", []), needs)
            case ast.Try():
                yield from _conditional(node.body + node.orelse, needs)


def _own_calls(statement: ast.stmt) -> Iterator[ast.Call]:
    """Calls of a simple statement, inner ones first; none of a block's own statements."""
    if not isinstance(statement, ast.Expr | ast.Assign | ast.Return) or statement.value is None:
        return
    calls = [node for node in ast.walk(statement.value) if isinstance(node, ast.Call)]
    outer = calls[:1]
    match outer:
        case [ast.Call(func=ast.Attribute(attr="build_group" | "add_argument"))]:
            yield outer[0]
        case _:
            yield from reversed(calls)


def _target(statement: ast.stmt) -> str:
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id
    return ""


def _is_parser(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("parser", "group")


def _dest(options: list[str]) -> str:
    long = [option for option in options if option.startswith("--")] or options
    return long[0].lstrip("-").replace("-", "_")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _type_name(keywords: dict[str, ast.expr]) -> str:
    node = keywords.get("type")
    if node is None:
        return "str"
    return "lambda" if isinstance(node, ast.Lambda) else ast.unparse(node)


def _field_parts(
    node: ast.expr | None,
) -> tuple[ast.expr | None, dict[str, ast.expr], bool]:
    """Default, argparse_meta and whether the field is no argument of __init__, of `name: type = node`."""
    match node:
        case ast.Call(func=ast.Name(id="field") | ast.Attribute(attr="field"), keywords=keywords):
            words = {word.arg: word.value for word in keywords}
        case _:
            return node, {}, False
    hidden = isinstance(words.get("init"), ast.Constant) and ast.unparse(words["init"]) == "False"
    default = words.get("default")
    factory = words.get("default_factory")
    if isinstance(factory, ast.Lambda):
        default = factory.body
    elif factory is not None:
        default = ast.Call(func=factory, args=[], keywords=[])
    return default, _argparse_meta(words.get("metadata")), hidden


def _argparse_meta(node: ast.expr | None) -> dict[str, ast.expr]:
    if not isinstance(node, ast.Dict):
        return {}
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and key.value == "argparse_meta":
            assert_dict = value if isinstance(value, ast.Dict) else ast.Dict(keys=[], values=[])
            return {
                str(inner.value): meta
                for inner, meta in zip(assert_dict.keys, assert_dict.values, strict=True)
                if isinstance(inner, ast.Constant)
            }
    return {}


def _annotation_keywords(  # noqa: PLR0911 - one return a case
    tree: SourceTree, module: Module, node: ast.expr
) -> dict[str, ast.expr] | None:
    """add_argument's type, nargs and choices for a field's annotation; None when it has no one type."""
    match node:
        case ast.Constant(value=str() as text):
            return _annotation_keywords(tree, module, ast.parse(text, mode="eval").body)
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            return _annotation_keywords(tree, module, left)
        case ast.Subscript(value=ast.Name(id="Optional"), slice=inner):
            return _annotation_keywords(tree, module, inner)
        case ast.Subscript(
            value=ast.Name(id="Union"), slice=ast.Tuple(elts=[inner, ast.Constant(value=None)])
        ):
            return _annotation_keywords(tree, module, inner)
        case ast.Subscript(value=ast.Name(id="list" | "List"), slice=inner):
            keywords = _annotation_keywords(tree, module, inner)
            return None if keywords is None else {**keywords, "nargs": ast.Constant("+")}
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            choices = inner if isinstance(inner, ast.Tuple) else ast.Tuple(elts=[inner])
            kinds = {type(c.value).__name__ for c in choices.elts if isinstance(c, ast.Constant)}
            return (
                {"type": ast.Name(id=kinds.pop()), "choices": choices} if len(kinds) == 1 else None
            )
        case ast.Name(id=name):
            members = tree.enum_members(module, name)
            if members is None:
                return {"type": node}
            choices_node = ast.List(elts=[ast.Constant(member) for member in members])
            return {"type": ast.Name(id="enum_type_handler"), "choices": choices_node}
        case ast.Attribute():
            return {"type": node}
    return None
