"""Packs the man page into sdist and wheel, if make dist has made one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PAGE = "build/man/llamaslot.1"


class ManPage(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        page = Path(self.root) / _PAGE
        if not page.is_file() or version == "editable":
            return
        if self.target_name == "wheel":
            build_data["shared_data"][str(page)] = "share/man/man1/llamaslot.1"
        else:
            build_data["force_include"][str(page)] = _PAGE
