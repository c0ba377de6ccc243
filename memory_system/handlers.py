"""A handler of an action: a function whose annotated parameters are the fields of a request."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from memory_system.envelope import FIELDS, Request, unknown_field
from memory_system.errors import InvalidField
from memory_system.fields import Fields, hints_of

Handler = Callable[..., Any]
# (request, call) -> the result: does what `call()` does, with whatever has to be around it.
Around = Callable[[Request, Callable[[], Any]], Any]

# Of the envelope, what an action may have as a field as well.
_FIELDS_TOO: Final = ("session_id", "agent_id")


@dataclass(frozen=True, slots=True)
class Action:
    """A handler, its fields, and the names of its parameters that take the request itself."""

    name: str
    handler: Handler
    fields: Fields
    request_parameters: frozenset[str]
    flat: bool

    @classmethod
    def of(cls, name: str, handler: Handler, flat: bool) -> Action:
        hints = hints_of(handler)
        takes_request = frozenset(each for each, hint in hints.items() if hint is Request and each != "return")
        return cls(name, handler, Fields.of(handler, without=takes_request), takes_request, flat)

    def call(self, request: Request, around: Around | None) -> Any:
        arguments = self.fields.read(self._data(request), strict=not request.legacy)
        for name in self.request_parameters:
            arguments[name] = request
        if around is None:
            return self.handler(**arguments)
        return around(request, functools.partial(self.handler, **arguments))

    def _data(self, request: Request) -> Mapping[str, Any]:
        """`data`, with the fields that stand beside the action instead."""
        readers, data = self.fields.readers, dict(request.data)
        for name, value in request.beside.items():
            if name in data:
                raise InvalidField(name, f"{name} is given twice: in data and beside the action")
            if name not in readers and not request.legacy:
                raise unknown_field(name, [*readers, *FIELDS])
            data[name] = value
        for name in _FIELDS_TOO:
            value = getattr(request, name)
            wanted = name in readers and (request.flat or (self.flat and name in self.fields.required))
            if wanted and name not in data and value is not None:
                data[name] = value
        return data
