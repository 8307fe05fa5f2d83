"""Checks of the options that a recipe gives to rewards."""

import inspect
import math
from collections.abc import Mapping
from typing import Any, get_args

from fastcraft.errors import UserError
from fastcraft.registry import suggestion
from fastcraft.rewards.base import Reward
from fastcraft.rewards.preprocess import Resize

RESERVED = {
    "total": "the weighted sum of all rewards",
    "file": "the column of pictures in a table of scores",
    "prompt": "the column of prompts in a table of scores",
}
"""Names that no reward may have in metrics and tables, and what they name there."""


def check_name(name: str) -> None:
    """Raise a `UserError` if ``name`` is one of `RESERVED`."""
    if name in RESERVED:
        raise UserError(f"rewards: label must not be {name!r}, which is {RESERVED[name]}; give the reward another one")


def checked_number(reward: str, option: str, value: Any) -> float:
    """``value`` as a finite float, or a `UserError` that names the option."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"rewards: option {option} of {reward!r} must be a finite number, got {value!r}")
    return float(value)


def checked_flag(reward: str, option: str, value: Any) -> bool:
    """``value`` if it is true or false, or a `UserError` that names the option."""
    if not isinstance(value, bool):
        raise UserError(f"rewards: option {option} of {reward!r} must be true or false, got {value!r}")
    return value


def checked_resize(reward: str, value: Any) -> Any:
    """``value`` if it is a way to resize, or a `UserError`."""
    if value not in get_args(Resize):
        raise UserError(f"rewards: option resize of {reward!r} must be 'bicubic' or 'area', got {value!r}")
    return value


def check_options(reward_class: type[Reward], options: Mapping[str, Any], *, reward: str) -> None:
    """Raise a `UserError` for an option that the reward does not take or for one that it needs and does not get."""
    known = _options(reward_class)
    if known is None:
        return
    for option in options:
        if option not in known:
            near = suggestion(option, known) if known else "; it takes none"
            raise UserError(f"rewards: {reward!r} has no option {option!r}{near}")
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in options:
            raise UserError(f"rewards: {reward!r} needs option {option!r}")


def _options(reward_class: type[Reward]) -> dict[str, inspect.Parameter] | None:
    """Options by name: the keyword-only arguments of ``build`` and, where it passes them on, of ``__init__``.

    A reward that inherits ``build`` is made of its options alone, so there every argument of ``__init__`` counts.
    None = any.
    """
    build = inspect.signature(reward_class.build).parameters
    inherited = reward_class.build.__func__ is Reward.build.__func__  # type: ignore[attr-defined]
    options = {name: p for name, p in build.items() if p.kind is p.KEYWORD_ONLY and name != "towers"}
    if not _takes_any(build):
        return options
    swallows = False
    for parent in reward_class.__mro__:
        if parent is Reward:
            return None if swallows else options
        if "__init__" not in vars(parent):
            continue
        accepted = dict(list(inspect.signature(vars(parent)["__init__"]).parameters.items())[1:])
        options |= {name: p for name, p in accepted.items() if p.kind is p.KEYWORD_ONLY or (inherited and _is_plain(p))}
        swallows = _takes_any(accepted)
        if not swallows:
            return options
    return options


def _takes_any(accepted: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())


def _is_plain(parameter: inspect.Parameter) -> bool:
    return parameter.kind is parameter.POSITIONAL_OR_KEYWORD
