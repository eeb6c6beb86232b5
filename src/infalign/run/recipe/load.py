"""From YAML text to a recipe: overrides, absolute paths, and mistakes as plain messages."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from infalign.errors import InputError, StorageError
from infalign.run.recipe.experiment import Recipe


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `key.path=value` overrides, make its paths absolute, check it.

    Raises:
        StorageError: If the file cannot be read.
        InputError: If it is not YAML, has an unknown key or an unusable value; the message says where.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read the recipe ({error})", where=str(path), hint="Check the path") from error
    return parse_recipe(text, where=str(path), folder=path.resolve().parent, overrides=overrides)


class _OneOfEachKey(yaml.SafeLoader):
    """Safe YAML in which a key that comes twice is a mistake, where YAML itself would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value} comes twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_OneOfEachKey)


def parse_recipe(text: str, *, where: str, folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in `text`; see `load_recipe`."""
    try:
        content = _read_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"not valid YAML ({' '.join(str(error).split())})", where=where) from error
    if not isinstance(content, dict):
        raise InputError("a recipe is a mapping of settings", where=where, hint="See recipes/ for examples")
    for override in overrides:
        _apply_override(content, override)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(_explain(error, content), where=where) from error
    return _with_absolute_paths(recipe, folder)


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"{override!r} is not key.path=value", where="--set")
    *parents, last = key.strip().split(".")
    section: Any = content
    for parent in parents:
        section = section[_entry(section, parent, key)] if isinstance(section, list) else section.setdefault(parent, {})
        if not isinstance(section, dict | list):
            raise InputError(f"{parent} in {key} is not a section", where="--set")
    place: Any = _entry(section, last, key) if isinstance(section, list) else last
    try:
        section[place] = _read_yaml(value)
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"the value of {key} is not valid YAML: {value!r}", where="--set") from error


def _entry(section: list[Any], number: str, key: str) -> int:
    """An entry of a list by its number, from 0."""
    if not number.isdigit() or int(number) >= len(section):
        raise InputError(
            f"{number} in {key} is not an entry of a list", where="--set", hint=f"Write 0 to {len(section) - 1}"
        )
    return int(number)


def _explain(error: ValidationError, content: Mapping[str, Any]) -> str:
    """The first problem, in words, with a suggestion for an unknown key."""
    first = error.errors()[0]
    location = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("function-", "dict[", "str")))
    if not isinstance(content.get("reward"), list):  # a single reward was not written as a list
        location = location.replace("reward.0", "reward", 1) if location.startswith("reward.0") else location
    if first["type"] == "extra_forbidden":
        key, section = str(first["loc"][-1]), _section_at(first["loc"][:-1])
        close = difflib.get_close_matches(key, section.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(section.model_fields)}"
        message = f"unknown key {location}; {hint}"
    else:
        text = first["msg"].removeprefix("Value error, ").removeprefix("procedure: ")
        if first["type"] == "model_type":
            text = f"a section of settings goes here, not {first['input']!r}"
        elif first["type"] == "string_pattern_mismatch":
            text = "use letters, digits, dots, hyphens and underscores, a letter or digit first"
        if text.split()[0][1:].islower():  # a sentence, not the name of a class
            text = text[0].lower() + text[1:]
        message = f"{location}: {text}" if location else text
    more = error.error_count() - 1
    return f"{message} (and {more} more)" if more else message


def _section_at(location: tuple[int | str, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        for candidate in _models_in(section.model_fields[part].annotation):
            section = candidate
    return section


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    content = recipe.model_dump()

    def absolute(section: dict[str, Any] | None, key: str) -> None:
        if section and isinstance(section.get(key), str):
            section[key] = _resolve(section[key], folder)

    absolute(content["policy"], "model")
    for reward in content["reward"]:
        absolute(reward, "model")
    for gold in content["evaluation"]["gold"]:
        absolute(gold, "model")
    absolute(content["prompts"], "source")
    absolute(content["prompts"], "evaluation_source")
    if content["testbed"]:
        absolute(content["testbed"]["demonstrations"], "source")
        for rows in content["testbed"]["preferences"]:
            absolute(rows, "source")
    decoder = content["procedure"].get("decoder")
    if isinstance(decoder, dict) and ":" not in decoder.get("proxy", ":"):
        content["procedure"] = {**content["procedure"], "decoder": dict(decoder)}
        absolute(content["procedure"]["decoder"], "proxy")
    for transform in [content["transform"], *content["compare_with"]]:
        if isinstance(transform, dict):
            absolute(transform, "file")
    return Recipe.model_validate(content)


def _resolve(name: str, folder: Path) -> str:
    """A path in the recipe's folder, or the name as it is where nothing is there and it reads as a hub name."""
    path = Path(name).expanduser()
    beside = path if path.is_absolute() else folder / path
    looks_like_hub_name = (
        not path.is_absolute() and not name.startswith(".") and name.count("/") <= 1 and not path.suffix
    )
    return name if looks_like_hub_name and not beside.exists() else str(beside.resolve())
