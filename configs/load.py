"""YAML files and dotted overrides -> `RunConfig`, with errors that name the nearest valid key and the file."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from configs.errors import UserError
from configs.schema import RunConfig

RECIPES = Path(__file__).parent
EXTENDS = "extends"


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe and apply overrides.

    A file may begin from another one: `extends: NAME` names a YAML file (relative to this one) or a shipped recipe.
    Sections are merged key by key, and what this file says wins.

    Args:
        source: a YAML file, or the name of a shipped recipe ("quickstart").
        overrides: "key.sub=value"; the value is YAML, so numbers, lists, null and true work. Applied in order.

    Raises:
        UserError: no such file, bad YAML, files that extend each other, an unknown key, a value that does not fit. One
            line, naming file and key.
    """
    path = find_recipe(source)
    values = _read_extended(path)
    origin: dict[str, str] = {}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override '{override}' is not of the form key.sub=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"override '{override}': the value is not valid YAML") from None
        _assign(values, key, value)
        origin[key] = f"override '{override}'"
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, path, origin)) from None


def find_recipe(source: str | Path) -> Path:
    """Return the path of a YAML file or of the shipped recipe with that name.

    Raises:
        UserError: neither exists; names the nearest recipe.
    """
    path = Path(source)
    if path.is_file():
        return path
    shipped = RECIPES / f"{source}.yaml"
    if shipped.is_file():
        return shipped
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    names = sorted(str(found.relative_to(RECIPES).with_suffix("")) for found in RECIPES.rglob("*.yaml"))
    near = get_close_matches(path.stem, names, n=1, cutoff=0.0)
    hint = f"did you mean the recipe '{near[0]}'?" if near else "there is no shipped recipe either"
    raise UserError(f"no configuration at '{source}': {hint}")


def dump_config(config: RunConfig) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def differing_keys(one: RunConfig, other: RunConfig) -> list[str]:
    """Return the dotted keys in which two configurations differ."""
    first, second = _flatten(one.model_dump(mode="json")), _flatten(other.model_dump(mode="json"))
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


def _read_extended(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a file merged over those of the file that it extends, and so on."""
    values = _read_mapping(path)
    base = values.pop(EXTENDS, None)
    if base is None:
        return values
    chain = (*extending, path)
    beside = path.parent / str(base)
    try:
        found = find_recipe(beside if beside.is_file() else str(base))
    except UserError as error:
        raise UserError(f"{path}: {EXTENDS}: {error}") from None
    if found.resolve() in {file.resolve() for file in chain}:
        raise UserError(f"{path}: {EXTENDS}: {found} extends this file itself")
    return _merged(_read_extended(found, chain), values)


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: not valid YAML{where}: {getattr(error, 'problem', error)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, expected keys and values")
    return values


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        child = values.setdefault(name, {})
        if not isinstance(child, dict):
            child = values[name] = {}
        values = child
    values[last] = value


def _explain(error: ValidationError, path: Path, origin: Mapping[str, str]) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    message = first["msg"].removeprefix("Value error, ")
    where = next((text for given, text in origin.items() if _is_about(given, key, message)), str(path))
    if first["type"] == "extra_forbidden":
        parent = _section(location[:-1])
        near = get_close_matches(location[-1], list(parent.model_fields), n=1, cutoff=0.0)
        nearest = ".".join([*location[:-1], near[0]])
        return f"{where}: unknown key '{key}', did you mean '{nearest}'?"
    given = "" if isinstance(first.get("input"), dict) else f" (got {first.get('input')!r})"
    return f"{where}: {key + ': ' if key else ''}{message}{given}"


def _is_about(override: str, key: str, message: str) -> bool:
    """Whether an error at `key` (a section's own check may concern several of its keys) comes from an override."""
    inside = not key or override.startswith(f"{key}.")
    return override == key or (inside and override.rpartition(".")[2] in message)


def _section(location: Sequence[str]) -> type[BaseModel]:
    section: type[BaseModel] = RunConfig
    for name in location:
        annotation = section.model_fields[name].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        section = annotation
    return section


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
