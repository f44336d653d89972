"""Puts the faults of a configuration file into words: the path of the key, what is expected, a probable correction."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from llamaslot.errors import ConfigError

Loc = tuple[str | int, ...]

#: The new keys of settings of the predecessor project.
RENAMED = {
    "LLAMA_SERVER_URL": "backends[0].url",
    "SLOTS_COUNT": "nothing: the number of slots is read from llama-server",
    "SIMILARITY_MIN_RATIO": "routing.similarity_min",
    "MIN_PREFIX_CHARS": "routing.small_prompt_tokens, which counts tokens",
    "LOCAL_META_DIR": "store.meta_dir",
}

_WORDING = {
    "missing": "is missing",
    "string_type": "should be text; put it in quotes",
    "string_too_short": "should not be empty",
    "too_short": "should not be empty",
    "bool_type": "should be on or off",
    "bool_parsing": "should be on or off",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "finite_number": "should be a number",
    "path_type": "should be a path",
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "dict_type": "should be a mapping: one 'name: value' a line",
    "invalid_key": "is not a key that can be used here: keys are text",
    "greater_than": "should be greater than {gt}",
    "greater_than_equal": "should be at least {ge}",
    "less_than": "should be less than {lt}",
    "less_than_equal": "should be at most {le}",
    "literal_error": "should be {expected}",
    "string_pattern_mismatch": "should be letters, digits, '.', '_' and '-'",
}


#: What PyYAML says of frequent mistakes, and what to look at.
_HINTS = {
    "'\\t'": "YAML is indented with spaces, never with tabs",
    "cannot start any token": "a text that begins with such a sign needs quotes",
    "could not find expected ':'": "a colon with a blank behind it follows each key, as in url: http://127.0.0.1:8080",
    "expected <block end>": "is this line indented as its neighbours are?",
    "mapping values are not allowed here": "is this line indented as its neighbours are? A text with ': ' needs quotes",
    "unknown escape character": "a text with \\ in it needs single quotes",
    "expected ',' or": "a bracket before it is not closed",
}


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses a mapping with the same key twice; PyYAML would use the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a list or a mapping cannot be a key", key.start_mark
                )
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """Return the content of a YAML file as lists, mappings and plain values. Raises ConfigError if the file cannot be
    read or is not YAML, then with the line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        fault = (
            "there is no such file. --config FILE names another; docs/guides/quickstart.md has one to start from;"
            " 'llamaslot run' and 'llamaslot demo' need none"
        )
    except OSError as error:
        fault = f"cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8 text (byte {error.start})"
    except yaml.MarkedYAMLError as error:
        problem = error.problem or error.context or ""
        # A key without its colon is noticed only in the next line.
        is_key = error.context == "while scanning a simple key"
        mark = (error.context_mark if is_key else error.problem_mark) or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        hint = next((f" ({hint})" for part, hint in _HINTS.items() if part in problem), "")
        fault = f"{where}{problem}{hint}"
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, IndexError) as error:
        # The last two: PyYAML's own, for an empty text that is marked as a number or a time.
        fault = f"is not YAML: {' '.join(str(error).split())}"
    raise ConfigError(str(path), [fault])


def fault_lines(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one line for each fault: the path in the file (``backends[0].url``), and what is expected there."""
    return [
        f"{dotted(details['loc'])}: {_say(details, model)}" for details in error.errors(include_url=False)
    ]


def dotted(loc: Loc) -> str:
    """Return a path as text: ``("backends", 0, "url")`` becomes ``backends[0].url``."""
    if loc[-1:] == ("[key]",):  # pydantic's mark for the key itself
        return f"{dotted(loc[:-2])}, the key {loc[-2]!r}"
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return path.removeprefix(".") or "the file"


def keys_of(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Yield the path of every key that a configuration file may have: ``listen.port``, ``backends[0].managed.slots``.
    Sections are left out. ``above``: text that is put before each path.
    """
    for name, field in model.model_fields.items():
        inner = None if _is_mapping(field.annotation) else _inner(field.annotation)
        if inner is None:
            yield above + name
        else:
            yield from keys_of(
                inner, f"{above}{name}[0]." if _is_list(field.annotation) else f"{above}{name}."
            )


def _say(details: ErrorDetails, model: type[BaseModel]) -> str:
    kind, loc, given = details["type"], details["loc"], details["input"]
    context: Mapping[str, Any] = details.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return _unknown(str(loc[-1]), loc, model)
    if kind == "model_type":
        if not loc and given is None:
            return "is empty: it needs at least 'backends'"
        return f"should be a mapping with the keys {', '.join(_section(loc, model).model_fields)}"
    said = _WORDING[kind].format_map(context) if kind in _WORDING else details["msg"].removeprefix("Input ")
    if kind.startswith("float") and str(loc[-1]).endswith("_s"):
        said = "should be a number of seconds, such as 10"
    if kind == "missing" or "key" in str(loc[-1]):  # a key is a secret: never repeat it
        return said
    if kind == "tuple_type" and loc == ("backends",) and given is not None:
        said += ": '- ' begins each backend"
    if kind == "string_type" and isinstance(given, bool):
        return f"{said}, else YAML reads it as {str(given).lower()}"
    if isinstance(given, str | int | float):
        said += f"; not {given!r}"
    if kind == "literal_error" and isinstance(given, str):
        said += _meant(
            given, [word.strip("' ") for word in context["expected"].replace(" or ", ", ").split(",")]
        )
    return said


def _unknown(key: str, loc: Loc, model: type[BaseModel]) -> str:
    if key in RENAMED:
        return f"unknown key; now {RENAMED[key]}"
    known = list(_section(loc[:-1], model).model_fields)
    if near := _meant(key, known):
        return f"unknown key{near}"
    elsewhere = [path for path in keys_of(model) if path.rpartition(".")[2] == key]
    if elsewhere:
        return f"unknown key here; did you mean {' or '.join(elsewhere)}?"
    return f"unknown key; known here: {', '.join(known)}"


def _meant(word: str, known: list[str]) -> str:
    near = get_close_matches(word.lower(), known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _section(loc: Loc, model: type[BaseModel]) -> type[BaseModel]:
    """Return the model of the section at the path ``loc`` of a file that ``model`` describes."""
    is_name = False  # of a mapping's entry
    for part in loc:
        if is_name or not isinstance(part, str):
            is_name = False
            continue
        annotation = model.model_fields[part].annotation
        is_name = _is_mapping(annotation)
        model = _inner(annotation) or model
    return model


def _inner(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for inner in map(_inner, get_args(annotation)) if inner), None)


def _is_mapping(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is dict


def _is_list(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is tuple
