"""When saves are made: what is worth one, one at a time, and none in the way of somebody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator

import pytest

from bench.virtual import VirtualLoop
from llamaslot.cache.content import Content
from llamaslot.cache.ids import head
from llamaslot.cache.namespaces import Namespace
from llamaslot.cache.reuse import CacheKind
from llamaslot.errors import SlotWedged
from llamaslot.llama.answers import Progress
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotEvent, SlotState
from tests.support.house import House, tokens_of
from tests.support.stub import Op, StubServer

SECONDS = {"save": 2.0, "restore": 2.0, "answer": 0.5}


@pytest.fixture
def house() -> Iterator[House]:
    """Three slots, and a disk so slow that whoever comes meets a save. Computing is believed to be dearer still."""
    house = House(VirtualLoop(), StubServer(3, pace=lambda op: SECONDS.get(op.kind, 0.01), token_s=1.0))
    house.server.action_s = SECONDS["save"]
    house.rates.prefill.observe(0, 1000, 1000.0)
    yield house
    house.close()


def fill(house: House, n: int = 3) -> None:
    for i in range(n):
        house.start(house.ask(Request(f"first {i}", tokens_of(10_000 * i, 400))), "first")
    house.finish()


def watch(house: House) -> list[int]:
    """How many saves and restores were under way at once, at each time that one was asked for."""
    seen: list[int] = []
    pace = house.server.pace

    def counted(op: Op) -> float | None:
        if op.kind in ("save", "restore"):
            seen.append(sum(other.kind in ("save", "restore") for other in house.server.pending))
        return pace(op)

    house.server.pace = counted
    return seen


def test_one_save_or_restore_at_a_time(house: House) -> None:
    """Each stops every stream of this server; the journal tells who waited for whom."""
    fill(house)
    seen = watch(house)
    for i in range(3):
        house.start(house.ask(Request(f"next {i}", tokens_of(50_000 + 10_000 * i, 400))), "next")
    house.finish()
    for i in range(3):
        house.start(house.ask(Request(f"back {i}", tokens_of(10_000 * i, 500))), "back")
    house.finish()
    assert len(seen) > 6
    assert set(seen) == {1}
    waits = [act.waited_s for one in house.dispatcher.journal.latest() for act in one.acts]
    assert max(waits) > 0.5
    house.check_nothing_is_left()


def test_who_leaves_while_waiting_to_save_holds_nothing_up(house: House) -> None:
    """His save is carried out in its turn, and everybody else is served."""
    fill(house)
    clients = [
        house.start(house.ask(Request(f"next {i}", tokens_of(50_000 + 10_000 * i, 400))), "next")
        for i in range(3)
    ]
    house.loop.pass_time(0.5)
    clients[1].cancel()
    house.loop.pass_time(0.5)
    clients[0].cancel()
    house.finish()
    assert clients[2].exception() is None
    house.check_nothing_is_left()


def test_a_save_ahead_of_need_gives_way(house: House) -> None:
    """Somebody comes while room is made for it: his answer must not stand still. It is tried again when he is gone."""
    fill(house, 2)
    house.server.pace = lambda op: 5.0 if op.kind == "reserve" else SECONDS.get(op.kind, 0.01)
    saving = house.loop.create_task(house.idle_save.run())
    house.loop.pass_time(4.0)
    assert any(op.kind == "reserve" for op in house.server.pending)
    house.server.pace = lambda op: 60.0 if op.kind == "answer" else 0.01
    client = house.start(house.ask(Request("client", tokens_of(90_000, 20))), "client")
    house.loop.pass_time(8.0)
    assert not client.done()
    assert house.catalog.snapshots == {}
    house.loop.pass_time(80.0)
    assert client.done()
    assert len(house.catalog.snapshots) == 2
    saving.cancel()
    house.loop.run_until_complete(asyncio.gather(saving, return_exceptions=True))
    house.check_nothing_is_left()


def test_restores_tell_how_long_a_save_would_wait(house: House) -> None:
    """Both wait for the same batch. Else a delay that was once so long that nothing is saved would stay what it was."""
    for first in (10_000, 50_000):
        for i in range(3):
            house.start(house.ask(Request(f"{first} {i}", tokens_of(first + 10_000 * i, 400))), "first")
        house.finish()
        house.loop.run_until_complete(house.idle_save.save_all())
    n_saves, house.rates.save_delay.seconds = len(house.catalog.snapshots), 9.0
    house.start(house.ask(Request("back", tokens_of(10_000, 400))), "back")
    house.finish()
    assert house.rates.save_delay.seconds < 9.0
    assert len(house.catalog.snapshots) == n_saves


def test_a_long_answer_is_worth_its_save(house: House) -> None:
    """The disk has the prompt, and computing the answer again as a part of the next one takes longer than saving."""
    table = house.leases.table
    assert table is not None
    fill(house)
    house.loop.run_until_complete(house.idle_save.save_all())
    slot = table.slots[0]
    assert not table.worth.is_worth_saving(slot)
    for n_more, is_worth_it in ((0, False), (2000, True)):
        table.take(slot, Request("again"), house.loop.time())
        content = Content(slot.content.tokens, False, True, (), slot.content.snapshot, n_more)
        table.give_back(slot, SlotEvent.KEEP, content, house.loop.time())
        assert table.worth.is_worth_saving(slot) is is_worth_it


def test_a_slot_goes_back_to_the_end_of_its_prompt_where_files_keep_no_checkpoints(house: House) -> None:
    """The answer comes back tokenized anew, and an exact end is all that a recurrent model could go on from."""
    assert house.leases.table is not None
    rewind_model = house.leases.table.rewind_model
    rewind_model.cache_kind, rewind_model.keeps_checkpoints = CacheKind.RECURRENT, False
    for i in range(3):
        house.start(
            house.ask(Request(f"first {i}", tokens_of(10_000 * i, 400)), tokens_of(5000, 20)), "first"
        )
    house.finish()
    house.start(house.idle_save.save_all(), "idle save")
    house.finish()
    saved = sorted(snapshot.tokens for snapshot in house.catalog.snapshots.values())
    assert saved == sorted(tokens_of(10_000 * i, 400) for i in range(3))
    assert all(slot.content.is_exact for slot in house.leases.table.slots)
    house.check_nothing_is_left()


def test_what_has_media_behind_it_is_never_written(house: House) -> None:
    """Nobody could say what its file holds."""
    table = house.leases.table
    assert table is not None
    fill(house, 1)
    [slot] = [slot for slot in table.slots if slot.content.tokens]
    table.take(slot, Request("an image"), house.loop.time())
    content = Content(slot.content.tokens, is_exact=False, is_dirty=True, has_media=True)
    table.give_back(slot, SlotEvent.KEEP, content, house.loop.time())
    house.loop.run_until_complete(house.idle_save.save_all())
    assert house.catalog.snapshots == {}
    assert house.server.files == {}
    assert not slot.content.is_dirty, "and nobody tries again"


def test_it_goes_back_with_the_lora_scales_of_what_it_holds(house: House) -> None:
    """With others the server would compute the whole prompt again, and the file would be of nobody's."""
    assert house.leases.table is not None
    rewind_model = house.leases.table.rewind_model
    rewind_model.cache_kind, rewind_model.keeps_checkpoints = CacheKind.RECURRENT, False
    scaled, real, sent = Namespace(lora='[{"id":0,"scale":0.5}]'), house.server.prefill, list[str]()

    def prefill(
        slot_id: int, tokens: bytes, lora: str = "", written: bytes | None = None
    ) -> AsyncGenerator[Progress]:
        sent.append(lora)
        return real(slot_id, tokens, lora)

    house.start(
        house.ask(Request("first", tokens_of(0, 400), namespace=scaled), tokens_of(5000, 20)), "first"
    )
    house.finish()
    house.server.prefill = prefill  # type: ignore[method-assign]
    house.start(house.idle_save.save_all(), "idle save")
    house.finish()
    assert sent == [scaled.lora]
    assert [snapshot.namespace for snapshot in house.catalog.snapshots.values()] == [scaled.text]
    house.check_nothing_is_left()


WEDGED = ("batch", "notice")


def wedge(house: House) -> None:
    """llama-server says nothing more of what it computes, and goes on with it until the test serves ``notice``."""
    house.loop.pass_time(1.0)
    [batch] = house.server.pending
    assert batch.kind == "batch"
    house.server.fail(batch, SlotWedged("nothing was told"))
    house.loop.settle()
    assert [op.kind for op in house.server.pending] == ["notice"]


@pytest.mark.parametrize("asks", [False, True], ids=["ahead of need", "for somebody"])
def test_a_slot_that_falls_silent_while_it_goes_back_is_abandoned(asks: bool) -> None:
    """llama-server may be at work in it still. It is counted: by whoever serves the request that it was saved for, and
    whose client is told."""
    house = House(VirtualLoop(), StubServer(1, pace=lambda op: None if op.kind in WEDGED else 0.01))
    house.rates.prefill.observe(0, 1000, 1000.0)
    table = house.leases.table
    assert table is not None
    table.rewind_model.cache_kind, table.rewind_model.keeps_checkpoints = CacheKind.RECURRENT, False
    house.start(house.ask(Request("first", tokens_of(0, 400)), tokens_of(5000, 20)), "first")
    house.finish()
    if asks:
        client = house.start(house.ask(Request("next", tokens_of(50_000, 400))), "next")
    else:
        client = house.start(house.idle_save.save_all(), "idle save")
    wedge(house)
    assert client.done()
    assert isinstance(client.exception(), SlotWedged) is asks
    assert [slot.state for slot in table.slots] == [SlotState.ABANDONED]
    assert house.metrics.wedged._value.get() == float(not asks)
    house.finish()
    assert [slot.state for slot in table.slots] == [SlotState.SUSPECT]
    house.check_nothing_is_left()
    house.close()


def test_it_does_not_where_they_keep_them(house: House) -> None:
    """There the answer is in the file, for whoever sends it back as it was."""
    assert house.leases.table is not None
    rewind_model = house.leases.table.rewind_model
    rewind_model.cache_kind, rewind_model.keeps_checkpoints = CacheKind.RECURRENT, True
    house.start(house.ask(Request("first", tokens_of(0, 400)), tokens_of(5000, 20)), "first")
    house.finish()
    house.start(house.idle_save.save_all(), "idle save")
    house.finish()
    [snapshot] = house.catalog.snapshots.values()
    assert snapshot.tokens == tokens_of(0, 400) + tokens_of(5000, 20)
    house.check_nothing_is_left()


class TestInTheBackground:
    """A slot is used again as soon as llama-server has written its file and the file's header was read."""

    @pytest.fixture(autouse=True)
    def _slow(self, house: House) -> None:
        house.catalog.is_slow_to_commit = True
        house.server.pace = lambda op: 60.0 if op.kind == "take in" else SECONDS.get(op.kind, 0.01)

    @staticmethod
    def n_committing(house: House) -> int:
        return sum(op.kind == "take in" for op in house.server.pending)

    def test_the_next_request_does_not_wait_for_the_commit(self, house: House) -> None:
        """The owner of what is committed waits for it, and computes nothing again."""
        fill(house)
        house.start(house.ask(Request("next", tokens_of(50_000, 400))), "next")
        house.loop.pass_time(30.0)
        assert not house.clients
        assert self.n_committing(house) == 1
        assert house.catalog.snapshots == {}
        table = house.leases.table
        assert table is not None
        held = [head(slot.content.tokens, 100) for slot in table.slots]
        evicted = next(i for i in range(3) if tokens_of(10_000 * i, 100) not in held)
        back = house.start(house.ask(Request("back", tokens_of(10_000 * evicted, 500))), "back")
        house.loop.pass_time(20.0)
        assert not back.done()
        house.finish()
        assert back.result() >= 399
        house.check_nothing_is_left()

    def test_an_idle_save_gives_its_slot_back_before_the_commit(self, house: House) -> None:
        """Its owner goes on in it at once, and the snapshot is that of the conversation all the same."""
        fill(house)
        saving = house.loop.create_task(house.idle_save.save_all())
        house.loop.pass_time(10.0)
        assert self.n_committing(house) == 1
        table = house.leases.table
        assert table is not None
        assert all(slot.is_idle for slot in table.slots)
        slot = next(slot for slot in table.slots if not slot.content.is_dirty)
        tokens = slot.content.tokens + tokens_of(90_000, 30)
        client = house.start(house.ask(Request("goes on", tokens)), "client")
        house.loop.pass_time(30.0)
        assert client.done()
        house.finish()
        house.loop.run_until_complete(saving)
        assert slot.content.snapshot in house.catalog.snapshots
        assert "ls-1" not in house.catalog.snapshots  # a later one of the same conversation has replaced it
        house.check_nothing_is_left()

    def test_a_burst_waits_for_no_commit_of_what_it_displaces(self, house: House) -> None:
        """All slots are displaced at once. Two commits go on at a time, the others are pending saves meanwhile. There
        may be as many as slots: the next save waits in its slot."""
        fill(house)
        for i in range(4):
            house.start(house.ask(Request(f"next {i}", tokens_of(50_000 + 10_000 * i, 400))), "next")
        house.loop.pass_time(40.0)
        assert len(house.clients) == 1
        assert self.n_committing(house) == 2
        house.finish()
        assert len(house.catalog.snapshots) == 4
        house.check_nothing_is_left()

    def test_three_files_in_memory_are_too_many(self, house: House) -> None:
        """Of a landing place there is room for two: the third save waits in its slot."""
        house.catalog.has_landing = True
        fill(house)
        for i in range(3):
            house.start(house.ask(Request(f"next {i}", tokens_of(50_000 + 10_000 * i, 400))), "next")
        house.loop.pass_time(40.0)
        assert len(house.clients) == 1
        house.finish()
        assert len(house.catalog.snapshots) == 3
        house.check_nothing_is_left()

    @pytest.mark.parametrize("pause_s", [1.0, 0.0])
    def test_a_save_without_room_waits_for_commits_that_have_whole_files(
        self, caplog: pytest.LogCaptureFixture, pause_s: float
    ) -> None:
        """What is displaced then is saved all the same, also if all ask in the same instant."""
        house = House(
            VirtualLoop(), StubServer(4, pace=lambda op: 60.0 if op.kind == "take in" else 0.01), room=3
        )
        house.rates.prefill.observe(0, 1000, 1000.0)
        house.catalog.is_slow_to_commit = True
        fill(house, 4)
        for i in range(4):
            house.start(house.ask(Request(f"next {i}", tokens_of(50_000 + 10_000 * i, 400))), "next")
            house.loop.pass_time(pause_s)
        house.finish()
        assert "was not saved" not in caplog.text
        assert len(house.catalog.snapshots) == 3
        house.check_nothing_is_left()
        house.close()

    def test_what_could_not_be_committed_is_dirty_again(
        self, house: House, caplog: pytest.LogCaptureFixture
    ) -> None:
        """If the slot still holds it; what has left its slot is lost, and those who wait for it compute it. The log
        says so once, and when it is over."""
        caplog.set_level("INFO")
        fill(house)
        house.catalog.is_disk_full = True
        house.start(house.idle_save.save_all(), "idle save")
        house.start(house.ask(Request("next", tokens_of(50_000, 400))), "next")
        house.finish()
        table = house.leases.table
        assert table is not None
        assert house.catalog.snapshots == {}
        assert all(slot.content.is_dirty for slot in table.slots)
        assert caplog.text.count("could not be saved to disk: ") == 1
        house.catalog.is_disk_full = False
        house.loop.pass_time(60.0)
        house.start(house.idle_save.save_all(), "idle save")
        house.finish()
        assert caplog.text.count("slots are saved again") == 1
        house.check_nothing_is_left()

    def test_a_stop_waits_for_commits(self, house: House) -> None:
        """Also for those of slots that hold something else by now."""
        fill(house)
        house.start(house.ask(Request("next", tokens_of(50_000, 400))), "next")
        house.loop.pass_time(30.0)
        assert self.n_committing(house) == 1
        stop = house.loop.create_task(house.idle_save.save_all())
        house.loop.pass_time(30.0)
        assert not stop.done()
        house.finish()
        house.loop.run_until_complete(stop)
        assert len(house.catalog.snapshots) == 4
        house.check_nothing_is_left()

    def test_a_shared_prefix_is_waited_for_until_it_is_committed(self, house: House) -> None:
        """Its own request goes on meanwhile."""
        table = house.leases.table
        assert table is not None
        table.cache_kind = house.server.cache_kind = CacheKind.RECURRENT
        system = tokens_of(0, 2000)
        first = house.start(
            house.ask(Request("first", system + tokens_of(50_000, 400), n_system=2000)), "first"
        )
        house.loop.settle()
        second = house.start(
            house.ask(Request("second", system + tokens_of(70_000, 400), n_system=2000)), "second"
        )
        house.finish()
        assert first.done()
        assert second.result() >= 1999
        house.check_nothing_is_left()


@pytest.mark.parametrize("is_idle_save", [True, False])
@pytest.mark.parametrize("ends", ["while the other one runs", "after it"])
def test_what_is_committed_while_another_conversation_has_the_slot_stays(
    is_idle_save: bool, ends: str
) -> None:
    """Both begin with the same long system part: when the later one is saved, it does not replace the other."""
    house = House(VirtualLoop(), StubServer(1, pace=lambda op: None if op.kind == "take in" else 0.01))
    house.rates.prefill.observe(0, 1000, 1000.0)
    house.catalog.is_slow_to_commit = True
    system = tokens_of(0, 900)
    one, other = system + tokens_of(5000, 80), system + tokens_of(7000, 90)
    house.start(house.ask(Request("one", one, n_system=900)), "one")
    house.finish()
    if is_idle_save:
        house.start(house.idle_save.save_all(), "idle save")
        house.loop.pass_time(1.0)
    pace = house.server.pace
    house.server.pace = lambda op: 5.0 if op.kind == "answer" else pace(op)
    client = house.start(house.ask(Request("other", other, n_system=900)), "other")
    house.loop.pass_time(3.0 if ends == "while the other one runs" else 10.0)
    assert client.done() is (ends == "after it")
    house.server.pace = lambda op: 0.01 if op.kind != "answer" else 5.0
    for op in [op for op in house.server.pending if op.kind == "take in"]:
        house.server.serve(op)
    house.loop.pass_time(10.0)
    house.start(house.ask(Request("other again", other + tokens_of(8000, 90), n_system=900)), "other")
    house.finish()
    house.start(house.idle_save.save_all(), "idle save")
    house.finish()
    saved = [snapshot.tokens for snapshot in house.catalog.snapshots.values()]
    assert any(tokens.startswith(one) for tokens in saved)
    assert any(tokens.startswith(other) for tokens in saved)
    house.check_nothing_is_left()
    house.close()
