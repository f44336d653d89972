"""The wheel in an empty environment: ``pip install 'llamaslot[embedded]'``, ``llamaslot demo``. Needs an index."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import models
from tests.support.forked import die_with_parent
from tests.support.real import free_port
from tests.support.source import REPOSITORY
from tests.support.users import Client

pytestmark = [pytest.mark.soak, pytest.mark.real, pytest.mark.timeout(900)]


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A venv with the wheel of this checkout and the embedded llama.cpp, and nothing else."""
    subprocess.run(
        [sys.executable, REPOSITORY / ".ci/man.py", REPOSITORY / "build/man/llamaslot.1"], check=True
    )
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, REPOSITORY], check=True)
    [wheel] = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    subprocess.run([tmp_path / "venv/bin/pip", "install", "--quiet", f"{wheel}[embedded]"], check=True)
    assert (tmp_path / "venv/share/man/man1/llamaslot.1").is_file()
    return tmp_path / "venv"


async def test_the_wheel_serves_a_demo(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the checkout is used; it ends with exit code 0."""
    port, model = free_port(), models.dense(tmp_path)
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    process = await asyncio.create_subprocess_exec(
        *(environment / "bin/llamaslot", "demo", "--port", str(port), "--model", model, "--slots", "1"),
        cwd=tmp_path,
        preexec_fn=die_with_parent,
    )
    async with Client(f"http://127.0.0.1:{port}") as client, asyncio.timeout(60):
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stream": True}
        while (reply := await client.ask("/v1/chat/completions", body)).error:
            assert process.returncode is None
            await asyncio.sleep(0.2)
        assert len(reply.text) == 4
        process.terminate()
        assert await process.wait() == 0
