"""Routes that an operator has allowed, and that change what the model computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import models
from tests.support.stack import Stack
from tests.support.users import Client

pytestmark = pytest.mark.real


async def test_lora_scales_set_for_everybody_end_what_the_slots_held(tmp_path: Path) -> None:
    """Nothing of before is believed afterwards, and requests are served as if the server had restarted."""
    allowed = {"passthrough": {"allow": ["/lora-adapters"]}}
    async with (
        Stack(models.dense(tmp_path), tmp_path, settings=allowed) as stack,
        Client(stack.url) as client,
    ):
        prompt = {"prompt": "a context of some length " * 40, "max_tokens": 4}
        await client.post("/v1/completions", prompt)
        held = [slot["n_tokens"] for slot in (await stack.status())["backends"][0]["slots"]]
        assert max(held) > 900
        async with client.session.post(stack.url + "/lora-adapters", json=[]) as response:
            assert response.status == 200
        answer = await client.post("/v1/completions", prompt)
        assert answer["usage"]["prompt_tokens"] > 900
        assert "reconnects to llama-server" in stack.llamaslot.log
