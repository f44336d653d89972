"""What a release has beside the program: the demo, the man page, the containers' files."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.shell_completion import BashComplete
from click.testing import CliRunner

from llamaslot import cli
from llamaslot.config.load import Config
from llamaslot.llama.managed.process import recommended_flags
from tests.support.source import REPOSITORY

demo: Any = import_module("llamaslot.cli.demo")  # the package has its command by this name


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("LLAMASLOT_SMOLLM2", str(tmp_path / "model.gguf"))
    return tmp_path


def test_a_demo_without_a_network_says_so(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    """In one line, with what helps; nothing is left behind."""
    monkeypatch.setattr(demo, "_INDEX", "http://127.0.0.1:9/simple/")
    result = CliRunner().invoke(cli.main, ["demo"])
    assert result.exit_code == 2
    assert "cannot be fetched from http://127.0.0.1:9/simple/" in result.stderr
    assert "llamaslot demo --model FILE" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(empty_cache.iterdir()) == []


def test_a_demo_without_its_llama_cpp_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is fetched."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(cli.main, ["demo"])
    assert (result.exit_code, result.stderr) == (
        2,
        "the embedded llama.cpp is missing: pipx inject llamaslot xllamacpp (in a venv: pip install xllamacpp)\n",
    )


def test_a_demo_is_configured(tmp_path: Path) -> None:
    """Its slots get the context each that was asked for."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    config = demo._config(8081, tmp_path / "model.gguf", 2, 4096)
    assert config.backend.managed is not None
    assert (config.backend.managed.slots, config.backend.managed.context) == (2, 8192)


def test_the_man_page_has_every_command(tmp_path: Path) -> None:
    """Of groups too; no line of a text is taken for a request of roff."""
    subprocess.run([sys.executable, REPOSITORY / ".ci/man.py", tmp_path / "page.1"], check=True)
    lines = (tmp_path / "page.1").read_text().splitlines()
    heads = [line for line in lines if line.startswith(".SS ")]
    for command in ("serve", "run", "bench", "demo", "doctor", "snapshots ls", "keys add"):
        assert any(line.startswith(f".SS llamaslot {command} ") for line in heads), command
    requests = {line.split()[0] for line in lines if line.startswith((".", "'"))}
    assert requests <= {".TH", ".SH", ".SS", ".TP", ".B", ".PP"}


def test_commands_and_options_are_completed() -> None:
    """In bash, as the quickstart switches it on."""
    shell = BashComplete(cli.main, {}, "llamaslot", "_LLAMASLOT_COMPLETE")
    assert [its.value for its in shell.get_completions([], "do")] == ["doctor"]
    assert "--vs" in [its.value for its in shell.get_completions(["bench"], "--v")]


def test_the_containers_fit_each_other() -> None:
    """One directory for both, a configuration without faults, and the flags that are recommended."""
    compose = yaml.safe_load((REPOSITORY / "docker/compose.yaml").read_text())
    llama, llamaslot = compose["services"]["llama"], compose["services"]["llamaslot"]
    assert set(llama["volumes"]) & set(llamaslot["volumes"]) == {"./kv:/kv"}
    assert llama["user"].endswith(":2000")
    assert "USER 2001:2000" in (REPOSITORY / "docker/Dockerfile").read_text()
    config = Config.load(REPOSITORY / "docker/config.yaml")
    assert str(config.backend.slot_save_path) == "/kv"
    line = " ".join(llama["command"])
    missing = [" ".join(flag.words()) for flag in recommended_flags([]) if " ".join(flag.words()) not in line]
    assert missing == []
