"""YAML files, layers and dotted overrides -> `RunConfig`, with errors that name the nearest valid key and the file."""

import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.errors import UserError
from configs.schema import DataConfig, RunConfig
from configs.task_definitions import DEFINITIONS_KEY, TaskDefinition
from configs.tasks import TASKS, expand_groups
from configs.yaml_files import explain, first_error, read_mapping

RECIPES = Path(__file__).parent
EXTENDS = "extends"
LAYER_SUFFIXES = (".yaml", ".yml")


DefinitionsOfShards = Callable[[DataConfig], Mapping[str, TaskDefinition]]
"""Reads which tasks the training shards define.

Raises:
    UserError: there are no shards, or they cannot be read.
"""


def load_config(
    source: str | Path, overrides: Sequence[str] = (), definitions_of_shards: DefinitionsOfShards | None = None
) -> RunConfig:
    """Read a recipe and apply overrides.

    A file may begin from another one: `extends: NAME` names a YAML file (relative to this one) or a shipped recipe.
    Sections are merged key by key, and what this file says wins.

    Args:
        source: a YAML file, or the name of a shipped recipe ("quickstart").
        overrides: "key.sub=value"; the value is YAML, so numbers, lists, null and true work. Or a layer: the path of a
            YAML file (.yaml, .yml) with some of the keys, merged like a file that extends. Applied in order.
        definitions_of_shards: asked where the recipe names a task that neither it nor the task table defines; what it
            tells becomes part of the configuration.

    Raises:
        UserError: no such file, bad YAML, files that extend each other, an unknown key, a value that does not fit. One
            line, naming file and key.
    """
    path = find_recipe(source)
    values = _read_extended(path)
    origin: dict[str, str] = {}
    for override in overrides:
        if override.endswith(LAYER_SUFFIXES) and "=" not in override:
            layer = _read_extended(Path(override))
            values = _merged(values, layer)
            origin.update(dict.fromkeys(_flatten(layer), override))
            continue
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise UserError(f"override '{override}' is neither of the form key.sub=value nor a .yaml file")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(f"override '{override}': the value is not valid YAML") from None
        _assign(values, key, value)
        origin = {given: text for given, text in origin.items() if not given.startswith(f"{key}.")}  # replaced
        origin.update(dict.fromkeys(_flatten({key: value}), f"override '{override}'"))
    unread = "" if definitions_of_shards is None else _add_definitions(values, definitions_of_shards)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, path, origin) + unread) from None


def make_override(key: str, value: object) -> str:
    """Return "key=value" for `load_config`, which reads the same value back: a path, say, with " #" or quotes in it."""
    plain = str(value) if isinstance(value, Path) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=math.inf).removesuffix("...\n").rstrip()
    return f"{key}={text}"


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
    near = get_close_matches(path.stem, recipe_names(), n=1, cutoff=0.0)
    hint = f"did you mean the recipe '{near[0]}'?" if near else "there is no shipped recipe either"
    raise UserError(f"no configuration at '{source}': {hint}")


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes, sorted; profiles of clusters are none (`configs.launch`)."""
    found = [*RECIPES.glob("*.yaml"), *RECIPES.glob("baselines/*.yaml")]
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in found)


def dump_config(config: RunConfig) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def differing_keys(one: RunConfig, other: RunConfig) -> list[str]:
    """Return the dotted keys in which two configurations differ."""
    first, second = _flatten(one.model_dump(mode="json")), _flatten(other.model_dump(mode="json"))
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


def _read_extended(path: Path, extending: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the values of a file merged over those of the file that it extends, and so on."""
    values = read_mapping(path, text_keys=True)
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


def _add_definitions(values: dict[str, Any], definitions_of_shards: DefinitionsOfShards) -> str:
    """Add the definitions of the shards where tasks are named that are not known yet; return what does not help."""
    defined = values.get(DEFINITIONS_KEY) or {}
    if not isinstance(defined, dict) or _named_tasks(values) <= {*TASKS, *defined}:
        return ""
    try:
        found = definitions_of_shards(DataConfig.model_validate(values.get("data") or {}))
    except ValidationError:
        return ""  # as the whole configuration will say
    except UserError as error:
        return f", nor do the training shards define it: {error}"
    values[DEFINITIONS_KEY] = {**{name: definition.model_dump() for name, definition in found.items()}, **defined}
    return "" if _named_tasks(values) <= {*TASKS, *defined, *found} else ", nor do the training shards define it"


def _named_tasks(values: Mapping[str, Any]) -> set[str]:
    """Tasks that a configuration names, whether or not it is right otherwise."""
    tasks = values.get("tasks", ())
    named = (
        set(expand_groups(tasks)) if isinstance(tasks, str | list) and all(isinstance(n, str) for n in tasks) else set()
    )
    for section, key in (("train", "task_weights"), ("data", "task_shares"), ("matching", "task_prior")):
        part = values.get(section)
        given = part.get(key) if isinstance(part, dict) else None
        named |= {name for name in given if isinstance(name, str)} if isinstance(given, dict) else set()
    return named


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        child = values.setdefault(name, {})
        if not isinstance(child, dict):
            child = values[name] = {}
        values = child
    values[last] = value


def _explain(error: ValidationError, path: Path, origin: Mapping[str, str]) -> str:
    key, message = first_error(error)
    is_check = error.errors()[0]["type"] == "value_error"
    where = next((text for given, text in origin.items() if _is_about(given, key, message, is_check)), str(path))
    return explain(error, RunConfig, where)


def _is_about(given: str, key: str, message: str, is_check: bool) -> bool:
    """Whether an error at `key` comes from the key that was given; a section's own check names those it is about."""
    if f"{key}.".startswith(f"{given}."):
        return True
    inside = not key or given.startswith(f"{key}.")
    if not is_check:
        return inside
    return inside and given.removeprefix(f"{key}.") in {word.strip(":,;()'") for word in message.split()}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
