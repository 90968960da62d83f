"""A jit function's source as a plain Python function with typed assignments."""

import ast
import types
from collections.abc import Callable

from triton.runtime.jit import JITFunction

_AS_TENSOR = "_as_tensor_"
_REWRITTEN: dict[Callable, Callable] = {}


class _TypedAssignments(ast.NodeTransformer):
    """`x = value` becomes `x = as_tensor(value)`: `count = 0` is an int32 tensor, as in a compiled kernel."""

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        hook = ast.Name(id=_AS_TENSOR, ctx=ast.Load())
        node.value = ast.Call(func=hook, args=[node.value], keywords=[])
        return node


def rewritten(kernel: JITFunction, as_tensor: Callable[[object], object]) -> Callable:
    """The interpretable twin of `kernel`, parsed once per process; shares its globals, defaults and closure
    cells.

    Unlike triton.runtime.interpreter.FunctionRewriter it adds nothing to the globals of the kernel's module.
    """
    function = kernel.fn
    if function not in _REWRITTEN:
        _REWRITTEN[function] = _rewrite(kernel, as_tensor)
    return _REWRITTEN[function]


def _rewrite(kernel: JITFunction, as_tensor: Callable[[object], object]) -> Callable:
    function = kernel.fn
    definition = ast.parse(kernel.src).body[0]
    free = (*function.__code__.co_freevars, _AS_TENSOR)
    # free variables need an enclosing function; never called, so annotations are not evaluated
    arguments = ast.arguments(posonlyargs=[], args=[ast.arg(name) for name in free], kwonlyargs=[],
                              kw_defaults=[], defaults=[])
    outer = ast.parse("def outer(): pass").body[0]
    outer.args, outer.body = arguments, [_TypedAssignments().visit(definition)]
    module = ast.fix_missing_locations(ast.Module(body=[outer], type_ignores=[]))
    ast.increment_lineno(module, _first_line(kernel) - 1)
    outer_code = compile(module, function.__code__.co_filename, "exec").co_consts[0]
    code = next(const for const in outer_code.co_consts
                if isinstance(const, types.CodeType) and const.co_name == function.__name__)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[_AS_TENSOR] = types.CellType(as_tensor)
    twin = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__,
                              tuple(cells[name] for name in code.co_freevars))
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


def _first_line(kernel: JITFunction) -> int:
    """The line of `def` in the kernel's file, below its decorators."""
    decorators = next(index for index, line in enumerate(kernel.raw_src) if line.lstrip().startswith("def "))
    return kernel.starting_line_number + decorators


