"""A file of keys, and the users that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llamaslot.config.keys import editing, made_now, new_key


class KeyFile:
    """A file of keys as ``llamaslot keys`` writes it; it exists even without any key. ``keys``: each key by
    its name.
    """

    def __init__(self, path: Path, *names: str) -> None:
        self.path, self.keys = path, dict[str, str]()
        path.parent.mkdir(parents=True, exist_ok=True)
        with editing(path):
            pass
        for name in names:
            self.add(name)

    def add(self, name: str, **more: Any) -> str:
        self.keys[name] = key = new_key()
        with editing(self.path) as entries:
            entries.append(made_now(name, key, **more))
        return key

    def remove(self, name: str) -> None:
        with editing(self.path) as entries:
            entries[:] = [entry for entry in entries if entry.name != name]
