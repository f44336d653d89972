"""Fixtures of these tests."""

from tests.support.leftovers import nothing_left

__all__ = ["nothing_left"]
