"""Lays values from a YAML file and from the environment over frozen dataclasses, key by key.

It knows no key: the dataclasses of `settings.py` carry a `Rule` in each field's metadata, and whatever is
said about a key (check, error message, documentation) comes from that rule.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from memory_system.errors import ConfigError

ENVIRONMENT_PREFIX: Final = "MEMORY__"
_SHOWN_CHARS: Final = 80
_DEEPEST: Final = 100

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a key is for and which values it takes.

    `span` is the least and the greatest number. `check` gets each text value and raises ValueError when it is
    not usable; `noun` then says what is expected. A `secret` value appears in no message.
    """

    doc: str
    unit: str = ""
    span: tuple[float, float] = (-math.inf, math.inf)
    choices: tuple[str, ...] = ()
    noun: str = ""
    check: Callable[[str], object] | None = None
    secret: bool = False
    is_path: bool = False
    row: type | None = None  # of a table: the dataclass of each entry, whose fields carry rules of their own


def rule(doc: str, **limits: Any) -> dict[str, Rule]:
    """Metadata of a dataclass field without a default: `field(metadata=rule("Importance.", span=(0, 1)))`."""
    return {"rule": Rule(doc, **limits)}


def key(default: T, doc: str, **limits: Any) -> T:
    """A dataclass field that is a setting: `port: int = key(7140, "TCP port.", span=(1, 65535))`.

    A secret one is left out of the repr of its class.
    """
    found: T = dataclasses.field(default=default, repr=not limits.get("secret", False), metadata=rule(doc, **limits))
    return found


def table(row: type[T], doc: str, *, noun: str) -> Mapping[str, T]:
    """A setting that is a mapping of names (each a `noun`) to objects of the dataclass `row`; empty by default."""
    found: Mapping[str, T] = dataclasses.field(default_factory=dict, metadata=rule(doc, noun=noun, row=row))
    return found


@dataclass(frozen=True, slots=True)
class Key:
    """One setting: its full name (`network.port`), its type, its value in the object walked, and its rule."""

    name: str
    kind: type
    value: Any
    rule: Rule

    @property
    def variable(self) -> str:
        """The environment variable that overrides this key."""
        return ENVIRONMENT_PREFIX + self.name.upper().replace(".", "__")

    @property
    def expected(self) -> str:
        """The values that the key takes, in words, with their unit."""
        if self.rule.row is not None:
            return f"a mapping of a {self.rule.noun} to any of " + ", ".join(_fields(self.rule.row, self.name))
        if self.rule.choices:
            return "one of " + ", ".join(self.rule.choices)
        if self.rule.noun:
            return self.rule.noun
        noun = {bool: "true or false", int: "an integer", float: "a number", str: "text"}.get(self.kind, "a list")
        if self.kind not in (int, float):
            return noun
        low, high = self.rule.span
        unit = f" ({self.rule.unit})" if self.rule.unit else ""
        return f"{noun} from {low:.12g} to {high:.12g}{unit}"


def walk(base: Any, prefix: str = "") -> Iterator[Key]:
    """Every key of a settings object, in the order of its definition."""
    section: type = type(base)
    kinds = _kinds(section)
    for field in dataclasses.fields(base):
        value = getattr(base, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield Key(prefix + field.name, kinds[field.name], value, field.metadata["rule"])


@functools.cache
def _kinds(row: type) -> dict[str, type]:
    """The type of each field, evaluated once: most of the time that loading a configuration takes goes there."""
    return {name: _kind(hint) for name, hint in typing.get_type_hints(row).items()}


def _kind(hint: Any) -> type:
    """The type that a value is checked for: `tuple` of tuple[str, ...], `float` of float | None."""
    alternatives = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if isinstance(hint, types.UnionType):
        return typing.cast(type, alternatives[0])
    return typing.cast(type, typing.get_origin(hint) or hint)


def _fields(row: type, prefix: str) -> dict[str, Key]:
    """The settings that an entry of a table may have, by their short names."""
    kinds = _kinds(row)
    return {
        field.name: Key(f"{prefix}.{field.name}", kinds[field.name], field.default, field.metadata["rule"])
        for field in dataclasses.fields(row)
    }


def overlay(base: T, values: Mapping[str, Any], prefix: str = "") -> T:
    """A copy of `base` in which each full key name in `values` has that value."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(base):  # type: ignore[arg-type]
        name, value = prefix + field.name, getattr(base, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = overlay(value, values, f"{name}.")
        elif name in values:
            changes[field.name] = values[name]
    return dataclasses.replace(base, **changes)  # type: ignore[type-var]


def load_file(base: Any, path: Path) -> dict[str, Any]:
    """The checked values of a YAML file by full key name.

    Raises ConfigError, naming file and line, for unreadable YAML, an unknown or repeated key, or an unusable value.
    """
    known = {setting.name: setting for setting in walk(base)}
    values: dict[str, Any] = {}
    for name, raw, where in _flatten_yaml(path, known):
        if name not in known:
            raise _unknown("key", name, where, _names(known))
        if name in values:
            raise ConfigError(f"{where}: {name} is given twice", key=name)
        values[name] = _value(known[name], raw, where)
    return values


def load_environment(base: Any, environ: Mapping[str, str]) -> dict[str, Any]:
    """The checked values of all MEMORY__SECTION__KEY variables by full key name; raises ConfigError."""
    known = {setting.variable: setting for setting in walk(base)}
    values: dict[str, Any] = {}
    for variable in sorted(name for name in environ if name.startswith(ENVIRONMENT_PREFIX)):
        if variable not in known:
            raise _unknown("variable", variable, "environment", list(known))
        setting = known[variable]
        values[setting.name] = _value(
            setting, _parse_variable(setting, environ[variable]), f"environment variable {variable}"
        )
    return values


def _parse_variable(setting: Key, text: str) -> Any:
    if setting.kind is str:
        return text  # as it stands: a password or a path is not YAML
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        return text


def _flatten_yaml(path: Path, known: Mapping[str, Key]) -> Iterator[tuple[str, Any, str]]:
    """Yield (full name, value, "FILE:LINE") of every leaf; a section is descended into, anything else is a leaf."""
    import yaml

    try:
        # The parser in C, where PyYAML was built with it, takes a tenth of the time for the shipped file.
        parser = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        text = path.read_text(encoding="utf-8")
        _refuse_deep(yaml.parse(text, parser))
        loader = parser(text)
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: expected sections such as 'network:' at the top of the file")
        yield from _leaves(loader, root, "", path, known)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}{_mark(error)}: not valid YAML: {_problem(error)}") from error


def _refuse_deep(events: Iterator[Any]) -> None:
    """Raises RecursionError before the composer in C, which has no limit of its own, ends the process."""
    depth = 0
    for event in events:
        depth += event.__class__.__name__.endswith("StartEvent") - event.__class__.__name__.endswith("EndEvent")
        if depth > _DEEPEST:
            raise RecursionError(f"more than {_DEEPEST} levels")


def _leaves(
    loader: Any, node: Any, prefix: str, path: Path, known: Mapping[str, Key]
) -> Iterator[tuple[str, Any, str]]:
    for key_node, value_node in node.value:
        name = f"{prefix}{loader.construct_object(key_node, deep=True)}"
        where = f"{path}:{key_node.start_mark.line + 1}"
        is_section = any(key.startswith(f"{name}.") for key in known)
        if is_section and value_node.id == "mapping":
            yield from _leaves(loader, value_node, f"{name}.", path, known)
            continue
        if name in known and known[name].rule.row is not None:
            _refuse_repeated(value_node, name, where)
        value = loader.construct_object(value_node, deep=True)
        if isinstance(value, bool) and name in known and known[name].kind is str:
            value = value_node.value  # YAML 1.1 reads the words on, off, yes and no as booleans
        if not is_section:
            yield name, value, where
        elif value is not None:  # a section whose keys are all commented out changes nothing
            raise ConfigError(f"{where}: {name} is a section: expected keys below it", key=name)


def _refuse_repeated(node: Any, name: str, where: str) -> None:
    """YAML keeps the last of two equal keys; a setting given twice is a mistake."""
    seen: set[str] = set()
    for key_node, value_node in node.value if node.id == "mapping" else ():
        if key_node.value in seen:
            raise ConfigError(f"{where}: {name}.{key_node.value} is given twice", key=name)
        seen.add(key_node.value)
        _refuse_repeated(value_node, f"{name}.{key_node.value}", where)


def _mark(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark is not None else ""


def _problem(error: Exception) -> str:
    problem = getattr(error, "problem", None) or str(error) or type(error).__name__
    return " ".join(str(problem).split())


def _names(known: Mapping[str, Key]) -> list[str]:
    sections = {name.rpartition(".")[0] for name in known} | {name.partition(".")[0] for name in known}
    return [*known, *sorted(sections)]


def _unknown(noun: str, name: str, where: str, names: list[str]) -> ConfigError:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    return ConfigError(f"{where}: unknown {noun} {name}; the nearest known one is {near}", key=name, nearest=near)


def _value(setting: Key, raw: Any, where: str) -> Any:
    """The checked value of a setting; of a table, entry by entry."""
    row = setting.rule.row
    if row is None:
        return _checked(setting, raw, where)
    if raw is None:  # all its entries are commented out
        return {}
    if not isinstance(raw, dict) or not all(isinstance(name, str) and name for name in raw):
        raise _refused(setting, raw, where)
    return {name: _entry(setting, row, name, fields, where) for name, fields in raw.items()}


def _entry(setting: Key, row: type, name: str, fields: Any, where: str) -> Any:
    if not isinstance(fields, dict):
        raise _refused(setting, {name: fields}, where)
    known = _fields(row, f"{setting.name}.{name}")
    for field in fields:
        if field not in known:
            raise _unknown("key", f"{setting.name}.{name}.{field}", where, [key.name for key in known.values()])
    return row(**{field: _checked(known[field], value, where) for field, value in fields.items()})


def _checked(setting: Key, raw: Any, where: str) -> Any:
    try:
        return _convert(setting, raw)
    except (ValueError, OverflowError) as error:
        raise _refused(setting, raw, where) from error


def _refused(setting: Key, raw: Any, where: str) -> ConfigError:
    text = repr(raw)
    shown = "(value not shown)" if setting.rule.secret else text[:_SHOWN_CHARS] + "…" * (len(text) > _SHOWN_CHARS)
    message = f"{where}: {setting.name} = {shown}: expected {setting.expected}"
    return ConfigError(message, key=setting.name, expected=setting.expected)


def _convert(setting: Key, raw: Any) -> Any:
    """The value in the type of the key; raises ValueError when the rule does not admit it."""
    if setting.kind is tuple:
        if not isinstance(raw, list):
            raise ValueError
        return tuple(_text(setting.rule, item) for item in raw)
    if setting.kind is str:
        return _text(setting.rule, raw)
    if setting.kind is bool:
        if not isinstance(raw, bool):
            raise ValueError
        return raw
    return _number(setting, raw)


def _text(rule: Rule, raw: Any) -> str:
    if not isinstance(raw, str) or "\0" in raw or (rule.choices and raw not in rule.choices):
        raise ValueError
    if rule.check is not None:
        rule.check(raw)
    return raw


def _number(setting: Key, raw: Any) -> int | float:
    allowed = (int,) if setting.kind is int else (int, float)
    if isinstance(raw, bool) or not isinstance(raw, allowed):
        raise ValueError
    value: int | float = setting.kind(raw)
    low, high = setting.rule.span
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError
    return value
