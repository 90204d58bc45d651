"""YAML files into typed models: read safely, validated whole; what is wrong is said in one line, in words of YAML."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from retrieve_or_generate.errors import UsageError

Model = TypeVar("Model", bound=BaseModel)

_PLAINLY = {  # what pydantic says in words of Python
    "tuple_type": "input should be a list, such as [a, b]",
    "too_short": "input should be a list with at least one value",
    "model_type": "input should be a mapping of keys to values",
    "dict_type": "input should be a mapping of keys to values",
}


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The keys and values of a file that is to be `what` ("an experiment file"); `UsageError` for one that holds none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such {what.partition(' ')[2]}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not readable as YAML ({_in_a_line(error)})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: {what} is a mapping of keys to values")
    return values


def validated(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """A `model` of these values; `UsageError` names `where`, the key, the problem and what is allowed."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _explained(error, where, model) from None


def _explained(error: ValidationError, where: str, model: type[BaseModel]) -> UsageError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if "[" not in str(part))  # which of several types
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1], model)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return UsageError(f"{where}: unknown key {key!r}{hint} (known: {', '.join(known)})")
    given = first.get("input")
    whole = isinstance(given, dict | list | BaseModel) and first["type"] == "value_error"  # the message says what of it
    shown = "" if whole or first["type"] == "missing" else f", not {str(given)[:60]!r}"
    message = _PLAINLY.get(first["type"], first["msg"].removeprefix("Value error, "))
    return UsageError(f"{f'{where}: {key}' if key else where}: {message[0].lower() + message[1:]}{shown}")


def _known_keys(location: tuple[int | str, ...], model: Any) -> list[str]:
    """Keys of `model` that are allowed where an unknown one was found."""
    for part in location:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        model = field.annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _in_a_line(error: Exception) -> str:
    """What is wrong and, of YAML, in which line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {problem}" if problem and mark else str(error).splitlines()[0]
