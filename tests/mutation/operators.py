"""The mutants of a module: every place that an operator applies to, and the module's tree with that place changed.

Not mutated: annotations, strings (most are messages), decorators, class keywords, `repr` and `compare` of dataclass
fields, imports, and what is inside a `raise` or an f-string, since tests need not pin the wording of a message.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}  # fmt: skip  (`|` joins types)

Change = Callable[[ast.AST], None]  # changes a node in place, so that its parent need not be known


@dataclass(frozen=True)
class Mutant:
    """One change of a module.

    number       its place among the module's mutants
    line         of the changed node, from 1
    is_function  whether it is inside a function's body, which an import does not run
    text         the change, for people: it does not depend on the line
    """

    number: int
    line: int
    is_function: bool
    text: str


def mutants(source: str) -> list[Mutant]:
    """Return all mutants of a module, in the order of its tree."""
    return [
        Mutant(number, getattr(node, "lineno", 0), is_function, text)
        for number, (node, is_function, text, _) in enumerate(_places(ast.parse(source)))
    ]


def mutate(source: str, number: int) -> ast.Module:
    """Return the tree of a module with one mutant's change."""
    tree = ast.parse(source)
    for i, (node, _, _, change) in enumerate(_places(tree)):
        if i == number:
            change(node)
            return ast.fix_missing_locations(tree)
    raise IndexError(f"the module has no mutant {number}")


def _places(tree: ast.Module) -> Iterator[tuple[ast.AST, bool, str, Change]]:
    for node, is_function in _visited(tree, False):
        for change in _changes(node):
            changed = copy.deepcopy(node)
            change(changed)
            before, after = (_head(ast.unparse(ast.fix_missing_locations(tree))) for tree in (node, changed))
            yield node, is_function, f"{before} -> {after}", change


def _head(text: str) -> str:
    return text.splitlines()[0] if text else "(nothing)"


def _visited(node: ast.AST, is_function: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node that may be mutated, and whether it is inside a function's body."""
    if isinstance(node, ast.keyword) and node.arg in ("repr", "compare"):
        return
    yield node, is_function
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "keywords") and not isinstance(node, ast.Call):
            continue
        inside = is_function or (isinstance(node, ast.FunctionDef | ast.Lambda) and name == "body")
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(
                child, ast.JoinedStr | ast.Import | ast.ImportFrom | ast.Raise
            ):
                yield from _visited(child, inside)
            elif isinstance(child, ast.Raise):
                yield child, inside


def _changes(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Compare():
            for i in range(len(node.ops)):
                yield _swap_comparison(i)
        case ast.BinOp() if type(node.op) in ARITHMETIC:
            yield _swap_arithmetic
        case ast.AugAssign() if type(node.op) in ARITHMETIC:
            yield _swap_arithmetic
        case ast.BoolOp():
            yield _swap_boolean
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield _drop_operator
        case ast.IfExp():
            yield _swap_branches
        case ast.Constant(value=bool() | int() | float()):
            yield _change_constant
        case ast.Raise() | ast.Continue() | ast.Break():
            yield _remove_statement
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom()):
            yield _remove_statement


def _swap_comparison(i: int) -> Change:
    def change(node: ast.AST) -> None:
        assert isinstance(node, ast.Compare)
        node.ops[i] = COMPARISONS[type(node.ops[i])]()

    return change


def _swap_arithmetic(node: ast.AST) -> None:
    assert isinstance(node, ast.BinOp | ast.AugAssign)
    node.op = ARITHMETIC[type(node.op)]()


def _swap_boolean(node: ast.AST) -> None:
    assert isinstance(node, ast.BoolOp)
    node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()


def _drop_operator(node: ast.AST) -> None:
    """not x -> bool(x), -x -> +x."""
    assert isinstance(node, ast.UnaryOp)
    if isinstance(node.op, ast.USub):
        node.op = ast.UAdd()
    else:
        node.operand = ast.UnaryOp(ast.Not(), node.operand)


def _swap_branches(node: ast.AST) -> None:
    assert isinstance(node, ast.IfExp)
    node.body, node.orelse = node.orelse, node.body


def _change_constant(node: ast.AST) -> None:
    assert isinstance(node, ast.Constant)
    if isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node.value, int):
        node.value += 1
    elif isinstance(node.value, float):
        node.value = node.value * 2 or 1.0


def _remove_statement(node: ast.AST) -> None:
    """Turn a statement into `pass`; its parent keeps its place."""
    node.__class__ = ast.Pass
