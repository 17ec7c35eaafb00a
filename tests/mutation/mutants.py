"""Small faults that can be planted in a Python file, found in its syntax tree and written back into
its text.

A fault replaces one node of the tree; everything else of the file stays as it is, line numbers
before it included. Nothing is planted in docstrings, annotations, ``__all__``, f-strings,
``__repr__``, asserts, and the texts of errors and warnings.
"""

import ast
import contextlib
import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
PAIRS = (
    "min max",
    "amin amax",
    "argmin argmax",
    "minimum maximum",
    "any all",
    "mean sum",
    "zeros_like ones_like",
    "floor ceil",
)
OPPOSITES = {one: other for pair in PAIRS for one, other in (pair.split(), reversed(pair.split()))}
DROPPED = ("detach", "clone", "abs", "sign", "square", "sqrt", "exp", "log", "lower", "strip")
GRAD_MODES = ("torch.no_grad()", "torch.enable_grad()", "torch.inference_mode()")


@dataclass(frozen=True)
class Mutant:
    """One fault: bytes ``start:end`` of ``file`` become ``after``."""

    file: str
    line: int
    """First line of the replaced text, from 1."""
    end_line: int
    function: str
    """Qualified name of the function or class around it, empty at the top of the file."""
    in_function: bool
    kind: str
    before: str
    after: str
    start: int
    end: int
    number: int = 0
    """Which of the equal faults of the function this is."""

    @property
    def key(self) -> str:
        """Names the fault in a way that stays when lines move."""
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        again = f" #{self.number}" if self.number else ""
        return f"{self.file}::{self.function or 'module'}: {self.kind}: {before} -> {after}{again}"

    def applied(self, source: bytes) -> bytes:
        """The text of the file with the fault in it."""
        return source[: self.start] + self.after.encode() + source[self.end :]


def mutants_of(file: str, source: bytes) -> list[Mutant]:
    """Every fault of a file, in the order of its text."""
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    found, seen = [], {}
    for mutant in sorted(
        finder.found, key=lambda mutant: (mutant.start, mutant.kind, mutant.after)
    ):
        number = seen[mutant.key] = seen.get(mutant.key, -1) + 1
        with contextlib.suppress(SyntaxError):
            compile(mutant.applied(source), file, "exec")
            found.append(replace(mutant, number=number))
    return found


def sample(mutants: list[Mutant], size: int, seed: int) -> list[Mutant]:
    """A part of the faults: of every file its share, at least one.

    ``seed`` stands for a random order in which other faults of the tree change nothing.
    """
    by_file: dict[str, list[Mutant]] = {}
    for mutant in sorted(
        mutants, key=lambda mutant: hashlib.sha256(f"{seed}|{mutant.key}".encode()).hexdigest()
    ):
        by_file.setdefault(mutant.file, []).append(mutant)
    if size >= len(mutants):
        return [mutant for file in sorted(by_file) for mutant in by_file[file]]
    exact = {file: len(of_file) * size / len(mutants) for file, of_file in by_file.items()}
    share = {file: max(1, int(value)) for file, value in exact.items()}
    for file in sorted(exact, key=lambda file: (share[file] - exact[file], file)):
        if sum(share.values()) < size:
            share[file] += 1
    return [mutant for file in sorted(by_file) for mutant in by_file[file][: share[file]]]


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str, source: bytes) -> None:
        self.found: list[Mutant] = []
        self._file, self._source = file, source
        self._offsets = [0, *accumulate(len(line) for line in source.splitlines(keepends=True))]
        self._names: list[str] = []
        self._in_function = 0

    def visit(self, node: ast.AST) -> None:
        for test in (
            (node.test,)
            if isinstance(node, ast.If | ast.While | ast.IfExp)
            else getattr(node, "ifs", ())
        ):
            self._negate(test)
        if isinstance(node, ast.expr):
            self._expression(node)
        elif isinstance(node, ast.stmt):
            self._statement(node)
        if not isinstance(
            node, ast.JoinedStr | ast.Assert | ast.Raise
        ):  # texts, and what is for the type checker
            super().visit(node)

    # What is left out

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        if name in ("isinstance", "issubclass", "cast"):
            for argument in node.args[:1]:
                self.visit(argument)
        elif name != "warnings.warn":
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._names.append(node.name)
        for statement in node.body:
            self.visit(statement)
        self._names.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in ("__repr__", "__str__", "extra_repr"):
            return
        self._names.append(node.name)
        for decorator in node.decorator_list:
            if ast.unparse(decorator) in GRAD_MODES:
                self._plant("gradient mode", decorator, "(lambda function: function)")
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if isinstance(default, ast.Constant | ast.UnaryOp):
                self._expression(default, kind="default")
        self._in_function += 1
        for statement in node.body:
            self.visit(statement)
        self._in_function -= 1
        self._names.pop()

    # What is planted

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Raise):
            self._plant("raise removed", node, "pass")
        elif isinstance(node, ast.Return) and node.value is not None:
            self._returned(node.value)
        elif _changes_state(node) and not (
            isinstance(node, ast.Assign) and self._names[-1:] == ["__init__"]
        ):
            self._plant("statement removed", node, "pass")
        if isinstance(node, ast.AugAssign):
            self._operator(node)

    def _returned(self, value: ast.expr) -> None:
        if isinstance(value, ast.Constant) and (
            value.value is None or isinstance(value.value, bool)
        ):
            return  # the opposite of a truth value is planted as a constant
        if isinstance(value, ast.Tuple) and len(value.elts) > 1:
            self._changed("wrong return", value, lambda new: new.elts.reverse())
        elif isinstance(value, ast.Compare | ast.BoolOp) or ast.unparse(value).startswith("not "):
            self._plant("wrong return", value, f"(not ({ast.unparse(value)}))")
        else:
            self._plant("wrong return", value, "None")

    def _expression(self, node: ast.expr, kind: str = "") -> None:
        if isinstance(node, ast.Constant):
            self._constant(node, kind or "constant")
        elif isinstance(node, ast.Compare):
            for i, operator in enumerate(node.ops):
                for other in COMPARISONS[type(operator)]:
                    self._changed(
                        "comparison",
                        node,
                        lambda new, i=i, other=other: new.ops.__setitem__(i, other()),
                    )
        elif isinstance(node, ast.BinOp):
            self._operator(node)
        elif isinstance(node, ast.BoolOp):
            other = ast.Or if isinstance(node.op, ast.And) else ast.And
            self._changed("and / or", node, lambda new: setattr(new, "op", other()))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._plant("not removed", node, f"({ast.unparse(node.operand)})")
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            self._plant(kind or "sign", node, f"({ast.unparse(node.operand)})")
        elif isinstance(node, ast.Slice):
            self._slice(node)
        elif isinstance(node, ast.Call):
            self._call(node)

    def _negate(self, test: ast.expr) -> None:
        """A condition; of a lone comparison and of a lone ``not`` the opposite is planted there
        already.
        """
        lone = (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)) or (
            isinstance(test, ast.Compare) and len(test.ops) == 1
        )
        if not lone:
            self._plant("condition negated", test, f"(not ({ast.unparse(test)}))")

    def _constant(self, node: ast.Constant, kind: str) -> None:
        value = node.value
        if isinstance(value, bool):
            self._plant(kind, node, str(not value))
        elif isinstance(value, int):
            for other in (value + 1, value - 1):
                self._plant(kind, node, str(other) if other >= 0 else f"({other})")
        elif isinstance(value, float):
            self._plant(kind, node, repr(value + 1.0))
            if value:
                self._plant(kind, node, f"({-value!r})")

    def _operator(self, node: ast.BinOp | ast.AugAssign) -> None:
        other = OPERATORS.get(type(node.op))
        if other is None or (isinstance(node.op, ast.BitOr) and not self._in_function):
            return
        if isinstance(node, ast.BinOp) and (_is_text(node.left) or _is_text(node.right)):
            return
        self._changed("operator", node, lambda new: setattr(new, "op", other()))

    def _slice(self, node: ast.Slice) -> None:
        if node.step is not None:
            return
        if node.lower is not None:
            self._plant("slice", node.lower, f"({ast.unparse(node.lower)} + 1)")
        else:
            self._changed("slice", node, lambda new: setattr(new, "lower", ast.Constant(1)))
        if node.upper is not None:
            self._plant("slice", node.upper, f"({ast.unparse(node.upper)} - 1)")

    def _call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in (
            "isinstance",
            "issubclass",
            "cast",
            "getattr",
        ):
            return
        first_two = node.args[:2]
        differ = len({ast.unparse(argument) for argument in first_two}) == 2
        if differ and not any(
            isinstance(argument, ast.Starred) or _is_text(argument) for argument in first_two
        ):
            self._changed("arguments swapped", node, _swap_arguments)
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in OPPOSITES:
            attribute = "attr" if isinstance(node.func, ast.Attribute) else "id"
            self._changed(
                "opposite function", node, lambda new: setattr(new.func, attribute, OPPOSITES[name])
            )
        if name in DROPPED and isinstance(node.func, ast.Attribute):
            of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id in (
                "torch",
                "math",
            )
            operands = node.args if of_torch else [node.func.value, *node.args]
            if len(operands) == 1:
                self._plant("call dropped", node, f"({ast.unparse(operands[0])})")

    def _changed(self, kind: str, node: ast.AST, change: Callable) -> None:
        new = copy.deepcopy(node)
        change(new)
        text = ast.unparse(new)
        bare = isinstance(node, ast.Call | ast.Slice | ast.AugAssign)
        self._plant(kind, node, text if bare else f"({text})")

    def _plant(self, kind: str, node: ast.AST, after: str) -> None:
        start = self._offsets[node.lineno - 1] + node.col_offset
        end = self._offsets[node.end_lineno - 1] + node.end_col_offset
        before, function = self._source[start:end].decode(), ".".join(self._names)
        place = (self._file, node.lineno, node.end_lineno, function, self._in_function > 0)
        self.found.append(Mutant(*place, kind, before, after, start, end))


def _changes_state(node: ast.stmt) -> bool:
    """A call by itself, an end of a loop's round, or an assignment to what others see."""
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    assigned = isinstance(node, ast.Assign) and isinstance(
        node.targets[0], ast.Attribute | ast.Subscript
    )
    return called or assigned or isinstance(node, ast.AugAssign | ast.Continue | ast.Break)


def _swap_arguments(call: ast.Call) -> None:
    call.args[0], call.args[1] = call.args[1], call.args[0]


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
