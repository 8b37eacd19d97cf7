"""YAML files as mappings, and what pydantic finds wrong with them as one line that names the nearest valid key."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import UserError


def read_mapping(path: Path, *, text_keys: bool = False) -> dict[str, Any]:
    """Return the keys and values of a YAML file; none for an empty one.

    Args:
        path: the file.
        text_keys: whether all keys must be text, those of mappings within it too.

    Raises:
        UserError: the file cannot be read, is not valid YAML, or holds something else.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        wrong = next(_keys_of_other_types(values), None) if text_keys else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", str(error).partition("\n")[0])
        raise UserError(f"{path}: not valid YAML{where}: {problem}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not valid YAML: a number or a nesting beyond all bounds") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if wrong is not None:
        raise UserError(
            f"{path}: key '{wrong}' is not text, as YAML reads numbers, dates, on, off, yes and no: quote it"
        )
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, expected keys and values")
    return values


def first_error(error: ValidationError) -> tuple[str, str]:
    """Return the dotted key of the first thing that is wrong, and what it is."""
    first = error.errors()[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")


def explain(error: ValidationError, model: type[BaseModel], where: str) -> str:
    """Say in one line what is first wrong with the values for `model`, which came from `where`."""
    first = error.errors()[0]
    key, message = first_error(error)
    if first["type"] == "extra_forbidden":
        location = [str(part) for part in first["loc"]]
        near = get_close_matches(location[-1], list(_section(model, location[:-1]).model_fields), n=1, cutoff=0.0)
        nearest = ".".join([*location[:-1], near[0]])
        return f"{where}: unknown key '{key}', did you mean '{nearest}'?"
    given = "" if isinstance(first.get("input"), dict) else f" (got {first.get('input')!r})"
    return f"{where}: {key + ': ' if key else ''}{message}{given}"


def _keys_of_other_types(values: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of mappings within mappings that are not text."""
    for key, value in values.items() if isinstance(values, dict) else ():
        if not isinstance(key, str):
            yield f"{prefix}{key}"
        yield from _keys_of_other_types(value, f"{prefix}{key}.")


def _section(model: type[BaseModel], location: Sequence[str]) -> type[BaseModel]:
    """The part of `model` at a location; parts may be optional, or values of a mapping by names of the user's own."""
    names = iter(location)
    for name in names:
        annotation = model.model_fields[name].annotation
        if get_origin(annotation) is dict:
            next(names)
        candidates = (annotation, *get_args(annotation))
        model = next(part for part in candidates if isinstance(part, type) and issubclass(part, BaseModel))
    return model
