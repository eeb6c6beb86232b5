"""What a callable is, as a digest that is the same in every process: its code, and the state that decides what it does.

Two callables that may behave differently have different digests: of a `functools.partial` its arguments count, of an
instance its attributes, of a method the object it belongs to, of a closure what it has captured, and of every function
its defaults, the constants that it reads, and the helpers of its project that it calls. Libraries are taken by name.
"""

from __future__ import annotations

import ast
import copyreg
import dis
import enum
import functools
import hashlib
import inspect
import os
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented))
_CACHED = type(functools.lru_cache(lambda: None))
# What lets threads wait for each other decides nothing.
_STATELESS = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Condition,
    threading.Event,
    threading.Semaphore,
    threading.local,
)
_NAMED = (types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType,
          types.GetSetDescriptorType, types.MemberDescriptorType)  # fmt: skip
_OF_EVERY_CLASS = frozenset({
    *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__firstlineno__", "__static_attributes__"),
    *("__annotations__", "__annotate_func__", "__annotations_cache__", "__abstractmethods__", "_abc_impl"),
    *("__orig_bases__", "__parameters__", "__dataclass_fields__", "__dataclass_params__"),
})  # fmt: skip


class UnknownStateError(Exception):
    """Part of a callable's state has no form that is the same in every process.

    Args:
        place: Where in the callable it is.
        value: What is there.
    """

    def __init__(self, place: str, value: Any) -> None:
        super().__init__(f"{place.strip() or 'it'} is a {type(value).__qualname__}")


def digest_of(function: Any) -> str:
    """A digest of a callable's code and state.

    Raises:
        UnknownStateError: Part of its state has no form that is the same in every process.
    """
    inner = innermost(function)
    module = getattr(inner, "__module__", None) or type(inner).__module__
    return _hash(_Reader(str(module).partition(".")[0]).text(function, ""))


def innermost(function: Any) -> Any:
    """The function inside of partials, caches and bound methods; the instance itself where it is one."""
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif isinstance(function, _CACHED):
            function = function.__wrapped__
        elif isinstance(function, types.MethodType):
            function = function.__func__
        else:
            return function


def name_of(function: Any) -> str:
    """`module:name`, of an instance that of its class."""
    inner = innermost(function)
    named = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{getattr(named, '__module__', None) or '?'}:{named.__qualname__}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _joined(*parts: str) -> str:
    """Parts as one text that no other parts give."""
    return "(" + ",".join(f"{len(part)}:{part}" if len(part) < 200 else _hash(part) for part in parts) + ")"


class _Reader:
    """Writes values as text. `root` is the package of the callable, whose other parts are read too."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._open: dict[int, int] = {}
        self._memo: dict[int, str] = {}
        self._kept: list[Any] = []
        self._reassigned: dict[int, set[str]] = {}

    # --- values ------------------------------------------------------------------------------------------------------

    def text(self, value: Any, place: str) -> str:
        """A value as text; `place` says where it is, for messages."""
        if type(value) in _PLAIN:
            return f"{type(value).__name__} {value!r}"
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        if isinstance(value, _STATELESS):
            return f"a {type(value).__qualname__}"
        if id(value) in self._memo:
            return self._memo[id(value)]
        with self._visit(value) as seen:
            if seen is not None:
                return f"seen {seen}"
            text = self._composite(value, place)
            if isinstance(value, types.FunctionType | type):  # which many others may refer to
                self._memo[id(value)] = text
            return text

    def lenient(self, value: Any) -> str:
        """As `text`; of what has no stable form only its class."""
        try:
            return self.text(value, "")
        except UnknownStateError:
            return f"a {type(value).__module__}.{type(value).__qualname__}"

    @contextmanager
    def _visit(self, value: Any) -> Iterator[int | None]:
        """Gives the number of a value that is being written further up, so that circles end."""
        if id(value) in self._open:
            yield self._open[id(value)]
            return
        self._open[id(value)] = len(self._open)
        self._kept.append(value)
        try:
            yield None
        finally:
            del self._open[id(value)]

    def _composite(self, value: Any, place: str) -> str:
        if type(value) in (list, tuple):
            return _joined(type(value).__name__, *(self.text(one, f"{place}[{at}]") for at, one in enumerate(value)))
        if type(value) in (set, frozenset):
            return _joined(type(value).__name__, *sorted(self.text(one, f"a member of {place}") for one in value))
        if type(value) in (dict, types.MappingProxyType):
            items = [_joined(self.text(key, f"a key of {place}"), self.text(one, f"{place}[{key!r}]"))
                     for key, one in value.items()]  # fmt: skip
            return _joined("dict", *sorted(items))
        if isinstance(value, types.FunctionType):
            return self._function(value, place)
        if isinstance(value, types.MethodType):
            return _joined("method", self.text(value.__func__, place), self.text(value.__self__, place))
        if isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            owner = getattr(value, "__self__", None)
            of = "" if owner is None or isinstance(owner, types.ModuleType) else self.text(owner, place)
            return _joined("builtin", str(getattr(value, "__module__", "")), value.__qualname__, of)
        if isinstance(value, _NAMED):
            return f"descriptor {value.__objclass__.__qualname__}.{value.__name__}"
        if isinstance(value, functools.partial):
            kept = {name: one for name, one in vars(value).items() if not name.startswith("__")}
            arguments = [
                self.text(list(value.args), f"{place} argument "),
                self.text(value.keywords, f"{place} argument "),
            ]
            return _joined("partial", self.text(value.func, place), *arguments, self.text(kept, place))
        if isinstance(value, _CACHED):
            return self.text(value.__wrapped__, place)
        if isinstance(value, staticmethod | classmethod):
            return _joined(type(value).__name__, self.text(value.__func__, place))
        if isinstance(value, property):
            return _joined("property", *(self.text(one, place) for one in (value.fget, value.fset)))
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.CodeType):
            return self._code(value, place)
        if isinstance(value, enum.Enum):
            return _joined("enum", self.text(type(value), place), value.name, self.lenient(value.value))
        return self._array(value, place) or self._object(value, place)

    def _array(self, value: Any, place: str) -> str | None:
        """NumPy arrays and torch tensors by their bytes; None for anything else."""
        root = type(value).__module__.partition(".")[0]
        if root == "torch" and hasattr(value, "detach") and hasattr(value, "numel"):
            import torch

            flat = value.detach().cpu().contiguous().flatten()
            data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
            return _joined("tensor", str(value.dtype), str(tuple(value.shape)), hashlib.sha256(data).hexdigest())
        if root == "numpy" and hasattr(value, "tobytes") and hasattr(value, "shape"):
            if value.dtype.hasobject:
                return _joined("array", str(value.shape), self.text(value.tolist(), place))
            return _joined("array", value.dtype.str, str(value.shape), hashlib.sha256(value.tobytes()).hexdigest())
        return None

    def _object(self, value: Any, place: str) -> str:
        """Anything else as pickle would take it apart."""
        try:
            reduce = copyreg.dispatch_table.get(type(value))
            parts: Any = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:
            raise UnknownStateError(place, value) from error
        if isinstance(parts, str):
            return f"global {type(value).__module__}.{parts}"
        make, arguments, state, members, items = (*parts, None, None, None)[:5]
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):  # __dict__ and slots
            state = {**(state[0] or {}), **state[1]}
        if isinstance(state, dict):
            attributes = [_joined(str(name), self.text(one, f"{place}.{name}" if place else f"its attribute {name}"))
                          for name, one in state.items()]  # fmt: skip
            state_text = _joined(*sorted(attributes))
        else:
            state_text = self.text(state, place)
        return _joined(
            "object",
            self.text(type(value), place),
            self.text(make, place),
            self.text(list(arguments or ()), place),
            state_text,
            self.text(list(members or ()), place),
            self.text(dict(items or ()), place),
        )

    # --- code --------------------------------------------------------------------------------------------------------

    def _class(self, of: type) -> str:
        parts = [f"class {of.__module__}.{of.__qualname__}"]
        if self._is_library(of.__module__):
            return parts[0]
        for base in of.__mro__:
            parts.append(f"class {base.__module__}.{base.__qualname__}")
            if not self._is_library(base.__module__):
                members = sorted(set(vars(base)) - _OF_EVERY_CLASS)
                parts += [_joined(member, self.lenient(vars(base)[member])) for member in members]
        return _joined(*parts)

    def _function(self, function: types.FunctionType, place: str) -> str:
        """Its source alone where nothing else decides what it does."""
        code, module = function.__code__, str(function.__globals__.get("__name__"))
        is_library = self._is_library(module)
        own = f"{module}.{code.co_qualname}" if is_library else _source(code)
        parts: list[str] = [] if own is not None else [self._code(code, place)]
        # A library's wrapper has counters and caches of its own; what it wraps is what counts.
        read = self.lenient if is_library else lambda value: self.text(value, place)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError:  # not yet assigned
                continue
            at = f"{place}.{name}" if place else f"what it captured as {name}"
            captured = self.lenient(content) if is_library else self.text(content, at)
            parts.append(_joined("captured", name, captured))
        if function.__defaults__ or function.__kwdefaults__:
            parts.append(_joined("defaults", read(function.__defaults__), read(function.__kwdefaults__)))
        own_attributes = {name: one for name, one in vars(function).items() if not name.startswith("__")}
        if own_attributes:
            parts.append(_joined("attributes", self.lenient(own_attributes)))
        if not is_library:
            parts += self._globals(function)
        return (own or "") if not parts else _joined("function", own or "", *parts)

    def _globals(self, function: types.FunctionType) -> list[str]:
        """What a function reads of its module, as far as its project decides it."""
        found: list[str] = []
        names = _names(function.__code__)
        for name in sorted(names):
            if name in function.__globals__ and not name.startswith("__"):
                text = self._global(name, function.__globals__[name], function.__globals__, names)
                if text:
                    found.append(_joined("global", name, text))
        return found

    def _global(self, name: str, value: Any, where: dict[str, Any], names: set[str]) -> str:
        if isinstance(value, types.ModuleType):
            if self._is_library(value.__name__):
                return ""
            members = vars(value)
            texts = [(one, self._global(one, members[one], members, set())) for one in sorted(names) if one in members]
            return _joined(*(_joined(one, text) for one, text in texts if text))
        if isinstance(value, types.FunctionType | type):
            module = value.__module__ if isinstance(value, type) else value.__globals__.get("__name__")
            return (
                ""
                if self._is_library(str(module)) and getattr(value, "__closure__", None) is None
                else self.lenient(value)
            )
        if _is_constant(value):
            return "" if name in self._assigned_later(where) else self.text(value, name)
        # What it was made as; and what is in it, unless it was made empty, for calls to fill (a cache, a counter).
        made = _definitions(where).get(name)
        if made is None:
            return self.lenient(value)
        parts = [text for text, _ in made]
        is_object = not self._is_library(type(value).__module__)
        if is_object:
            parts.append(self.lenient(type(value)))
        if (is_object or isinstance(value, list | dict | set | tuple | frozenset | np.ndarray)) and not all(
            is_empty for _, is_empty in made
        ):
            parts.append(self.lenient(value))
        return _joined(*parts)

    def _assigned_later(self, where: dict[str, Any]) -> set[str]:
        """Names of a module that its own functions assign, such as counters."""
        if id(where) not in self._reassigned:
            codes = [one.__code__ for one in list(where.values())
                     if isinstance(one, types.FunctionType) and one.__globals__ is where]  # fmt: skip
            self._reassigned[id(where)] = {
                step.argval
                for code in codes
                for inner in _codes(code)
                for step in dis.get_instructions(inner)
                if step.opname == "STORE_GLOBAL"
            }
        return self._reassigned[id(where)]

    def _code(self, code: types.CodeType, place: str) -> str:
        constants = [self.text(one, place) for one in code.co_consts]
        names = [code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
        counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
        return _joined(code.co_code.hex(), code.co_exceptiontable.hex(), repr(names), repr(counts), *constants)

    def _is_library(self, module: str) -> bool:
        root = module.partition(".")[0]
        if root == self._root and root not in sys.stdlib_module_names:
            return False
        if root in sys.stdlib_module_names and root != "__main__":
            return True
        file = getattr(sys.modules.get(root), "__file__", None) or ""
        return root == "infalign" or any(
            f"{os.sep}{folder}{os.sep}" in file for folder in ("site-packages", "dist-packages")
        )


def _source(code: types.CodeType) -> str | None:
    """A function's own source; None for a lambda, which shares its line with others, and where there is none."""
    if code.co_name == "<lambda>":
        return None
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):
        return None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code and that of the functions inside of it."""
    yield code
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            yield from _codes(one)


def _names(code: types.CodeType) -> set[str]:
    return {name for one in _codes(code) for name in one.co_names}


def _is_constant(value: Any) -> bool:
    if type(value) in (tuple, frozenset):
        return all(_is_constant(one) for one in value)
    return type(value) in _PLAIN or isinstance(value, enum.Enum)


def _definitions(where: dict[str, Any]) -> dict[str, list[tuple[str, bool]]]:
    """For each name that a module assigns at its top: the source of each statement, and whether it makes it empty."""
    module = sys.modules.get(str(where.get("__name__")))
    if module is None or vars(module) is not where:
        return {}
    try:
        source = inspect.getsource(module)
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError, ValueError):
        return {}
    lines = source.splitlines()
    found: dict[str, list[tuple[str, bool]]] = {}
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        statement = todo.pop(0)
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        inner = [one for one in ast.iter_child_nodes(statement) if isinstance(one, ast.stmt)]
        todo += inner
        if not inner:
            text = "\n".join(lines[statement.lineno - 1 : statement.end_lineno])
            for one in ast.walk(statement):
                if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
                    found.setdefault(one.id, []).append((text, _is_empty(_assigned(statement, one.id))))
    return found


def _assigned(statement: ast.stmt, name: str) -> ast.expr | None:
    """What a plain assignment gives to a name; None of any other statement."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    value = getattr(statement, "value", None) if isinstance(statement, ast.Assign | ast.AnnAssign) else None
    for target in targets:
        if isinstance(target, ast.Name) and target.id == name:
            return value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, given in zip(target.elts, value.elts, strict=True):
                if isinstance(one, ast.Name) and one.id == name:
                    return given
    return None


# What a call without arguments makes empty; any other may read a file or the environment.
_CONTAINERS = {
    *("list", "dict", "set", "tuple", "frozenset", "bytearray", "Counter", "defaultdict", "OrderedDict", "deque"),
    *("WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "Lock", "RLock", "local"),
}


def _is_empty(value: ast.expr | None) -> bool:
    """Whether an expression makes something empty: `[]`, `{}`, `Counter()`, `defaultdict(list)`."""
    if isinstance(value, ast.List | ast.Tuple | ast.Set):
        return not value.elts
    if isinstance(value, ast.Dict):
        return not value.keys
    if isinstance(value, ast.Call):
        name = ast.unparse(value.func).rpartition(".")[2]
        return name in _CONTAINERS and not value.keywords and (not value.args or name == "defaultdict")
    return False
