"""``llamaslot status`` and ``top``: what is shown of a status."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from llamaslot import cli
from llamaslot.cli.running import NotRunning, Running
from llamaslot.cli.status import _drawn
from llamaslot.errors import LlamaslotError

SLOT = {"id": 0, "state": "HOT", "n_tokens": 4096, "is_dirty": True, "prefill": None, "user": None}
BUSY = {**SLOT, "id": 1, "state": "LEASED", "user": "key:ada", "prefill": {"n_done": 512, "n_tokens": 60_211}}
FREE = {**SLOT, "id": 2, "state": "FREE", "n_tokens": 0}
GPU: dict[str, Any] = {
    "name": "gpu0", "health": "up", "why_down": None, "drain": None, "model": "m.gguf", "n_ctx": 8192,
    "warnings": ["slots cannot be saved"],
    "assist": {"is_on": True, "why": None, "remedy": None}, "slots": [SLOT, BUSY, FREE],
}  # fmt: skip
DOWN = {
    **GPU, "name": "gpu1", "health": "down", "why_down": "llama-server refuses", "slots": [], "assist": None,
    "warnings": [], "model": None,
}  # fmt: skip
ASIDE = {
    **DOWN,
    "name": "gpu2",
    "health": "up",
    "why_down": None,
    "assist": {"is_on": False, "why": "a reason", "remedy": "a flag"},
}
STATUS: dict[str, Any] = {
    "version": "1", "backends": [GPU, DOWN, ASIDE], "queue": 2, "rewrite": [],
    "snapshots": {"n": 1, "size_bytes": 3 << 29, "quota_bytes": 20 << 30},
    "users": [{"id": "key:bob", "running": 0, "waiting": 2, "deficit_s": 0.0}],
}  # fmt: skip
FLIGHT = {
    "backend": "gpu0", "slot": 1, "stage": "prefill 512 of 60,211", "n_answered": None, "tokens_per_s": 248.4,
    "gives_way_to": "",
}  # fmt: skip
ENDED = {
    "at": 0.0, "total_s": 9.0, "queued_s": 0.2, "waited_s": 0.1, "first_s": 0.5, "user": "key:ada", "error": "",
    "text": "slot 1 held 9 of 10 tokens",
}  # fmt: skip
TODAY = {
    "n": 12, "share_reused": 0.571, "saved_s": 40.2, "saved_error_s": 8.7, "first_p50_s": 0.88, "first_p95_s": 22.0,
    "n_faults": 0, "n_unserved": 1,
}  # fmt: skip
ACTIVITY = {"in_flight": [FLIGHT], "ended": [ENDED], "today": TODAY}


@pytest.fixture
def config_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a llamaslot that answers."""
    monkeypatch.setattr(Running, "get", lambda self, page: ACTIVITY if "activity" in page else STATUS)
    path = tmp_path / "config.yaml"
    path.write_text("backends: [{url: 'http://127.0.0.1:8080'}]\n")
    return path


def test_one_table(config_path: Path) -> None:
    """That a person can paste into a chat."""
    result = CliRunner().invoke(cli.main, ["status", "--config", str(config_path)])
    assert result.stdout.splitlines() == [
        "llamaslot 1: 1 of 3 slots work, 2 wait; 1 snapshot, 1.5 GiB of 20.0 GiB",
        "today: 12 requests; 57% of prompt tokens reused, 40 s ± 8.7 s of prefill saved; "
        "half of the first tokens within 0.88 s, 95% within 22 s; 1 not served",
        "",
        "SLOT    STATE          TOKENS  USED  SAVED  USER  DOING",
        "gpu0/0  hot             4,096   50%  no",
        "gpu0/1  leased          4,096   50%  no     ada   prefill 512 of 60,211, 248/s",
        "gpu0/2  free",
        "gpu1    down",
        "gpu2    assist is off",
        "",
        "waiting: bob 2",
        "gpu0: slots cannot be saved",
        "gpu1: llama-server refuses",
        "gpu2: a reason. a flag",
    ]


@pytest.mark.parametrize(
    ("command", "others"),
    [
        (["status"], ["--url", "--store"]),
        (["top"], ["--url", "--store"]),
        (["drain", "gpu0"], ["--store"]),
        (["snapshots", "ls"], ["--store"]),
        (["reload"], []),
    ],
)
def test_without_a_configuration_other_ways_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], others: list[str]
) -> None:
    """Those that the command has."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.main, command)
    assert (result.exit_code, "config.yaml: 1 fault" in result.stderr) == (2, True)
    assert re.findall(r"--\w+", result.stderr) == ["--config", *others]


def test_top_draws_the_same_until_it_is_interrupted(
    config_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on while llamaslot is restarted."""
    n_slept = 0

    def sleep(seconds: float) -> None:
        nonlocal n_slept
        n_slept += 1
        if n_slept == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", sleep)
    answers = iter([STATUS, STATUS, ACTIVITY])

    def get(self: Running, page: str) -> Any:
        try:
            return next(answers)
        except StopIteration:
            raise NotRunning("no llamaslot answers") from None

    monkeypatch.setattr(Running, "get", get)
    result = CliRunner().invoke(cli.main, ["top", "--config", str(config_path)])
    assert result.exit_code == 0, result.output
    assert "no llamaslot answers" in result.stdout


def test_what_top_draws(config_path: Path) -> None:
    """The table, and the last requests; what is too wide is cut at its end."""
    console = Console(width=68, file=io.StringIO())
    console.print(_drawn(Running.of(config_path)))
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert lines[2].startswith("today: 12 requests; 57% of prompt tokens reused, 40 s")
    assert lines[6].endswith("ada   prefill 512 of 60…")
    assert "waiting: bob 2" in lines
    assert " ".join(lines[-1].split()).endswith("ada 0.3 s 0.5 s slot 1 held 9 of 10 tokens")


def test_a_narrow_top_still_says_why(config_path: Path) -> None:
    """In 44 columns, with fewer figures."""
    console = Console(width=44, file=io.StringIO())
    console.print(_drawn(Running.of(config_path), 44))
    assert isinstance(console.file, io.StringIO)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "gpu0/1 leased ada prefill 512 of…" in lines
    assert lines[-1].endswith("ada slot 1 held 9 of 10 tokens")


@pytest.mark.parametrize("answer", [{}, {"backends": 5}, {"backends": [{"name": "x"}], "version": "1"}])
@pytest.mark.parametrize("words", [("status",), ("reload",), ("drain", "gpu0"), ("doctor",)])
def test_what_is_no_llamaslot_is_told_in_a_line(
    words: tuple[str, ...], answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program answers with JSON of its own: no command ends with a traceback."""
    config_path = tmp_path / "config.yaml"
    config_path.write_text("backends: [{url: 'http://127.0.0.1:9'}]\n")
    monkeypatch.setattr(Running, "_answer", lambda *_: answer)
    result = CliRunner().invoke(cli.main, [*words, "--config", str(config_path)])
    assert isinstance(result.exception, SystemExit), result.exception
    if words == ("doctor",):
        assert result.exit_code in (1, 2)
    else:
        assert result.exit_code == 2
        assert "is no llamaslot, or one of another version" in result.stderr


def test_nothing_else_imports_rich() -> None:
    """It takes 0.1 s."""
    code = "import sys; from llamaslot import cli, http; import llamaslot.http.serve; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("key", ["sk-…", "a\nb"])
def test_a_key_that_no_header_can_carry(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    """It is not taken for an answer of another server."""
    monkeypatch.setenv("LLAMASLOT_KEY", key)
    with pytest.raises(LlamaslotError, match="LLAMASLOT_KEY"):
        Running.at("http://127.0.0.1:1").get("status")


def test_an_address_with_a_blank() -> None:
    """http.client refuses it when it is asked to connect."""
    with pytest.raises(NotRunning, match="no llamaslot answers on a b"):
        Running.at("http://a b").get("status")
