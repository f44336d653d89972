"""One line of figures per measurement, shown whatever pytest captures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Figure = Callable[[object], None]


@pytest.fixture
def figure(capsys: pytest.CaptureFixture[Any], request: pytest.FixtureRequest) -> Figure:
    """Prints one line, after the name of the test that measured it."""

    def show(line: object) -> None:
        with capsys.disabled():
            print(f"\n{request.node.name}: {line}", flush=True)

    return show
