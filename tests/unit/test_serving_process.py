"""How the interpreter of a process that serves is set up."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from llamaslot.http.serve import keep_answers_flowing


@pytest.fixture
def _as_before() -> Iterator[None]:
    interval_s, thresholds, is_enabled = sys.getswitchinterval(), gc.get_threshold(), gc.isenabled()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    (gc.enable if is_enabled else gc.disable)()
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("_as_before")
def test_no_thread_and_no_collection_holds_up_answers_for_long() -> None:
    """A thread that commits a save gives the event loop its turn within a batch of the fastest model."""
    gc.disable()  # as while it starts
    keep_answers_flowing()
    assert sys.getswitchinterval() < 0.001
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
