"""A llama-server's command line as a user has typed it after ``llamaslot run --``: finds the flags that it sets, and
the flags that llamaslot must add.

Flags are found in every spelling that llama-server accepts: short, with ``_`` for ``-``, as ``--flag=value``, or as an
environment variable ``LLAMA_ARG_…``, which a flag on the command line overrides (llama.cpp, ``common/arg.cpp``).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from llamaslot.errors import LlamaslotError
from llamaslot.llama.managed.process import Flag, recommended_flags

EMBEDDED = "llamaslot.llama.managed.embedded"
_CONTAINERS = ("docker", "podman", "nerdctl")
_OFF = ("off", "disabled", "false", "0")


class UnusableCommand(LlamaslotError):
    """llamaslot cannot run this command line; the message says what to change."""


class ServerFlag(NamedTuple):
    """A flag of llama-server. ``names``: its spellings; ``opposite``: those of the flag that turns it off;
    ``variable``: its environment variable, without ``LLAMA_ARG_``; ``has_value``: the next word is its value.
    """

    names: tuple[str, ...]
    variable: str
    opposite: tuple[str, ...] = ()
    has_value: bool = True


HOST = ServerFlag(("--host",), "HOST")
PORT = ServerFlag(("--port",), "PORT")
FILE = ServerFlag(("-m", "--model"), "MODEL")
REPOSITORY = ServerFlag(("-hf", "-hfr", "--hf-repo"), "HF_REPO")
REPOSITORY_FILE = ServerFlag(("-hff", "--hf-file"), "HF_FILE")
MODEL_URL = ServerFlag(("-mu", "--model-url"), "MODEL_URL")
DOCKER_REPOSITORY = ServerFlag(("-dr", "--docker-repo"), "DOCKER_REPO")
SLOTS = ServerFlag(("-np", "--parallel"), "N_PARALLEL")
SAVE_PATH = ServerFlag(("--slot-save-path",), "SLOT_SAVE_PATH")
UNIFIED = ServerFlag(("-kvu", "--kv-unified"), "KV_UNIFIED", ("-no-kvu", "--no-kv-unified"), has_value=False)
CACHE_RAM = ServerFlag(("-cram", "--cache-ram"), "CACHE_RAM")
IDLE_SLOTS = ServerFlag(
    ("--cache-idle-slots",), "CACHE_IDLE_SLOTS", ("--no-cache-idle-slots",), has_value=False
)
METRICS = ServerFlag(("--metrics",), "ENDPOINT_METRICS", has_value=False)
JINJA = ServerFlag(("--jinja",), "JINJA", ("--no-jinja",), has_value=False)
SLOTS_ROUTE = ServerFlag(("--slots",), "ENDPOINT_SLOTS", ("--no-slots",), has_value=False)
BATCH = ServerFlag(("-b", "--batch-size"), "BATCH")
UBATCH = ServerFlag(("-ub", "--ubatch-size"), "UBATCH")
SHIFT = ServerFlag(("--context-shift",), "CONTEXT_SHIFT", ("--no-context-shift",), has_value=False)
CHUNK_REUSE = ServerFlag(("--cache-reuse",), "CACHE_REUSE")
PREFIX = ServerFlag(("--api-prefix",), "API_PREFIX")
TLS_KEY = ServerFlag(("--ssl-key-file",), "SSL_KEY_FILE")
TLS_CERT = ServerFlag(("--ssl-cert-file",), "SSL_CERT_FILE")
KEYS = ServerFlag(("--api-key",), "API_KEY")  # its variable is LLAMA_API_KEY
KEY_FILE = ServerFlag(("--api-key-file",), "API_KEY_FILE")

_RECOMMENDED = (UNIFIED, CACHE_RAM, IDLE_SLOTS, METRICS, JINJA, BATCH, UBATCH)


def _said_on_line(option: ServerFlag, words: Sequence[str]) -> str | None:
    """The value of an option on the command line, at its last occurrence; "on" or "off" for an option without value.
    None if the option is not there.
    """
    said = None
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if name in option.opposite:
            said = "off"
        elif name in option.names:
            said = "on" if not option.has_value else value if equals else "".join(words[i + 1 : i + 2])
    return said


def _said_in(option: ServerFlag, environment: Mapping[str, str]) -> str | None:
    if option is KEYS:
        return environment.get("LLAMA_API_KEY")
    said = environment.get(f"LLAMA_ARG_{option.variable}")
    if option.has_value:
        return said
    if f"LLAMA_ARG_NO_{option.variable}" in environment:
        return "off"
    return None if said is None else "off" if said in _OFF else "on"


def is_contained(command: Sequence[str] | None) -> bool:
    """True if a word of the command is a container engine (docker, podman, nerdctl), also behind a wrapper."""
    return any(Path(word).name in _CONTAINERS for word in command or ())


@dataclass(frozen=True)
class GivenCommand:
    """A user's whole command line, ``line``, with the interface of ``process.Launch``. Making one raises
    UnusableCommand if llamaslot cannot run it.
    """

    line: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def __post_init__(self) -> None:
        if not self.line:
            raise UnusableCommand(
                "llama-server's command line is missing: llamaslot run -- llama-server -m model.gguf -np 4"
            )
        program = Path(self.line[0]).name
        if is_contained(self.line[:1]):
            raise UnusableCommand(
                f"{program}: neither the port nor the files of a container are this machine's: run llamaslot in the "
                "container, or in front of it with `llamaslot serve`"
            )
        if shutil.which(self.line[0]) is None:
            raise UnusableCommand(f"there is no program {self.line[0]} (in PATH, if it has no slash)")
        for option in (PREFIX, TLS_KEY, TLS_CERT):
            if self.said(option) is not None:
                raise UnusableCommand(
                    f"{option.names[0]} cannot be used here: llama-server is reached by llamaslot alone, over plain "
                    "HTTP; leave it out, and put what needs it in front of llamaslot"
                )
        if not self.model:
            raise UnusableCommand(
                "llama-server's command line names no model (-m FILE, -hf REPOSITORY): `run` is for one model; "
                "for a llama-server that loads several use `llamaslot serve`"
            )
        if (file := self.said(FILE)) is not None and not os.access(file, os.R_OK):
            fault = "cannot be read" if os.path.exists(file) else "does not exist"
            raise UnusableCommand(f"the model file {file} {fault}")

    def said(self, option: ServerFlag) -> str | None:
        """The value of a flag on the command line or in the environment; "on" or "off" for a flag without value; None
        if neither sets it.
        """
        on_line = _said_on_line(option, self._flags)
        return on_line if on_line is not None else _said_in(option, self.environment)

    @property
    def _n_program(self) -> int:
        """The number of words before llama-server's flags. In ``numactl -m 0 llama-server -c 512`` they are 4: ``-m 0``
        is a flag of numactl.
        """
        for i, word in enumerate(self.line):
            if Path(word).name.startswith("llama-server") or word == EMBEDDED:
                return i + 1
        return 1

    @property
    def _flags(self) -> tuple[str, ...]:
        return self.line[self._n_program :]

    @property
    def model(self) -> str:
        """The real path of the model's file, or the repository or URL that it is loaded from; "" without either."""
        if file := self.said(FILE):
            return os.path.realpath(file)
        sources = (self.said(option) for option in (REPOSITORY, MODEL_URL, DOCKER_REPOSITORY))
        source = next(filter(None, sources), "")
        return " ".join(filter(None, (source, self.said(REPOSITORY_FILE))))

    @property
    def api_keys(self) -> list[str]:
        """The API keys that llama-server accepts; empty if it needs none. Raises UnusableCommand if ``--api-key-file``
        cannot be read.
        """
        keys = (self.said(KEYS) or "").split(",")
        if (path := self.said(KEY_FILE)) is not None:
            try:
                keys += [line for line in Path(path).read_text().splitlines() if not line.startswith("#")]
            except (OSError, UnicodeDecodeError) as error:
                raise UnusableCommand(f"--api-key-file {path} cannot be read: {error}") from error
        return [key for key in keys if key]

    # -- as process.Launch -----------------------------------------------------------------------------------------

    @property
    def command(self) -> tuple[str, ...]:
        return self.line[: self._n_program]

    @property
    def args(self) -> tuple[str, ...]:
        """The user's flags without ``--host`` and ``--port``, which llamaslot sets."""
        kept, words = list[str](), iter(self._flags)
        for word in words:
            if word.partition("=")[0] not in (*HOST.names, *PORT.names):
                kept.append(word)
            elif "=" not in word:
                next(words, None)
        return tuple(kept)

    @property
    def port(self) -> None:
        return None

    def needed(self, port: int, slot_save_path: Path) -> list[Flag]:
        flags = [Flag("--host", (), "127.0.0.1"), Flag("--port", (), str(port))]
        if self.said(SAVE_PATH) is None:
            flags.append(Flag("--slot-save-path", (), str(slot_save_path)))
        if self.said(SLOTS) is None:
            # llama-server's own default is four slots with a unified KV cache, in which any task clears idle slots.
            # Four slots without it would have a quarter of the context each, too little for some clients.
            flags.append(Flag("-np", (), "1"))
        return flags

    def recommended(self) -> list[Flag]:
        said = {name for option in _RECOMMENDED if self.said(option) is not None for name in option.names}
        return [flag for flag in recommended_flags(tuple(said)) if not flag.names & said]

    def costs(self) -> Iterator[str]:
        """A line for each flag that makes llama-server work worse with llamaslot, set or missing: what it costs, and
        what to change.
        """
        if self.said(SLOTS) is None:
            yield (
                "-np is not set: one slot with the whole context is used, and one request runs at a time; "
                "-np 4 runs four, each with a quarter of -c"
            )
        if self.said(UNIFIED) == "on":
            yield (
                "--kv-unified: any task may clear idle slots, so llamaslot leaves the slots to llama-server and "
                "saves nothing; leave it out"
            )
        if self.said(SLOTS_ROUTE) == "off":
            yield "--no-slots: llamaslot cannot look at the slots and saves nothing; leave it out"
        if (size := self.said(CACHE_RAM)) not in (None, "0"):
            yield (
                f"--cache-ram {size}: what it keeps in memory is lost when the model is swapped out, and copying it "
                "stops all streams; --cache-ram 0 leaves that to the disk"
            )
        if self.said(SHIFT) == "on" or self.said(CHUNK_REUSE) not in (None, "0"):
            yield (
                "--context-shift, --cache-reuse: they rewrite contexts, which are then no beginning of any prompt "
                "and are computed again"
            )
