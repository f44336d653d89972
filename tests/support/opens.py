"""Which files this process opens."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Opens:
    """Every file that is opened, whoever does it and however, by Python's audit hook: that one stays for ever."""

    def __init__(self) -> None:
        self._seen: list[str] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self._seen is not None:
            self._seen.append(os.path.basename(str(arguments[0])))

    @contextmanager
    def noted(self) -> Iterator[list[str]]:
        """The names of slot files and sidecars that are opened in the block, when it has ended."""
        self._seen = seen = list[str]()
        found: list[str] = []
        try:
            yield found
        finally:
            self._seen = None
            found += sorted(name for name in seen if name.startswith("ls-"))


OPENS = Opens()
