"""``llamaslot bench --vs`` in front of the real llama.cpp."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from llamaslot.bench.result import figures, load
from tests.support import models
from tests.support.stack import Stack, program

pytestmark = [pytest.mark.real]


async def test_its_numbers_are_those_of_the_servers(tmp_path: Path) -> None:
    """Four users on two slots, through llamaslot and on llama-server alone: what the answers tell agrees with each
    server's own counter within 2 %, and llamaslot reuses what llama-server has lost.
    Without pauses each user finds its slot overwritten."""
    model = models.dense(tmp_path)
    sizes = ("--users", "4", "--turns", "2", "--context", "1500", "--shared", "100", "--question", "40")
    more = ("--answer", "8", "--think", "0", "--json", "result.json", "--report", "report.html")
    async with (
        Stack(model, tmp_path / "a", slots=2, context=4096) as through,
        Stack(model, tmp_path / "b", alone=True, slots=2, context=4096) as alone,
    ):
        process = await asyncio.create_subprocess_exec(
            *(
                *program(),
                "bench",
                through.url,
                "--vs",
                f"{alone.url}/v1",
                "--vs-name",
                "alone",
                *sizes,
                *more,
            ),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        out, _ = await asyncio.wait_for(process.communicate(), 100)
    assert process.returncode == 0, out.decode()
    result = load(tmp_path / "result.json")
    assert [side.name for side in result.sides] == ["llamaslot", "alone"]
    through_it, alone_it = map(figures, result.sides)
    for its in (through_it, alone_it):
        assert (its.n_answered, its.n_failed) == (8, 0)
        assert its.disagreement == pytest.approx(0.0, abs=0.02)
    assert through_it.follow_up_reuse is not None
    assert through_it.follow_up_reuse > 0.8  # so little is now and then computed sooner than restored
    assert alone_it.follow_up_reuse is not None
    assert alone_it.follow_up_reuse < 0.6
    assert (
        "sooner" in (tmp_path / "report.html").read_text()
        or "later" in (tmp_path / "report.html").read_text()
    )
