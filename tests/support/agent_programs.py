"""Command-line agents as users install them, by npm or pip. They run non-interactively, and are told only where
llamaslot is. Each has a home directory of its own, and connects to nothing but llamaslot.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.forked import die_with_parent

_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
#: Where ``make agents`` installs them.
DIRECTORY = Path(os.environ.get("LLAMASLOT_AGENTS") or _CACHE / "llamaslot/agents")
PATIENCE_S = 500.0
#: Tokens of an answer, as the models of the tests end none by themselves. Codex asks for no number: llama-server's -n.
N_ANSWER = 24


@dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended, and all that it wrote."""

    status: int
    text: str


@dataclass(frozen=True, slots=True)
class Agent:
    """One program. ``set_up`` writes its files into a home and returns its environment. ``first`` and ``again`` are its
    arguments for a new session and for continuing the last one; the question is appended to them.

    ``n_least``: tokens that every prompt of its conversations has, unlike its prompts for titles and the like.
    ``reuse``: the least share of a follow-up's prompt that must be reused.
    """

    name: str
    program: str
    set_up: Callable[[Path, str], dict[str, str]]
    first: Sequence[str]
    again: Sequence[str]
    n_least: int = 8000
    reuse: float = 0.98

    @property
    def path(self) -> Path:
        return DIRECTORY / self.program

    async def ask(self, home: Path, url: str, text: str, *, goes_on: bool = False) -> Ended:
        """One question, to the end of the program. Raises TimeoutError after ``PATIENCE_S``. Canceling kills it."""
        project = home / "project"
        project.mkdir(parents=True, exist_ok=True)
        environment = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "NO_COLOR": "1",
            **self.set_up(home, url),
        }
        process = await asyncio.create_subprocess_exec(
            *(str(self.path), *(self.again if goes_on else self.first), text),
            cwd=project,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            preexec_fn=die_with_parent,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                out, _ = await process.communicate()
        finally:
            if process.returncode is None:
                os.killpg(process.pid, 9)
                await process.wait()
        return Ended(process.returncode or 0, out.decode(errors="replace"))


def _claude(home: Path, url: str) -> dict[str, str]:
    return {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": "anything",
        "ANTHROPIC_MODEL": "local",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL": "local",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(N_ANSWER),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_TELEMETRY": "1",
    }


_CODEX = """
model = "local"
model_provider = "llamaslot"
[model_providers.llamaslot]
name = "llamaslot"
base_url = "{url}/v1"
wire_api = "responses"
"""


def _codex(home: Path, url: str) -> dict[str, str]:
    (home / "config.toml").write_text(_CODEX.format(url=url))
    return {"CODEX_HOME": str(home)}


def _opencode(home: Path, url: str) -> dict[str, str]:
    config: dict[str, Any] = {
        "$schema": "https://opencode.ai/config.json",
        "autoupdate": False,
        "share": "disabled",
        "model": "llamaslot/local",
        "provider": {
            "llamaslot": {
                "npm": "@ai-sdk/openai-compatible",
                "name": "llamaslot",
                "options": {"baseURL": f"{url}/v1", "apiKey": "anything"},
                "models": {"local": {"name": "local", "limit": {"context": 131072, "output": N_ANSWER}}},
            }
        },
    }
    path = home / ".config" / "opencode" / "opencode.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}


def _qwen(home: Path, url: str) -> dict[str, str]:
    settings: dict[str, Any] = {
        "security": {"auth": {"selectedType": "openai"}},
        "model": {"generationConfig": {"samplingParams": {"max_tokens": N_ANSWER}}},
        "general": {"disableAutoUpdate": True},
        "privacy": {"usageStatisticsEnabled": False},
        "telemetry": {"enabled": False},
    }
    path = home / ".qwen" / "settings.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))
    return {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": "anything", "OPENAI_MODEL": "local"}


def _aider(home: Path, url: str) -> dict[str, str]:
    known = {"openai/local": {"max_input_tokens": 65536, "max_output_tokens": 8192, "mode": "chat"}}
    (home / ".aider.model.metadata.json").write_text(json.dumps(known))
    return {"OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": "anything"}


def _cline(home: Path, url: str) -> dict[str, str]:
    settings = {
        "provider": "openai-compatible",
        "apiKey": "anything",
        "model": "local",
        "baseUrl": f"{url}/v1",
    }
    told = {"settings": settings, "updatedAt": "2026-01-01T00:00:00.000Z", "tokenSource": "manual"}
    path = home / ".cline" / "data" / "settings" / "providers.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": 1, "modes": {}, "providers": {"openai-compatible": told}}))
    return {"CLINE_SESSION_BACKEND_MODE": "local"}  # else it leaves a daemon behind


_CONTINUE = """
name: box
version: 1.0.0
schema: v1
models:
  - name: local
    provider: openai
    model: local
    apiBase: {url}/v1
    apiKey: anything
    roles: [chat]
"""


def _continue(home: Path, url: str) -> dict[str, str]:
    path = home / ".continue" / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_CONTINUE.format(url=url))
    return {"CONTINUE_TELEMETRY_ENABLED": "0"}


_AIDER = (
    *("--model", "openai/local", "--no-show-model-warnings", "--no-git", "--yes-always", "--map-tokens", "0"),
    *("--no-check-update", "--analytics-disable", "--no-show-release-notes", "--no-detect-urls"),
)
_CLINE = ("--provider", "openai-compatible", "--model", "local")
AGENTS = (
    Agent(
        "Claude Code",
        "node_modules/.bin/claude",
        _claude,
        ("--tools", "Read,Agent", "-p"),
        ("--tools", "Read,Agent", "--continue", "-p"),
    ),
    Agent(
        "Codex",
        "node_modules/.bin/codex",
        _codex,
        ("exec", "--skip-git-repo-check"),
        ("exec", "resume", "--last", "--skip-git-repo-check"),
    ),
    Agent("opencode", "node_modules/.bin/opencode", _opencode, ("run",), ("run", "--continue")),
    Agent("Qwen Code", "node_modules/.bin/qwen", _qwen, ("-p",), ("--continue", "-p")),
    # It resumes a session in a terminal only: this is a new one, which asks again when its answer is cut short.
    Agent("Cline", "node_modules/.bin/cline", _cline, _CLINE, _CLINE),
    Agent("Continue", "node_modules/.bin/cn", _continue, ("-p",), ("-p", "--resume"), n_least=4000),
    Agent(
        "Aider",
        "python/bin/aider",
        _aider,
        (*_AIDER, "--message"),
        (*_AIDER, "--restore-chat-history", "--message"),
        n_least=2000,
        reuse=0.55,  # the conversation stands before the files and before its closing rules, which are computed again
    ),
)
