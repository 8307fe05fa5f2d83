"""Recipes from TOML and back: an unknown key is an error with the nearest right one."""

import dataclasses
import math
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fastcraft.errors import UserError, named
from fastcraft.objectives import OBJECTIVES
from fastcraft.recipe import ObjectiveConfig, Recipe
from fastcraft.registry import suggestion

RECIPES = Path(__file__).parent / "recipes"

RENAMED = {
    "text.train": "trained.text.mode", "text.lora_rank": "trained.text.rank", "text.lora_alpha": "trained.text.alpha",
    "text.gradient_checkpointing": "trained.text.gradient_checkpointing",
}  # fmt: skip
"""Keys of older recipes -> what they are called now."""


def load_recipe(name_or_path: str, overrides: Sequence[str] = (), replaced: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe by name or TOML file and apply ``section.key=value`` overrides, then ``replaced`` dotted keys.

    Raises:
        UserError: no such recipe, broken TOML, an unknown key, a wrong type or a rule broken.
    """
    tree = _read_toml(name_or_path)
    for item in overrides:
        key, equals, text = item.partition("=")
        if not equals:
            raise UserError(f"--set: expected SECTION.KEY=VALUE, got {item!r}")
        _assign(tree, key.strip(), parse_value(text.strip()))
    for key, value in (replaced or {}).items():
        _assign(tree, key, value)
    return recipe_from_tree(tree)


def recipe_from_tree(tree: Mapping[str, Any]) -> Recipe:
    """Nested tables, as `tomllib` reads them, into a checked `Recipe`."""
    return _build(Recipe, tree, "")


def recipe_names() -> list[str]:
    """Recipes that ship with the package."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def _read_toml(name_or_path: str) -> dict[str, Any]:
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = RECIPES / f"{name_or_path}.toml"
        if not path.is_file():
            raise UserError(f"--recipe: unknown recipe {name_or_path!r}{suggestion(name_or_path, recipe_names())}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--recipe: cannot read {name_or_path!r}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"--recipe: {name_or_path!r} is not TOML: {error}") from error


def parse_value(text: str) -> Any:
    """A TOML value; text that is none is taken as a string, so quotes are optional on a command line."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b`` or, in an array of tables, ``rewards.0.weight``."""
    node: Any = tree
    *parents, last = key.split(".")
    if not parents:
        raise UserError(f"--set: expected SECTION.KEY=VALUE, got key {key!r}")
    for part in parents:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise UserError(f"--set: {key!r}: expected an index below {len(node)}, got {part!r}")
            node = node[int(part)]
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, (dict, list)):
            raise UserError(f"--set: {key!r}: {part!r} is a value, not a section")
    if isinstance(node, list):
        raise UserError(f"--set: {key!r} must go on to a key inside entry {last!r}")
    node[last] = value


def _build(cls: Any, tree: Any, where: str) -> Any:
    """A dataclass from a table, checking names and types on the way."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{where or 'recipe'}: expected a table, got {tree!r}")
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            if now := RENAMED.get(_join(where, key)):
                raise UserError(f"{_join(where, key)} is called {now} now")
            raise UserError(f"unknown key {_join(where, key)!r}{suggestion(key, hints)}")
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    for key in required:
        if key not in tree:
            raise UserError(f"{_join(where, key)} is required")
    values = {key: _convert(hints[key], value, _join(where, key)) for key, value in tree.items()}
    with named(f"{where}." if where else ""):
        return cls(**values)


def _objective(tree: Any, where: str) -> ObjectiveConfig:
    """The section of an objective: its name, and its own settings beside it."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: expected a table, got {tree!r}")
    name = _convert(str, tree.get("name", ObjectiveConfig().name), _join(where, "name"))
    settings = {key: value for key, value in tree.items() if key != "name"}
    return ObjectiveConfig(name=name, settings=_build(_settings_of(name, where), settings, where))


def _convert(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the annotated type, or a `UserError` that names the key."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is ObjectiveConfig:
        return _objective(value, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if origin is tuple:
        length = None if args[-1] is Ellipsis else len(args)
        if not isinstance(value, (list, tuple)) or (length is not None and len(value) != length):
            raise UserError(f"{where}: expected a list{f' of {length} values' if length else ''}, got {value!r}")
        kinds = [args[0]] * len(value) if length is None else args
        return tuple(
            _convert(kind, item, f"{where}.{i}") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is Literal:
        if value not in args:
            near = suggestion(value, args) if isinstance(value, str) else ""
            raise UserError(f"{where} must be one of {', '.join(map(repr, args))}, got {value!r}{near}")
        return value
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected a table, got {value!r}")
        return {key: _convert(args[1], item, _join(where, key)) for key, item in value.items()}
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where}: expected {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"{where} must be finite, got {value!r}")
    return value


def _settings_of(name: str, where: str) -> Any:
    with named(f"{where}.name: "):
        return OBJECTIVES.get(name).Settings


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def recipe_to_tree(recipe: Recipe) -> dict[str, Any]:
    """Nested plain values, the inverse of `recipe_from_tree`."""
    tree = dataclasses.asdict(recipe)
    tree["objective"] = {"name": recipe.objective.name, **tree["objective"]["settings"]}
    return tree


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML that `load_recipe` reads back to an equal `Recipe`."""
    lines: list[str] = []
    tree = recipe_to_tree(recipe)
    tables: list[tuple[str, Mapping[str, Any]]] = []
    for section, content in tree.items():
        if isinstance(content, (list, tuple)):
            tables += [(f"[[{section}]]", table) for table in content]
        elif section == "trained":
            tables += [(f"[{section}.{part}]", table) for part, table in content.items()]
        else:
            tables.append((f"[{section}]", content))
    for header, table in tables:
        lines += [header, *(f"{key} = {_toml_value(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(
            f"\\u{ord(char):04x}" if ord(char) < 32 or ord(char) == 127 else {"\\": "\\\\", '"': '\\"'}.get(char, char)
            for char in value
        )
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_value(key)} = {_toml_value(item)}" for key, item in value.items()) + "}"
    return repr(value)
