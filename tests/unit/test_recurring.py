"""What fails with every request is not in the log with every request."""

from __future__ import annotations

import logging

import pytest

from llamaslot.observe.recurring_faults import AGAIN_S, OVER_S, Recurring


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def saves(clock: Clock, caplog: pytest.LogCaptureFixture) -> Recurring:
    caplog.set_level(logging.INFO)
    return Recurring(logging.getLogger("saves"), "slots are saved again", now=clock)


def fail(saves: Recurring, n: int, reason: str = "no room for {} MiB: 1.{} KiB are free") -> None:
    for i in range(n):
        saves.failed(reason.format(i + 1, i), "req-%d: not saved: %s", i, reason)


def test_a_full_disk_is_told_when_it_begins_and_when_it_is_over(
    saves: Recurring, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Between them no request has a line of its own: sizes and ids make no new reason."""
    fail(saves, 50)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    clock.now = OVER_S
    for _ in range(3):
        saves.succeeded()
    assert caplog.messages[1:] == ["slots are saved again"]
    fail(saves, 2)
    assert len(caplog.messages) == 3, "it has begun again"


def test_another_reason_is_told(saves: Recurring, caplog: pytest.LogCaptureFixture) -> None:
    """At once."""
    fail(saves, 2)
    fail(saves, 2, "no rights")
    assert len(caplog.messages) == 2


def test_what_lasts_is_told_each_ten_minutes(
    saves: Recurring, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """With the number of those between."""
    fail(saves, 5)
    clock.now = AGAIN_S
    fail(saves, 2)
    assert caplog.messages[1].endswith("; since this was last said, 4 times more")
    assert len(caplog.messages) == 2


def test_what_comes_and_goes_is_told_each_ten_minutes_too(
    saves: Recurring, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Small files fit, large ones do not: that is no news with each file, nor is it over."""
    for _ in range(20):
        fail(saves, 1)
        saves.succeeded()
    assert len(caplog.messages) == 1
    clock.now = AGAIN_S
    fail(saves, 1)
    assert len(caplog.messages) == 2
