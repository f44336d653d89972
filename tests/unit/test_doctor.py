"""``llamaslot doctor``: what a journal shows, what this machine shows, and the report."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from llamaslot import cli
from llamaslot.cli.doctor import examine
from llamaslot.cli.doctor.findings import Finding, lines
from llamaslot.cli.doctor.machine import holder, of_machine
from llamaslot.cli.doctor.running import of_backend, of_journal
from llamaslot.cli.running import Refused, Running
from llamaslot.config.load import Config
from llamaslot.store.directory_lock import DirectoryLock

SLOT = {"id": 0, "state": "free", "n_tokens": 0}
BACKEND: dict[str, Any] = {
    "name": "gpu0",
    "health": "up",
    "why_down": None,
    "drain": None,
    "n_ctx": 8192,
    "warnings": [],
    "assist": {"is_on": True, "why": None, "remedy": None},
    "slots": [SLOT, SLOT],
}
STATUS: dict[str, Any] = {"backends": [BACKEND], "too_long": {"n": 0, "n_tokens": 0}}


def decision(user: int, queued_s: float = 0.0, n_reused: int = 900, seconds: float = 0.1) -> dict[str, Any]:
    save = {"step": "save", "is_done": True, "size_bytes": 10_000_000, "seconds": seconds}
    return {
        "at": 1000.0 + user,
        "user": f"key:{user}",
        "queued_s": queued_s,
        "n_expected": 1000,
        "n_reused": n_reused,
        "acts": [save],
    }


def found(findings: Any) -> dict[str, str]:
    return {its.check: its.remedy for its in findings if its.is_found}


def test_a_journal_in_which_nothing_is_wrong() -> None:
    """Two users on two slots, whose contexts are where they were left."""
    findings = list(of_journal(STATUS, [decision(i % 2) for i in range(40)]))
    assert {its.state for its in findings} == {"ok"}
    assert "save 95.4 MiB/s (40)" in findings[-1].text


def test_too_few_decisions_tell_nothing() -> None:
    findings = list(of_journal(STATUS, []))
    assert [its.state for its in findings] == ["skipped", "ok", "skipped", "skipped"]
    assert findings[0].text.startswith("the journal has too few requests (0)")


def test_too_few_slots() -> None:
    """More users than slots is no fault while nobody waits."""
    busy = [decision(i % 6, queued_s=3.0 * (i % 2)) for i in range(40)]
    assert found(of_journal(STATUS, busy))["number of slots"].startswith("llama-server -np 6,")
    assert found(of_journal(STATUS, [decision(i % 6) for i in range(40)])) == {}


def test_slots_that_are_too_small() -> None:
    """The remedy is for all slots together, with room for an answer."""
    status = {**STATUS, "too_long": {"n": 3, "n_tokens": 20_000}}
    assert found(of_journal(status, []))["context per slot"].startswith("llama-server -c 49152 ")


def test_contexts_that_others_take_away() -> None:
    """What was forecast and is not there."""
    missed = [decision(i % 2, n_reused=10 if i % 3 == 0 else 1000) for i in range(40)]
    assert "--cache-ram 0" in found(of_journal(STATUS, missed))["contexts found again"]


def test_a_slow_disk() -> None:
    assert "idle_save_s" in found(of_journal(STATUS, [decision(1, seconds=4.0)]))["save and restore"]


@pytest.mark.parametrize(
    ("its", "check"),
    [
        ({"health": "down", "why_down": "it refuses"}, "gpu0: connection"),
        ({"assist": {"is_on": False, "why": "x", "remedy": "llama-server --y"}}, "gpu0: slots"),
        ({"warnings": ["slot_save_path is not set"]}, "gpu0: slot files"),
        ({}, None),
    ],
)
def test_what_the_status_says(its: dict[str, Any], check: str | None) -> None:
    wrong = found(of_backend({**BACKEND, **its}))
    assert list(wrong) == ([check] if check else [])


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    (tmp_path / "kv").mkdir()
    path = tmp_path / "config.yaml"
    backend = {"name": "gpu0", "url": "http://127.0.0.1:1", "slot_save_path": "kv"}
    path.write_text(
        yaml.safe_dump(
            {"listen": {"port": 2}, "backends": [backend], "store": {"meta_dir": "meta", "quota": 0}}
        )
    )
    return path


def test_a_clock_that_is_wrong(config_path: Path) -> None:
    """A snapshot from the future: this machine's clock was set back."""
    config = Config.load(config_path)
    assert found(of_machine(config)) == {}
    ahead = config_path.parent / "kv" / "ls-0123456789abcdef.json"
    ahead.touch()
    os.utime(ahead, (4e9, 4e9))
    assert found(of_machine(config)) == {"clock": "timedatectl set-ntp true"}
    assert "last used in the future, at 2096-10-0" in next(
        its.text for its in of_machine(config) if its.check == "clock"
    )
    assert [its.name for its in (config_path.parent / "kv").iterdir()] == [ahead.name]


def test_whether_another_llamaslot_is_there(tmp_path: Path) -> None:
    """Its pid while it holds the lock; the file alone says nothing."""
    assert holder(tmp_path) is None
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    assert holder(tmp_path) == os.getpid()
    lock.release()
    assert holder(tmp_path) is None


def run(*words: str) -> Result:
    return CliRunner().invoke(cli.main, ["doctor", *words])


def test_a_server_that_does_not_answer(config_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says so, and one if it answers on a port that llama-server takes by itself."""

    async def answers(url: str) -> bool:
        return url.endswith(":9931")

    monkeypatch.setattr(examine, "_answers", answers)
    result = run("--config", str(config_path))
    assert result.exit_code == 1
    assert "FAULT  gpu0: connection" in result.stdout
    assert "-> backends[].url: http://127.0.0.1:9931, or llama-server --port 1" in result.stdout


def test_a_llamaslot_that_refuses_is_not_asked_more(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong key is a line of the report."""

    def refuse(*_: object) -> None:
        raise Refused(401, "Invalid API Key")

    monkeypatch.setattr(Running, "get", refuse)
    result = run("--config", str(config_path))
    assert result.exit_code == 0, result.output
    assert "serves, and does not tell more: Invalid API Key" in result.stdout


def test_a_directory_in_use_is_left_alone(config_path: Path) -> None:
    """By a llamaslot that has another configuration."""
    with (config_path.parent / "kv" / ".llamaslot.lock").open("wb") as lock:
        lock.write(b"4711\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another llamaslot (pid 4711) uses" in run("--config", str(config_path)).stdout


def test_a_configuration_with_faults(tmp_path: Path) -> None:
    result = run("--config", str(tmp_path / "none.yaml"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "there is no such file" in result.stderr


def test_the_report() -> None:
    """One line per check, the remedy below, a count at the end."""
    assert lines([Finding("a", "ok", "fine"), Finding("long", "fault", "bad", "llama-server -x")]) == [
        "ok     a     fine",
        "FAULT  long  bad",
        "             -> llama-server -x",
        "1 found in 2 checks",
    ]
    narrow = lines([Finding("long", "note", "two words", "llama-server -np 4 --slot-save-path /kv")], 40)
    assert narrow[:3] == [
        "note   long  two words",
        "             -> llama-server -np 4",
        "                --slot-save-path /kv",
    ]
