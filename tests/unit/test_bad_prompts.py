"""Which prompts are not sent on, and for how long; which backend is suspected, and for how long."""

from __future__ import annotations

import pytest

from llamaslot.backend.health import Suspicion
from llamaslot.backend.leases import Leases
from llamaslot.backend.slot_table import SlotTable
from llamaslot.errors import DeadlyPrompt, UpstreamError
from llamaslot.fleet import bad_prompts
from llamaslot.fleet.bad_prompts import BadPrompts
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_prompt_is_refused_after_two_servers_for_a_while(clock: Clock) -> None:
    """For five minutes since the last one."""
    known = BadPrompts(clock)
    known.has_ended_server(b"a", 0)
    known.check(b"a")
    clock.now += 200
    with pytest.raises(DeadlyPrompt, match=r"ended 2 times .* for 300 s"):
        known.has_ended_server(b"a", 0)
    clock.now += 299
    with pytest.raises(DeadlyPrompt, match="for 1 s"):
        known.check(b"a")
    known.check(b"b")
    clock.now += 1
    known.check(b"a")
    known.has_ended_server(b"a", 0)  # counted anew


def test_two_servers_of_one_request_count_however_long_it_took(clock: Clock) -> None:
    known = BadPrompts(clock)
    known.has_ended_server(b"a", 0)
    clock.now += 10_000
    with pytest.raises(DeadlyPrompt):
        known.has_ended_server(b"a", 1)


def test_few_are_kept(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those noted last."""
    monkeypatch.setattr(bad_prompts, "_MAX_KEPT", 3)
    known = BadPrompts(clock)
    for key in (b"a", b"b", b"c", b"a", b"d"):
        known.was_refused(key)
    assert [key for key in (b"a", b"b", b"c", b"d") if known.is_refused(key)] == [b"a", b"c", b"d"]
    known.was_answered(b"a")
    assert not known.is_refused(b"a")
    assert len(known) == 2


@pytest.fixture
def leases(clock: Clock) -> Leases:
    settings = SchedulingSettings()
    leases = Dispatcher(settings, QueueLimits(), clock).add("gpu0")
    leases.attach(SlotTable("gpu0", 1, 1024, settings=settings, rates=Rates()))
    return leases


def test_errors_are_forgiven_after_longer_and_longer_pauses(leases: Leases, clock: Clock) -> None:
    """A question that is answered does not show that requests are."""
    suspicion, error = Suspicion(leases), UpstreamError(500, b"{}")
    for pause_s in (2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0):
        suspicion.blame(error)
        clock.now += pause_s - 0.1
        suspicion.end()
        assert leases.is_suspect
        clock.now += 0.1
        suspicion.end()
        assert not leases.is_suspect
    suspicion.has_worked()
    suspicion.blame(error)
    clock.now += 2.0
    suspicion.end()
    assert not leases.is_suspect


def test_silence_is_forgiven_at_once(leases: Leases) -> None:
    suspicion = Suspicion(leases)
    suspicion.begin()
    assert leases.is_suspect
    suspicion.end()
    assert not leases.is_suspect
