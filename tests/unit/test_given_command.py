"""A llama-server's command line as typed: which flags it says in which spelling, and what is added to it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from llamaslot.llama.managed import given_command as flags
from llamaslot.llama.managed.given_command import EMBEDDED, GivenCommand, ServerFlag, UnusableCommand
from llamaslot.llama.managed.process import own_words

STORE = Path("/store")


def given(
    line: str, environment: Mapping[str, str] | None = None, *, program: Sequence[str] = ("sh",)
) -> GivenCommand:
    """A command whose model comes from elsewhere; ``sh`` stands for a program that is there."""
    return GivenCommand((*program, "-hf", "a/b", *line.split()), environment or {})


def arguments(command: GivenCommand) -> list[str]:
    return [*own_words(command, command.needed(1234, STORE), None), *command.args]


def test_what_is_missing_is_added() -> None:
    """Host, port and store always, the recommended ones, and one slot where no number is said."""
    assert arguments(given("")) == [
        *("--host", "127.0.0.1", "--port", "1234", "--slot-save-path", "/store", "-np", "1"),
        *("--no-kv-unified", "--cache-ram", "0", "--no-cache-idle-slots", "--metrics", "--jinja"),
        *("-b", "512", "-ub", "512", "-hf", "a/b"),
    ]


@pytest.mark.parametrize(
    ("line", "environment", "ours"),
    [
        ("-np 4", {}, "-np"),
        ("--parallel=4", {}, "-np"),
        ("", {"LLAMA_ARG_N_PARALLEL": "4"}, "-np"),
        ("-kvu", {}, "--no-kv-unified"),
        ("--kv_unified", {}, "--no-kv-unified"),
        ("", {"LLAMA_ARG_KV_UNIFIED": "1"}, "--no-kv-unified"),
        ("", {"LLAMA_ARG_NO_KV_UNIFIED": "1"}, "--no-kv-unified"),
        ("-cram 100", {}, "--cache-ram"),
        ("", {"LLAMA_ARG_CACHE_RAM": "100"}, "--cache-ram"),
        ("--no-jinja", {}, "--jinja"),
        ("-ub 64", {}, "-b"),
        ("", {"LLAMA_ARG_BATCH": "64"}, "-ub"),
        ("--slot-save-path /kv", {}, "--slot-save-path"),
        ("--slot_save_path=/kv", {}, "--slot-save-path"),
    ],
)
def test_what_is_said_in_any_spelling_is_left(line: str, environment: dict[str, str], ours: str) -> None:
    """Short, long, with an equals sign, with underscores, in the environment."""
    command = given(line, environment)
    words = arguments(command)
    added = words[: len(words) - len(command.args)]
    assert ours not in added
    assert words[len(added) :] == ["-hf", "a/b", *line.split()]


@pytest.mark.parametrize("line", ["--host 0.0.0.0 --port 8080", "--port=8080 --host=0.0.0.0"])
def test_host_and_port_are_llamaslots(line: str) -> None:
    """Its own command line names none but those of loopback."""
    command = given(line + " -np 2")
    assert (command.said(flags.HOST), command.said(flags.PORT)) == ("0.0.0.0", "8080")
    assert command.args == ("-hf", "a/b", "-np", "2")


@pytest.mark.parametrize(
    ("line", "environment", "option", "value"),
    [
        ("-np 2 -np 3", {}, flags.SLOTS, "3"),
        ("--kv-unified --no-kv-unified", {}, flags.UNIFIED, "off"),
        ("--kv-unified", {"LLAMA_ARG_KV_UNIFIED": "off"}, flags.UNIFIED, "on"),
        ("", {"LLAMA_ARG_KV_UNIFIED": "false"}, flags.UNIFIED, "off"),
        ("-np", {}, flags.SLOTS, ""),
        ("", {"LLAMA_API_KEY": "k"}, flags.KEYS, "k"),
    ],
)
def test_the_last_word_counts_then_the_environment(
    line: str, environment: dict[str, str], option: ServerFlag, value: str
) -> None:
    """As in llama-server."""
    assert given(line, environment).said(option) == value


def test_flags_of_what_starts_it_are_not_its_own() -> None:
    """`nice -n 5 llama-server`, and Python's `-m` before the embedded engine."""
    command = GivenCommand((sys.executable, "-m", EMBEDDED, "-m", __file__, "-np", "2"), {})
    assert command.command == (sys.executable, "-m", EMBEDDED)
    assert command.model == __file__
    assert GivenCommand(("env", "-u", "X", "llama-server", "-hf", "a/b"), {}).command == (
        "env",
        "-u",
        "X",
        "llama-server",
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("-kvu -np 2", ["--kv-unified: any task may clear idle slots"]),
        ("-np 2 --cache-ram 512", ["--cache-ram 512: what it keeps in memory is lost"]),
        ("-np 2 --cache-ram 0", []),
        ("-np 2 --no-slots", ["--no-slots: llamaslot cannot look"]),
        ("-np 2 --cache-reuse 256", ["--context-shift, --cache-reuse: they rewrite"]),
        ("", ["-np is not set: one slot"]),
    ],
)
def test_what_costs_is_said(line: str, said: list[str]) -> None:
    """A line for each flag that works against llamaslot; it is passed all the same."""
    costs = list(given(line).costs())
    assert len(costs) == len(said)
    assert all(cost.startswith(begin) for cost, begin in zip(costs, said, strict=True))


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ([], "command line is missing"),
        (["no-such-program"], "there is no program no-such-program"),
        (["podman", "run", "x"], "podman: neither the port"),
        (["sh", "-np", "2"], "names no model"),
        (["sh", "-m", "/none"], "the model file /none does not exist"),
        (["sh", "-hf", "a/b", "--api-prefix", "/x"], "--api-prefix cannot be used"),
        (["sh", "-hf", "a/b", "--ssl-key-file", "k"], "--ssl-key-file cannot be used"),
    ],
)
def test_what_cannot_be_run(words: list[str], fault: str) -> None:
    """One message, which says what is wrong."""
    with pytest.raises(UnusableCommand, match=fault):
        GivenCommand(tuple(words), {})


def test_keys_come_from_the_line_the_environment_and_a_file(tmp_path: Path) -> None:
    """Several, separated by commas; comments of the file left out."""
    (tmp_path / "keys").write_text("# of the team\nc\n\nd\n")
    command = given(f"--api-key a,b --api-key-file {tmp_path}/keys", {"LLAMA_API_KEY": "x"})
    assert command.api_keys == ["a", "b", "c", "d"]
    assert given("", {"LLAMA_API_KEY": "x"}).api_keys == ["x"]
    with pytest.raises(UnusableCommand, match="cannot be read"):
        _ = given("--api-key-file /none").api_keys
