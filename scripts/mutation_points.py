"""The small changes of a mutation run: where in a source file they can be made, and making one."""

from __future__ import annotations

import ast
import copy
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# What only describes, and so cannot be wrong: a change there would survive every test.
_DESCRIBES = {"__all__", "TYPE_CHECKING"}


@dataclasses.dataclass(frozen=True)
class Point:
    """One change: the node's place in `ast.walk` order, the line, and which change of that node."""

    index: int
    line: int
    what: str


def points(source: str) -> list[Point]:
    """Every change this module knows to make to `source`."""
    tree = ast.parse(source)
    skipped = set(_without_effect(tree))
    found = []
    for index, node in enumerate(ast.walk(tree)):
        if index not in skipped:
            line = getattr(node, "lineno", 0)
            found += [Point(index, line, what) for what in _changes(node)]
    return found


def mutate(source: str, point: Point) -> str:
    """`source` with the change `point` made."""
    tree = ast.parse(source)
    target = list(ast.walk(tree))[point.index]
    replacement = _changed(target, point.what)
    tree = _Replace(target, replacement).visit(tree)
    return ast.unparse(ast.fix_missing_locations(tree))


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def _without_effect(tree: ast.Module) -> Iterator[int]:
    """Indices of docstrings, annotations, type-only imports, messages of errors, and decorators."""
    dead: set[ast.AST] = set()
    for node in ast.walk(tree):
        for part in _describing(node):
            dead.update(ast.walk(part))
    for index, node in enumerate(ast.walk(tree)):
        if node in dead:
            yield index


def _describing(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield from node.decorator_list
    if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node):
        yield node.body[0]
    if isinstance(node, ast.FunctionDef):
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            if argument.annotation is not None:
                yield argument.annotation
        if node.returns is not None:
            yield node.returns
    if isinstance(node, ast.AnnAssign):
        yield node.annotation
    # What an error says is held by tests of its own; whether it is raised is what counts here.
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        yield node.exc
    if isinstance(node, ast.JoinedStr):
        yield node
    if isinstance(node, ast.If) and any(
        isinstance(part, ast.Name) and part.id in _DESCRIBES for part in ast.walk(node.test)
    ):
        yield node
    if isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id in _DESCRIBES for target in node.targets
    ):
        yield node


def _changes(node: ast.AST) -> list[str]:
    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARE:
            return ["comparison"]
        case ast.BinOp(op=op) if type(op) in _BINARY:
            return ["arithmetic"]
        case ast.BoolOp():
            return ["and/or", *(f"drop clause {i}" for i in range(len(node.values)))]
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            return ["drop the sign"]
        case ast.Constant(value=bool()):
            return ["negate"]
        case ast.Constant(value=int() | float()):
            return ["plus one"]
        case ast.If() | ast.IfExp():
            return ["always", "never"]
        case ast.Call(keywords=[_, *_]):
            return [f"drop argument {i}" for i, k in enumerate(node.keywords) if k.arg]
        case ast.Return(value=value) if value is not None and not _is_none(value):
            return ["return None"]
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            return ["drop the statement"]
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return ["drop the statement"]
        case _:
            return []


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _changed(node: ast.AST, what: str) -> ast.AST:
    new = copy.copy(node)
    match new, what:
        case ast.Compare(), _:
            new.ops = [_COMPARE[type(new.ops[0])]()]
        case ast.BinOp(), _:
            new.op = _BINARY[type(new.op)]()
        case ast.BoolOp(), "and/or":
            new.op = ast.Or() if isinstance(new.op, ast.And) else ast.And()
        case ast.BoolOp(), _:
            left = [v for i, v in enumerate(new.values) if i != int(what.split()[-1])]
            return left[0] if len(left) == 1 else ast.BoolOp(new.op, left)
        case ast.UnaryOp(), _:
            return new.operand
        case ast.Constant(), "negate":
            new.value = not new.value
        case ast.Constant(), _:
            new.value = new.value + 1
        case ((ast.If() | ast.IfExp()), _):
            new.test = ast.Constant(what == "always")
        case ast.Call(), _:
            new.keywords = [k for i, k in enumerate(new.keywords) if i != int(what.split()[-1])]
        case ast.Return(), _:
            new.value = ast.Constant(None)
        case _:
            return ast.Pass()
    return new
