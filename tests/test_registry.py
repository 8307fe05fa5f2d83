"""Catalogues: lazy, with suggestions."""

import pytest

from fastcraft.errors import UserError
from fastcraft.registry import Registry


def test_reading_a_catalogue_imports_nothing():
    registry = Registry("reward", {"a": "no_such_module:A"})
    assert registry.names() == ["a"]
    with pytest.raises(UserError, match="cannot load 'no_such_module:A'"):
        registry.get("a")


def test_users_own_component_by_path():
    assert Registry("reward", {}).get("collections:OrderedDict").__name__ == "OrderedDict"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clp", "^unknown reward 'clp'; did you mean 'clip'"),
        ("zzz", "^unknown reward 'zzz'; known: aesthetic, clip"),
        (":x", "expected 'package.module:name', got ':x'"),
        ("collections:Nothing", "cannot load 'collections:Nothing'"),
    ],
)
def test_unknown_names_are_explained(name, message):
    with pytest.raises(UserError, match=message):
        Registry("reward", {"clip": "x:y", "aesthetic": "x:y"}).get(name)
