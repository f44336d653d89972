"""What is found out when the real llama.cpp is met."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from llamaslot.backend.probes import Files, Probes
from llamaslot.cache.reuse import CacheKind
from llamaslot.llama.client import LlamaServer
from llamaslot.scheduling.rates import Rates
from llamaslot.store import Catalog
from llamaslot.store.quota import Limits
from tests.support import models
from tests.support.real import RealServer

pytestmark = pytest.mark.real


@pytest.mark.parametrize("kind", ["swa", "recurrent"])
async def test_slot_files_keep_checkpoints(tmp_path: Path, kind: str) -> None:
    """Those of a build of October 2026 do, whatever the window; nothing is left of the probe."""
    model = {"swa": models.swa, "recurrent": models.recurrent}[kind](tmp_path)
    cache_kind = {"swa": CacheKind.SWA, "recurrent": CacheKind.RECURRENT}[kind]
    async with RealServer(model, tmp_path / "kv", slots=1) as server:
        catalog = Catalog(tmp_path / "kv", Limits(1 << 30), now=time.time, on_drop=lambda _: None)
        await catalog.open()
        api = LlamaServer(server.url, None)
        probes = Probes(api, catalog, Rates())
        assert await probes.checkpoints(0) == Files(True, cache_kind)
        assert probes.warnings == []
        await catalog.settle()
        catalog.close()
        await api.close()
    assert [path.name for path in (tmp_path / "kv").iterdir() if path.name.startswith("ls-")] == []
