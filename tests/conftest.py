"""How ``make test`` shares out the tests."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those on the real llama.cpp come last, and on one worker: nothing else runs beside them, llama-server has the
    machine to itself."""
    items.sort(key=lambda item: item.get_closest_marker("real") is not None)
    for item in items:
        if item.get_closest_marker("real") is not None:
            item.add_marker(pytest.mark.xdist_group("real"))
