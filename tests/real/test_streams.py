"""Streams of the real llama.cpp with all that llamaslot puts into them, held against the strictest reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.support import models
from tests.support.inprocess import CHAT, NATIVE, TEXT, Front, fronted, letters
from tests.support.real import RealServer
from tests.support.strict import strict
from tests.web.test_streams import INFILL, MESSAGES, RESPONSES, body_of

pytestmark = [pytest.mark.real, pytest.mark.asyncio(loop_scope="module")]

BUSY = {"stream": {"keepalive_s": 0.003}, "prefill": {"chunk_threshold_s": 0}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Front]:
    directory = tmp_path_factory.mktemp("streams")
    async with (
        RealServer(models.infill(directory), directory / "kv", slots=1, context=4096, batch=512) as server,
        fronted(directory / "front", server.url, server.save_dir, BUSY) as it,
    ):
        yield it


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE, INFILL, RESPONSES, MESSAGES])
async def test_a_stream_has_no_event_without_data(front: Front, path: str) -> None:
    """Of two at once: one waits for the other, is placed, saved, restored, computed, and told so all the time."""
    bodies = [body_of(path, letters(n, 2000), return_progress=True) for n in (1, 2, 1)]
    answers = await asyncio.gather(*(front.post(path, body) for body in bodies))
    for answer in answers:
        assert answer.status == 200
        events = strict(answer.raw)
        assert len(events) == answer.raw.count(b"\n\n") > 1
        assert answer.raw.endswith(b"\n\n")
    assert any(comment.startswith("queued ") for answer in answers for comment in answer.comments)
