"""Which files this process opens."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Opens:
    """Notes every file that this process opens, by Python's audit hook, which can never be removed."""

    def __init__(self) -> None:
        self._seen: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self._seen is not None:
            self._seen.append(os.path.basename(str(arguments[0])))

    @contextmanager
    def noted(self) -> Iterator[list[str]]:
        """A context manager: after its block, its list has the names of the slot files and sidecars opened in the
        block.
        """
        self._seen = seen = list[str]()
        found: list[str] = []
        try:
            yield found
        finally:
            self._seen = None
            found += sorted(name for name in seen if name.startswith("ls-"))


OPENS = Opens()
