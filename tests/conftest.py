"""How ``make test`` shares out the tests, and what holds for all of them."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is.
settings.register_profile(
    "any machine", max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")
# Slot files of managed servers are where a test expects them, whether or not this machine has a place in memory.
os.environ["RUNTIME_DIRECTORY"] = "/nonexistent/llamaslot"


def pytest_sessionstart(session: pytest.Session) -> None:
    """Have each worker begin to import the tests with another file. On a fresh checkout pytest rewrites all assertions:
    12 s of CPU time, and three workers that import in the same order would do it three times. Garbage collections would
    take 7 s more."""
    worker: dict[str, object] = getattr(session.config, "workerinput", {})
    if not worker or len(session.config.args) < 2:
        return
    gc.disable()
    root = session.config.rootpath
    files = [path for arg in session.config.args for path in sorted(Path(root, arg).glob("test_*.py"))]
    first = int(str(worker["workerid"]).removeprefix("gw")) * len(files) // int(str(worker["workercount"]))
    for path in (*files[first:], *files[:first]):
        with contextlib.suppress(Exception):  # told when it is collected
            importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))


@pytest.fixture(scope="session", autouse=True)
def no_temporary_files_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the last test of a worker when any of its tests, or a process that they started, has left a file in the
    directory for temporary files."""
    tmp_path_factory.getbasetemp()  # pytest keeps those of its last runs, beside this directory
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="llamaslot-tests-") as directory,
    ):
        os.chmod(directory, 0o755)  # some tests look at their files as another user
        patch.setenv("TMPDIR", directory)
        patch.setattr(tempfile, "tempdir", directory)
        yield
        assert os.listdir(directory) == []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First those on the real llama.cpp, each file on one worker, so that its servers are started once. Then all
    others, one by one, on whichever worker is free. Last what is marked ``alone``: on one worker, with nothing beside.
    """
    items.sort(key=_part)
    for item in items:
        if item.get_closest_marker("alone") is not None:
            item.add_marker(pytest.mark.xdist_group("alone"))
        elif item.get_closest_marker("real") is not None and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what was imported and collected out of every later garbage collection. Refuse to go on without groups: what
    must be alone would not be."""
    gc.enable()
    gc.collect()
    gc.freeze()
    if getattr(session.config.option, "loadgroup", False):
        grouped = [item for item in session.items if item.get_closest_marker("xdist_group") is not None]
        if not all("@" in item.nodeid for item in grouped):
            pytest.exit("this pytest-xdist forms no groups with this pytest", returncode=3)


def _part(item: pytest.Item) -> int:
    if item.get_closest_marker("alone") is not None:
        return 3
    if item.get_closest_marker("real") is not None:
        return 0
    return 1 if item.get_closest_marker("xdist_group") is not None else 2
