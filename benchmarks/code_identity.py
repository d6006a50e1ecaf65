"""What a stored result depends on: the code that a benchmark's run reaches, and no other.

From given functions and classes, the names in their source are followed to everything of the benchmarks and of the
library's own modules that they use. So a change of one method leaves the stored runs of the others as they are, and a
change of a comment or docstring leaves all. Names are followed, not values nor annotations: what a run is handed, such
as a client update object, must be among the starting points by its class.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent


def code_identity(starts: Iterable[Any], packages: Sequence[str], settings: object) -> str:
    """A digest of settings and of all code that is reached.

    Args:
        starts: functions (lambdas too) and classes.
        packages: prefixes of the modules whose code counts; the benchmarks' own always does.
        settings: what else a result depends on; its ``repr`` must say all of it.
    """
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    pieces: dict[str, str] = {}
    waiting = list(starts)
    while waiting:
        found = waiting.pop()
        name = f"{found.__module__}.{found.__qualname__}"
        if isinstance(found, FunctionType) and found.__name__ == "<lambda>":
            names, text = _of_lambda(found)
            name = f"{name}:{text}"
        else:
            names, text = _of_source(found)
        if name in pieces:
            continue
        pieces[name] = text
        space = vars(sys.modules[found.__module__])
        for path in sorted(names):
            constant, reached = _described(_resolve(space, path))
            waiting += [value for value in reached if _counts(value, packages)]
            if constant:
                pieces[f"{found.__module__}.{path}"] = constant
    for name in sorted(pieces):
        digest.update(f"{name}={pieces[name]}\n".encode())
    return digest.hexdigest()


def _described(value: Any) -> tuple[str, list[Any]]:
    """A constant in words, and the functions and classes that a name stands for or a constant holds."""
    if isinstance(value, type | FunctionType):
        return "", [value]
    if isinstance(value, dict):
        value = tuple(value.items())
    if isinstance(value, tuple):
        parts = [_described(entry) for entry in value]
        return f"({','.join(text for text, _ in parts)})", [r for _, reached in parts for r in reached]
    return (repr(value), []) if isinstance(value, bool | int | float | str) else ("", [])


def _counts(value: type | FunctionType, packages: Sequence[str]) -> bool:
    module = sys.modules.get(value.__module__)
    file = getattr(module, "__file__", None)
    if module is None or file is None:
        return False
    return value.__module__.startswith(tuple(packages)) or Path(file).resolve().parent == HERE


@cache
def _of_source(found: Any) -> tuple[set[str], str]:
    """Dotted names in a definition, and its text without docstrings and comments."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(found))))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    text = ast.dump(tree)
    for node in ast.walk(tree):
        # An annotation may name more than what runs.
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant("")
    return set(_dotted(tree)), text


def _dotted(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


def _of_lambda(found: FunctionType) -> tuple[set[str], str]:
    """The names in a lambda, whose source cannot be cut out of its line, and its code."""
    names: set[str] = set()
    parts = [repr(found.__defaults__)]

    def visit(code: CodeType) -> None:
        names.update(code.co_names)
        constants = [c for c in code.co_consts if not isinstance(c, CodeType)]
        parts.append(repr((code.co_code, code.co_names, code.co_varnames, constants)))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                visit(constant)

    visit(found.__code__)
    return names, "".join(parts)


def _resolve(space: dict[str, Any], path: str) -> Any:
    first, _, attribute = path.partition(".")
    value = space.get(first)
    if not attribute:
        return value
    return getattr(value, attribute, None) if isinstance(value, ModuleType) else None
