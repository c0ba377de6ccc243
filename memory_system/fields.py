"""The fields of an action, taken from the annotations of the function that answers it.

    def find(*, query: str, limit: Annotated[int, Span(1, 100)] = 10, kind: Literal["note", "task"] | None = None): ...

    Fields.of(find).read({"query": "trains"}, strict=True)     # {"query": "trains"}: defaults stay the function's

Understood are str, int, float, bool, dict, list, `X | None`, unions, Literal, Any, `Annotated[X, Span(low, high)]` and
frozen dataclasses (a map with their fields). What is read has these types exactly: text is never taken for a number.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Final, Literal, Union

from memory_system.envelope import noun, unknown_field
from memory_system.errors import InvalidField

# (value, path, strict) -> the value to hand on; raises InvalidField. `strict`: unknown fields of nested maps too.
Reader = Callable[[Any, str, bool], Any]

_PLAIN: Final = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    dict: "a map",
    list: "a list",
}

_NO_LIMIT: Final = 2**62


@dataclass(frozen=True, slots=True)
class Span:
    """Bounds, both included: of a number its value, of text its characters, of a list or map its items. Text with
    `blank=False` has to have a character that is seen."""

    low: float = -math.inf
    high: float = math.inf
    blank: bool = True

    def admits(self, value: Any) -> bool:
        if not self.blank and not value.strip():
            return False
        return self.low <= (value if isinstance(value, int | float) else len(value)) <= self.high

    def words(self, kind: object) -> str:
        """` from 1 to 100`, with what is counted."""
        if not self.blank:
            return f"{replace(self, blank=True).words(kind)} that is not blank"
        counted = {str: " characters", list: " items", dict: " items"}.get(_base(kind), "")
        if self.high == math.inf:
            return f" of at least {self.low:.12g}{counted}"
        if self.high >= _NO_LIMIT and not counted:  # the most that can be stored, which nobody asks about
            return f" from {self.low:.12g}"
        if self.low == -math.inf:
            return f" of at most {self.high:.12g}{counted}"
        return f" {'of' if counted else 'from'} {self.low:.12g} to {self.high:.12g}{counted}"


class Fields:
    """The fields of one function or dataclass. `readers`: name -> reader; `required`: names without a default."""

    def __init__(self, readers: Mapping[str, Reader], required: frozenset[str]) -> None:
        self.readers = dict(readers)
        self.required = required

    def __repr__(self) -> str:
        names = [name if name in self.required else f"{name}=" for name in self.readers]
        return f"Fields({', '.join(names)})"

    @classmethod
    def of(cls, function: Callable[..., Any], *, without: frozenset[str] = frozenset()) -> Fields:
        """The fields of a function or method, but for the parameters named `without`.

        Raises TypeError when a parameter has no annotation, or one that no field can have.
        """
        readers, required = {}, []
        hints = hints_of(function)
        for name, parameter in inspect.signature(function).parameters.items():
            if name in without:
                continue
            where = f"{_name_of(function)}(), parameter {name}"
            if parameter.kind not in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                raise TypeError(f"{where}: a field is a parameter that can be given by its name")
            if name not in hints:
                raise TypeError(f"{where}: it needs an annotation, which says what the field may be")
            readers[name] = reader_of(hints[name], where)
            if parameter.default is parameter.empty:
                required.append(name)
        return cls(readers, frozenset(required))

    @classmethod
    def of_dataclass(cls, kind: type) -> Fields:
        hints = typing.get_type_hints(kind, include_extras=True)
        parts = [part for part in dataclasses.fields(kind) if part.init]
        readers = {part.name: reader_of(hints[part.name], f"{kind.__name__}.{part.name}") for part in parts}
        missing = dataclasses.MISSING
        needed = [part.name for part in parts if part.default is missing and part.default_factory is missing]
        return cls(readers, frozenset(needed))

    def read(self, data: Mapping[str, Any], *, strict: bool, where: str = "") -> dict[str, Any]:
        """The arguments that `data` gives. Unknown fields are refused if `strict`, else left out.

        Raises InvalidField with the path of the field below `where`.
        """
        prefix = f"{where}." if where else ""
        found = {}
        for name, value in data.items():
            reader = self.readers.get(name)
            if reader is not None:
                found[name] = reader(value, prefix + name, strict)
            elif strict:
                raise unknown_field(name, self.readers, where)
        for name in self.readers:
            if name in self.required and name not in found:
                raise InvalidField(prefix + name, f"{prefix}{name} is required")
        return found


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, a method or an object that can be called. Raises TypeError for unknown names."""
    target = function if inspect.isroutine(function) else type(function).__call__
    try:
        return typing.get_type_hints(target, include_extras=True)
    except NameError as error:
        raise TypeError(f"{_name_of(function)}(): {error}; annotations are looked up in the module") from error


def reader_of(kind: Any, where: str = "annotation") -> Reader:
    """What reads values of an annotation. Raises TypeError for one that no field can have."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is object:
        return lambda value, _path, _strict: value
    if origin is Annotated:
        return _bounded(kind, where)
    if origin is Literal:
        return _choice(kind)
    if origin in (Union, types.UnionType):
        return _union(parts, where)
    if kind in _PLAIN or origin in (dict, list, Mapping):
        return _plain(kind, where)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    raise TypeError(f"{where}: no field can be {kind!r}; memory_system/fields.py says what it can be")


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _base(kind: Any) -> Any:
    """`list[str]` -> list."""
    origin = typing.get_origin(kind)
    return dict if origin is Mapping else origin or kind


def expected(kind: Any) -> str:
    """The values that an annotation admits, in words: `text of 1 to 128 characters or null`."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return expected(parts[0]) + "".join(part.words(parts[0]) for part in parts[1:] if isinstance(part, Span))
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}" if len(parts) > 1 else str(parts[0])
    if origin in (Union, types.UnionType):
        return " or ".join(expected(part) for part in parts)
    if kind is type(None):
        return "null"
    return "a map" if dataclasses.is_dataclass(kind) else _PLAIN.get(_base(kind), "a value")


def _wrong(path: str, kind: Any, value: object, **details: Any) -> InvalidField:
    return InvalidField(path, f"{path}: expected {expected(kind)}, got {noun(value)}", **details)


def _plain(kind: Any, where: str) -> Reader:
    """A type without parameters, or a list or map with the type of what it holds."""
    base, parts = _base(kind), typing.get_args(kind)
    if base is dict and parts and parts[0] is not str:
        raise TypeError(f"{where}: the keys of a map are text: dict[str, ...]")
    item = reader_of(parts[-1], where) if parts and parts[-1] is not Any else None

    def read(value: Any, path: str, strict: bool) -> Any:
        if base is float and type(value) is int:
            return float(value)
        if type(value) is not base:
            raise _wrong(path, kind, value)
        if item is None:
            return value
        if base is list:
            return [item(each, f"{path}[{position}]", strict) for position, each in enumerate(value)]
        return {key: item(each, f"{path}.{key[:80]}", strict) for key, each in value.items()}

    return read


def _bounded(kind: Any, where: str) -> Reader:
    plain, *extras = typing.get_args(kind)
    read_plain = reader_of(plain, where)
    spans = [extra for extra in extras if isinstance(extra, Span)]
    if not spans:
        return read_plain

    def read(value: Any, path: str, strict: bool) -> Any:
        try:
            found = read_plain(value, path, strict)
        except InvalidField as error:
            if error.field != path:
                raise
            raise _wrong(path, kind, value) from None
        if found is not None and not all(span.admits(found) for span in spans):
            raise InvalidField(path, f"{path}: expected {expected(kind)}")
        return found

    return read


def _choice(kind: Any) -> Reader:
    choices = typing.get_args(kind)
    texts = [choice for choice in choices if isinstance(choice, str)]

    def read(value: Any, path: str, strict: bool) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            near = difflib.get_close_matches(value[:80], texts, n=1) if isinstance(value, str) else []
            hint = f"; did you mean {near[0]}?" if near else ""
            details = {"suggestion": near[0]} if near else {}
            raise InvalidField(path, f"{path}: expected {expected(kind)}{hint}", **details)
        return value

    return read


def _union(kinds: tuple[Any, ...], where: str) -> Reader:
    """Null where it is allowed, else the first part that takes the value."""
    parts = [kind for kind in kinds if kind is not type(None)]
    optional = len(parts) < len(kinds)
    readers = [reader_of(part, where) for part in parts]

    def read(value: Any, path: str, strict: bool) -> Any:
        if value is None and optional:
            return None
        problem: InvalidField | None = None
        for reader in readers:
            try:
                return reader(value, path, strict)
            except InvalidField as error:
                # What is wrong deeper inside says more than "none of these".
                if problem is None or problem.field == path:
                    problem = error
        if problem is not None and (len(readers) == 1 or problem.field != path):
            raise problem
        raise _wrong(path, Union[kinds], value)  # noqa: UP007  built from a tuple

    return read


def _dataclass(kind: type) -> Reader:
    fields = Fields.of_dataclass(kind)

    def read(value: Any, path: str, strict: bool) -> Any:
        if not isinstance(value, dict):
            raise _wrong(path, kind, value)
        return kind(**fields.read(value, strict=strict, where=path))

    return read
