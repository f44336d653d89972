"""The source of llamaslot, parsed once in each worker. Tests that read all of it are in one group, ``SOURCE_GROUP``."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SOURCE = REPOSITORY / "src/llamaslot"
MODULES = sorted(SOURCE.rglob("*.py"))
SOURCE_GROUP = pytest.mark.xdist_group("source")


@cache
def parsed(module: Path) -> ast.Module:
    """The syntax tree of ``module``. Tests must not change it."""
    return ast.parse(module.read_text())
