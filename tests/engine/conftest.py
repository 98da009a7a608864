"""What tests of the engine share."""

import pytest

from fastjac.engine.rules.base import _RULES


@pytest.fixture
def registry():
    """Rules that are registered in the test are gone after it."""
    before = dict(_RULES)
    yield
    _RULES.clear()
    _RULES.update(before)
