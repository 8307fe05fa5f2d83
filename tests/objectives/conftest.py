"""An objective over the tiny model."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.objectives.build import Built, build


@pytest.fixture
def tiny_objective(tiny_parts: SimpleNamespace) -> Callable[..., Built]:
    """``make(**options)`` of `tests.objectives.build.build`, four steps if not said otherwise."""

    def make(**options: Any) -> Built:
        return build(tiny_parts, **{"num_steps": 4, **options})

    return make
