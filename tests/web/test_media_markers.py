"""Media in plain prompts before several servers: each server has a marker of its own, and clients know that of any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_model import FakeModel
from tests.support.fleet import Fleet, fleet
from tests.support.inprocess import NATIVE, letters

OLD = "<__media__>"  # of builds whose /props tell none
EMBEDDINGS = "/v1/embeddings"


def said(marker: str) -> dict[str, Any]:
    """A prompt with one image."""
    return {"prompt_string": letters(1, 300) + marker + "?", "multimodal_data": ["aGk="]}


async def told_to_both(it: Fleet, path: str, body: dict[str, Any]) -> list[Any]:
    """What each of two servers gets for ``body``, while the other is drained."""
    seen = []
    for name, other in (("gpu0", "gpu1"), ("gpu1", "gpu0")):
        assert (await it.post(f"/llamaslot/drain?backend={other}", None)).status == 200
        answer = await it.post(path, body)
        assert answer.status == 200, answer.raw
        seen.append(it.fakes[name].sent(path)[-1].body)
        assert (await it.post(f"/llamaslot/undrain?backend={other}", None)).status == 200
    return seen


@pytest.mark.parametrize("is_assisted", [True, False], ids=["assisted", "not assisted"])
@pytest.mark.parametrize("is_old", [False, True], ids=["", "beside an old build"])
async def test_any_servers_marker_is_understood_by_each(
    tmp_path: Path, is_assisted: bool, is_old: bool
) -> None:
    """Of completions with one prompt or a list, and of embeddings, for which llama-server chooses the slot. A text
    that only looks like it is not changed."""
    model = FakeModel(takes_media=True)
    async with fleet(tmp_path, [model] * 2, wait=False, unified=not is_assisted) as it:
        for server in it.fakes.values():
            await server.start()
            server.overrides[EMBEDDINGS] = 200, {"data": []}
        if is_old:
            it.fakes["gpu1"].media_marker = ""
        await it.start()
        assert [its.leases.table and its.leases.table.is_assisted for its in it.registry.backends] == [
            is_assisted
        ] * 2
        markers = [server.media_marker or OLD for server in it.fakes.values()]
        assert len({*markers}) == 2
        for marker in markers:
            for path, field in ((NATIVE, "prompt"), (EMBEDDINGS, "input"), (EMBEDDINGS, "content")):
                one = await told_to_both(it, path, {field: said(marker), "n_predict": 2})
                assert [body[field] for body in one] == [said(own) for own in markers]
                some = await told_to_both(it, path, {field: [said(marker)] * 2, "n_predict": 2})
                assert [body[field] for body in some] == [[said(own)] * 2 for own in markers]
        text = {"prompt": f"what is {markers[0]} in multimodal_data?", "n_predict": 2}
        assert [body["prompt"] for body in await told_to_both(it, NATIVE, text)] == [text["prompt"]] * 2
