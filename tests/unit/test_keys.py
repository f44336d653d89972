"""The file of keys, and ``llamaslot keys``: what an operator sees, and what is on disk afterwards."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from llamaslot import cli
from llamaslot.config.keys import Key, digest_of, editing, made_now, new_key, read_keys
from llamaslot.errors import ConfigError

Run = Callable[..., Result]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the configuration says that keys are; not there yet."""
    (tmp_path / "config.yaml").write_text("backends: []\nauth: {keys_file: keys.json}\n")
    return tmp_path / "keys.json"


@pytest.fixture
def run(path: Path) -> Run:
    def run(command: str, *words: str) -> Result:
        config = str(path.parent / "config.yaml")
        return CliRunner().invoke(cli.main, ["keys", command, "--config", config, *words])

    return run


def names(path: Path) -> list[str]:
    return [key.name for key in read_keys(path)[0]]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- the command


def test_add_prints_the_key_and_keeps_its_digest(run: Run, path: Path) -> None:
    """Nothing else on stdout; the key is nowhere on disk. A configuration with other faults does not matter."""
    result = run("add", "ada", "--max-running", "2", "--max-waiting", "0", "--admin")
    key = result.stdout.strip()
    assert (result.exit_code, result.stdout) == (0, f"{key}\n")
    assert key.startswith("sk-llamaslot-")
    assert len(key) > 50
    assert "ada" in result.stderr
    assert key not in path.read_text()
    (entry,) = read_keys(path)[0]
    assert (entry.name, entry.digest, entry.max_running, entry.max_waiting) == ("ada", digest_of(key), 2, 0)
    assert entry.is_admin
    assert entry.created is not None
    assert mode(path) == 0o600
    assert sorted(os.listdir(path.parent)) == ["config.yaml", "keys.json"]


def test_no_two_keys_are_alike() -> None:
    """They are random."""
    assert len({new_key() for _ in range(100)}) == 100


def test_ls_lists_names_and_limits(run: Run) -> None:
    """In the order in which they were made."""
    run("add", "zoe")
    run("add", "ada", "--max-running", "2", "--admin")
    lines = run("ls").stdout.replace("1 s", "now").splitlines()  # it may have taken one
    assert [line.split() for line in lines[:3]] == [
        ["NAME", "AGE", "MAX", "RUNNING", "MAX", "WAITING", "ADMIN"],
        ["zoe", "now", "-", "-"],
        ["ada", "now", "2", "-", "yes"],
    ]
    assert lines[3].startswith("2 keys in ")


def test_rm_takes_keys_away(run: Run, path: Path) -> None:
    """Those that are named, or none if one of the names is unknown."""
    for name in ("ada", "bob", "eve"):
        run("add", name)
    refused = run("rm", "ada", "nobody")
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "no key of nobody; nothing was changed" in refused.stderr
    assert names(path) == ["ada", "bob", "eve"]
    assert run("rm", "ada", "eve").exit_code == 0
    assert names(path) == ["bob"]
    run("rm", "bob")
    assert run("ls").stdout == f"0 keys in {path}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("add", "a b"), "a b: a name should be 1 to 63 letters"),
        (("add", "-"), "a name should be"),
        (("add", "ada"), "ada has a key already: choose another name, or remove the old key"),
        (("add", "bob", "--max-running", "0"), "0 is not in the range x>=1"),
        (
            ("ls", "--file", "/nowhere/keys.json"),
            "there is no such file; make it with: llamaslot keys add NAME",
        ),
        (("add", "bob", "--file", "/nowhere/keys.json"), "its directory cannot be opened"),
        (("ls", "--config", "none.yaml"), "none.yaml: 1 fault"),
    ],
)
def test_what_can_not_be_done_is_said(run: Run, words: tuple[str, ...], said: str) -> None:
    """Exit code 2, nothing on stdout."""
    run("add", "ada")
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_a_configuration_without_keys_names_what_is_missing(run: Run, path: Path) -> None:
    """And --file does without it."""
    (path.parent / "config.yaml").write_text("backends: []")
    assert "auth.keys_file: is missing" in run("add", "ada").stderr
    assert run("add", "ada", "--file", str(path)).exit_code == 0
    assert names(path) == ["ada"]


# --- the file


def test_a_file_keeps_its_owner_and_mode(path: Path) -> None:
    """Readable for the group if it was; for others and writable for the group it is not any more. A link stays one."""
    path.write_text("{}")
    path.chmod(0o664)
    if os.geteuid() == 0:
        os.chown(path, 1234, 2345)
    link = path.parent / "link" / "keys.json"
    link.parent.mkdir()
    link.symlink_to(path)
    before = path.stat()
    with editing(link) as keys:
        keys.append(made_now("ada", new_key()))
    after = path.stat()
    assert link.is_symlink()
    assert (after.st_uid, after.st_gid, mode(path)) == (before.st_uid, before.st_gid, 0o640)
    assert after.st_ino != before.st_ino
    assert names(link) == ["ada"]
    assert os.listdir(link.parent) == ["keys.json"]


def test_a_change_that_fails_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is the old one, and no half-written one lies about."""
    with editing(path) as keys:
        keys.append(made_now("ada", new_key()))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left"), editing(path) as keys:
        keys.clear()
    assert path.read_bytes() == before
    assert len(os.listdir(path.parent)) == 2


def test_another_programs_file_is_not_taken_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its owner, llamaslot itself for one, could not read it any more."""
    path.write_text("{}")
    before = path.stat()

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.fchown", refused)
    real = os.fstat

    def others(fd: int) -> os.stat_result:
        fields = list(real(fd))
        fields[4] += 1
        return os.stat_result(fields)

    monkeypatch.setattr("os.fstat", others)
    with pytest.raises(ConfigError, match="do this as that user, or as root"), editing(path):
        pass
    monkeypatch.undo()
    assert path.stat().st_ino == before.st_ino


def test_two_who_edit_at_once_lose_nothing(path: Path) -> None:
    """The second waits for the first."""

    def add(name: str) -> None:
        with editing(path) as keys:
            keys.append(made_now(name, new_key()))

    threads = [threading.Thread(target=add, args=(f"user{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names(path)) == [f"user{n}" for n in range(8)]


GOOD = {"name": "ada", "digest": digest_of("x")}


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "is empty; a file without keys is {}"),
        ("{", "is not JSON: "),
        ("[]", "the file: should be a mapping with the keys keys"),
        ({"kyes": []}, "kyes: unknown key; did you mean keys?"),
        ({"keys": {}}, "keys: should be a list"),
        ({"keys": [{"name": "ada"}]}, "keys[0].digest: is missing"),
        (
            {"keys": [GOOD | {"digest": "sk-llamaslot-secret"}]},
            "keys[0].digest: should be sha256: and 64 digits",
        ),
        ({"keys": [GOOD | {"name": "a/b"}]}, "keys[0].name: a name should be"),
        ({"keys": [GOOD | {"max_running": 0}]}, "keys[0].max_running: should be greater than 0"),
        ({"keys": [GOOD | {"max_waiting": True}]}, "keys[0].max_waiting: should be a number, not on"),
        ({"keys": [GOOD | {"admin": True}]}, "keys[0].admin: unknown key"),
        ({"keys": [GOOD, GOOD | {"digest": digest_of("y")}]}, "keys[1].name: keys[0] has the same name ada"),
        ({"keys": [GOOD, GOOD | {"name": "bob"}]}, "keys[1].digest: keys[0] has the same digest;"),
    ],
)
def test_a_broken_file_says_where(path: Path, content: object, fault: str) -> None:
    """And repeats no secret."""
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError) as caught:
        read_keys(path)
    assert any(line.startswith(fault) for line in caught.value.faults), caught.value.faults
    assert "secret" not in str(caught.value)
    assert caught.value.source == str(path)


def test_what_is_no_file_of_keys_is_not_waited_for(tmp_path: Path) -> None:
    """A pipe, a directory, a device, and what anybody could write to."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "open").write_text("{}")
    (tmp_path / "open").chmod(0o666)
    for path, said in (
        (tmp_path / "pipe", "is not a regular file"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "is not a regular file"),
        (tmp_path / "open", "every user may write to it"),
        (tmp_path / "none", "there is no such file"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_keys(path)


def test_an_entry_can_be_written_by_hand(path: Path) -> None:
    """Name and digest are enough; the digest is that of ``sha256sum``."""
    digest = "sha256:2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    path.write_text(json.dumps({"keys": [{"name": "ada", "digest": digest}]}))
    (entry,) = read_keys(path)[0]
    assert entry == Key(name="ada", digest=digest_of("x"))


def test_other_words_for_rm_lead_to_it(run: Run) -> None:
    """Nothing is removed by them."""
    result = run("remove", "ada")
    assert result.exit_code == 2
    assert "llamaslot keys rm NAME" in result.stderr
