"""A training script of others, which is read and never run, and expressions of it, rewritten for another module.

That module has imported the script as `script`. What an expression lacks there is named, not guessed.
"""

import ast
import builtins
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from symtable import SymbolTable, symtable

from federation.app.sources import parse
from federation.tools.roles import role

Function = ast.FunctionDef
Value = tuple[ast.expr, ast.AST]  # an expression, and the function or module that it is in


@dataclass
class Piece:
    """An expression for another module, the lines that it needs before it, and the names that nothing gives a value."""

    text: str
    line: int = 0  # of the script
    lines: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


class Script:
    """A script that has been read, and what pieces of it need: of its imports, of its names, of its command line."""

    def __init__(self, path: Path) -> None:
        self.name, self.tree = path.stem, parse(path)
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self.imports = {_bound_by(alias): node for node, alias in self._aliases()}
        self.options = dict(self._options())
        self.top: dict[str, list[ast.stmt]] = {}  # statements at its top, by the names that they define
        for statement in self.tree.body:
            for name in _defined(statement):
                self.top.setdefault(name, []).append(statement)
        self.used_imports: set[str] = set()
        self.used_names: set[str] = set()
        self.uses_options = False

    def _aliases(self) -> Iterator[tuple[ast.Import | ast.ImportFrom, ast.alias]]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                yield from ((node, alias) for alias in node.names)

    def _options(self) -> Iterator[tuple[str, str]]:
        """Yield each option of its command line, with its default, "" if there is none."""
        for call in self.calls(lambda name: name.endswith(".add_argument")):
            names = [str(word.value) for word in call.args if isinstance(word, ast.Constant)]
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            flag = {"'store_true'": "False", "'store_false'": "True"}.get(given.get("action", ""), "")
            name = next((name for name in names if name.startswith("--")), *names[:1])
            yield given.get("dest", name).strip("'-").replace("-", "_"), given.get("default", flag)

    # ------------------------------------------------------------------------------------------------- what is in it

    def calls(self, wanted: Callable[[str], object]) -> list[ast.Call]:
        """Return the calls of functions whose dotted name is `wanted`, in the order of their lines."""
        found = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call) and wanted(ast.unparse(node.func))]
        return sorted(found, key=lambda call: call.lineno)

    def classes(self, base: str = "") -> list[ast.ClassDef]:
        """Return the classes at its top that have a base whose name ends so."""
        found = [node for node in self.tree.body if isinstance(node, ast.ClassDef)]
        return [one for one in found if not base or any(ast.unparse(of).endswith(base) for of in one.bases)]

    def functions(self) -> list[Function]:
        return [node for node in self.tree.body if isinstance(node, Function)]

    def scope(self, node: ast.AST) -> ast.AST:
        """Return the function that a node is in, or the module."""
        while not isinstance(node := self.parents.get(node, self.tree), Function | ast.Module):
            pass
        return node

    def needed(self) -> list[str]:
        """Return the names at its top that pieces of it use, with all that these use."""
        waiting, found = list(self.used_names), set()
        while waiting:
            name = waiting.pop()
            if self._is_options(name):
                self.uses_options = True
            elif name in self.top and name not in found:
                found.add(name)
                waiting += [other for one in self.top[name] for other in _globals(_symbols(one))]
        return sorted(found)

    def import_lines(self) -> list[str]:
        """Return the imports of it that pieces of it use."""
        used = [(node, alias) for node, alias in self._aliases() if _bound_by(alias) in self.used_imports]
        return [ast.unparse(_import_of(node, alias)) for node, alias in used]

    # -------------------------------------------------------------------------------------------------- pieces of it

    def piece(self, value: ast.expr, scope: ast.AST | None = None, ours: Container[str] = ()) -> Piece:
        """Return an expression for another module, which has a value for the names in `ours`."""
        piece = Piece("", getattr(value, "lineno", 0))
        piece.text = ast.unparse(self._rewritten(value, scope or self.scope(value), piece, ours))
        return piece

    def _rewritten(self, value: ast.expr, scope: ast.AST, piece: Piece, ours: Container[str]) -> ast.expr:
        script, copy = self, ast.parse(ast.unparse(value), mode="eval").body
        bound = set(_stored(copy))

        class Rewrite(ast.NodeTransformer):
            def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
                if script._is_options(ast.unparse(node.value)) and node.attr in script.options:
                    return script._option(node.attr, piece)
                return ast.Attribute(self.visit(node.value), node.attr, node.ctx)

            def visit_Name(self, node: ast.Name) -> ast.expr:
                return node if node.id in ours or node.id in bound else script._named(node, scope, piece, ours)

        rewritten: ast.expr = Rewrite().visit(copy)
        return rewritten

    def _is_options(self, name: str) -> bool:
        return role(name) == "args" and bool(self.options)

    def _option(self, name: str, piece: Piece) -> ast.expr:
        """Return the default of an option of its command line."""
        if not self.options[name]:
            piece.unknown.append(name)
        return ast.parse(self.options[name] or name, mode="eval").body

    def _named(self, node: ast.Name, scope: ast.AST, piece: Piece, ours: Container[str]) -> ast.expr:
        """Return what a name stands for: something at its top, an import, or the value of a local variable."""
        name = node.id
        if value := self._local(name, scope):
            rewritten = self._rewritten(*value, piece, ours)
            if isinstance(rewritten, ast.Constant) or value[1] is not scope:
                return rewritten
            line = f"{name} = {ast.unparse(rewritten)}"
            piece.lines += [line] if line not in piece.lines else []
        elif name in self.top:
            self.used_names.add(name)
            return ast.Attribute(ast.Name("script"), name)
        elif name in self.imports:
            self.used_imports.add(name)
        elif not hasattr(builtins, name):
            piece.unknown.append(name)
        return node

    def _local(self, name: str, scope: ast.AST) -> Value | None:
        """Return the value of a variable or parameter of a function."""
        if not isinstance(scope, Function):
            return None
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
                return node.value, scope
        return self.argument(scope, name)

    def argument(self, function: Function, parameter: str) -> Value | None:
        """Return what a parameter of a function is: its default, or else what the function is first called with."""
        if parameter in (known := defaults(function)):
            return known[parameter], self.tree
        owner = self.parents[function]
        called = owner.name if isinstance(owner, ast.ClassDef) else function.name
        for call in self.calls(lambda name: name == called):
            given = dict(zip(self.parameters(function), call.args, strict=False))
            given |= {word.arg: word.value for word in call.keywords if word.arg}
            if parameter in given:
                return given[parameter], self.scope(call)
        return None

    def parameters(self, function: Function) -> list[str]:
        """Return the parameters of a function, without the first one of a method."""
        is_method = isinstance(self.parents[function], ast.ClassDef)
        return [one.arg for one in (*function.args.args[is_method:], *function.args.kwonlyargs)]

    def arguments(self, function: Function, given: dict[str, str]) -> Iterator[tuple[str, Piece]]:
        """Yield each parameter that has to be given, and what: `given` has what there is, by what it is for."""
        for name in self.parameters(function):
            if (part := role(name)) in given:
                self.uses_options |= part == "args"
                yield name, Piece(given[part])
            elif name not in defaults(function):
                value = self.argument(function, name)
                yield name, self.piece(*value) if value else Piece("...", unknown=[name])


def defaults(function: Function) -> dict[str, ast.expr]:
    """Return the parameters of a function that have a default, with that."""
    given = function.args
    pairs = [*zip(given.args[::-1], given.defaults[::-1], strict=False)]
    pairs += [(one, value) for one, value in zip(given.kwonlyargs, given.kw_defaults, strict=True) if value]
    return {parameter.arg: value for parameter, value in pairs}


def _bound_by(alias: ast.alias) -> str:
    return (alias.asname or alias.name).split(".")[0]


def _import_of(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.stmt:
    return ast.Import([alias]) if isinstance(node, ast.Import) else ast.ImportFrom(node.module, [alias], node.level)


def _defined(statement: ast.stmt) -> list[str]:
    """Return the names that a statement at module level defines, if that is all that it does."""
    if isinstance(statement, Function | ast.ClassDef):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    targets += [statement.target] if isinstance(statement, ast.AnnAssign) else []
    return [name for target in targets for name in _stored(target)]


def _stored(node: ast.AST) -> list[str]:
    return [one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)]


def _symbols(statement: ast.stmt) -> SymbolTable:
    return symtable(ast.unparse(statement), "script", "exec")


def _globals(table: SymbolTable) -> Iterator[str]:
    """Yield the names that a statement uses of the module that it is in, wherever in it."""
    for symbol in table.get_symbols():
        if symbol.is_global() or (table.get_type() == "module" and symbol.is_referenced()):
            yield symbol.get_name()
    yield from chain.from_iterable(map(_globals, table.get_children()))
