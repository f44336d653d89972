"""Settings as frozen objects, checked as their annotations say, with all faults at once.

A subset of pydantic, under the same names: importing that and making its validators was a third of a start's time (150
of 460 ms) and 20 MB of memory. A class has a check for each field, made when it is first needed.
"""

from __future__ import annotations

import inspect
import math
import operator
import os
import re
import types
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

Loc = tuple[str | int, ...]
_MISSING: Any = object()
_TRUE, _FALSE = ("true", "1", "on", "yes", "y", "t"), ("false", "0", "off", "no", "n", "f")
_NUMBER = re.compile(r"[+-]?\d+(_\d+)*(\.0*)?")


class Fault(NamedTuple):
    """What is wrong with the value ``given`` at ``loc``. ``kind``: ``value_error`` if a function said ``why``, else one
    of pydantic's words for it, with the ``bound`` that was missed.
    """

    loc: Loc
    kind: str
    given: object = None
    bound: object = None
    why: str = ""


class ValidationError(ValueError):
    """All faults of a value."""

    def __init__(self, name: str, faults: list[Fault]) -> None:
        said = (f"{'.'.join(map(str, fault.loc))}: {fault.why or fault.kind}" for fault in faults)
        super().__init__(f"{name}: {'; '.join(said)}")
        self.faults = faults


class ValidationInfo:
    """Of one validation. ``context``: what validators may need to know; ``faults``: found so far."""

    def __init__(self, context: Mapping[str, Any] | None = None) -> None:
        self.context, self.faults = context, list[Fault]()

    def wrong(self, loc: Loc, kind: str, given: object = None, bound: object = None, why: str = "") -> Any:
        """Note a fault. Returns what stands for the missing value."""
        self.faults.append(Fault(loc, kind, given, bound, why))
        return _MISSING


class BeforeValidator(NamedTuple):
    """Changes a value before its type is checked. Raises ValueError."""

    function: Callable[..., Any]


class AfterValidator(NamedTuple):
    """Changes a value of the right type. Raises ValueError."""

    function: Callable[..., Any]


class _Field(NamedTuple):
    default_factory: Callable[[], Any] | None
    strict: bool
    bounds: tuple[tuple[str, Any], ...]


def Field(  # noqa: N802
    *,
    default_factory: Callable[[], Any] | None = None,
    strict: bool = False,
    **bounds: Any,
) -> Any:
    """What a value must be: ``gt``, ``ge``, ``lt``, ``le``, ``min_length``, ``max_length``, ``pattern``,
    ``allow_inf_nan``. ``strict``: a number that is not a text of one.
    """
    return _Field(default_factory, strict, tuple(bounds.items()))


class SecretStr:
    """A text that is not shown."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_secret_value(self) -> str:
        return self._text

    def __len__(self) -> int:
        return len(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretStr) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return "SecretStr('**********')"

    __str__ = __repr__


Check = Callable[[Any, Loc, ValidationInfo], Any]


class FieldInfo(NamedTuple):
    """``annotation``: its type, without what is asked of it beyond that."""

    annotation: Any
    check: Check


class _Fields:
    """The fields of the class, by name, in order."""

    def __get__(self, _: object, owner: type[BaseModel]) -> dict[str, FieldInfo]:
        if "_fields" not in owner.__dict__:
            hints = get_type_hints(owner, include_extras=True)
            owner._fields = {
                name: FieldInfo(_bare(hints[name]), _check(hints[name])) for name in owner._names
            }
        return owner._fields


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
class BaseModel:
    """An annotation for each field, and its default if there is one. It cannot be changed; a key that is no field is a
    fault.
    """

    model_fields: ClassVar[_Fields] = _Fields()
    _names: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[dict[str, Any]] = {}
    _fields: ClassVar[dict[str, FieldInfo]]

    def __init_subclass__(cls) -> None:
        own = [name for name in inspect.get_annotations(cls) if not name.startswith("_")]
        cls._names = (*cls._names, *(name for name in own if name not in cls._names))
        cls._defaults = cls._defaults | {name: cls.__dict__[name] for name in own if name in cls.__dict__}

    def __init__(self, **values: Any) -> None:
        """Raises ValidationError."""
        self.__dict__.update(self.model_validate(values).__dict__)

    @classmethod
    def model_validate(cls, raw: object, context: Mapping[str, Any] | None = None) -> Self:
        """The settings in parsed YAML or JSON. Raises ValidationError with all faults."""
        info = ValidationInfo(context)
        made = cls._read(raw, (), info)
        if info.faults:
            raise ValidationError(cls.__name__, info.faults)
        assert isinstance(made, cls), "there are no faults"
        return made

    @classmethod
    def _read(cls, raw: object, loc: Loc, info: ValidationInfo) -> Any:
        """As ``model_validate``, but faults are noted."""
        if isinstance(raw, cls):
            return raw
        if not isinstance(raw, dict):
            return info.wrong(loc, "model_type", raw)
        n_before, values = len(info.faults), dict[str, Any]()
        for name, field in cls.model_fields.items():
            if name in raw:
                values[name] = field.check(raw[name], (*loc, name), info)
            elif name not in cls._defaults:
                info.wrong((*loc, name), "missing", raw)
        for key in raw:
            if not isinstance(key, str):
                info.wrong((*loc, key if isinstance(key, int) else str(key)), "invalid_key", key)
            elif key not in cls._names:
                info.wrong((*loc, key), "extra_forbidden", raw[key])
        if len(info.faults) > n_before:
            return _MISSING
        try:
            return cls.model_construct(**values)._checked()
        except ValueError as error:
            return info.wrong(loc, "value_error", raw, why=str(error))

    def _checked(self) -> Self:
        """Itself, or another one, if its fields go together. Raises ValueError."""
        return self

    @classmethod
    def model_construct(cls, **values: Any) -> Self:
        """Without any check."""
        made = object.__new__(cls)
        for name in cls._names:
            if name in values:
                made.__dict__[name] = values[name]
            elif name in cls._defaults:
                default: Any = cls._defaults[name]
                is_made = isinstance(default, _Field) and default.default_factory is not None
                made.__dict__[name] = default.default_factory() if is_made else default
        made.__dict__["_set"] = frozenset(values)
        return made

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """Another one, in which ``update`` replaces values. Without any check."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, **update)
        made.__dict__["_set"] = self.model_fields_set | update.keys()
        return made

    @property
    def model_fields_set(self) -> frozenset[str]:
        """The fields that were given, and not left to their defaults."""
        found: frozenset[str] = self.__dict__["_set"]
        return found

    def __setattr__(self, name: str, _: object) -> None:
        raise ValueError(f"{name}: {type(self).__name__} is frozen")

    def _values(self) -> tuple[Any, ...]:
        return tuple(self.__dict__[name] for name in self._names)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def __repr__(self) -> str:
        told = ", ".join(f"{name}={self.__dict__[name]!r}" for name in self._names)
        return f"{type(self).__name__}({told})"


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _check(hint: Any) -> Check:
    """The check of an annotation."""
    args, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        return _annotated(_check(args[0]), args[1:], is_strict=any(_is_strict(its) for its in args[1:]))
    if origin in (Union, types.UnionType):  # only with None
        (inner,) = (_check(its) for its in args if its is not type(None))
        return lambda value, loc, info: None if value is None else inner(value, loc, info)
    if origin is Literal:
        return partial(_literal, args)
    if origin is tuple:
        return partial(_tuple, _check(args[0]))
    if origin is dict:
        return partial(_dict, _check(args[0]), _check(args[1]))
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint._read
    return _OF_TYPE[hint]


def _is_strict(asked: object) -> bool:
    return isinstance(asked, _Field) and asked.strict


def _annotated(check: Check, asked: Sequence[object], *, is_strict: bool) -> Check:
    before = [_function(its) for its in asked if isinstance(its, BeforeValidator)]
    after = [
        _bounded(its.bounds) if isinstance(its, _Field) else _function(its)
        for its in asked
        if isinstance(its, _Field | AfterValidator)
    ]
    if is_strict:
        before.append(_whole_number)
    steps = [*reversed(before), check, *after]

    def checked(given: Any, loc: Loc, info: ValidationInfo) -> Any:
        value = given
        for step in steps:
            if (value := step(value, loc, info)) is _MISSING:
                if info.faults[-1].loc == loc:  # as it was written, not as a number
                    info.faults[-1] = info.faults[-1]._replace(given=given)
                break
        return value

    return checked


def _function(its: BeforeValidator | AfterValidator) -> Check:
    function = its.function
    takes_info = function.__code__.co_argcount == 2

    def call(value: Any, loc: Loc, info: ValidationInfo) -> Any:
        try:
            return function(value, info) if takes_info else function(value)
        except ValueError as error:
            return info.wrong(loc, "value_error", value, why=str(error))

    return call


_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "gt": ("greater_than", operator.gt),
    "ge": ("greater_than_equal", operator.ge),
    "lt": ("less_than", operator.lt),
    "le": ("less_than_equal", operator.le),
    "min_length": ("too_short", lambda value, n: len(value) >= n),
    "max_length": ("too_long", lambda value, n: len(value) <= n),
    "pattern": ("string_pattern_mismatch", lambda value, pattern: re.search(pattern, value) is not None),
    "allow_inf_nan": ("finite_number", lambda value, allowed: allowed or math.isfinite(value)),
}


def _bounded(bounds: Iterable[tuple[str, Any]]) -> Check:
    known = [(*_BOUNDS[name], bound) for name, bound in sorted(bounds)]

    def check(value: Any, loc: Loc, info: ValidationInfo) -> Any:
        for kind, is_right, bound in known:
            if not is_right(value, bound):
                return info.wrong(loc, kind, value, bound)
        return value

    return check


def _literal(allowed: tuple[object, ...], value: Any, loc: Loc, info: ValidationInfo) -> Any:
    is_one = isinstance(value, Hashable) and value in allowed
    return value if is_one else info.wrong(loc, "literal_error", value, allowed)


def _tuple(check: Check, value: Any, loc: Loc, info: ValidationInfo) -> Any:
    if not isinstance(value, list | tuple):
        return info.wrong(loc, "tuple_type", value)
    made = tuple([check(its, (*loc, i), info) for i, its in enumerate(value)])
    return _MISSING if any(its is _MISSING for its in made) else made


def _dict(of_key: Check, of_value: Check, value: Any, loc: Loc, info: ValidationInfo) -> Any:
    if not isinstance(value, dict):
        return info.wrong(loc, "dict_type", value)
    made = {}
    for key, its in value.items():
        name = key if isinstance(key, str | int) else str(key)
        made[of_key(key, (*loc, name, "[key]"), info)] = of_value(its, (*loc, name), info)
    return made  # not used if a part of it is wrong


def _whole_number(value: Any, loc: Loc, info: ValidationInfo) -> Any:
    return value if type(value) is int else info.wrong(loc, "int_type", value)


def _int(value: Any, loc: Loc, info: ValidationInfo) -> Any:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return int(value) if value.is_integer() else info.wrong(loc, "int_from_float", value)
    if not isinstance(value, str):
        return info.wrong(loc, "int_type", value)
    found = _NUMBER.fullmatch(value.strip())
    return int(value.strip().partition(".")[0]) if found else info.wrong(loc, "int_parsing", value)


def _float(value: Any, loc: Loc, info: ValidationInfo) -> Any:
    if not isinstance(value, int | float | str):
        return info.wrong(loc, "float_type", value)
    try:
        return float(value)
    except (ValueError, OverflowError):
        return info.wrong(loc, "float_parsing", value)


def _bool(value: Any, loc: Loc, info: ValidationInfo) -> Any:
    if value in (0, 1) and isinstance(value, int | float):
        return bool(value)
    if not isinstance(value, str | int):
        return info.wrong(loc, "bool_type", value)
    if (said := str(value).lower()) not in (*_TRUE, *_FALSE):
        return info.wrong(loc, "bool_parsing", value)
    return said in _TRUE


def _str(value: Any, loc: Loc, info: ValidationInfo) -> Any:
    return value if isinstance(value, str) else info.wrong(loc, "string_type", value)


def _secret(value: Any, loc: Loc, info: ValidationInfo) -> Any:
    if isinstance(value, SecretStr):
        return value
    return SecretStr(value) if isinstance(value, str) else info.wrong(loc, "string_type", value)


def _path(value: Any, loc: Loc, info: ValidationInfo) -> Any:
    return Path(value) if isinstance(value, str | os.PathLike) else info.wrong(loc, "path_type", value)


def _datetime(value: Any, loc: Loc, info: ValidationInfo) -> Any:
    try:
        return value if isinstance(value, datetime) else datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return info.wrong(loc, "datetime_type", value)


_OF_TYPE: dict[Any, Check] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    Path: _path,
    SecretStr: _secret,
    datetime: _datetime,
}
