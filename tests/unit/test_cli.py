"""The command line: what an operator sees, and the exit codes that a service manager sees."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import llamaslot
from llamaslot import cli
from llamaslot.cli import log_lines
from llamaslot.cli.output import EXIT_FAULT
from llamaslot.config.load import Config
from llamaslot.errors import LlamaslotError
from llamaslot.http.serve import _greet

REPOSITORY = Path(__file__).parents[2]
GOOD = "backends: [{url: 'http://127.0.0.1:8080'}]\n"

Run = Callable[..., Result]


@pytest.fixture
def config_path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(GOOD)
    return path


@pytest.fixture
def run_serve(monkeypatch: pytest.MonkeyPatch, config_path: Path) -> Run:
    """``llamaslot serve`` with an application that only raises what it is given, or returns."""

    def run(raises: BaseException | None = None) -> Result:
        async def serve(config: Config, path: Path) -> None:
            if raises is not None:
                raise raises

        app = types.ModuleType("llamaslot.http.serve")
        app.__dict__["serve"] = serve
        monkeypatch.setitem(sys.modules, "llamaslot.http.serve", app)
        return CliRunner().invoke(cli.main, ["serve", "--config", str(config_path)])

    return run


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """The command sets up the logging of the process; the process here is the test run's."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_version() -> None:
    """The name and the version, nothing else."""
    result = CliRunner().invoke(cli.main, ["--version"])
    assert (result.exit_code, result.output) == (0, f"llamaslot {llamaslot.__version__}\n")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["serve", "--help"]], ids=" ".join)
def test_help_imports_little(words: list[str]) -> None:
    """So that it is there at once: neither the configuration nor the web."""
    code = (
        "import sys; from llamaslot import cli\n"
        f"try: cli.main({words!r})\n"
        "finally: sys.exit(', '.join({'pydantic', 'aiohttp', 'asyncio', 'orjson', 'regex'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "\n"), ran.stderr
    assert ran.stdout.startswith(("Usage: ", "llamaslot ", "-c, "))


def test_check_of_a_good_file(config_path: Path) -> None:
    """Says so, and does not serve."""
    result = CliRunner().invoke(cli.main, ["serve", "--check", "--config", str(config_path)])
    assert (result.exit_code, result.stdout) == (0, f"{config_path}: no faults\n")


def test_faults_are_a_list_on_stderr(config_path: Path) -> None:
    """With and without --check: exit code 2, nothing on stdout."""
    config_path.write_text(GOOD + "listen: {port: 0}\nquota: 1")
    for flags in ([], ["--check"]):
        result = CliRunner().invoke(cli.main, ["serve", *flags, "--config", str(config_path)])
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.splitlines()[0] == f"{config_path}: 2 faults"
        assert [line.split(":")[0] for line in result.stderr.splitlines()[1:]] == ["  listen.port", "  quota"]


def test_as_a_program_a_missing_file_is_no_traceback(tmp_path: Path) -> None:
    """Through the real entry point, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "llamaslot", "serve", "--config", tmp_path / "none.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no such file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_clean_end(run_serve: Run) -> None:
    """SIGTERM makes the application return: exit code 0."""
    result = run_serve()
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EADDRINUSE, "address already in use"), "listen: 127.0.0.1:8081 is in use"),
        (
            OSError(errno.EADDRNOTAVAIL, "can not assign"),
            "listen: 127.0.0.1:8081 is no address of this machine",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied"),
            "listen: 127.0.0.1:8081 may not be used by this user",
        ),
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "listen.host: 127.0.0.1: Name or service",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/var/lib/x"), "/var/lib/x: Permission denied"),
        (LlamaslotError("another llamaslot uses /kv"), "another llamaslot uses /kv"),
        (ExceptionGroup("g", [ExceptionGroup("h", [LlamaslotError("inside")])]), "inside"),
    ],
)
def test_what_an_operator_can_mend_is_one_line(run_serve: Run, error: Exception, said: str) -> None:
    """Exit code 2 and no traceback, also out of a group of tasks."""
    result = run_serve(error)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(said)
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a fault of ours"),
        OSError(errno.EIO, "Input/output error"),
        ExceptionGroup("g", [LlamaslotError("x"), RuntimeError("a fault of ours")]),
    ],
)
def test_a_fault_of_ours_keeps_its_traceback(run_serve: Run, error: Exception) -> None:
    """Nobody can mend it from one line."""
    assert run_serve(error).exception is error


def test_the_log_has_times_on_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line per record, on stderr, of the level asked for."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    log_lines.set_up_logging("warning", "text")
    logging.getLogger("llamaslot.store").warning("quota reached")
    logging.getLogger("llamaslot.store").info("not asked for")
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} WARNING llamaslot.store: quota reached\n", err)


def test_the_journal_gets_levels_and_no_times(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd's journal has its own clock, and reads the level from the start of a line."""
    stderr = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
    log_lines.set_up_logging("info", "auto")
    logging.getLogger("llamaslot").error("first\nsecond")
    assert capfd.readouterr().err == "<3>llamaslot: first\n<3>second\n"


def test_a_terminal_inside_a_service_has_times(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """JOURNAL_STREAM is inherited; what counts is whether stderr is that stream."""
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    log_lines.set_up_logging("info", "text")
    logging.getLogger("llamaslot").info("up")
    assert capfd.readouterr().err.endswith("INFO    llamaslot: up\n")


def test_a_file_gets_json_lines(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is neither a terminal nor the journal: one object per line, also of a traceback."""
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    log_lines.set_up_logging("info", "auto")
    logging.getLogger("llamaslot").warning("%s is full", "gpu0")
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("llamaslot").exception("died")
    full, died = map(json.loads, capfd.readouterr().err.splitlines())
    assert (full["level"], full["logger"], full["message"]) == ("warning", "llamaslot", "gpu0 is full")
    assert "ValueError: bad" in died["exception"]


# --- the systemd unit


UNITS = ["llamaslot.service", "llama-server.service"]


def unit(name: str = UNITS[0]) -> dict[str, str]:
    text = (REPOSITORY / "docs" / name).read_text().replace("\\\n", "")
    return dict(re.findall(r"^([A-Za-z]+)=(.*)$", text, re.M))


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_accepts_the_unit(name: str) -> None:
    """No complaint about our file; other units of this machine are not our business."""
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", REPOSITORY / "docs" / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert name not in done.stderr
    assert done.returncode == 0, done.stderr


def test_both_units_share_what_they_need_in_common() -> None:
    """A group, a umask, and the directory that one writes to and the other keeps; llama-server is started as
    docs/install.md says, on the port where llamaslot looks for it."""
    ours, its = map(unit, UNITS)
    assert (ours["Group"], ours["UMask"]) == (its["Group"], its["UMask"]) == ("llama", "0007")
    assert ours["User"] != its["User"]
    assert its["ReadWritePaths"] == "/var/lib/llamaslot/kv"
    text = (REPOSITORY / "docs/install.md").read_text()
    command = text.partition("```sh\nllama-server ")[2].partition("```")[0].replace("\\\n", "").split()
    assert its["ExecStart"].split()[2:] == [
        word.replace("model.gguf", "/models/model.gguf") for word in command
    ]


def test_the_unit_gives_time_to_save_the_slots(config_path: Path) -> None:
    """systemd waits longer than the drain and the saves may take, and signals llamaslot alone."""
    shutdown = Config.load(config_path).shutdown
    assert float(unit()["TimeoutStopSec"]) > shutdown.save_s + shutdown.drain_s
    assert unit()["KillMode"] == "mixed"


def test_the_unit_shares_files_with_its_group() -> None:
    """What llamaslot writes can be used by llama-server's group and by nobody else."""
    assert (unit()["UMask"], unit()["StateDirectoryMode"]) == ("0007", "2770")


def test_the_unit_does_not_retry_what_it_can_not_mend() -> None:
    """The exit code of faults stops the restarts."""
    assert unit()["RestartPreventExitStatus"] == str(EXIT_FAULT)


def test_the_unit_starts_what_there_is(config_path: Path) -> None:
    """Its command line is one that the program understands."""
    words = unit()["ExecStart"].split()
    assert words[:2] == ["/usr/bin/env", "llamaslot"]
    assert words[-1] == "/etc/llamaslot/config.yaml"
    result = CliRunner().invoke(cli.main, [*words[2:-1], str(config_path), "--check"])
    assert result.exit_code == 0


def test_a_terminal_that_lacks_characters_stops_nothing() -> None:
    """Its locale is not UTF-8: ``serve`` ended at its first lines, ``status`` with a traceback."""
    script = (
        "import click; from llamaslot import cli; "
        "cli.main.command('show')(lambda: click.echo('40 s \u00b1 8 \u2026')); cli.main(['show'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"40 s \xb1 8 ?\n"


# --- words that people try


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("version", "Did you mean 'llamaslot --version'?"),
        ("keys list", "Did you mean 'llamaslot keys ls'?"),
        ("keys revoke ada", "Did you mean 'llamaslot keys rm NAME'?"),
        ("snapshots delete ls-1", "Did you mean 'llamaslot snapshots rm ID'?"),
        ("serve config.yaml", "(config.yaml). Did you mean --config FILE?\n"),
        ("keys ls config.yaml", "(config.yaml). Did you mean --config FILE?\n"),
        ("status http://127.0.0.1:8081", "Did you mean --config FILE or --url URL?"),
        ("bench http://127.0.0.1:9/v1 --vs alone.json", "alone.json: No such file or directory"),
    ],
)
def test_a_wrong_command_line_ends_with_what_was_meant(line: str, said: str) -> None:
    """Other programs' words, and a file or an address without its option."""
    result = CliRunner().invoke(cli.main, line.split())
    assert (result.exit_code, said in result.output) == (2, True), result.output


@pytest.mark.parametrize("words", [[], ["snapshots"], ["keys"]])
def test_no_command_s_summary_is_cut(words: list[str]) -> None:
    """Each fits beside its name in a terminal of 80 columns."""
    result = CliRunner().invoke(cli.main, [*words, "--help"], terminal_width=80)
    assert "Commands:" in result.output
    assert "..." not in result.output.partition("Commands:")[2]


# --- the first line of the log


@pytest.mark.parametrize(
    ("host", "said"),
    [
        (
            "0.0.0.0",
            "listens on 0.0.0.0:{0}, every address of this machine; from this machine: http://127.0.0.1:{0}/v1",
        ),
        ("127.0.0.1", "listens on 127.0.0.1:{0}; from this machine: http://127.0.0.1:{0}/v1"),
    ],
)
def test_the_log_tells_where_it_listens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str, said: str
) -> None:
    """By the sockets that are open, and not by what one would type here: who may reach it depends on that."""
    path = tmp_path / "config.yaml"
    path.write_text(GOOD + f"listen: {{host: {host}}}\nauth: {{allow_anonymous: on}}\n")
    caplog.set_level(logging.INFO)
    port = 8081
    _greet(Config.load(path), [(host, port)])
    assert said.format(port) in caplog.text
