"""Fixtures of these tests."""

from tests.support.figures import figure

__all__ = ["figure"]
