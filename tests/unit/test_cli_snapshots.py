"""``llamaslot snapshots``: what an operator sees of the directory, and what goes from it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llamaslot import cli
from llamaslot.cache.content import SnapshotKind
from llamaslot.cli.output import several, span, table
from llamaslot.llama.identity import Identity
from llamaslot.scheduling.rates import Rates
from llamaslot.store.directory_lock import DirectoryLock
from tests.support.snapshots import Shelter, some_tokens
from tests.support.trees import Tree, words

OURS, OTHERS = (Identity({"n_vocab": n}, {i: -1.0 * i for i in range(8)}).to_text() for n in (1, 2))
Run = Callable[..., Result]


def test_the_store_of_run_needs_no_configuration(tmp_path: Path) -> None:
    """That of its only model, or of the one whose part is named."""
    for part in ("a-1", "b-2"):
        (tmp_path / part).mkdir()
        meta = tmp_path / ".meta" / part
        meta.mkdir(parents=True)
        backends = [{"url": "http://127.0.0.1:8080", "slot_save_path": str(tmp_path / part)}]
        (meta / "config.yaml").write_text(
            json.dumps({"backends": backends, "store": {"meta_dir": str(meta)}})
        )
        if part == "a-1":
            listed = CliRunner().invoke(cli.main, ["snapshots", "ls", "--store", str(tmp_path)])
            assert (listed.exit_code, "a-1" in listed.stdout) == (0, True), listed.output
    listed = CliRunner().invoke(cli.main, ["snapshots", "ls", "--store", str(tmp_path)])
    assert (listed.exit_code, "which model?" in listed.output) == (2, True)
    listed = CliRunner().invoke(cli.main, ["snapshots", "ls", "--store", str(tmp_path / "b-2")])
    assert (listed.exit_code, "b-2" in listed.stdout) == (0, True)
    nothing = CliRunner().invoke(cli.main, ["snapshots", "ls", "--store", str(tmp_path / ".meta")])
    assert (nothing.exit_code, "no 'llamaslot run' has used" in nothing.output) == (2, True)


class StoppedStore(Shelter):
    """A directory as llamaslot leaves it: stopped, with a configuration beside it and a model that was served."""

    def __init__(self, directory: Path) -> None:
        (directory / "kv").mkdir()
        super().__init__(directory / "kv", 1 << 20)
        self.time = time.time() - 86_400
        self.root = directory
        self.ids: list[str] = []
        rates = Rates()
        rates.model = OURS
        (directory / "llama.rates.json").write_text(json.dumps(rates.to_json()))
        self.configure()

    def configure(self, **store: object) -> None:
        lines = "".join(f", {key}: {value}" for key, value in ({"min_free": 0} | store).items())
        (self.root / "config.yaml").write_text(
            "backends: [{url: 'http://127.0.0.1:8080', slot_save_path: kv}]\n"
            f"store: {{meta_dir: {self.root}{lines}}}\n"
        )

    async def fill(self) -> None:
        """A pinned trunk; a leaf that was asked for twice; one of another model; another leaf."""
        await self.open()
        trunk = await self.save(
            some_tokens(400, 0), 4_000, fingerprint=OURS, kind=SnapshotKind.TRUNK, is_prewarmed=True
        )
        leaf = await self.save(some_tokens(1_500, 1), 9_000, fingerprint=OURS)
        other = await self.save(some_tokens(300, 2), 3_000, fingerprint=OTHERS)
        last = await self.save(some_tokens(600, 3), 5_000, fingerprint=OURS)
        self.ids = [each.id for each in (trunk, leaf, other, last)]
        self.catalog.touch(leaf.id)
        self.catalog.touch(leaf.id)
        await self.catalog.settle()
        self.catalog.close()

    def kept(self) -> list[int]:
        """The numbers of those that are whole on disk."""
        there = {entry.name for entry in self.directory.iterdir()}
        return [i for i, id_ in enumerate(self.ids) if {f"{id_}.kv", f"{id_}.json"} <= there]


@pytest.fixture
def stopped(tmp_path: Path) -> StoppedStore:
    stopped = StoppedStore(tmp_path)
    asyncio.run(stopped.fill())
    return stopped


@pytest.fixture
def run(stopped: StoppedStore) -> Run:
    def run(*words: str) -> Result:
        command = ["snapshots", words[0], "--config", str(stopped.root / "config.yaml"), *words[1:]]
        return CliRunner().invoke(cli.main, command)

    return run


def break_one(stopped: StoppedStore, number: int = 1) -> None:
    """Its file has the right size and another content."""
    path = stopped.directory / f"{stopped.ids[number]}.kv"
    path.write_bytes(bytes(path.stat().st_size))


# -- looking -------------------------------------------------------------------------------------------------------


def test_ls_shows_what_is_there(stopped: StoppedStore, run: Run) -> None:
    """The latest used first, in columns that line up, with a sum; foreign files are counted only."""
    (stopped.directory / "notes.txt").write_text("mine")
    result = run("ls")
    assert result.exit_code == 0
    heading, *rows, summary = result.output.splitlines()
    assert heading.split() == [
        "ID",
        "KIND",
        "TOKENS",
        "SIZE",
        "SHARED",
        "HITS",
        "AGE",
        "USED",
        "MODEL",
        "STATE",
    ]
    assert [row.split()[0] for row in rows] == [stopped.ids[i] for i in (1, 3, 2, 0)]
    words = {row.split()[0]: " ".join(row.split()[1:]) for row in rows}
    assert words[stopped.ids[0]].startswith("trunk, pinned 400 3.9 KiB 0 B 0 23 h 23 h ")
    assert words[stopped.ids[1]].startswith("leaf 1,500 8.8 KiB 0 B 2 ")
    assert words[stopped.ids[2]].endswith("(other)")
    assert words[stopped.ids[3]].startswith("leaf 600 ")
    assert len({row.index(" KiB") for row in rows}) == 1
    assert summary == f"4 snapshots, 20.5 KiB of 20.0 GiB, in {stopped.directory}; 1 other file left alone"


@pytest.mark.parametrize(
    ("order", "expected"),
    [("size", [1, 3, 0, 2]), ("tokens", [1, 3, 0, 2]), ("age", [0, 1, 2, 3]), ("hits", [1])],
)
def test_ls_sorts(stopped: StoppedStore, run: Run, order: str, expected: list[int]) -> None:
    """By what the operator wants to know."""
    rows = run("ls", "--sort", order).output.splitlines()[1:-1]
    assert [row.split()[0] for row in rows][: len(expected)] == [stopped.ids[i] for i in expected]


def test_json_has_all_that_is_known(stopped: StoppedStore, run: Run) -> None:
    """Raw numbers, for programs, and no word of what was said in it."""
    found = {item["id"]: item for item in json.loads(run("ls", "--json").output)}
    assert found.keys() == set(stopped.ids)
    leaf = found[stopped.ids[1]]
    assert (leaf["kind"], leaf["n_tokens"], leaf["size_bytes"], leaf["n_hits"]) == ("leaf", 1_500, 9_000, 2)
    assert (leaf["state"], leaf["is_pinned"]) == ("whole", False)
    assert found[stopped.ids[0]]["is_pinned"]
    assert not found[stopped.ids[2]]["is_of_model_served_last"]
    assert json.loads(run("show", stopped.ids[1], "--json").output) == leaf


def test_show_takes_the_beginning_of_an_id(stopped: StoppedStore, run: Run) -> None:
    """With or without ``ls-``; nothing, or too little, is refused in words."""
    text = run("show", stopped.ids[1][:9]).output
    assert text == run("show", stopped.ids[1][3:9]).output
    said = dict(line.split(None, 1) for line in text.splitlines())
    assert (said["id"], said["tokens"], said["hits"]) == (stopped.ids[1], "1,500", "2")
    assert said["size"] == "8.8 KiB (9,000 bytes)"
    assert said["created"].endswith("(23 h ago)")
    for name, why in (
        ("zz", "there is no such snapshot"),
        ("ls-", "several snapshots have such ids; give more characters"),
    ):
        refused = run("show", name)
        assert (refused.exit_code, refused.stderr) == (2, f"{name}: {why}\n")


def test_an_empty_directory_is_no_fault(tmp_path: Path, run: Run, stopped: StoppedStore) -> None:
    """There is just nothing."""
    stopped.configure()
    for id_ in stopped.ids:
        for suffix in (".kv", ".json"):
            os.unlink(stopped.directory / (id_ + suffix))
    assert run("ls").output == f"0 snapshots, 0 B of 20.0 GiB, in {stopped.directory}\n"
    assert run("gc").output == "nothing to remove\n"
    assert run("verify").output == "0 whole, 0 broken\n"


def test_without_a_directory_it_says_so(stopped: StoppedStore, run: Run) -> None:
    """Nothing is kept on disk, or the directory is not there, or the configuration has faults."""
    (stopped.root / "config.yaml").write_text("backends: [{url: 'http://127.0.0.1:8080'}]\n")
    assert "slot_save_path is not set: nothing is kept on disk" in run("ls").stderr
    (stopped.root / "config.yaml").write_text(
        "backends: [{url: 'http://127.0.0.1:8080', slot_save_path: gone}]\n"
    )
    assert (run("ls").exit_code, "cannot be read: No such file" in run("ls").stderr) == (2, True)
    (stopped.root / "config.yaml").write_text("quota: 3\n")
    assert run("ls").exit_code == 2


# -- removing ------------------------------------------------------------------------------------------------------


def test_rm_removes_what_is_named(stopped: StoppedStore, run: Run) -> None:
    """A pinned one too: the pin is against eviction, not against its owner."""
    dry = run("rm", "--dry-run", stopped.ids[0], stopped.ids[1][:10])
    assert dry.output.splitlines()[-1] == "2 snapshots would be removed, 12.7 KiB"
    assert stopped.kept() == [0, 1, 2, 3]
    done = run("rm", stopped.ids[0], stopped.ids[1][:10])
    assert done.output.splitlines()[-1] == "2 snapshots removed, 12.7 KiB"
    assert stopped.kept() == [2, 3]


def test_rm_of_one_that_is_not_there_removes_none(stopped: StoppedStore, run: Run) -> None:
    """A slip of the pen costs nothing."""
    assert run("rm", stopped.ids[0], "ls-zz").exit_code == 2
    assert stopped.kept() == [0, 1, 2, 3]


def test_gc_removes_what_cannot_be_used(stopped: StoppedStore, run: Run) -> None:
    """What a crash left and what is broken; foreign files stay."""
    break_one(stopped)
    stopped.put("ls-00000000000000aa.part", b"x" * 100)
    stopped.put("notes.txt")
    dry = run("gc", "--dry-run")
    assert stopped.ids[1] in dry.output
    assert "no slot file: it begins with 0x00000000" in dry.output
    assert "there is only .part" in dry.output
    assert "2 snapshots would be removed" in dry.output
    assert stopped.kept() == [0, 1, 2, 3]
    assert "2 snapshots removed" in run("gc").output
    assert stopped.kept() == [0, 2, 3]
    assert (stopped.directory / "notes.txt").exists()
    assert run("gc").output == "nothing to remove\n"


def test_gc_says_what_it_does_not_read(tmp_path: Path) -> None:
    """Rows that have changed are found by ``verify``: reading all of a large store takes long."""

    async def fill(tree: Tree) -> None:
        await tree.catalog.open()
        first = await tree.take(words(400, 1))
        second = await tree.take(words(600, 1), after=first.id)
        assert second.parts
        await tree.catalog.settle()
        tree.catalog.close()

    (directory := tmp_path / "kv").mkdir()
    asyncio.run(fill(Tree(directory)))
    extent = next(directory.glob("*.ext"))
    data = bytearray(extent.read_bytes())
    data[len(data) // 3] ^= 1
    extent.write_bytes(data)
    config = tmp_path / "config.yaml"
    config.write_text(
        "backends: [{url: 'http://127.0.0.1:8080', slot_save_path: kv}]\n"
        f"store: {{meta_dir: {tmp_path}, min_free: 0}}\n"
    )
    said = CliRunner().invoke(cli.main, ["snapshots", "gc", "--dry-run", "--config", str(config)]).output
    assert said.startswith("nothing to remove\nonly sizes and headers were compared: verify reads the files")
    assert "1 broken" in CliRunner().invoke(cli.main, ["snapshots", "verify", "--config", str(config)]).output


def test_gc_removes_those_of_other_models_when_asked(stopped: StoppedStore, run: Run) -> None:
    """A model may come back, so not without --others; and not before it is known which one is served."""
    assert run("gc").output == "nothing to remove\n"
    assert "of another model" in run("gc", "--others").output
    assert stopped.kept() == [0, 1, 3]
    os.unlink(stopped.root / "llama.rates.json")
    refused = run("gc", "--others")
    assert (refused.exit_code, "start llamaslot with it once" in refused.stderr) == (2, True)


def test_no_model_of_several_backends_is_another_one(stopped: StoppedStore, run: Run) -> None:
    """They share the directory. While the model of one is not known, nothing is removed."""
    config = stopped.root / "config.yaml"
    config.write_text(
        "backends: [{url: 'http://127.0.0.1:8080', slot_save_path: kv},"
        " {name: b, url: 'http://127.0.0.1:8082', slot_save_path: ../" + stopped.root.name + "/kv}]\n"
        f"store: {{meta_dir: {stopped.root}, min_free: 0}}\n"
    )
    assert run("gc", "--others").exit_code == 2
    rates = Rates()
    rates.model = OTHERS
    (stopped.root / "b.rates.json").write_text(json.dumps(rates.to_json()))
    assert run("gc", "--others").exit_code == 0
    assert stopped.kept() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("limits", "left", "why"),
    [
        ({"quota": 14_000}, [0, 1], "store.quota"),
        ({"max_files": 3}, [0, 1, 3], "store.max_files"),
        ({"quota": "100B"}, [0], "store.quota"),
        ({"min_free": 1 << 60}, [0], "store.min_free"),
    ],
)
def test_gc_keeps_to_the_limits(
    stopped: StoppedStore, run: Run, limits: dict[str, int], left: list[int], why: str
) -> None:
    """Another model's goes first, then what was left behind; what is pinned stays."""
    stopped.configure(**limits)
    assert f"worth least: {why}" in run("gc", "--dry-run").output
    run("gc")
    assert stopped.kept() == left


def test_verify_reads_the_headers(stopped: StoppedStore, run: Run) -> None:
    """And says which are broken; only --remove removes them."""
    assert (run("verify").exit_code, run("verify").output) == (0, "4 whole, 0 broken\n")
    break_one(stopped)
    found = run("verify")
    assert found.exit_code == 1
    assert found.output.splitlines()[-1] == "3 whole, 1 broken"
    assert run("verify", stopped.ids[0]).exit_code == 0
    dry = run("verify", "--remove", "--dry-run")
    assert (dry.exit_code, "1 snapshot would be removed" in dry.output) == (1, True)
    assert stopped.kept() == [0, 1, 2, 3]
    done = run("verify", "--remove")
    assert (done.exit_code, "1 snapshot removed" in done.output) == (0, True)
    assert stopped.kept() == [0, 2, 3]


@pytest.mark.parametrize("words", [("rm", "ID"), ("gc",), ("verify", "--remove")])
def test_what_changes_files_needs_the_lock(stopped: StoppedStore, run: Run, words: tuple[str, ...]) -> None:
    """While llamaslot runs it refuses, and says whom to stop; what only looks works."""
    break_one(stopped)
    words = tuple(stopped.ids[0] if word == "ID" else word for word in words)
    lock = DirectoryLock(stopped.directory)
    lock.acquire()
    try:
        refused = run(*words)
        assert refused.exit_code == 2
        assert f"is in use by another llamaslot (pid {os.getpid()}): stop it" in refused.stderr
        assert "--dry-run, ls, show and verify work at any time" in refused.stderr
        assert stopped.kept() == [0, 1, 2, 3]
        assert run(words[0], "--dry-run", *words[1:]).exit_code in (0, 1)
        assert run("ls").exit_code == run("show", stopped.ids[0]).exit_code == 0
        assert run("verify").exit_code == 1
    finally:
        lock.release()
    assert run(*words).exit_code == 0


def test_what_is_left_opens_cleanly(stopped: StoppedStore, run: Run) -> None:
    """A llamaslot that starts afterwards finds nothing to repair."""
    break_one(stopped)
    run("gc", "--others")

    async def reopened() -> set[str]:
        await stopped.reopen()
        await stopped.catalog.settle()
        found = set(stopped.catalog.snapshots)
        stopped.catalog.check()
        stopped.catalog.close()
        return found

    assert asyncio.run(reopened()) == {stopped.ids[0], stopped.ids[3]}


def test_the_command_line_itself(stopped: StoppedStore) -> None:
    """As an operator types it."""
    done = subprocess.run(
        [sys.executable, "-m", "llamaslot", "snapshots", "ls", "--config", str(stopped.root / "config.yaml")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "4 snapshots, " in done.stdout


# -- words ---------------------------------------------------------------------------------------------------------


def test_spans() -> None:
    """One unit, rounded down."""
    said = [span(s) for s in (-5, 0.4, 1, 59.9, 60, 3_599, 3_600, 86_399, 86_400, 1e7)]
    assert said == ["now", "now", "1 s", "59 s", "1 min", "59 min", "1 h", "23 h", "1 d", "115 d"]
    assert [several(n, "file", "files") for n in (0, 1, 2_000)] == ["0 files", "1 file", "2,000 files"]


def test_tables_line_up() -> None:
    """Numbers end together, words begin together, and no line has blanks at its end."""
    assert table(("NAME", "N"), [("a", "10"), ("long", "9")], {"N"}) == ["NAME   N", "a     10", "long   9"]
